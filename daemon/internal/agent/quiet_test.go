package agent

import (
	"errors"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// addBegins writes the record with which ADD begins; addEnds attaches as ADD does.
func (k *kept) addBegins(p *bpftest.Pod) attach.Record {
	k.t.Helper()
	r := attach.Record{
		ContainerID: idOf(p).ContainerID, IfName: "eth0", IfIndex: p.IfIndex, HostIfName: p.HostIfName, PodNetns: p.Netns,
		PodNamespace: "shop", PodName: p.HostIfName, PodUID: "u-1", CreatedAt: time.Now(), Error: attach.Unfinished,
	}
	if err := attach.WriteRecord(k.stateDir, r); err != nil {
		k.t.Fatal(err)
	}
	return r
}

func (k *kept) addEnds(p *bpftest.Pod, r attach.Record) {
	k.t.Helper()
	err := k.node.NS.Do(func(ns.NetNS) error {
		return attach.Attach(k.datapath, k.bpfDir, idOf(p), r.Target(), attach.ViaAuto)
	})
	r.Error = ""
	if err := errors.Join(err, attach.WriteRecord(k.stateDir, r)); err != nil {
		k.t.Fatal(err)
	}
}

// Pods that come and go on a healthy node are no reason for a warning, however the daemon's looks and the source's news fall
// among the steps of ADD and DEL.
func TestChurnWarnsOfNothing(t *testing.T) {
	k := newKept(t)
	listed := func(p *bpftest.Pod) func(probe.Pod) bool {
		return func(other probe.Pod) bool { return other.Name == p.HostIfName }
	}
	for range 8 {
		p := k.run() // the source tells of it early
		r := k.addBegins(p)
		k.look(2)
		k.addEnds(p, r)
		k.look(2)
		k.wantWhole(p)
		if err := k.del(p); err != nil {
			t.Fatal(err)
		}
		k.look(2)
		k.deleteDevice(p)
		k.look(1)
		if err := os.Remove(k.cached(p)); err != nil {
			t.Fatal(err)
		}
		k.look(2) // the source still tells of it
		k.pods = slices.DeleteFunc(k.pods, listed(p))
		k.look(1)
	}
	if n := k.logged("level=WARN") + k.logged("level=ERROR"); n > 0 {
		t.Errorf("%d warnings:\n%s", n, k.log)
	}
}

// What lasts is said, once.
func TestWhatLastsIsWarnedOf(t *testing.T) {
	k := newKept(t)
	p := k.run()
	r := k.addBegins(p)
	r.CreatedAt = time.Now().Add(-unfinishedLimit)
	if err := attach.WriteRecord(k.stateDir, r); err != nil {
		t.Fatal(err)
	}
	k.look(3)
	if n := k.logged("not attached"); n != 1 {
		t.Errorf("an ADD that never finished was logged %d times:\n%s", n, k.log)
	}

	unknown := map[string]error{"shop/web": errors.New("no record of its network")}
	now := time.Now()
	for _, after := range []time.Duration{0, beingDeleted / 2, beingDeleted, 2 * beingDeleted} {
		k.keeper.noteUnadopted(k.daemon, unknown, now.Add(after))
	}
	if n := k.logged("no record of its network"); n != 1 {
		t.Errorf("a pod that cannot be adopted was logged %d times:\n%s", n, k.log)
	}
	k.keeper.noteUnadopted(k.daemon, nil, now)
	k.keeper.noteUnadopted(k.daemon, unknown, now.Add(3*beingDeleted))
	if n := k.logged("no record of its network"); n != 1 {
		t.Errorf("it was logged again, although it was attached meanwhile:\n%s", k.log)
	}
}
