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
	"github.com/probelet/probelet/bpf/lock"
)

// DefaultStateDir is the default directory for records. Like bpffs, it does not survive a reboot.
const DefaultStateDir = "/run/probelet"

// Record describes an attachment to the daemon and to DEL. Each is a file in <state dir>/attachments, written before anything is
// attached and removed once everything is detached.
type Record struct {
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"` // in the pod
	// Network is the name of the network configuration that made the attachment.
	Network string `json:"network"`

	// IfIndex and HostIfName identify the host-side veth; 0 and empty if none was found.
	IfIndex    int    `json:"ifIndex"`
	HostIfName string `json:"hostIfName"`
	// PodNetns is the inode number of the pod's network namespace, as in Target.
	PodNetns uint32 `json:"podNetns"`
	// NetnsCookie is the cookie of the pod's network namespace, as in Target.
	NetnsCookie uint64 `json:"netnsCookie,omitempty"`
	// Hook tells where answers are made; empty in records of builds that had no choice.
	Hook Hook `json:"hook,omitempty"`

	PodNamespace string   `json:"podNamespace,omitempty"`
	PodName      string   `json:"podName,omitempty"`
	PodUID       string   `json:"podUID,omitempty"`
	PodIPs       []string `json:"podIPs,omitempty"`

	CreatedAt time.Time `json:"createdAt"`
	// Adopted is set if the daemon made the attachment, for a pod that predates the plugin.
	Adopted bool `json:"adopted,omitempty"`
	// Error is the reason why nothing is attached; empty if the pod is attached.
	Error string `json:"error,omitempty"`
	// Passing is set if the error may be transient, so that the daemon retries.
	Passing bool `json:"passing,omitempty"`
}

// Unfinished is the Error of a record while ADD is attaching. It remains if ADD is killed.
const Unfinished = "ADD has not finished"

// Target returns the target of the attachment.
func (r Record) Target() Target {
	return Target{IfIndex: r.IfIndex, PodNetns: r.PodNetns, NetnsCookie: r.NetnsCookie, Hook: r.Hook}
}

// ID returns the ID of the attachment.
func (r Record) ID() ID { return ID{r.ContainerID, r.IfName} }

// LockRecords keeps DEL and the daemon from changing the same attachment at the same time. DELs share the lock (unix.LOCK_SH), because
// they are independent of each other; the daemon takes it exclusively (unix.LOCK_EX). When ctx ends, the error is lock.ErrHeld.
func LockRecords(ctx context.Context, stateDir string, how int) (unlock func(), err error) {
	locked, err := lock.Dir(ctx, RecordsDir(stateDir), how)
	if err != nil {
		return nil, err
	}
	return locked.Release, nil
}

// RecordsDir returns the directory of the records in a state directory.
func RecordsDir(stateDir string) string { return filepath.Join(stateDir, "attachments") }

func recordPath(stateDir string, id ID) string {
	return filepath.Join(RecordsDir(stateDir), id.name()+".json")
}

// WriteRecord creates or atomically replaces a record.
func WriteRecord(stateDir string, r Record) error {
	text, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(RecordsDir(stateDir), 0o700); err != nil {
		return err
	}
	return renameio.WriteFile(recordPath(stateDir, r.ID()), append(text, '\n'), 0o600, renameio.WithTempDir(RecordsDir(stateDir)))
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

// ReadRecords reads all records. If some are unreadable, it returns the others along with an error that names them.
func ReadRecords(stateDir string) ([]Record, error) { return new(Reader).Read(stateDir) }

// Reader reads all records repeatedly, and rereads only files that have changed. The zero value is ready for use. It is not safe for
// concurrent use.
type Reader struct{ known map[string]known }

// known is a cached record. Each write replaces the file.
type known struct {
	Record
	stamp datapath.Stamp // zero: must be read again
}

// Read is like ReadRecords. The records share memory with those of earlier calls.
func (r *Reader) Read(stateDir string) ([]Record, error) {
	entries, err := os.ReadDir(RecordsDir(stateDir))
	if errors.Is(err, os.ErrNotExist) {
		r.known = nil
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var records []Record
	var errs []error
	read := make(map[string]known, len(entries))
	for _, e := range entries {
		name, isRecord := strings.CutSuffix(e.Name(), ".json")
		if _, ok := parseName(name); !ok || !isRecord {
			continue
		}
		path := filepath.Join(RecordsDir(stateDir), e.Name())
		one, err := r.read(path)
		switch {
		case err == nil:
			records, read[path] = append(records, one.Record), one
		case !errors.Is(err, os.ErrNotExist): // removed meanwhile
			errs = append(errs, err)
		}
	}
	r.known = read
	return records, errors.Join(errs...)
}

func (r *Reader) read(path string) (known, error) {
	now, err := datapath.StampOf(path)
	if err != nil {
		return known{}, err
	}
	if before, ok := r.known[path]; ok && before.stamp == now {
		return before, nil
	}
	record, err := readRecord(path)
	return known{record, now.Settled()}, err
}

// RemoveRecord removes a record. It is no error if there is none.
func RemoveRecord(stateDir string, id ID) error {
	err := os.Remove(recordPath(stateDir, id))
	if datapath.Absent(err) {
		return nil
	}
	return err
}
