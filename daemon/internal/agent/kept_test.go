package agent

import (
	"context"
	"log/slog"
	"net/netip"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/logtest"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/repair"
	"github.com/probelet/probelet/daemon/internal/repair/repairtest"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

// kept is a node that an agent looks after step by step, without its loop.
type kept struct {
	*repairtest.Node
	*agent
	t   testing.TB
	log *logtest.Log
}

func newKept(t testing.TB) *kept {
	t.Helper()
	k := &kept{Node: repairtest.New(t), t: t, log: &logtest.Log{}}
	c := Config{BPFDir: k.BPFDir, StateDir: k.StateDir, Defaults: probe.NewDefaults()}
	k.agent = newAgent(slog.New(slog.NewTextHandler(k.log, nil)), k.Datapath, c, statedir.Endpoints{}, idleRefresher(t))
	k.podsKnown = true
	k.start()
	return k
}

// start gives the agent the repairs of a daemon that has just started.
func (k *kept) start() {
	k.t.Helper()
	k.datapath = k.Datapath
	k.In(func() (err error) {
		k.repairs, err = newRepairs(k.repairConfig(attach.HookTC, k.Adopt()))
		return err
	})
	looker := k.repairs.looker
	k.t.Cleanup(func() { _ = looker.Close() })
}

// run adds a pod that was started before probelet, and is known to the source.
func (k *kept) run() *bpftest.Pod {
	k.t.Helper()
	p := k.Run()
	port := probe.Spec{Container: "c", Type: probe.Readiness, Kind: probe.TCP, Port: 80, Period: 5 * time.Minute, Timeout: time.Second}
	k.pods = append(k.pods, probe.Pod{
		Namespace: "shop", Name: p.HostIfName, UID: "u-1", IPs: []netip.Addr{p.IPv4}, Probes: []probe.Spec{port},
	})
	return p
}

// adopted adds a pod of run, and makes the agent adopt it.
func (k *kept) adopted() *bpftest.Pod {
	k.t.Helper()
	p := k.run()
	k.look(1)
	k.WantWhole(p)
	return p
}

// look makes the agent look a number of times, and returns whether the last look changed something.
func (k *kept) look(times int) (changed bool) {
	k.t.Helper()
	for range times {
		k.readRecords()
		k.In(func() (err error) {
			changed, err = k.lookOnce(k.t.Context())
			return err
		})
		k.readRecords()
		k.checkDevices()
	}
	return changed
}

// lookOnce looks and repairs, in the node's network namespace.
func (k *kept) lookOnce(ctx context.Context) (changed bool, err error) {
	return k.repair(ctx, k.repairs.looker.Look(k.records))
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

func (k *kept) wantRepairs(action repair.Action, want int) {
	k.t.Helper()
	if got := k.log.Count("attachment " + string(action)); got != want {
		k.t.Errorf("%s %d times, want %d\n%s", action, got, want, k.log)
	}
}

// arm makes the pod's port fresh by a probe that succeeded.
func (k *kept) arm(p *bpftest.Pod) {
	k.t.Helper()
	k.observeAs(k.Device(p))
}

// observeAs makes the agent learn of a probe's success by a device.
func (k *kept) observeAs(device datapath.DeviceKey) {
	k.observe([]evidence.Observation{{Device: device, Outcome: probe.Outcome{
		Port: 80, Kind: probe.TCP, Event: probe.Connected, ObservedAt: datapath.Now(), Duration: 1,
	}}})
}

// attachClsact does what the plugin does at ADD.
func (k *kept) attachClsact(p *bpftest.Pod) {
	k.t.Helper()
	k.AttachClsact(p)
	k.checkDevices()
}

// fresh reports whether connections to the pod's port are taken.
func (k *kept) fresh(p *bpftest.Pod) bool {
	k.t.Helper()
	maps, err := attach.OpenPod(k.Datapath, k.BPFDir, repairtest.ID(p))
	if err != nil {
		return false
	}
	port, tally, err := maps.Get(datapath.PortKey(80))
	return err == nil && datapath.PortFresh(port, tally, datapath.Now())
}
