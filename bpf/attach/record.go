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

// DefaultStateDir is where records are kept by default. Like bpffs it does not survive a reboot.
const DefaultStateDir = "/run/probelet"

// Record describes an attachment to the daemon and to DEL. Each is a file in <state dir>/attachments, written before anything is
// attached and removed after everything is detached.
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
	// Hook tells where answers are made; empty in records of builds before there was a choice.
	Hook Hook `json:"hook,omitempty"`

	PodNamespace string   `json:"podNamespace,omitempty"`
	PodName      string   `json:"podName,omitempty"`
	PodUID       string   `json:"podUID,omitempty"`
	PodIPs       []string `json:"podIPs,omitempty"`

	CreatedAt time.Time `json:"createdAt"`
	// Adopted means that the daemon attached it, to a pod that was there before the plugin.
	Adopted bool `json:"adopted,omitempty"`
	// Error tells why nothing is attached; empty if it is.
	Error string `json:"error,omitempty"`
	// Passing means that the error may pass, so that the daemon tries again.
	Passing bool `json:"passing,omitempty"`
}

// Unfinished is the Error of a record while ADD attaches. It stays if ADD is killed.
const Unfinished = "ADD has not finished"

// Target returns what the record says is attached to.
func (r Record) Target() Target {
	return Target{IfIndex: r.IfIndex, PodNetns: r.PodNetns, NetnsCookie: r.NetnsCookie, Hook: r.Hook}
}

// ID returns the ID of the attachment.
func (r Record) ID() ID { return ID{r.ContainerID, r.IfName} }

// LockRecords keeps DEL and the daemon from changing the same attachment at once. DELs share the lock (unix.LOCK_SH), because they
// are independent of each other; the daemon takes it exclusively (unix.LOCK_EX). The error is lock.ErrHeld when ctx ends.
func LockRecords(ctx context.Context, stateDir string, how int) (unlock func(), err error) {
	locked, err := lock.Dir(ctx, RecordsDir(stateDir), how)
	if err != nil {
		return nil, err
	}
	return locked.Release, nil
}

// RecordsDir is the directory with the records in a state directory.
func RecordsDir(stateDir string) string { return filepath.Join(stateDir, "attachments") }

func recordPath(stateDir string, id ID) string {
	return filepath.Join(RecordsDir(stateDir), id.name()+".json")
}

// WriteRecord creates or replaces a record, atomically for readers.
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

// ReadRecords reads all records. It returns those that it could read, even if there is an error, which names the others.
func ReadRecords(stateDir string) ([]Record, error) { return new(Reader).Read(stateDir) }

// Reader reads all records again and again, and of their files those that have changed. The zero value is ready for use; it is not
// safe for concurrent use.
type Reader struct{ known map[string]known }

// known is a record that was read. Each write makes another file of it.
type known struct {
	Record
	stamp datapath.Stamp // zero: it is to be read again
}

// Read is ReadRecords. The records share memory with those of earlier calls.
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

// RemoveRecord removes a record. A missing one is no error.
func RemoveRecord(stateDir string, id ID) error {
	err := os.Remove(recordPath(stateDir, id))
	if datapath.Absent(err) {
		return nil
	}
	return err
}
