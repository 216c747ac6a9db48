package repair

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/probelet/probelet/bpf/attach"
)

// unadopted is a running pod that is not attached, and cannot be adopted.
type unadopted struct {
	since  time.Time
	logged string // the reason that was logged last
}

// adopt attaches pods that were started before probelet.
func (r *Repairer) adopt(ctx context.Context, known Known, result *Result) error {
	if len(known.Unattached) == 0 {
		clear(r.unadopted)
		return nil
	}
	records, unknown, err := r.Adopt.Find(known.Unattached)
	r.noteUnadopted(unknown, time.Now())
	errs := []error{err}
	pinned, err := attach.List(r.BPFDir)
	errs = append(errs, err)
	for _, record := range records {
		// A DEL removes the pins too; if only the record is gone, it was lost.
		deleted := known.Deleted(record.ContainerID) && !slices.Contains(pinned, record.ID())
		if deleted || !r.isDue(ctx, record.ID()) {
			continue
		}
		changed, err := r.adoptOne(record, result)
		result.RecordsChanged = result.RecordsChanged || changed
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// noteUnadopted logs pods that could not be adopted for longer than an ADD or a DEL takes: a polled source lists pods that are
// already gone, and some whose record is yet to be written.
func (r *Repairer) noteUnadopted(unknown map[string]error, now time.Time) {
	maps.DeleteFunc(r.unadopted, func(pod string, _ unadopted) bool { return unknown[pod] == nil })
	for pod, reason := range unknown {
		u, ok := r.unadopted[pod]
		if !ok {
			u.since = now
		}
		if now.Sub(u.since) >= DeletionGrace && u.logged != reason.Error() {
			u.logged = reason.Error()
			r.Log.Warn("failed to adopt a pod that was started before probelet", "pod", pod, "reason", reason)
		}
		r.unadopted[pod] = u
	}
}

// adoptionUnfinished is the error on record while a pod is being adopted.
const adoptionUnfinished = "the daemon has not finished"

// adoptOne attaches a pod that has no record, and returns whether it has one now.
func (r *Repairer) adoptOne(record attach.Record, result *Result) (changed bool, err error) {
	unlock, ok := r.lock()
	if !ok {
		return false, nil
	}
	defer unlock()
	if _, err := attach.ReadRecord(r.StateDir, record.ID()); !errors.Is(err, os.ErrNotExist) {
		return false, err // attached meanwhile
	}
	record.Hook = r.Hook
	// Like ADD: should this process die half-way, the record tells what was begun, and the next daemon finishes it.
	record.Error, record.Passing = adoptionUnfinished, true
	if err := attach.WriteRecord(r.StateDir, record); err != nil {
		return false, err
	}
	if err := r.attach(record, errors.New("the pod was started before probelet"), result); err != nil {
		r.failed(record, fmt.Errorf("adopting: %w", err))
	}
	return true, nil
}
