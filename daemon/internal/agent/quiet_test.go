package agent

import (
	"os"
	"slices"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// Pods that come and go on a healthy node are no reason for a warning, however the daemon's looks and the source's news fall
// among the steps of ADD and DEL.
func TestChurnWarnsOfNothing(t *testing.T) {
	k := newKept(t)
	listed := func(p *bpftest.Pod) func(probe.Pod) bool {
		return func(other probe.Pod) bool { return other.Name == p.HostIfName }
	}
	for range 8 {
		p := k.run() // the source tells of it early
		r := k.BeginADD(p)
		k.look(2)
		k.FinishADD(p, r)
		k.look(2)
		k.WantWhole(p)
		if err := k.DEL(p); err != nil {
			t.Fatal(err)
		}
		k.look(2)
		k.DeleteDevice(p)
		k.look(1)
		if err := os.Remove(k.Cached(p)); err != nil {
			t.Fatal(err)
		}
		k.look(2) // the source still tells of it
		k.pods = slices.DeleteFunc(k.pods, listed(p))
		k.look(1)
	}
	if n := k.log.Count("level=WARN") + k.log.Count("level=ERROR"); n > 0 {
		t.Errorf("%d warnings:\n%s", n, k.log)
	}
}

// What lasts is said, once.
func TestWhatLastsIsWarnedOf(t *testing.T) {
	k := newKept(t)
	p := k.run()
	r := k.BeginADD(p)
	r.CreatedAt = time.Now().Add(-unfinishedLimit)
	if err := attach.WriteRecord(k.stateDir, r); err != nil {
		t.Fatal(err)
	}
	k.look(3)
	if n := k.log.Count("not attached"); n != 1 {
		t.Errorf("an ADD that never finished was logged %d times:\n%s", n, k.log)
	}
}
