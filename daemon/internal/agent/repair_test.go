package agent

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/netip"
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
	"github.com/probelet/probelet/daemon/internal/adopt"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/prober"
	"github.com/probelet/probelet/daemon/internal/refresh"
	"github.com/probelet/probelet/daemon/internal/repair"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

// kept is a node that a keeper looks after, with no loop around it.
type kept struct {
	*daemon
	t        testing.TB
	node     *bpftest.Node
	keeper   *keeper
	log      *safeLog
	cacheDir string // libcni's
}

// safeLog may be read while it is written.
type safeLog struct {
	mutex sync.Mutex
	text  strings.Builder
}

func (l *safeLog) Write(text []byte) (int, error) {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	return l.text.Write(text)
}

func (l *safeLog) String() string {
	l.mutex.Lock()
	defer l.mutex.Unlock()
	return l.text.String()
}

func newKept(t testing.TB) *kept {
	t.Helper()
	k := &kept{t: t, node: bpftest.NewNode(t), log: &safeLog{}, cacheDir: t.TempDir()}
	c := Config{BPFDir: bpftest.BPFDir(t), StateDir: filepath.Join(t.TempDir(), "state"), Defaults: probe.NewDefaults()}
	err := errors.Join(os.Mkdir(filepath.Join(k.cacheDir, "results"), 0o700), os.MkdirAll(attach.RecordsDir(c.StateDir), 0o700))
	if err != nil {
		t.Fatal(err)
	}
	k.daemon = newDaemon(slog.New(slog.NewTextHandler(k.log, nil)), nil, c, statedir.Endpoints{}, idleRefresher(t))
	k.podsKnown = true
	k.keeper = makeKeeper(adopt.Node{Root: "/", CacheDir: k.cacheDir})
	k.load()
	return k
}

// load makes the daemon one that has just been started.
func (k *kept) load() {
	k.t.Helper()
	d, err := datapath.Ensure(k.t.Context(), k.bpfDir)
	if err != nil {
		k.t.Fatal(err)
	}
	k.t.Cleanup(func() { _ = d.Close() })
	k.datapath = d
	k.keeper = makeKeeper(k.keeper.adopt)
	k.keeper.looker = k.looker()
}

// looker returns one that looks at the node of the test.
func (k *kept) looker() (l *repair.Looker) {
	k.t.Helper()
	k.inNode(func() (err error) {
		l, err = repair.New(k.datapath, k.bpfDir)
		return err
	})
	k.t.Cleanup(func() { _ = l.Close() })
	return l
}

func idOf(p *bpftest.Pod) attach.ID {
	return attach.ID{ContainerID: "c-" + p.HostIfName, IfName: "eth0"}
}

// run adds a pod that had its network before, as the runtime and the source tell of it.
func (k *kept) run() *bpftest.Pod {
	k.t.Helper()
	p := k.node.AddPod(k.t)
	text, err := json.Marshal(map[string]any{
		"kind": "cniCacheV1", "containerId": idOf(p).ContainerID, "ifName": "eth0", "networkName": "pods", "netns": p.NS.Path(),
		"cniArgs": [][2]string{{"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", p.HostIfName}, {"K8S_POD_UID", "u-1"}},
		"result": map[string]any{
			"interfaces": []map[string]string{{"name": p.HostIfName}, {"name": "eth0", "sandbox": p.NS.Path()}},
			"ips":        []map[string]string{{"address": p.IPv4.String() + "/24"}},
		},
	})
	if err == nil {
		err = os.WriteFile(k.cached(p), text, 0o600)
	}
	if err != nil {
		k.t.Fatal(err)
	}
	port := probe.Spec{Container: "c", Type: probe.Readiness, Kind: probe.TCP, Port: 80, Period: 5 * time.Minute, Timeout: time.Second}
	k.pods = append(k.pods, probe.Pod{
		Namespace: "shop", Name: p.HostIfName, UID: "u-1", IPs: []netip.Addr{p.IPv4}, Probes: []probe.Spec{port},
	})
	return p
}

func (k *kept) cached(p *bpftest.Pod) string {
	return filepath.Join(k.cacheDir, "results", p.HostIfName)
}

// adopted is a pod of run that is attached.
func (k *kept) adopted() *bpftest.Pod {
	k.t.Helper()
	p := k.run()
	k.look(1)
	k.wantWhole(p)
	return p
}

// look has the keeper look a number of times, and returns whether the last one changed something.
func (k *kept) look(times int) (changed bool) {
	k.t.Helper()
	for range times {
		k.readRecords()
		bpftest.Do(k.t, k.node.NS, func() (err error) {
			changed, err = k.lookOnce(k.t.Context())
			return err
		})
		k.readRecords()
		k.checkDevices()
	}
	return changed
}

// lookOnce looks and does what is called for, in the node's network namespace.
func (k *kept) lookOnce(ctx context.Context) (changed bool, err error) {
	return k.keeper.apply(ctx, k.daemon, k.keeper.looker.Look(k.records))
}

func (k *kept) check(p *bpftest.Pod) (err error) {
	k.t.Helper()
	bpftest.Do(k.t, k.node.NS, func() error {
		err = attach.Check(k.datapath, k.bpfDir, idOf(p), p.IfIndex)
		return nil
	})
	return err
}

func (k *kept) wantWhole(p *bpftest.Pod) {
	k.t.Helper()
	if err := k.check(p); err != nil {
		k.t.Errorf("%v\n%s", err, k.log)
	}
	if r := k.record(p); r.Error != "" || r.Passing {
		k.t.Errorf("record %+v\n%s", r, k.log)
	}
}

func (k *kept) record(p *bpftest.Pod) attach.Record {
	k.t.Helper()
	r, err := attach.ReadRecord(k.stateDir, idOf(p))
	if err != nil {
		k.t.Fatalf("%v\n%s", err, k.log)
	}
	return r
}

// wantNothing is that neither pins nor records nor maps in use are left.
func (k *kept) wantNothing() {
	k.t.Helper()
	ids, err := attach.List(k.bpfDir)
	records, recordsErr := attach.ReadRecords(k.stateDir)
	pods, podsErr := k.datapath.Devices()
	if err := errors.Join(err, recordsErr, podsErr); err != nil || len(ids)+len(records)+len(pods) > 0 {
		k.t.Errorf("pinned %v, on record %v, in use %v, %v\n%s", ids, records, pods, err, k.log)
	}
}

func (k *kept) wantRepairs(what repair.Action, want int) {
	k.t.Helper()
	if got := k.logged("attachment " + string(what)); got != want {
		k.t.Errorf("%s %d times, want %d\n%s", what, got, want, k.log)
	}
}

func (k *kept) logged(text string) int { return strings.Count(k.log.String(), text) }

// pin is a file of the pod's attachment.
func (k *kept) pin(p *bpftest.Pod, name string) string {
	return filepath.Join(datapath.AttachmentsDir(k.bpfDir), idOf(p).ContainerID+"@eth0", name)
}

// detach detaches one of the programs, as bpftool does it.
func (k *kept) detach(p *bpftest.Pod, program string) {
	k.t.Helper()
	if err := detachPinned(k.pin(p, program)); err != nil {
		k.t.Fatal(err)
	}
}

// occupy puts somebody else's XDP program on the pod's device; none with fd -1.
func (k *kept) occupy(p *bpftest.Pod, fd int) {
	k.t.Helper()
	bpftest.Do(k.t, k.node.NS, func() error {
		device, err := netlink.LinkByIndex(p.IfIndex)
		if err != nil {
			return err
		}
		return netlink.LinkSetXdpFdWithFlags(device, fd, unix.XDP_FLAGS_SKB_MODE)
	})
}

func (k *kept) deleteDevice(p *bpftest.Pod) {
	k.t.Helper()
	bpftest.Do(k.t, k.node.NS, func() error {
		device, err := netlink.LinkByIndex(p.IfIndex)
		if err != nil {
			return err
		}
		return netlink.LinkDel(device)
	})
}

// del does what the plugin does at DEL.
func (k *kept) del(p *bpftest.Pod) error {
	return p.Node.NS.Do(func(ns.NetNS) error {
		if err := attach.Detach(k.datapath, k.bpfDir, idOf(p)); err != nil {
			return err
		}
		return attach.RemoveRecord(k.stateDir, idOf(p))
	})
}

// arm makes the pod's port fresh by a probe that succeeded.
func (k *kept) arm(p *bpftest.Pod) {
	k.t.Helper()
	k.observeAs(k.device(p))
}

// observeAs has the daemon learn of a probe's success by a device.
func (k *kept) observeAs(device datapath.DeviceKey) {
	k.observe([]evidence.Observation{{Device: device, Outcome: probe.Outcome{
		Port: 80, Kind: probe.TCP, Event: probe.Connected, ObservedAt: datapath.Now(), Duration: 1,
	}}})
}

// device is the pod's, as it is attached.
func (k *kept) device(p *bpftest.Pod) datapath.DeviceKey {
	k.t.Helper()
	key, err := attach.Device(k.bpfDir, idOf(p))
	if err != nil {
		k.t.Fatal(err)
	}
	return key
}

// attachClsact does what the plugin does at ADD.
func (k *kept) attachClsact(p *bpftest.Pod) {
	k.t.Helper()
	k.inNode(func() error {
		return attach.Attach(k.datapath, k.bpfDir, idOf(p), k.record(p).Target(), attach.ViaClsact)
	})
	k.checkDevices()
}

func (k *kept) inNode(f func() error) {
	k.t.Helper()
	bpftest.Do(k.t, k.node.NS, f)
}

// fresh is whether connections to the pod's port are taken.
func (k *kept) fresh(p *bpftest.Pod) bool {
	k.t.Helper()
	maps, err := attach.OpenPod(k.datapath, k.bpfDir, idOf(p))
	if err != nil {
		return false
	}
	port, tally, err := maps.Get(datapath.PortKey(80))
	return err == nil && datapath.PortFresh(port, tally, datapath.Now())
}

// A report may be older than a DEL and another ADD, of which the daemon has not read yet: what those left stays as it is.
func TestRepairLeavesWhatIsNewerThanTheLook(t *testing.T) {
	k := newKept(t)
	p := k.adopted()
	k.detach(p, "steer")
	k.look(1)
	k.inNode(func() error {
		report := k.keeper.looker.Look(k.records)
		if err := k.del(p); err != nil {
			return err
		}
		k.addEnds(p, k.addBegins(p))
		added := k.device(p)
		_, err := k.keeper.apply(t.Context(), k.daemon, report)
		if now := k.device(p); now != added {
			t.Errorf("attached as %+v, then as %+v", added, now)
		}
		return err
	})
	k.look(1)
	k.wantWhole(p)
	k.wantRepairs(repair.Reattached, 0)
}

// What is lost is noticed at once: from then on nothing is answered, whatever is observed. The second look puts it back, and what was
// known before is not known any more.
func TestRepairTakesTwoLooks(t *testing.T) {
	unpin := func(program string) func(*kept, *bpftest.Pod) {
		return func(k *kept, p *bpftest.Pod) {
			_ = os.Remove(k.pin(p, program))
			for k.check(p) == nil { // the kernel detaches it a moment later
				time.Sleep(time.Millisecond)
			}
		}
	}
	for name, test := range map[string]struct {
		hook attach.Hook
		lose func(*kept, *bpftest.Pod)
	}{
		"respond":             {attach.HookXDP, func(k *kept, p *bpftest.Pod) { k.detach(p, "respond") }},
		"steer":               {attach.HookTC, func(k *kept, p *bpftest.Pod) { k.detach(p, "steer") }},
		"observe":             {attach.HookTC, func(k *kept, p *bpftest.Pod) { k.detach(p, "observe") }},
		"pin of respond":      {attach.HookXDP, unpin("respond")},
		"pin of observe":      {attach.HookTC, unpin("observe")},
		"the programs forgot": {attach.HookTC, func(k *kept, p *bpftest.Pod) { _ = k.datapath.RemoveDevice(k.device(p)) }},
		"all filters": {attach.HookTC, func(k *kept, p *bpftest.Pod) {
			k.attachClsact(p)
			k.inNode(func() error { return attach.RemoveFilters(p.IfIndex) })
		}},
	} {
		t.Run(name, func(t *testing.T) {
			k := newKept(t)
			k.hook = test.hook
			p, other := k.adopted(), k.adopted()
			for _, p := range []*bpftest.Pod{p, other} {
				if k.arm(p); !k.fresh(p) {
					t.Fatal("not fresh")
				}
			}
			test.lose(k, p)
			k.look(1)
			if k.check(p) == nil || k.fresh(p) || !k.keeper.again {
				t.Fatalf("after one look: %v, fresh %v", k.check(p), k.fresh(p))
			}
			if k.arm(p); k.fresh(p) {
				t.Error("fresh although it is not whole")
			}
			k.look(1)
			k.wantWhole(p)
			if k.fresh(p) {
				t.Error("fresh by what was known before")
			}
			if k.arm(p); !k.fresh(p) || !k.fresh(other) {
				t.Error("not fresh by what was observed since, or the other pod is not")
			}
			k.look(2)
			k.wantRepairs(repair.Reattached, 1)
			if k.logged("is not whole") != 1 {
				t.Error(k.log)
			}
		})
	}
}

// Somebody else has the place. It is said once, in the log and in the record; tried again ever less often; and put right when the place
// is free.
func TestAnotherXDPProgram(t *testing.T) {
	k := newKept(t)
	k.hook = attach.HookXDP
	other, err := datapath.Load()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close() //nolint:errcheck // a test's
	before, after := k.run(), k.run()
	k.occupy(before, other.Respond().FD())
	for k.look(1); k.check(after) != nil; k.look(1) { // on a busy machine one look may have time for one pod only
	}
	k.detach(after, "respond")
	k.occupy(after, other.Respond().FD())
	k.look(10)
	for _, p := range []*bpftest.Pod{before, after} {
		if r := k.record(p); !strings.Contains(r.Error, "has XDP program") || !r.Passing {
			t.Errorf("record %+v", r)
		}
		f := k.keeper.failures[idOf(p)]
		if f == nil || f.wait != 2*firstRetry || time.Until(f.next) < firstRetry/2 {
			t.Fatalf("%+v", f)
		}
		f.next = time.Now()
	}
	k.look(2)
	if k.logged("cannot be put right") != 3 { // adopting and attaching are two things to fail at
		t.Error(k.log)
	}
	for _, p := range []*bpftest.Pod{before, after} {
		if f := k.keeper.failures[idOf(p)]; f.wait != 4*firstRetry {
			t.Errorf("%+v", f)
		}
		k.occupy(p, -1)
		k.keeper.failures[idOf(p)].next = time.Now()
	}
	k.look(2)
	k.wantWhole(before)
	k.wantWhole(after)
	if len(k.keeper.failures) > 0 {
		t.Errorf("%+v", k.keeper.failures)
	}
}

// A BPF file system was mounted over the one in which everything is pinned. What is attached stays so, out of sight. With XDP it
// keeps the place, and the record says what to do; without, it is behind this one's, and is named as a neighbour.
func TestAnotherBPFFS(t *testing.T) {
	for _, hook := range []attach.Hook{attach.HookXDP, attach.HookTC} {
		t.Run(string(hook), func(t *testing.T) {
			k := newKept(t)
			k.haveTCX()
			k.hook = hook
			p := k.adopted()
			parent := filepath.Dir(k.bpfDir)
			if err := unix.Mount("bpf", parent, "bpf", 0, ""); err != nil {
				t.Fatal(err)
			}
			defer unix.Unmount(parent, unix.MNT_DETACH) //nolint:errcheck // a test's
			if current, err := k.datapath.Current(); err != nil || current {
				t.Errorf("current: %v, %v", current, err)
			}
			k.load()
			k.look(5)
			if hook == attach.HookXDP {
				if r := k.record(p); !strings.Contains(r.Error, "if another BPF file system was mounted over") {
					t.Errorf("record %+v", r)
				}
				if k.logged("cannot be put right") != 1 {
					t.Error(k.log)
				}
				return
			}
			k.wantWhole(p)
			k.inNode(func() error {
				checker, err := attach.NewChecker(k.datapath, k.bpfDir)
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

// Running pods get the programs of a build with another ABI, and nothing is left of those before.
func TestAnotherABI(t *testing.T) {
	k := newKept(t)
	p, gone := k.adopted(), k.adopted()
	old := filepath.Join(k.bpfDir, "v0")
	if err := os.Rename(filepath.Join(k.bpfDir, datapath.ABI), old); err != nil {
		t.Fatal(err)
	}
	if err := attach.RemoveRecord(k.stateDir, idOf(gone)); err != nil {
		t.Fatal(err)
	}
	k.pods = k.pods[:1]
	k.deleteDevice(gone)
	k.load()
	k.look(1)
	if _, err := os.Stat(old); err != nil {
		t.Errorf("removed with what is attached: %v", err)
	}
	k.look(2)
	k.wantWhole(p)
	if _, err := os.Stat(old); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left: %v", err)
	}
	k.wantRepairs(repair.Reattached, 1)
	k.wantRepairs(repair.Removed, 1)
}

// A daemon that died while it adopted a pod has left a record; one of a build that did not call its error passing, too.
func TestHalfAdopted(t *testing.T) {
	for _, passing := range []bool{true, false} {
		k := newKept(t)
		p := k.adopted()
		r := k.record(p)
		r.Error, r.Passing = adoptUnfinished, passing
		if err := errors.Join(attach.WriteRecord(k.stateDir, r), os.Remove(k.pin(p, "steer"))); err != nil {
			t.Fatal(err)
		}
		k.load()
		k.look(2)
		k.wantWhole(p)
	}
}

// ADD could not attach, and the pod was started all the same.
func TestErrorsOfADD(t *testing.T) {
	k := newKept(t)
	p := k.node.AddPod(t)
	r := attach.Record{
		ContainerID: idOf(p).ContainerID, IfName: "eth0", IfIndex: p.IfIndex, HostIfName: p.HostIfName, PodNetns: p.Netns, Error: "busy",
	}
	write := func() {
		t.Helper()
		if err := attach.WriteRecord(k.stateDir, r); err != nil {
			t.Fatal(err)
		}
	}
	write()
	k.look(3)
	if got := k.record(p); got.Error != "busy" {
		t.Errorf("one that does not pass, or an ADD that is under way: %+v", got)
	}
	r.Passing = true
	write()
	k.look(2)
	k.wantWhole(p)
}

func TestTheRecordIsLost(t *testing.T) {
	k := newKept(t)
	p := k.adopted()
	if err := attach.RemoveRecord(k.stateDir, idOf(p)); err != nil {
		t.Fatal(err)
	}
	k.look(1)
	k.wantWhole(p)
	k.wantRepairs(repair.Adopted, 2)
}

// The pins are lost, and then the pod goes.
func TestMapsOfNobodyAreRemoved(t *testing.T) {
	k := newKept(t)
	p := k.adopted()
	if err := os.RemoveAll(k.pin(p, "")); err != nil {
		t.Fatal(err)
	}
	k.deleteDevice(p)
	k.pods = nil
	k.look(2)
	k.wantNothing()
	k.wantRepairs(repair.Removed, 1)
}

func TestADeviceIsGone(t *testing.T) {
	k := newKept(t)
	p := k.adopted()
	k.deleteDevice(p)
	k.pods = nil
	k.look(2)
	k.wantNothing()
	k.wantRepairs(repair.Removed, 1)
}

// What neither record nor device accounts for.
func TestPinsOfNobodyAreRemoved(t *testing.T) {
	k := newKept(t)
	p := k.adopted()
	if err := attach.RemoveRecord(k.stateDir, idOf(p)); err != nil {
		t.Fatal(err)
	}
	k.pods = nil
	k.look(2)
	if err := k.check(p); err != nil {
		t.Errorf("its device is there: %v", err)
	}
	k.deleteDevice(p)
	k.look(1)
	k.wantNothing()
	k.wantRepairs(repair.Removed, 1)
}

// The device's number is another pod's by now, as after a new start of the machine.
func TestADeviceIsAnothers(t *testing.T) {
	k := newKept(t)
	p := k.node.AddPod(t)
	stale := attach.Record{ContainerID: "old", IfName: "eth0", IfIndex: p.IfIndex, HostIfName: "veth4711"}
	if err := attach.WriteRecord(k.stateDir, stale); err != nil {
		t.Fatal(err)
	}
	k.look(2)
	k.wantNothing()
	k.wantRepairs(repair.Reattached, 0)
}

// Of a pod's plugins ours is the first to be told of DEL: until the last one was, the runtime has the pod's network on record.
func TestAPodThatIsBeingDeletedIsNotAdopted(t *testing.T) {
	k := newKept(t)
	p := k.adopted()
	if err := k.del(p); err != nil {
		t.Fatal(err)
	}
	k.look(3)
	k.wantNothing()
	k.deleted[idOf(p).ContainerID] = time.Now().Add(-beingDeleted) // it went on to live
	k.look(1)
	k.wantWhole(p)
}

// While a DEL is under way nothing is done, nor is it held against what it takes apart.
func TestDELKeepsTheKeeperOut(t *testing.T) {
	k := newKept(t)
	p := k.adopted()
	late := k.run()
	unlock, err := attach.LockRecords(t.Context(), k.stateDir, unix.LOCK_SH)
	if err != nil {
		t.Fatal(err)
	}
	k.detach(p, "steer")
	k.look(3)
	if k.check(p) == nil || !errors.Is(k.check(late), attach.ErrNotAttached) || k.logged("is not whole") > 0 || !k.keeper.again {
		t.Errorf("%v, %v\n%s", k.check(p), k.check(late), k.log)
	}
	unlock()
	k.look(2)
	k.wantWhole(p)
	k.wantWhole(late)
}

// A DEL that knows nothing of the lock, at any moment of a repair.
func TestDELWithoutLock(t *testing.T) {
	k := newKept(t)
	for i := range 20 {
		k.pods = nil
		p := k.adopted()
		k.detach(p, "steer")
		k.look(1)
		var both sync.WaitGroup
		both.Go(func() {
			_ = k.node.NS.Do(func(ns.NetNS) error { _, err := k.lookOnce(t.Context()); return err })
		})
		time.Sleep(time.Duration(i) * 4 * time.Millisecond)
		for range 3 { // as the runtime does it
			if k.del(p) == nil {
				break
			}
		}
		both.Wait()
		if err := os.Remove(k.cached(p)); err != nil {
			t.Fatal(err)
		}
		k.deleteDevice(p)
		k.pods = nil
		for _, f := range k.keeper.failures {
			f.next = time.Time{} // a repair that failed because of DEL would be tried again in a while
		}
		k.look(3)
		k.wantNothing()
	}
}

// A look that has used up its time leaves the rest to the next one.
func TestALookEnds(t *testing.T) {
	k := newKept(t)
	p, late := k.adopted(), k.run()
	k.detach(p, "steer")
	k.readRecords()
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for range 3 {
		bpftest.Do(t, k.node.NS, func() error {
			_, err := k.lookOnce(ended)
			return err
		})
		if k.check(p) == nil || k.check(late) == nil || !k.keeper.again {
			t.Fatalf("%v, %v, again %v", k.check(p), k.check(late), k.keeper.again)
		}
	}
	k.look(1)
	k.wantWhole(p)
	k.wantWhole(late)
	if k.look(1) || k.keeper.again {
		t.Error("there is no end to it")
	}
}

// Pods that the daemon adopts have the node's hook; one that is attached already keeps its own.
func TestAdoptedPodsHaveTheHook(t *testing.T) {
	k := newKept(t)
	byTC := k.adopted()
	k.hook = attach.HookXDP
	byXDP := k.adopted()
	k.detach(byTC, "steer")
	k.look(2)
	k.wantWhole(byTC)
	for p, want := range map[int]bool{byTC.IfIndex: false, byXDP.IfIndex: true} {
		k.inNode(func() error {
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
	if a, b := k.record(byTC).Hook, k.record(byXDP).Hook; a != "" && a != attach.HookTC || b != attach.HookXDP {
		t.Errorf("on record %q, %q", a, b)
	}
}

// A server that ended is not answered for, though everything is attached anew: the maps that knew of it are gone.
func TestMapsMadeAnewKnowNothing(t *testing.T) {
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

// startKept runs the daemon as start does, on the pod's node, whose attachments it looks after.
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
	l := &loop{
		daemon: newDaemon(n.logger(), n.d, n.config, statedir.Endpoints{}, refresher), log: n.logger(), calls: make(chan func()),
		prober: finder, who: who, set: n.d.SetProber, held: func() error { return nil }, refresh: specs.Refresh, failing: specs.Failing, delivery: specs.Delivery,
		keeper: makeKeeper(adopt.Node{Root: "/", CacheDir: n.t.TempDir()}),
	}
	bpftest.Do(n.t, n.pod.Node.NS, func() (err error) {
		l.keeper.looker, err = repair.New(n.d, n.config.BPFDir)
		return err
	})
	in.all.Go(func() { _ = n.pod.Node.NS.Do(func(ns.NetNS) error { l.keeper.looker.Run(ctx); return nil }) })
	done := make(chan error, 1)
	go func() { done <- n.pod.Node.NS.Do(func(ns.NetNS) error { return l.run(ctx, in) }) }()
	n.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			n.t.Errorf("daemon: %v", err)
		}
		in.all.Wait()
		refresher.Close()
	})
}

// A program is detached by hand: the daemon's next look misses it, and the one after puts it back.
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
			if logged("attachment is not whole") != 1 || logged("attachment reattached") != 1 {
				t.Error("not said once")
			}
		})
	}
}
