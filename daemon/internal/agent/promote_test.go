package agent

import (
	"context"
	"errors"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/repair"
)

// promoting runs the keeper's promoter until stop, which may be called more than once.
func (k *kept) promoting() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = k.node.NS.Do(func(ns.NetNS) error { k.keeper.promoter.run(ctx, k.daemon); return nil })
	}()
	stop = func() { cancel(); <-done }
	k.t.Cleanup(stop)
	return stop
}

// eventually looks until something is so.
func (k *kept) eventually(what string, ok func() bool) {
	k.t.Helper()
	for range 1000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
		k.look(1)
	}
	k.t.Fatalf("never: %s\n%s", what, k.log)
}

// filters are the names of ours on the pod's device.
func (k *kept) filters(p *bpftest.Pod) (names []string) {
	k.t.Helper()
	k.inNode(func() error {
		device, err := netlink.LinkByIndex(p.IfIndex)
		if err != nil {
			return err
		}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			filters, err := netlinksafe.FilterList(device, parent)
			if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) { // no such qdisc
				return err
			}
			for _, f := range filters {
				if b, ok := f.(*netlink.BpfFilter); ok && strings.HasPrefix(b.Name, "probelet/") {
					names = append(names, b.Name)
				}
			}
		}
		return nil
	})
	return names
}

// isTCX reports whether the pod's tc programs are attached by links, and by nothing else.
func (k *kept) isTCX(p *bpftest.Pod) bool {
	_, err := os.Stat(k.pin(p, "steer"))
	return err == nil && len(k.filters(p)) == 0
}

// haveTCX skips the test on a kernel without.
func (k *kept) haveTCX() {
	k.t.Helper()
	p := k.node.AddPod(k.t)
	var err error
	id := attach.ID{ContainerID: "try", IfName: "eth0"}
	k.inNode(func() error {
		target := attach.Target{IfIndex: p.IfIndex, PodNetns: p.Netns}
		err = attach.Attach(k.datapath, k.bpfDir, id, target, attach.ViaTCX)
		return attach.Detach(k.datapath, k.bpfDir, id)
	})
	if errors.Is(err, ebpf.ErrNotSupported) {
		k.t.Skip("this kernel has no tcx")
	}
	if err != nil {
		k.t.Fatal(err)
	}
}

// What was known stays known.
func TestPromotion(t *testing.T) {
	k := newKept(t)
	k.haveTCX()
	p, adopted := k.adopted(), k.adopted()
	k.attachClsact(p)
	before := k.device(p)
	if k.arm(p); k.isTCX(p) || !k.fresh(p) {
		t.Fatal("not as the plugin makes it")
	}
	k.promoting()
	k.eventually("promoted", func() bool { return k.isTCX(p) })
	k.wantWhole(p)
	k.wantWhole(adopted)
	if k.device(p) != before || !k.fresh(p) {
		t.Error("what was known is forgotten")
	}
	k.wantRepairs(repair.Reattached, 0)
}

// A device that lost trust is tried again once ours are first in line.
func TestPromotionOfALostDevice(t *testing.T) {
	k := newKept(t)
	k.haveTCX()
	p := k.adopted()
	k.attachClsact(p)
	devices, err := ebpf.LoadPinnedMap(k.datapath.Dir()+"/devices", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer devices.Close() //nolint:errcheck // a test's
	const trust = 22      // offset in struct device, bpf/abi.h
	var device []byte
	if device, err = devices.LookupBytes(uint32(p.IfIndex)); err == nil {
		device[trust] = byte(datapath.TrustLost)
		err = devices.Put(uint32(p.IfIndex), device)
	}
	if err != nil {
		t.Fatal(err)
	}
	k.checkDevices()
	k.promoting()
	k.eventually("it is tried again", func() bool {
		device, err := k.datapath.Device(k.device(p))
		return err == nil && device.Trust == datapath.TrustUnproven && k.isTCX(p)
	})
	k.look(1)
	if k.logged("answers do not arrive") != 1 || k.logged("are tried again") != 1 {
		t.Error(k.log)
	}
}

// Nothing is left of what is deleted while others are promoted.
func TestDELWhilePromoting(t *testing.T) {
	k := newKept(t)
	k.haveTCX()
	pods := k.clsactPods(12)
	k.promoting()
	k.eventually("at work", func() bool { return slices.ContainsFunc(pods, k.isTCX) })
	for i, p := range pods {
		if i%2 == 0 {
			continue
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second) // as the plugin waits
		unlock, err := attach.LockRecords(ctx, k.stateDir, unix.LOCK_SH)
		cancel()
		if err != nil {
			t.Fatalf("DEL of %s: %v", p.HostIfName, err)
		}
		err = k.del(p)
		unlock()
		if err != nil {
			t.Fatal(err)
		}
		k.deleteDevice(p)
	}
	for i, p := range pods {
		if i%2 == 0 {
			k.eventually("promoted", func() bool { return k.isTCX(p) })
			k.wantWhole(p)
		} else if _, err := os.Stat(k.pin(p, "")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", p.HostIfName, err)
		}
	}
	if k.logged("stays on clsact") > 0 {
		t.Error(k.log)
	}
}

// However many there are to be promoted, a DEL gets the lock within the two seconds that it waits.
func TestDELGetsTheLock(t *testing.T) {
	k := newKept(t)
	k.keeper.promoter.promote = func(*daemon, attach.ID) error {
		time.Sleep(20 * time.Millisecond) // as a tcx link takes for both sides
		return nil
	}
	k.promoting()
	k.keeper.promoter.offered <- make([]attach.ID, 10000)
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		unlock, err := attach.LockRecords(ctx, k.stateDir, unix.LOCK_SH)
		cancel()
		if err != nil {
			t.Fatal(err)
		}
		unlock()
	}
}

// slowPromoter promotes nothing, and reports an error when it is told which.
type slowPromoter struct {
	began chan attach.ID
	end   chan error
}

func (k *kept) slowPromoter() *slowPromoter {
	s := &slowPromoter{make(chan attach.ID), make(chan error)}
	k.keeper.promoter.promote = func(_ *daemon, id attach.ID) error {
		s.began <- id
		return <-s.end
	}
	return s
}

func (s *slowPromoter) lookUntilItBegins(k *kept) {
	k.t.Helper()
	k.eventually("a promotion", func() bool {
		select {
		case <-s.began:
			return true
		default:
			return false
		}
	})
}

// clsactPods are so many, which need promoting.
func (k *kept) clsactPods(n int) (pods []*bpftest.Pod) {
	k.t.Helper()
	for range n {
		p := k.adopted()
		k.attachClsact(p)
		pods = append(pods, p)
	}
	return pods
}

// A promotion takes its time. The loop does not wait for it, and the daemon's end does, but for none that has not begun.
func TestThePromoterIsSlow(t *testing.T) {
	k := newKept(t)
	k.clsactPods(3)
	s := k.slowPromoter()
	stop := k.promoting()
	s.lookUntilItBegins(k)
	k.look(3) // it returns
	ended := make(chan struct{})
	go func() { stop(); close(ended) }()
	select {
	case <-ended:
		t.Fatal("ended in the middle of a promotion")
	case id := <-s.began:
		t.Fatalf("began another, %s", id)
	case <-time.After(100 * time.Millisecond):
	}
	s.end <- nil
	<-ended
}

// A kernel without tcx is asked once.
func TestPromotionWithoutTCX(t *testing.T) {
	k := newKept(t)
	k.clsactPods(2)
	var asked atomic.Int32
	k.keeper.promoter.promote = func(*daemon, attach.ID) error { asked.Add(1); return ebpf.ErrNotSupported }
	var done sync.WaitGroup
	done.Go(func() { k.keeper.promoter.run(t.Context(), k.daemon) })
	k.eventually("asked", func() bool { return asked.Load() > 0 })
	done.Wait()
	k.look(3)
	if asked.Load() != 1 || k.logged("has no tcx") != 1 {
		t.Errorf("asked %d times\n%s", asked.Load(), k.log)
	}
}

// What fails is tried again at each look, and said once. What a DEL has removed is no failure.
func TestPromotionFails(t *testing.T) {
	k := newKept(t)
	k.clsactPods(1)
	s := k.slowPromoter()
	k.promoting()
	try := func(err error) {
		t.Helper()
		s.lookUntilItBegins(k)
		s.end <- err
	}
	busy := errors.New("busy")
	for range 3 {
		try(busy)
	}
	try(os.ErrNotExist)
	try(errors.New("other"))
	try(busy)
	try(nil) // so that all before it has been logged
	if k.logged("stays on clsact") != 3 || k.logged("error=other") != 1 || k.logged("error=busy") != 2 {
		t.Error(k.log)
	}
}
