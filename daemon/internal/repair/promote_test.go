package repair

import (
	"context"
	"errors"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
)

// Nothing is left of what is deleted while others are promoted.
func TestDELWhilePromoting(t *testing.T) {
	f := newFixture(t)
	f.RequireTCX()
	pods := f.clsactPods(12)
	f.promoting()
	f.eventually("at work", func() bool { return slices.ContainsFunc(pods, f.IsTCX) })
	for i, p := range pods {
		if i%2 == 0 {
			continue
		}
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second) // as the plugin waits
		unlock, err := attach.LockRecords(ctx, f.StateDir, unix.LOCK_SH)
		cancel()
		if err != nil {
			t.Fatalf("DEL of %s: %v", p.HostIfName, err)
		}
		err = f.del(p)
		unlock()
		if err != nil {
			t.Fatal(err)
		}
		f.DeleteDevice(p)
	}
	for i, p := range pods {
		if i%2 == 0 {
			f.eventually("promoted", func() bool { return f.IsTCX(p) })
			f.WantWhole(p)
		} else if _, err := os.Stat(f.Pin(p, "")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", p.HostIfName, err)
		}
	}
	if f.log.Count("stays on clsact") > 0 {
		t.Error(f.log)
	}
}

// However many there are to be promoted, a DEL gets the lock within the two seconds that it waits.
func TestDELGetsTheLock(t *testing.T) {
	f := newFixture(t)
	f.promoter.promote = func(attach.ID) error {
		time.Sleep(20 * time.Millisecond) // as a tcx link takes for both sides
		return nil
	}
	f.promoting()
	f.promoter.offered <- make([]attach.ID, 10000)
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		unlock, err := attach.LockRecords(ctx, f.StateDir, unix.LOCK_SH)
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

func (f *fixture) slowPromoter() *slowPromoter {
	s := &slowPromoter{make(chan attach.ID), make(chan error)}
	f.promoter.promote = func(id attach.ID) error {
		s.began <- id
		return <-s.end
	}
	return s
}

func (s *slowPromoter) lookUntilItBegins(f *fixture) {
	f.t.Helper()
	f.eventually("a promotion", func() bool {
		select {
		case <-s.began:
			return true
		default:
			return false
		}
	})
}

// clsactPods are so many, which need promoting.
func (f *fixture) clsactPods(n int) (pods []*bpftest.Pod) {
	f.t.Helper()
	for range n {
		p := f.adopted()
		f.AttachClsact(p)
		pods = append(pods, p)
	}
	return pods
}

// A promotion takes its time. The loop does not wait for it, and the daemon's end does, but for none that has not begun.
func TestThePromoterIsSlow(t *testing.T) {
	f := newFixture(t)
	f.clsactPods(3)
	s := f.slowPromoter()
	stop := f.promoting()
	s.lookUntilItBegins(f)
	f.look(3) // it returns
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
	f := newFixture(t)
	f.clsactPods(2)
	var asked atomic.Int32
	f.promoter.promote = func(attach.ID) error { asked.Add(1); return ebpf.ErrNotSupported }
	var done sync.WaitGroup
	done.Go(func() { f.promoter.Run(t.Context()) })
	f.eventually("asked", func() bool { return asked.Load() > 0 })
	done.Wait()
	f.look(3)
	if asked.Load() != 1 || f.log.Count("has no tcx") != 1 {
		t.Errorf("asked %d times\n%s", asked.Load(), f.log)
	}
}

// What fails is tried again at each look, and said once. What a DEL has removed is no failure.
func TestPromotionFails(t *testing.T) {
	f := newFixture(t)
	f.clsactPods(1)
	s := f.slowPromoter()
	f.promoting()
	try := func(err error) {
		t.Helper()
		s.lookUntilItBegins(f)
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
	if f.log.Count("stays on clsact") != 3 || f.log.Count("error=other") != 1 || f.log.Count("error=busy") != 2 {
		t.Error(f.log)
	}
}
