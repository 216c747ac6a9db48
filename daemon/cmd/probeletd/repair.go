package main

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"github.com/containernetworking/plugins/pkg/netlinksafe"

	"github.com/probelet/probelet/bpf/attach"
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
	said     string // of pods that cannot be adopted
}

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
	return &keeper{adopt: adopt.Node{Root: "/proc/1/root", CacheDir: cacheDir}, suspects: map[attach.ID]bool{}}, nil
}

// repair looks at all attachments. The error is errReplaced, or nothing that ends the daemon.
func (l *loop) repair() error {
	current, err := l.datapath.Current()
	if err == nil && (!current || !sameBPFFS(l.bpfDir)) {
		return errReplaced
	}
	if err != nil {
		l.log.Error("comparing with what is pinned", "error", err)
	}
	if l.keeper == nil || !l.podsKnown {
		return nil
	}
	changed, err := l.keeper.look(l.daemon)
	if err != nil {
		l.log.Error("looking after attachments", "error", err)
	}
	if changed {
		l.readRecords()
	}
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
func (k *keeper) look(d *daemon) (changed bool, err error) {
	devices, err := netlinksafe.LinkList()
	if err != nil {
		return false, fmt.Errorf("listing devices: %w", err)
	}
	present := map[int]bool{}
	for _, device := range devices {
		present[device.Attrs().Index] = true
	}
	checker, err := attach.NewChecker(d.datapath, d.bpfDir)
	if err != nil {
		return false, err
	}
	suspects := map[attach.ID]bool{}
	var errs []error
	for _, r := range d.records {
		problem := wrong(checker, r, present)
		if problem == nil {
			continue
		}
		if !k.suspects[r.ID()] {
			suspects[r.ID()] = true
			continue
		}
		err := k.mend(d, r, present[r.IfIndex], problem)
		changed = changed || err == nil
		errs = append(errs, err)
	}
	k.suspects = suspects
	errs = append(errs, k.removeUnrecorded(d))
	more, err := k.adoptAll(d)
	return changed || more, errors.Join(append(errs, err)...)
}

// wrong says what is wrong with an attachment that is on record.
func wrong(checker *attach.Checker, r attach.Record, present map[int]bool) error {
	if r.Error != "" || r.IfIndex == 0 {
		return nil // never attached; the record says why
	}
	if !present[r.IfIndex] {
		return fmt.Errorf("device %d, %s, is gone", r.IfIndex, r.HostIfName)
	}
	err := checker.Check(r.ID(), r.IfIndex)
	if errors.Is(err, attach.ErrIncomplete) || errors.Is(err, attach.ErrNotAttached) {
		return err
	}
	return nil // as far as can be seen
}

func (k *keeper) mend(d *daemon, r attach.Record, present bool, problem error) error {
	if !present {
		if err := attach.Detach(d.datapath, d.bpfDir, r.ID()); err != nil {
			return err
		}
		d.repaired(removed, r, problem)
		return attach.RemoveRecord(d.stateDir, r.ID())
	}
	if _, err := attach.ReadRecord(d.stateDir, r.ID()); errors.Is(err, os.ErrNotExist) {
		return nil // DEL was faster
	}
	if err := attach.Attach(d.datapath, d.bpfDir, r.ID(), r.Target(), attach.HookAuto); err != nil {
		return fmt.Errorf("attaching %s again, because %w: %w", r.ID(), problem, err)
	}
	d.repaired(reattached, r, problem)
	return nil
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
	var errs []error
	for _, id := range pinned {
		if recorded[id] {
			continue
		}
		if _, err := attach.ReadRecord(d.stateDir, id); !errors.Is(err, os.ErrNotExist) {
			continue // a new one
		}
		orphaned, err := attach.Orphaned(d.datapath, d.bpfDir, id)
		if err == nil && orphaned {
			err = attach.Detach(d.datapath, d.bpfDir, id)
			d.repaired(removed, attach.Record{ContainerID: id.ContainerID, IfName: id.IfName}, errors.New("it has neither record nor device"))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// adoptAll attaches pods that have no attachment.
func (k *keeper) adoptAll(d *daemon) (changed bool, err error) {
	var pods []adopt.Pod
	for _, pod := range d.pods {
		if len(pod.IPs) == 0 || pod.NotAnswered != "" || d.recorded(pod.Namespace, pod.Name, pod.IPs) {
			continue
		}
		pods = append(pods, adopt.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, IPs: pod.IPs})
	}
	if len(pods) == 0 {
		k.said = ""
		return false, nil
	}
	records, err := k.adopt.Find(pods)
	if word := fmt.Sprint(err); err != nil && word != k.said {
		k.said = word
		d.log.Warn("pods that are not attached", "reason", err)
	}
	var errs []error
	for _, r := range records {
		err := k.adoptOne(d, r)
		changed = changed || err == nil
		errs = append(errs, err)
	}
	return changed, errors.Join(errs...)
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

func (k *keeper) adoptOne(d *daemon, r attach.Record) (err error) {
	if _, err := attach.ReadRecord(d.stateDir, r.ID()); !errors.Is(err, os.ErrNotExist) {
		return err // somebody was faster
	}
	// As ADD does it: whoever finds it half-way knows.
	r.Error = "the daemon has not finished"
	if err := attach.WriteRecord(d.stateDir, r); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, attach.RemoveRecord(d.stateDir, r.ID()))
		}
	}()
	if err := attach.Attach(d.datapath, d.bpfDir, r.ID(), r.Target(), attach.HookAuto); err != nil {
		return fmt.Errorf("adopting %s/%s: %w", r.PodNamespace, r.PodName, err)
	}
	r.Error = ""
	if err := attach.WriteRecord(d.stateDir, r); err != nil {
		return errors.Join(err, attach.Detach(d.datapath, d.bpfDir, r.ID()))
	}
	d.repaired(adopted, r, errors.New("the pod had its network before"))
	return nil
}
