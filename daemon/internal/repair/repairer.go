package repair

import (
	"context"
	"errors"
	"os"
	"reflect"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/adopt"
)

// Repairer repairs what looks find. It is not safe for concurrent use.
type Repairer struct {
	Config
	// suspects were broken at the last look. It takes two looks to repair an attachment, because an ADD or a DEL may be in progress.
	suspects  map[attach.ID]bool
	failures  map[attach.ID]*failure
	unadopted map[string]unadopted // by namespace/name
	again     bool                 // something is left to be done soon
	repairs   int                  // calls of Repair
}

// failure tracks an attachment that could not be repaired.
type failure struct {
	reason string
	next   time.Time // of the next attempt
	wait   time.Duration
}

// NewRepairer returns a repairer that has seen no report.
func NewRepairer(c Config) *Repairer {
	return &Repairer{Config: c, suspects: map[attach.ID]bool{}, failures: map[attach.ID]*failure{}, unadopted: map[string]unadopted{}}
}

// Assessment is what follows from a report.
type Assessment struct {
	Whole []attach.ID // nothing is wrong with them
	// Broken were whole, or unknown, at the look before. Nothing may be answered for them until they are whole again.
	Broken []Finding
	// Promotable are whole, and attached by clsact.
	Promotable []attach.ID

	due   []Finding // broken for two looks in a row
	stray bool
}

// Assess compares a report, which must have no Err, with the one before and with the current records. Attachments that have another
// record since the look are left to the next one.
func (r *Repairer) Assess(report Report, records []attach.Record) Assessment {
	r.again = false
	current := make(map[attach.ID]attach.Record, len(records))
	for _, record := range records {
		current[record.ID()] = record
	}
	result := Assessment{stray: report.Stray}
	suspects := map[attach.ID]bool{}
	for _, f := range report.Findings {
		id := f.Record.ID()
		if record, ok := current[id]; !ok || !reflect.DeepEqual(record, f.Record) {
			continue
		}
		switch {
		case f.Problem == nil:
			delete(r.failures, id)
			result.Whole = append(result.Whole, id)
			if f.Promotable {
				result.Promotable = append(result.Promotable, id)
			}
			continue
		case r.suspects[id]:
			result.due = append(result.due, f)
		case r.isBeingDeleted(id):
			continue
		default:
			result.Broken = append(result.Broken, f)
			r.again = true
		}
		suspects[id] = true
	}
	r.suspects = suspects
	return result
}

// Known is what the caller knows of the node.
type Known struct {
	Records    []attach.Record // as last read
	Unattached []adopt.Pod     // pods to adopt: they run, could be answered, and have no record
	// Deleted reports whether a record of the container was removed within the DeletionGrace.
	Deleted func(containerID string) bool
}

// Repair is a repair that was made.
type Repair struct {
	Action Action
	ID     attach.ID
}

// Result is what Repair did.
type Result struct {
	Repairs []Repair
	// RecordsChanged is set if records were written or removed, or found to have changed since they were read.
	RecordsChanged bool
	// Again is set if something is left to be done soon.
	Again bool
	Err   error
}

func (r *Result) repaired(action Action, id attach.ID) {
	r.Repairs = append(r.Repairs, Repair{action, id})
}

// Repair repairs the attachments that two reports in a row found broken, adopts pods, and removes what belongs to no attachment.
func (r *Repairer) Repair(ctx context.Context, a Assessment, known Known) (result Result) {
	ctx, cancel := context.WithTimeout(ctx, budget)
	defer cancel()
	for _, f := range a.due {
		if r.isDue(ctx, f.Record.ID()) && r.repair(f, &result) {
			result.RecordsChanged = true
		}
	}
	errs := []error{r.removeUnrecorded(known.Records, &result), r.adopt(ctx, known, &result)}
	if !r.again { // or else programs of another ABI may still be needed, until their pods are attached again
		errs = append(errs, r.prune(ctx, a.stray))
	}
	result.Again, result.Err = r.again, errors.Join(errs...)
	return result
}

func (r *Repairer) prune(ctx context.Context, stray bool) error {
	r.repairs++
	if !stray && r.repairs%pruneEvery != 1 {
		return nil
	}
	return errors.Join(attach.Prune(ctx, r.Datapath, r.BPFDir), datapath.RemoveOthers(r.BPFDir))
}

// isDue reports whether a repair may be attempted: there is time left, and the last attempt is long enough ago.
func (r *Repairer) isDue(ctx context.Context, id attach.ID) bool {
	if f := r.failures[id]; f != nil && time.Now().Before(f.next) {
		return false
	}
	r.again = r.again || ctx.Err() != nil
	return ctx.Err() == nil
}

// lock keeps a DEL out. It does not wait: ok is false if a DEL is in progress.
func (r *Repairer) lock() (unlock func(), ok bool) {
	expired, cancel := context.WithCancel(context.Background())
	cancel()
	unlock, err := attach.LockRecords(expired, r.StateDir, unix.LOCK_EX)
	if err != nil {
		r.again = true
	}
	return unlock, err == nil
}

// isBeingDeleted reports whether a DEL is in progress, perhaps of this attachment, or has removed its record since it was read.
func (r *Repairer) isBeingDeleted(id attach.ID) bool {
	unlock, ok := r.lock()
	if !ok {
		return true
	}
	defer unlock()
	_, err := attach.ReadRecord(r.StateDir, id)
	return errors.Is(err, os.ErrNotExist)
}

// repair attaches a broken attachment again, or removes it if its device is gone. It returns whether the record has changed.
func (r *Repairer) repair(f Finding, result *Result) (changed bool) {
	unlock, ok := r.lock()
	if !ok {
		return false
	}
	defer unlock()
	id := f.Record.ID()
	record, err := attach.ReadRecord(r.StateDir, id)
	if errors.Is(err, os.ErrNotExist) {
		return true // DEL was faster
	}
	if err == nil && !reflect.DeepEqual(record, f.Record) {
		return true // attached again since the look
	}
	switch {
	case err != nil:
	case f.Gone:
		err = r.remove(record, f.Problem, result)
	default:
		err = r.attach(record, f.Problem, result)
	}
	if err != nil {
		return r.failed(f.Record, err)
	}
	delete(r.failures, id)
	return true
}

func (r *Repairer) remove(record attach.Record, problem error, result *Result) error {
	if err := attach.Detach(r.Datapath, r.BPFDir, record.ID()); err != nil {
		return err
	}
	if err := attach.RemoveRecord(r.StateDir, record.ID()); err != nil {
		return err
	}
	r.done(Removed, record, problem, result)
	return nil
}

func (r *Repairer) attach(record attach.Record, problem error, result *Result) error {
	id := record.ID()
	if err := attach.Attach(r.Datapath, r.BPFDir, id, record.Target(), attach.ViaAuto); err != nil {
		return err
	}
	if _, err := attach.ReadRecord(r.StateDir, id); errors.Is(err, os.ErrNotExist) {
		// A DEL that gave up waiting for the lock, or does not know of it.
		return attach.Detach(r.Datapath, r.BPFDir, id)
	}
	action := Reattached
	if record.Adopted && record.Error != "" {
		action = Adopted
	}
	if record.Error != "" {
		record.Error, record.Passing = "", false
		if err := attach.WriteRecord(r.StateDir, record); err != nil {
			return errors.Join(err, attach.Detach(r.Datapath, r.BPFDir, id))
		}
	}
	r.done(action, record, problem, result)
	return nil
}

func (r *Repairer) done(action Action, record attach.Record, why error, result *Result) {
	result.repaired(action, record.ID())
	r.Log.Warn("attachment "+string(action), "id", record.ID(), "pod", record.PodNamespace+"/"+record.PodName, "device", record.HostIfName,
		"because", why)
}

// failed schedules the next attempt. Each reason is logged once, and kept in the record. It returns whether the record has changed.
func (r *Repairer) failed(record attach.Record, err error) (changed bool) {
	id := record.ID()
	if _, err := attach.ReadRecord(r.StateDir, id); errors.Is(err, os.ErrNotExist) {
		return true // a DEL without the lock interfered
	}
	f := r.failures[id]
	if f == nil {
		f = &failure{wait: firstRetry}
		r.failures[id] = f
	}
	f.next, f.wait = time.Now().Add(f.wait), min(2*f.wait, longestRetry)
	if f.reason == err.Error() {
		return false
	}
	f.reason = err.Error()
	record.Error, record.Passing = f.reason, true
	err = errors.Join(err, attach.WriteRecord(r.StateDir, record))
	r.Log.Error("failed to repair an attachment; retrying", "id", id, "pod", record.PodNamespace+"/"+record.PodName, "error", err)
	return true
}

// removeUnrecorded detaches attachments that have neither a record nor a device.
func (r *Repairer) removeUnrecorded(records []attach.Record, result *Result) error {
	pinned, err := attach.List(r.BPFDir)
	if err != nil {
		return err
	}
	recorded := map[attach.ID]bool{}
	for _, record := range records {
		recorded[record.ID()] = true
	}
	pinned = slices.DeleteFunc(pinned, func(id attach.ID) bool { return recorded[id] })
	if len(pinned) == 0 {
		return nil
	}
	unlock, ok := r.lock()
	if !ok {
		return nil
	}
	defer unlock()
	var errs []error
	for _, id := range pinned {
		if _, err := attach.ReadRecord(r.StateDir, id); !errors.Is(err, os.ErrNotExist) {
			continue // recorded meanwhile
		}
		orphaned, err := attach.Orphaned(r.BPFDir, id)
		if err == nil && orphaned {
			err = attach.Detach(r.Datapath, r.BPFDir, id)
		}
		if err == nil && orphaned {
			r.done(Removed, attach.Record{ContainerID: id.ContainerID, IfName: id.IfName}, errors.New("it has neither a record nor a device"), result)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
