package repair

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/repair/repairtest"
)

// A report may be older than a DEL and another ADD that the daemon has not read of yet. What those left is not touched.
func TestRepairLeavesWhatIsNewerThanTheLook(t *testing.T) {
	f := newFixture(t)
	p := f.adopted()
	f.Detach(p, "steer")
	f.look(1)
	f.In(func() error {
		report := f.looker.Look(f.records)
		if err := f.del(p); err != nil {
			return err
		}
		f.FinishADD(p, f.BeginADD(p))
		added := f.Device(p)
		_, err := f.repair(t.Context(), report)
		if now := f.Device(p); now != added {
			t.Errorf("attached as %+v, then as %+v", added, now)
		}
		return err
	})
	f.look(1)
	f.WantWhole(p)
	f.wantRepairs(Reattached, 0)
}

// Another XDP program occupies the device. That is logged once and recorded, retried at growing intervals, and repaired once the device is
// free.
func TestAnotherXDPProgram(t *testing.T) {
	f := newFixture(t)
	f.repairer.Hook = attach.HookXDP
	other, err := datapath.Load()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close() //nolint:errcheck // a test's
	before, after := f.run(), f.run()
	f.Occupy(before, other.Respond().FD())
	for f.look(1); f.Check(after) != nil; f.look(1) { // on a busy machine, a look may only have time for one pod
	}
	f.Detach(after, "respond")
	f.Occupy(after, other.Respond().FD())
	f.look(10)
	for _, p := range []*bpftest.Pod{before, after} {
		if r := f.Record(p); !strings.Contains(r.Error, "has XDP program") || !r.Passing {
			t.Errorf("record %+v", r)
		}
		failure := f.repairer.failures[repairtest.ID(p)]
		if failure == nil || failure.wait != 2*firstRetry || time.Until(failure.next) < firstRetry/2 {
			t.Fatalf("%+v", failure)
		}
		failure.next = time.Now()
	}
	f.look(2)
	if f.log.Count("failed to repair") != 3 { // adopting and attaching fail with different errors
		t.Error(f.log)
	}
	for _, p := range []*bpftest.Pod{before, after} {
		if failure := f.repairer.failures[repairtest.ID(p)]; failure.wait != 4*firstRetry {
			t.Errorf("%+v", failure)
		}
		f.Occupy(p, -1)
		f.repairer.failures[repairtest.ID(p)].next = time.Now()
	}
	f.look(2)
	f.WantWhole(before)
	f.WantWhole(after)
	if len(f.repairer.failures) > 0 {
		t.Errorf("%+v", f.repairer.failures)
	}
}

// Another BPF file system was mounted over the one with the pins. What is attached remains, out of sight. With XDP it occupies the device,
// and the record says what to do. Otherwise it runs behind ours, and is listed as a neighbour.
func TestAnotherBPFFS(t *testing.T) {
	for _, hook := range []attach.Hook{attach.HookXDP, attach.HookTC} {
		t.Run(string(hook), func(t *testing.T) {
			f := newFixture(t)
			f.RequireTCX()
			f.repairer.Hook = hook
			p := f.adopted()
			parent := filepath.Dir(f.BPFDir)
			if err := unix.Mount("bpf", parent, "bpf", 0, ""); err != nil {
				t.Fatal(err)
			}
			defer unix.Unmount(parent, unix.MNT_DETACH) //nolint:errcheck // a test's
			if current, err := f.Datapath.Current(); err != nil || current {
				t.Errorf("current: %v, %v", current, err)
			}
			f.Load()
			f.start()
			f.look(5)
			if hook == attach.HookXDP {
				if r := f.Record(p); !strings.Contains(r.Error, "if another BPF file system is mounted over") {
					t.Errorf("record %+v", r)
				}
				if f.log.Count("failed to repair") != 1 {
					t.Error(f.log)
				}
				return
			}
			f.WantWhole(p)
			f.In(func() error {
				checker, err := attach.NewChecker(f.Datapath, f.BPFDir)
				if err != nil {
					return err
				}
				neighbours, err := checker.Neighbours(p.IfIndex)
				if len(neighbours) != 2 || neighbours[0].Before || !strings.Contains(neighbours[1].What, "steer") {
					t.Errorf("%v", neighbours)
				}
				return err
			})
		})
	}
}

// Running pods get the programs of a build with another ABI, and nothing is left of the previous ones.
func TestAnotherABI(t *testing.T) {
	f := newFixture(t)
	p, gone := f.adopted(), f.adopted()
	old := filepath.Join(f.BPFDir, "v0")
	if err := os.Rename(filepath.Join(f.BPFDir, datapath.ABI), old); err != nil {
		t.Fatal(err)
	}
	if err := attach.RemoveRecord(f.StateDir, repairtest.ID(gone)); err != nil {
		t.Fatal(err)
	}
	f.pods = f.pods[:1]
	f.DeleteDevice(gone)
	f.Load()
	f.start()
	f.look(1)
	if _, err := os.Stat(old); err != nil {
		t.Errorf("removed with what is attached: %v", err)
	}
	f.look(2)
	f.WantWhole(p)
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
	f.wantRepairs(Reattached, 1)
	f.wantRepairs(Removed, 1)
}

// A daemon that died while adopting a pod left a record, perhaps of a build that did not mark its error as passing.
func TestHalfAdopted(t *testing.T) {
	for _, passing := range []bool{true, false} {
		f := newFixture(t)
		p := f.adopted()
		r := f.Record(p)
		r.Error, r.Passing = adoptionUnfinished, passing
		if err := errors.Join(attach.WriteRecord(f.StateDir, r), os.Remove(f.Pin(p, "steer"))); err != nil {
			t.Fatal(err)
		}
		f.Load()
		f.start()
		f.look(2)
		f.WantWhole(p)
	}
}

// ADD failed to attach, and the pod was started nevertheless.
func TestErrorsOfADD(t *testing.T) {
	f := newFixture(t)
	p := f.AddPod(t)
	r := attach.Record{
		ContainerID: repairtest.ID(p).ContainerID, IfName: "eth0", IfIndex: p.IfIndex, HostIfName: p.HostIfName, PodNetns: p.Netns, Error: "busy",
	}
	write := func() {
		t.Helper()
		if err := attach.WriteRecord(f.StateDir, r); err != nil {
			t.Fatal(err)
		}
	}
	write()
	f.look(3)
	if got := f.Record(p); got.Error != "busy" {
		t.Errorf("a permanent error, or an ADD in progress: %+v", got)
	}
	r.Passing = true
	write()
	f.look(2)
	f.WantWhole(p)
}

func TestTheRecordIsLost(t *testing.T) {
	f := newFixture(t)
	p := f.adopted()
	if err := attach.RemoveRecord(f.StateDir, repairtest.ID(p)); err != nil {
		t.Fatal(err)
	}
	f.look(1)
	f.WantWhole(p)
	f.wantRepairs(Adopted, 2)
}

// The pins are lost, and then the pod goes.
func TestDeviceWithoutPinsIsRemoved(t *testing.T) {
	f := newFixture(t)
	p := f.adopted()
	if err := os.RemoveAll(f.Pin(p, "")); err != nil {
		t.Fatal(err)
	}
	f.DeleteDevice(p)
	f.pods = nil
	f.look(2)
	f.eventually("pruned", func() bool { // on a busy machine, two looks may not have time for it
		devices, err := f.Datapath.Devices()
		return err == nil && len(devices) == 0
	})
	f.WantNothing()
	f.wantRepairs(Removed, 1)
}

func TestDeviceIsGone(t *testing.T) {
	f := newFixture(t)
	p := f.adopted()
	f.DeleteDevice(p)
	f.pods = nil
	f.look(2)
	f.WantNothing()
	f.wantRepairs(Removed, 1)
}

// Pins are orphaned once they have neither a record nor a device.
func TestOrphanedPinsAreRemoved(t *testing.T) {
	f := newFixture(t)
	p := f.adopted()
	if err := attach.RemoveRecord(f.StateDir, repairtest.ID(p)); err != nil {
		t.Fatal(err)
	}
	f.pods = nil
	f.look(2)
	if err := f.Check(p); err != nil {
		t.Errorf("its device still exists: %v", err)
	}
	f.DeleteDevice(p)
	f.look(1)
	f.WantNothing()
	f.wantRepairs(Removed, 1)
}

// The ifindex belongs to another pod by now, as after a reboot.
func TestReusedIfindex(t *testing.T) {
	f := newFixture(t)
	p := f.AddPod(t)
	stale := attach.Record{ContainerID: "old", IfName: "eth0", IfIndex: p.IfIndex, HostIfName: "veth4711"}
	if err := attach.WriteRecord(f.StateDir, stale); err != nil {
		t.Fatal(err)
	}
	f.look(2)
	f.WantNothing()
	f.wantRepairs(Reattached, 0)
}

// Our plugin is the first in the chain to get DEL. The runtime keeps its record of the network until the last one has.
func TestPodBeingDeletedIsNotAdopted(t *testing.T) {
	f := newFixture(t)
	p := f.adopted()
	if err := f.del(p); err != nil {
		t.Fatal(err)
	}
	f.look(3)
	f.WantNothing()
	f.deleted = nil // it lives on
	f.look(1)
	f.WantWhole(p)
}

// While a DEL is in progress nothing is repaired, and what it detaches is not reported as broken.
func TestDELExcludesRepairs(t *testing.T) {
	f := newFixture(t)
	p := f.adopted()
	late := f.run()
	unlock, err := attach.LockRecords(t.Context(), f.StateDir, unix.LOCK_SH)
	if err != nil {
		t.Fatal(err)
	}
	f.Detach(p, "steer")
	f.look(3)
	if f.Check(p) == nil || !errors.Is(f.Check(late), attach.ErrNotAttached) || f.broken > 0 || !f.again {
		t.Errorf("%v, %v\n%s", f.Check(p), f.Check(late), f.log)
	}
	unlock()
	f.look(2)
	f.WantWhole(p)
	f.WantWhole(late)
}

// A DEL that does not take the lock may come at any moment of a repair.
func TestDELWithoutLock(t *testing.T) {
	f := newFixture(t)
	for i := range 20 {
		f.pods = nil
		p := f.adopted()
		f.Detach(p, "steer")
		f.look(1)
		var both sync.WaitGroup
		both.Go(func() {
			_ = f.NS.Do(func(ns.NetNS) error { _, err := f.repair(t.Context(), f.looker.Look(f.records)); return err })
		})
		time.Sleep(time.Duration(i) * 4 * time.Millisecond)
		for range 3 { // as runtimes do
			if f.DEL(p) == nil {
				break
			}
		}
		both.Wait()
		if err := os.Remove(f.Cached(p)); err != nil {
			t.Fatal(err)
		}
		f.DeleteDevice(p)
		f.pods = nil
		for _, failure := range f.repairer.failures {
			failure.next = time.Time{} // a repair that failed because of DEL would be retried later
		}
		f.look(3)
		f.WantNothing()
	}
}

// A repair that has used up its time leaves the rest to the next one.
func TestRepairStopsWhenTimeIsUp(t *testing.T) {
	f := newFixture(t)
	p, late := f.adopted(), f.run()
	f.Detach(p, "steer")
	f.readRecords()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for range 3 {
		bpftest.Do(t, f.NS, func() error {
			_, err := f.repair(ended, f.looker.Look(f.records))
			return err
		})
		if f.Check(p) == nil || f.Check(late) == nil || !f.again {
			t.Fatalf("%v, %v, again %v", f.Check(p), f.Check(late), f.again)
		}
	}
	f.look(1)
	f.WantWhole(p)
	f.WantWhole(late)
	if f.look(1) || f.again {
		t.Error("repairs never end")
	}
}

// Adopted pods get the hook of the node. Pods that are attached already keep theirs.
func TestAdoptedPodsHaveTheHook(t *testing.T) {
	f := newFixture(t)
	byTC := f.adopted()
	f.repairer.Hook = attach.HookXDP
	byXDP := f.adopted()
	f.Detach(byTC, "steer")
	f.look(2)
	f.WantWhole(byTC)
	for p, want := range map[int]bool{byTC.IfIndex: false, byXDP.IfIndex: true} {
		f.In(func() error {
			device, err := netlink.LinkByIndex(p)
			if err != nil {
				return err
			}
			if xdp := device.Attrs().Xdp; (xdp != nil && xdp.ProgId != 0) != want {
				t.Errorf("%s: XDP %+v", device.Attrs().Name, xdp)
			}
			return nil
		})
	}
	if a, b := f.Record(byTC).Hook, f.Record(byXDP).Hook; a != "" && a != attach.HookTC || b != attach.HookXDP {
		t.Errorf("on record %q, %q", a, b)
	}
}
