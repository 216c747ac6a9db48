package agent

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/adopt"
	"github.com/probelet/probelet/daemon/internal/prober"
	"github.com/probelet/probelet/daemon/internal/refresh"
	"github.com/probelet/probelet/daemon/internal/repair"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/internal/polltest"
)

// The first look that finds an attachment broken ends answering, whatever is observed. The second repairs it, and starts from nothing.
func TestRepairTakesTwoLooks(t *testing.T) {
	unpin := func(program string) func(*kept, *bpftest.Pod) {
		return func(k *kept, p *bpftest.Pod) {
			_ = os.Remove(k.Pin(p, program))
			polltest.Eventually(k.t, "the kernel has detached "+program, func() bool { return k.Check(p) != nil })
		}
	}
	for name, test := range map[string]struct {
		hook attach.Hook
		lose func(*kept, *bpftest.Pod)
	}{
		"respond":             {attach.HookXDP, func(k *kept, p *bpftest.Pod) { k.Detach(p, "respond") }},
		"steer":               {attach.HookTC, func(k *kept, p *bpftest.Pod) { k.Detach(p, "steer") }},
		"observe":             {attach.HookTC, func(k *kept, p *bpftest.Pod) { k.Detach(p, "observe") }},
		"pin of respond":      {attach.HookXDP, unpin("respond")},
		"pin of observe":      {attach.HookTC, unpin("observe")},
		"the programs forgot": {attach.HookTC, func(k *kept, p *bpftest.Pod) { _ = k.datapath.RemoveDevice(k.Device(p)) }},
		"all filters": {attach.HookTC, func(k *kept, p *bpftest.Pod) {
			k.attachClsact(p)
			k.In(func() error { return attach.RemoveFilters(p.IfIndex) })
		}},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKept(t)
			k.repairs.repairer.Hook = test.hook
			p, other := k.adopted(), k.adopted()
			for _, p := range []*bpftest.Pod{p, other} {
				if k.arm(p); !k.fresh(p) {
					t.Fatal("not fresh")
				}
			}
			test.lose(k, p)
			k.look(1)
			if k.Check(p) == nil || k.fresh(p) || !k.repairs.again {
				t.Fatalf("after one look: %v, fresh %v", k.Check(p), k.fresh(p))
			}
			if k.arm(p); k.fresh(p) {
				t.Error("fresh although it is broken")
			}
			k.look(1)
			k.WantWhole(p)
			if k.fresh(p) {
				t.Error("fresh because of previous evidence")
			}
			if k.arm(p); !k.fresh(p) || !k.fresh(other) {
				t.Error("not fresh after another observation, or the other pod is not")
			}
			k.look(2)
			k.wantRepairs(repair.Reattached, 1)
			if k.log.Count("attachment is broken") != 1 {
				t.Error(k.log)
			}
		})
	}
}

// Attaching a pod again loses what the maps knew of a failed server, so nothing is answered for it.
func TestReattachedPodStartsFromNothing(t *testing.T) {
	n := newNode(t)
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.attach()
	n.start()
	healthz := n.makeFresh()
	n.status.Store(500)
	n.attachMaps(n.pod, n.idOf(n.pod))
	n.eventually("the probe's endpoint is known again", n.has(healthz))
	n.want("/healthz", 500, false)
	n.status.Store(200)
	n.want("/healthz", 200, false)
	n.eventually("fresh again", n.open(8080))
}

// startKept runs the daemon as start does, on the pod's node, whose attachments it repairs.
func (n *node) startKept() {
	n.t.Helper()
	specs, err := openSource(n.config, n.logger())
	if err != nil {
		n.t.Fatal(err)
	}
	finder, err := prober.Parse(n.config.Prober)
	if err != nil {
		n.t.Fatal(err)
	}
	who, err := finder.Find()
	if err := errors.Join(err, n.d.SetProber(who)); err != nil {
		n.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	in, err := watch(ctx, n.config.StateDir, n.d, specs, n.logger())
	if err != nil {
		n.t.Fatal(err)
	}
	refresher, err := refresh.New(ownSockets{n.d, n.config.openSocket, func() {}}, datapath.Now)
	if err != nil {
		n.t.Fatal(err)
	}
	ag := newAgent(n.logger(), n.d, n.config, statedir.Endpoints{}, refresher)
	ag.source, ag.held = specs, func() error { return nil }
	ag.prober = &proberFollower{log: n.logger(), finder: finder, set: n.d.SetProber, who: who}
	bpftest.Do(n.t, n.pod.Node.NS, func() (err error) {
		ag.repairs, err = newRepairs(ag.repairConfig(n.config.Hook, adopt.Node{Root: "/", CacheDir: n.t.TempDir()}))
		return err
	})
	in.all.Go(func() { _ = n.pod.Node.NS.Do(func(ns.NetNS) error { ag.repairs.looker.Run(ctx); return nil }) })
	done := make(chan error, 1)
	go func() { done <- n.pod.Node.NS.Do(func(ns.NetNS) error { return ag.run(ctx, in) }) }()
	n.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("daemon: %v", err)
		}
		in.all.Wait()
		refresher.Close()
	})
}

// If a program is detached, the daemon's next look notices, and the one after attaches it again.
func TestADaemonRepairs(t *testing.T) {
	for _, test := range []struct {
		hook    attach.Hook
		program string
	}{{attach.HookTC, "steer"}, {attach.HookTC, "observe"}, {attach.HookXDP, "respond"}} {
		t.Run(test.program, func(t *testing.T) {
			n := newNode(t)
			n.config.Hook = test.hook
			n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
			n.attach()
			logged := n.keepLog()
			n.startKept()
			healthz := n.makeFresh()
			n.detach(test.program)
			n.eventually("nothing is answered", not(n.open(8080)))
			n.eventually("attached again", func() (whole bool) {
				bpftest.Do(t, n.pod.Node.NS, func() error {
					whole = attach.Check(n.d, n.config.BPFDir, n.idOf(n.pod), n.pod.IfIndex) == nil
					return nil
				})
				return whole
			})
			n.eventually("the probe's endpoint is known again", n.has(healthz))
			n.want("/healthz", 200, false)
			n.eventually("fresh again", n.open(8080))
			n.want("/healthz", 200, true)
			if logged("attachment is broken") != 1 || logged("attachment reattached") != 1 {
				t.Error("not logged once")
			}
		})
	}
}
