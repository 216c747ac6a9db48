package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/adopt"
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

// repair looks at all attachments. The error is errReplaced, or nothing that ends the daemon.
func (l *loop) repair(ctx context.Context) error {
	current, err := l.datapath.Current()
	if err == nil && (!current || !sameBPFFS(l.bpfDir)) {
		return errReplaced
	}
	err = errors.Join(err, l.sweep())
	if l.keeper != nil && l.podsKnown {
		changed, lookErr := l.keeper.look(ctx, l.daemon)
		if changed {
			l.readRecords()
		}
		err = errors.Join(err, lookErr)
	}
	word := fmt.Sprint(err)
	if err != nil && word != l.unrepaired {
		l.log.Error("looking after attachments", "error", err)
	}
	l.unrepaired = word
	return nil
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

// look returns whether records have changed.
func (k *keeper) look(ctx context.Context, d *daemon) (changed bool, err error) {
	devices, err := deviceNames()
	if err != nil {
		return false, err
	}
	checker, err := attach.NewChecker(d.datapath, d.bpfDir)
	if err != nil {
		return false, err
	}
	k.again = false
	ctx, cancel := context.WithTimeout(ctx, lookBudget)
	defer cancel()
	suspects := map[attach.ID]bool{}
	var whole []attach.ID
	for _, r := range d.records {
		gone, problem := wrong(checker, r, devices)
		switch {
		case problem == nil:
			d.resume(r.ID())
			delete(k.failures, r.ID())
			whole = append(whole, r.ID())
			continue
		case !k.suspects[r.ID()] && k.isBeingDeleted(d, r.ID()):
			continue
		case !k.suspects[r.ID()]:
			d.suspend(r, problem, gone)
			k.again = true
		case k.isDue(ctx, r.ID()):
			changed = k.putRight(d, r, problem, gone) || changed
		}
		suspects[r.ID()] = true
	}
	k.suspects = suspects
	k.promoter.offer(d, whole)
	errs := []error{k.removeUnrecorded(d)}
	adopted, err := k.adoptAll(ctx, d)
	errs = append(errs, err)
	if !k.again { // otherwise some may be about to be pinned anew
		errs = append(errs, attach.Prune(ctx, d.datapath, d.bpfDir), datapath.RemoveOthers(d.bpfDir))
	}
	return changed || adopted, errors.Join(errs...)
}

// deviceNames returns the names of the node's network devices, by index.
func deviceNames() (map[int]string, error) {
	list, err := netlinksafe.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing devices: %w", err)
	}
	names := map[int]string{}
	for _, device := range list {
		names[device.Attrs().Index] = device.Attrs().Name
	}
	return names, nil
}

// isDue is false of what has failed a moment ago, and when the time of this look is used up.
func (k *keeper) isDue(ctx context.Context, id attach.ID) bool {
	if f := k.failures[id]; f != nil && time.Now().Before(f.next) {
		return false
	}
	k.again = k.again || ctx.Err() != nil
	return ctx.Err() == nil
}

// wrong says what is wrong with an attachment that is on record, and whether its device is gone.
func wrong(checker *attach.Checker, r attach.Record, devices map[int]string) (gone bool, problem error) {
	if r.IfIndex == 0 {
		return false, nil // never attached; the record says why
	}
	name, present := devices[r.IfIndex]
	// A state directory that outlives the machine's run has records whose devices are now other pods'.
	if !present || name != r.HostIfName {
		gone, problem = true, fmt.Errorf("device %d, %s, is gone", r.IfIndex, r.HostIfName)
	}
	switch {
	case !present, gone && r.Error != "":
		return gone, problem
	case r.Passing, r.Error != "" && r.Adopted:
		return false, errors.New("it was not attached")
	case r.Error != "":
		return false, nil // the record says why, or an ADD is under way
	}
	err := checker.Check(r.ID(), r.IfIndex)
	if errors.Is(err, attach.ErrIncomplete) || errors.Is(err, attach.ErrNotAttached) {
		return gone, cmp.Or(problem, err)
	}
	return false, nil // as far as can be seen
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
	d.repaired(removed, r, problem)
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
	what := reattached
	if r.Adopted && r.Error != "" {
		what = adopted
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

// What is done about attachments.
const (
	reattached = "reattached"
	removed    = "removed"
	adopted    = "adopted"
)

func (d *daemon) repaired(what string, r attach.Record, why error) {
	d.metrics.repairs.WithLabelValues(what).Inc()
	d.log.Warn("attachment "+what, "id", r.ID(), "pod", r.PodNamespace+"/"+r.PodName, "device", r.HostIfName, "because", why)
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
			d.repaired(removed, attach.Record{ContainerID: id.ContainerID, IfName: id.IfName}, errors.New("it has neither record nor device"))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// adoptAll attaches pods that have no attachment.
func (k *keeper) adoptAll(ctx context.Context, d *daemon) (changed bool, err error) {
	var pods []adopt.Pod
	for _, pod := range d.pods {
		if len(pod.IPs) == 0 || pod.NotAnswered != "" || d.recorded(pod.Namespace, pod.Name, pod.IPs) {
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

// recorded is whether somebody has attached, or tried to attach, a pod.
func (d *daemon) recorded(namespace, name string, ips []netip.Addr) bool {
	return slices.ContainsFunc(d.records, func(r attach.Record) bool {
		if r.PodName != "" {
			return r.PodNamespace == namespace && r.PodName == name
		}
		return slices.ContainsFunc(r.PodIPs, func(text string) bool {
			ip, err := netip.ParseAddr(text)
			return err == nil && slices.Contains(ips, ip.Unmap())
		})
	})
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
