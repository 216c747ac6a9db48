package attach

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/google/renameio/v2"

	"github.com/probelet/probelet/bpf/datapath"
)

// DefaultStateDir is where records are kept unless a configuration says otherwise. Like bpffs it does not outlive the
// machine's run.
const DefaultStateDir = "/run/probelet"

// Record is what whoever attached leaves for the daemon and for DEL: one file each in <state dir>/attachments, written
// before anything is attached and removed after everything is detached.
type Record struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"` // in the pod
	// Network is the name of the network configuration that made the attachment.
	Network string `json:"network"`

	// IfIndex and HostIfName are of the host-side veth; 0 and empty if none was found.
	IfIndex    int    `json:"ifIndex"`
	HostIfName string `json:"hostIfName"`
	// PodNetns is the inode number of the pod's network namespace, as in Target.
	PodNetns uint32 `json:"podNetns"`

	PodNamespace string   `json:"podNamespace,omitempty"`
	PodName      string   `json:"podName,omitempty"`
	PodUID       string   `json:"podUID,omitempty"`
	PodIPs       []string `json:"podIPs,omitempty"`

	CreatedAt time.Time `json:"createdAt"`
	// Adopted: the daemon attached it, of a pod that had its network before.
	Adopted bool `json:"adopted,omitempty"`
	// Error is why nothing is attached; empty if it is.
	Error string `json:"error,omitempty"`
	// Passing: the error may pass, so the daemon tries again.
	Passing bool `json:"passing,omitempty"`
}

// Target is what is attached to.
func (r Record) Target() Target { return Target{IfIndex: r.IfIndex, PodNetns: r.PodNetns} }

// ID is the name of the attachment.
func (r Record) ID() ID { return ID{r.ContainerID, r.IfName} }

// LockRecords keeps DEL and the daemon from seeing to the same attachment at once. DEL shares it (unix.LOCK_SH), because
// attachments are deleted independently of each other; the daemon has it for itself (unix.LOCK_EX). The error is
// datapath.ErrLocked when ctx ends.
func LockRecords(ctx context.Context, stateDir string, how int) (unlock func(), err error) {
	return datapath.Lock(ctx, RecordsDir(stateDir), how)
}

// RecordsDir is where the records of a state directory are.
func RecordsDir(stateDir string) string { return filepath.Join(stateDir, "attachments") }

func recordPath(stateDir string, id ID) string {
	return filepath.Join(RecordsDir(stateDir), id.name()+".json")
}

// WriteRecord writes or replaces a record; a reader sees the old or the new one.
func WriteRecord(stateDir string, r Record) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(RecordsDir(stateDir), 0o700); err != nil {
		return err
	}
	return renameio.WriteFile(recordPath(stateDir, r.ID()), append(text, '\n'), 0o600)
}

// ReadRecord reads one record. The error is os.ErrNotExist if there is none.
func ReadRecord(stateDir string, id ID) (Record, error) { return readRecord(recordPath(stateDir, id)) }

func readRecord(path string) (Record, error) {
	var r Record
	text, err := os.ReadFile(path)
	if err != nil {
		return r, err
	}
	if err := json.Unmarshal(text, &r); err != nil {
		return r, fmt.Errorf("%s: %w", path, err)
	}
	return r, nil
}

// ReadRecords reads all records. Those that can't be read are left out and named in the error, which comes beside the rest.
func ReadRecords(stateDir string) ([]Record, error) {
	entries, err := os.ReadDir(RecordsDir(stateDir))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var records []Record
	var errs []error
	for _, e := range entries {
		name, isRecord := strings.CutSuffix(e.Name(), ".json")
		if _, ok := parseName(name); !ok || !isRecord {
			continue
		}
		r, err := readRecord(filepath.Join(RecordsDir(stateDir), e.Name()))
		switch {
		case err == nil:
			records = append(records, r)
		case !errors.Is(err, os.ErrNotExist): // removed meanwhile
			errs = append(errs, err)
		}
	}
	return records, errors.Join(errs...)
}

// RemoveRecord removes a record. It is all right if there is none.
func RemoveRecord(stateDir string, id ID) error {
	err := os.Remove(recordPath(stateDir, id))
	if datapath.Absent(err) {
		return nil
	}
	return err
}
