package agent

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/adopt"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/repair"
)

// errReplaced ends the daemon. Started again, in a pod with the mounts of now, it finds what is there.
var errReplaced = errors.New("the BPF objects that this daemon uses are not those that are pinned any more (was another BPF file system mounted?); it must be started again")

// keeper keeps attachments as the node is.
type keeper struct {
	adopt adopt.Node
	// suspects are attachments that were not as they should be at the last look. It takes two looks to do something about one:
	// an ADD or a DEL may be under way.
	suspects map[attach.ID]bool
	failures map[attach.ID]*failure
	again    bool // there is more to be done, soon
	promoter *promoter
	looker   *repair.Looker
	looking  bool // a report is awaited
	looks    int  // reports that were applied
	// unadopted are the pods that cannot be adopted, by namespace/name.
	unadopted map[string]unadopted
}

// unadopted is a pod that runs, is not attached, and cannot be.
type unadopted struct {
	since time.Time
	said  string // the reason that was logged last
}

// failure tracks an attachment that could not be repaired.
type failure struct {
	reason string
	next   time.Time // when it is tried again
	wait   time.Duration
}

const (
	// lookBudget is how long a look may attach and detach: the daemon does nothing else meanwhile.
	lookBudget = 500 * time.Millisecond
	// lookAgain is when the next look is, if this one left something to do.
	lookAgain = 500 * time.Millisecond
	// What failed is tried again after firstRetry, and then after ever longer until mostRetry.
	firstRetry = 5 * time.Second
	mostRetry  = 5 * time.Minute
	// beingDeleted is how long after the DEL of our plugin, which is the first of the chain's, the other plugins and the runtime
	// are given to forget a pod. It is not adopted meanwhile.
	beingDeleted = 2 * time.Minute
)

// newKeeper returns nil, and why, if this process cannot see the host as it is.
func newKeeper(cacheDir string) (*keeper, error) {
	own, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		return nil, err
	}
	host, err := os.Readlink("/proc/1/ns/net")
	if err != nil {
		return nil, fmt.Errorf("the host's network namespace is not known: %w", err)
	}
	if own != host {
		return nil, errors.New("not in the host's network namespace")
	}
	return makeKeeper(adopt.Node{Root: "/proc/1/root", CacheDir: cacheDir}), nil
}

func makeKeeper(node adopt.Node) *keeper {
	return &keeper{adopt: node, suspects: map[attach.ID]bool{}, failures: map[attach.ID]*failure{}, unadopted: map[string]unadopted{}, promoter: newPromoter()}
}

// look has the looker look, unless it is at it. Without a keeper only connections are swept.
func (l *loop) look() error {
	l.checkDevices()
	l.sayUnrepaired(l.sweep())
	if !sameBPFFS(l.bpfDir) {
		return errReplaced
	}
	if l.keeper == nil {
		if current, err := l.datapath.Current(); err == nil && !current {
			return errReplaced
		}
		return nil
	}
	l.keeper.request(l.daemon)
	return nil
}

// repair does what a report calls for. The error is errReplaced, or nothing that ends the daemon.
func (l *loop) repair(ctx context.Context, report repair.Report) error {
	if report.Replaced {
		return errReplaced
	}
	l.keeper.looking = false
	changed, err := l.keeper.apply(ctx, l.daemon, report)
	if changed {
		l.readRecords()
		l.checkDevices()
	}
	l.sayUnrepaired(err)
	return nil
}

// sayUnrepaired logs what keeps the attachments from being looked after, once.
func (l *loop) sayUnrepaired(err error) {
	if err == nil {
		l.unrepaired = ""
	} else if word := err.Error(); word != l.unrepaired {
		l.unrepaired = word
		l.log.Error("looking after attachments", "error", err)
	}
}

// sameBPFFS is whether the host has the same file system where we have ours. In a pod it may have been mounted anew.
func sameBPFFS(bpfDir string) bool {
	var ours, theirs syscall.Stat_t
	parent := filepath.Dir(bpfDir)
	if syscall.Stat(parent, &ours) != nil || syscall.Stat(filepath.Join("/proc/1/root", parent), &theirs) != nil {
		return true // or it cannot be seen
	}
	return ours.Dev == theirs.Dev || !filepath.IsAbs(bpfDir)
}

// request asks for a look, unless one is under way.
func (k *keeper) request(d *daemon) {
	if d.podsKnown && !k.looking {
		k.looking = true
		k.looker.Request(slices.Clone(d.records))
	}
}

// apply does what a report calls for, and returns whether records have changed. What has a new record since the look is left
// to the next one.
func (k *keeper) apply(ctx context.Context, d *daemon, report repair.Report) (changed bool, err error) {
	if report.Err != nil {
		return false, report.Err
	}
	k.again = false
	ctx, cancel := context.WithTimeout(ctx, lookBudget)
	defer cancel()
	suspects := map[attach.ID]bool{}
	var promotable []attach.ID
	for _, f := range report.Findings {
		r := f.Record
		a := d.attachments[r.ID()]
		switch {
		case a == nil || !reflect.DeepEqual(a.record, r):
			continue
		case f.Problem == nil:
			d.resume(r.ID())
			delete(k.failures, r.ID())
			if f.Promotable {
				promotable = append(promotable, r.ID())
			}
			continue
		case !k.suspects[r.ID()] && k.isBeingDeleted(d, r.ID()):
			continue
		case !k.suspects[r.ID()]:
			d.suspend(r, f.Problem, f.Gone)
			k.again = true
		case k.isDue(ctx, r.ID()):
			changed = k.putRight(d, r, f.Problem, f.Gone) || changed
		}
		suspects[r.ID()] = true
	}
	k.suspects = suspects
	k.promoter.offer(promotable)
	errs := []error{k.removeUnrecorded(d)}
	adopted, err := k.adoptAll(ctx, d)
	errs = append(errs, err)
	if !k.again { // otherwise some may be about to be pinned anew
		errs = append(errs, k.prune(ctx, d, report.Stray))
	}
	return changed || adopted, errors.Join(errs...)
}

// pruneEvery is after how many looks leftovers are looked for that show nowhere else.
const pruneEvery = 12

func (k *keeper) prune(ctx context.Context, d *daemon, stray bool) error {
	k.looks++
	if !stray && k.looks%pruneEvery != 1 {
		return nil
	}
	return errors.Join(attach.Prune(ctx, d.datapath, d.bpfDir), datapath.RemoveOthers(d.bpfDir))
}

// isDue is false of what has failed a moment ago, and when the time of this look is used up.
func (k *keeper) isDue(ctx context.Context, id attach.ID) bool {
	if f := k.failures[id]; f != nil && time.Now().Before(f.next) {
		return false
	}
	k.again = k.again || ctx.Err() != nil
	return ctx.Err() == nil
}

// lock keeps a DEL out, or returns false if there is one.
func (k *keeper) lock(d *daemon) (unlock func(), ok bool) {
	now, cancel := context.WithCancel(context.Background())
	cancel() // it does not wait
	unlock, err := attach.LockRecords(now, d.stateDir, unix.LOCK_EX)
	if err != nil {
		k.again = true
	}
	return unlock, err == nil
}

// isBeingDeleted is whether a DEL is at work, perhaps on this, or was faster than the reading of its record.
func (k *keeper) isBeingDeleted(d *daemon, id attach.ID) bool {
	unlock, ok := k.lock(d)
	if !ok {
		return true
	}
	defer unlock()
	_, err := attach.ReadRecord(d.stateDir, id)
	return errors.Is(err, os.ErrNotExist)
}

// putRight returns whether the record has changed, or is gone.
func (k *keeper) putRight(d *daemon, r attach.Record, problem error, gone bool) (changed bool) {
	unlock, ok := k.lock(d)
	if !ok {
		return false
	}
	defer unlock()
	current, err := attach.ReadRecord(d.stateDir, r.ID())
	if errors.Is(err, os.ErrNotExist) {
		return true // DEL was faster
	}
	if err == nil && !reflect.DeepEqual(current, r) {
		return true // it is another attachment since the look
	}
	switch {
	case err != nil:
	case gone:
		err = k.remove(d, current, problem)
	default:
		err = k.attach(d, current, problem)
	}
	if err != nil {
		return k.failed(d, r, err)
	}
	delete(k.failures, r.ID())
	if a := d.attachments[r.ID()]; a != nil {
		a.maps, a.pending = nil, true // those of what was attached before
	}
	return true
}

func (k *keeper) remove(d *daemon, r attach.Record, problem error) error {
	if err := attach.Detach(d.datapath, d.bpfDir, r.ID()); err != nil {
		return err
	}
	if err := attach.RemoveRecord(d.stateDir, r.ID()); err != nil {
		return err
	}
	d.repaired(repair.Removed, r, problem)
	return nil
}

func (k *keeper) attach(d *daemon, r attach.Record, problem error) error {
	if err := attach.Attach(d.datapath, d.bpfDir, r.ID(), r.Target(), attach.ViaAuto); err != nil {
		return err
	}
	if _, err := attach.ReadRecord(d.stateDir, r.ID()); errors.Is(err, os.ErrNotExist) {
		// A DEL that did not wait for the lock, or does not know of it.
		return attach.Detach(d.datapath, d.bpfDir, r.ID())
	}
	what := repair.Reattached
	if r.Adopted && r.Error != "" {
		what = repair.Adopted
	}
	if r.Error != "" {
		r.Error, r.Passing = "", false
		if err := attach.WriteRecord(d.stateDir, r); err != nil {
			return errors.Join(err, attach.Detach(d.datapath, d.bpfDir, r.ID()))
		}
	}
	d.repaired(what, r, problem)
	return nil
}

// failed says so where people look: once in the log, and in the record. It returns whether the record has changed.
func (k *keeper) failed(d *daemon, r attach.Record, err error) (changed bool) {
	if _, err := attach.ReadRecord(d.stateDir, r.ID()); errors.Is(err, os.ErrNotExist) {
		return true // a DEL, without the lock, was in the way
	}
	f := k.failures[r.ID()]
	if f == nil {
		f = &failure{wait: firstRetry}
		k.failures[r.ID()] = f
	}
	f.next, f.wait = time.Now().Add(f.wait), min(2*f.wait, mostRetry)
	if f.reason == err.Error() {
		return false
	}
	f.reason = err.Error()
	r.Error, r.Passing = f.reason, true
	err = errors.Join(err, attach.WriteRecord(d.stateDir, r))
	d.log.Error("attachment cannot be put right; this is tried again", "id", r.ID(), "pod", r.PodNamespace+"/"+r.PodName, "error", err)
	return true
}

func (d *daemon) repaired(what repair.Action, r attach.Record, why error) {
	d.metrics.Repaired(what)
	d.log.Warn("attachment "+string(what), "id", r.ID(), "pod", r.PodNamespace+"/"+r.PodName, "device", r.HostIfName, "because", why)
}

// removeUnrecorded removes what is pinned of devices that are gone, and has no record.
func (k *keeper) removeUnrecorded(d *daemon) error {
	pinned, err := attach.List(d.bpfDir)
	if err != nil {
		return err
	}
	recorded := map[attach.ID]bool{}
	for _, r := range d.records {
		recorded[r.ID()] = true
	}
	pinned = slices.DeleteFunc(pinned, func(id attach.ID) bool { return recorded[id] })
	if len(pinned) == 0 {
		return nil
	}
	unlock, ok := k.lock(d)
	if !ok {
		return nil
	}
	defer unlock()
	var errs []error
	for _, id := range pinned {
		if _, err := attach.ReadRecord(d.stateDir, id); !errors.Is(err, os.ErrNotExist) {
			continue // a new one
		}
		orphaned, err := attach.Orphaned(d.bpfDir, id)
		if err == nil && orphaned {
			err = attach.Detach(d.datapath, d.bpfDir, id)
		}
		if err == nil && orphaned {
			d.repaired(repair.Removed, attach.Record{ContainerID: id.ContainerID, IfName: id.IfName}, errors.New("it has neither record nor device"))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// adoptAll attaches pods that have no attachment.
func (k *keeper) adoptAll(ctx context.Context, d *daemon) (changed bool, err error) {
	var pods []adopt.Pod
	recorded := recordedPods(d.records)
	for _, pod := range d.pods {
		if len(pod.IPs) == 0 || pod.NotAnswered != "" || recorded.has(pod) {
			continue
		}
		pods = append(pods, adopt.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, IPs: pod.IPs})
	}
	if len(pods) == 0 {
		clear(k.unadopted)
		return false, nil
	}
	records, unknown, err := k.adopt.Find(pods)
	k.noteUnadopted(d, unknown, time.Now())
	errs := []error{err}
	pinned, err := attach.List(d.bpfDir)
	errs = append(errs, err)
	for _, r := range records {
		// A record that is lost leaves the pins; DEL does not.
		if d.wasDeleted(r.ContainerID) && !slices.Contains(pinned, r.ID()) || !k.isDue(ctx, r.ID()) {
			continue
		}
		done, err := k.adoptOne(d, r)
		changed = changed || done
		errs = append(errs, err)
	}
	return changed, errors.Join(errs...)
}

// noteUnadopted logs the pods that could not be adopted for longer than an ADD or a DEL takes: a source that is polled
// tells of pods that are gone already, and of some before their record is written.
func (k *keeper) noteUnadopted(d *daemon, unknown map[string]error, now time.Time) {
	maps.DeleteFunc(k.unadopted, func(pod string, _ unadopted) bool { return unknown[pod] == nil })
	for pod, reason := range unknown {
		u, ok := k.unadopted[pod]
		if !ok {
			u.since = now
		}
		if now.Sub(u.since) >= beingDeleted && u.said != reason.Error() {
			u.said = reason.Error()
			d.log.Warn("a pod that ran before cannot be attached", "pod", pod, "reason", reason)
		}
		k.unadopted[pod] = u
	}
}

// recorded are the pods that have been attached, or that somebody tried to attach: by name, or by address where the record has
// no name.
type recorded struct {
	names map[podName]bool
	ips   map[netip.Addr]bool
}

func recordedPods(records []attach.Record) recorded {
	all := recorded{make(map[podName]bool, len(records)), map[netip.Addr]bool{}}
	for _, r := range records {
		if r.PodName != "" {
			all.names[podName{r.PodNamespace, r.PodName}] = true
			continue
		}
		for _, text := range r.PodIPs {
			if ip, err := netip.ParseAddr(text); err == nil {
				all.ips[ip.Unmap()] = true
			}
		}
	}
	return all
}

func (r recorded) has(pod probe.Pod) bool {
	return r.names[podName{pod.Namespace, pod.Name}] || slices.ContainsFunc(pod.IPs, func(ip netip.Addr) bool { return r.ips[ip] })
}

// adoptOne returns whether there is a record now.
func (k *keeper) adoptOne(d *daemon, r attach.Record) (changed bool, err error) {
	unlock, ok := k.lock(d)
	if !ok {
		return false, nil
	}
	defer unlock()
	if _, err := attach.ReadRecord(d.stateDir, r.ID()); !errors.Is(err, os.ErrNotExist) {
		return false, err // somebody was faster
	}
	r.Hook = d.hook
	// As ADD does it: whoever finds it half-way knows; and the next daemon goes on, should this one die.
	r.Error, r.Passing = adoptUnfinished, true
	if err := attach.WriteRecord(d.stateDir, r); err != nil {
		return false, err
	}
	if err := k.attach(d, r, errors.New("the pod had its network before")); err != nil {
		k.failed(d, r, fmt.Errorf("adopting: %w", err))
	}
	return true, nil
}

// adoptUnfinished is in the record of a pod that is being adopted.
const adoptUnfinished = "the daemon has not finished"
