package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/bpf/lock"
	"github.com/probelet/probelet/internal/polltest"
)

func TestAddAttachesRecordsAndReturnsPrevResult(t *testing.T) {
	inEachWay(t, func(t *testing.T, w *world, way way) {
		pod := w.node.AddPod(t)
		r := w.add(pod).must(t)

		want, err := json.Marshal(prevResult(pod))
		if err != nil {
			t.Fatal(err)
		}
		if !sameJSON(t, r.stdout, string(want)) || r.stderr != "" {
			t.Errorf("stdout %s, want %s; stderr %q", r.stdout, want, r.stderr)
		}
		w.check(pod).must(t)
		w.wantAttachedTo(pod, way)

		got := w.record(pod)
		if age := time.Since(got.CreatedAt); age < 0 || age > time.Minute {
			t.Errorf("created at %v", got.CreatedAt)
		}
		got.CreatedAt = time.Time{}
		if want := (attach.Record{
			ContainerID: idOf(pod).ContainerID, IfName: "eth0", Network: "net",
			IfIndex: pod.IfIndex, HostIfName: pod.HostIfName, PodNetns: pod.Netns, NetnsCookie: pod.NetnsCookie, Hook: way.hook,
			PodNamespace: "shop", PodName: "cart-0", PodUID: "u-1",
			PodIPs: []string{pod.IPv4.String(), pod.IPv6.String()},
		}); !reflect.DeepEqual(got, want) {
			t.Errorf("record %+v, want %+v", got, want)
		}
	})
}

func sameJSON(t *testing.T, a, b string) bool {
	t.Helper()
	var x, y any
	if err := errors.Join(json.Unmarshal([]byte(a), &x), json.Unmarshal([]byte(b), &y)); err != nil {
		t.Fatal(err)
	}
	return reflect.DeepEqual(x, y)
}

func TestAddAddDelDel(t *testing.T) {
	inEachWay(t, func(t *testing.T, w *world, way way) {
		pod := w.node.AddPod(t)
		before := w.state()
		w.add(pod).must(t)
		w.putEvidence(pod)
		w.add(pod).must(t)
		w.check(pod).must(t)
		w.wantAttachedTo(pod, way)
		if keys := w.evidence(pod); len(keys) > 0 {
			t.Errorf("the second ADD left evidence about the pod: %v", keys)
		}
		w.putEvidence(pod)
		w.del(pod).must(t)
		w.wantState(before)
		w.del(pod).must(t)
		w.wantState(before)
		w.add(pod).must(t)
		w.check(pod).must(t)
	})
}

func TestDelWithoutAnything(t *testing.T) {
	for _, dirs := range []fields{
		{},
		{"bpfDir": "/nonexistent/b/probelet", "stateDir": "/nonexistent/s"},
		{"bpfDir": "/etc/hostname/b", "stateDir": "/etc/hostname/s"},
	} {
		w := newWorld(t).with(dirs)
		w.del(&bpftest.Pod{NS: w.node.NS, HostIfName: "never"}).must(t)
	}
}

// The daemon may be repairing what is being removed. DEL waits for it, but a daemon that hangs does not block the removal.
func TestDelWaitsForTheDaemon(t *testing.T) {
	for _, busy := range []time.Duration{200 * time.Millisecond, time.Hour} {
		w := newWorld(t)
		pod := w.node.AddPod(t)
		w.add(pod).must(t)
		unlock, err := attach.LockRecords(t.Context(), w.stateDir(), unix.LOCK_EX)
		if err != nil {
			t.Fatal(err)
		}
		began := time.Now()
		done := time.AfterFunc(busy, unlock)
		w.del(pod).must(t)
		if took := time.Since(began); took < min(busy, daemonDeadline) || took > daemonDeadline+time.Second {
			t.Errorf("the daemon is busy for %v, DEL took %v", busy, took)
		}
		if done.Stop() {
			unlock()
		}
	}
}

func TestDelWithRemains(t *testing.T) {
	tests := map[string]struct {
		lose harm
		veth bool // is gone, too
		gc   bool // finds what no pin leads to
	}{
		"nothing missing":             {},
		"veth gone":                   {veth: true},
		"record gone":                 {lose: removeRecord},
		"record of an unfinished ADD": {lose: editRecord(func(r *attach.Record) { r.Error = attach.Unfinished })},
		"record unreadable":           {lose: truncateRecord},
		"links unpinned":              {lose: unpin("steer", "observe", "respond")},
		"device unnamed":              {lose: unpinDevice},
		"device unnamed, veth gone":   {lose: unpinDevice, veth: true},
		"nothing pinned":              {lose: unpin("")},
		"nothing pinned, veth gone":   {lose: unpin(""), veth: true},
		"device forgotten":            {lose: forgetDevice},
		"device half forgotten":       {lose: interruptRemoval, gc: true},
		"half forgotten, veth gone":   {lose: interruptRemoval, veth: true, gc: true},
		"steer detached":              {lose: detachProgram("steer")},
		"observe detached":            {lose: detachProgram("observe")},
	}
	inEachWay(t, func(t *testing.T, w *world, _ way) {
		for name, test := range tests {
			other, pod := w.node.AddPod(t), w.node.AddPod(t)
			t.Run(name, func(t *testing.T) {
				w := w.in(t)
				before := w.state()
				w.add(pod).must(t)
				w.putEvidence(pod)
				if test.lose != nil {
					if err := test.lose(w, pod); err != nil {
						t.Fatal(err)
					}
				}
				leaveOut := ""
				if test.veth {
					deleteVeth(t, pod)
					leaveOut = pod.HostIfName + ":"
				}
				w.del(pod).must(t)
				if test.gc {
					w.gc().must(t)
				}
				w.wantStateWithout(leaveOut, before)
				w.add(other).must(t)
				w.check(other).must(t)
				w.del(other).must(t)
				w.wantStateWithout(leaveOut, before)
			})
		}
	})
}

// Map entries remain, because the next daemon replaces everything that is loaded.
func TestDelWithIncompleteObjects(t *testing.T) {
	inEachWay(t, func(t *testing.T, w *world, _ way) {
		pod := w.node.AddPod(t)
		w.status(newPlugin()).must(t) // loads the objects
		if err := w.inDatapath(func(d *datapath.Datapath) error {
			return d.AddDevice(datapath.DeviceKey{Ifindex: uint32(pod.IfIndex), Generation: 1}, pod.Netns, datapath.HookTC)
		}); err != nil {
			t.Fatal(err)
		}
		before := w.state()
		w.add(pod).must(t)
		if err := os.Remove(filepath.Join(w.bpfDir(), datapath.ABI, "counters")); err != nil {
			t.Fatal(err)
		}
		w.del(pod).must(t)
		w.wantStateWithout("devices: ", before)
	})
}

func TestDelLeavesOthersAlone(t *testing.T) {
	inEachWay(t, func(t *testing.T, w *world, _ way) {
		one, two := w.node.AddPod(t), w.node.AddPod(t)
		w.add(one).must(t)
		w.add(two).must(t)
		w.putEvidence(two)
		if err := unpin("")(w, one); err != nil {
			t.Fatal(err)
		}
		w.del(one).must(t)
		w.check(two).must(t)
		w.wantAttached(two)
		if keys := w.evidence(two); len(keys) != 2 {
			t.Errorf("remaining evidence of the other pod: %v", keys)
		}
	})
}

// The index of a device may belong to another pod by now.
func TestDelLeavesAReusedIndexAlone(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	w.add(pod).must(t)
	if err := attachAnew(w, pod); err != nil {
		t.Fatal(err)
	}
	w.del(pod).must(t)
	if state := w.state(); !strings.Contains(state, "devices: ") || !strings.Contains(state, "pod_netns: ") {
		t.Errorf("state\n%s", state)
	}
}

func TestDelNeedsNeitherNamespaceNorConfiguration(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	before := w.state()
	w.add(pod).must(t)
	args := w.args(pod, w.stdin(fields{"onError": 7, "hook": "warp", "what": 1, "prevResult": "garbage", "dns": 3}))
	args.Netns = "/nonexistent/netns"
	w.delWith(args).must(t)
	w.wantState(before)

	for _, stdin := range []string{``, `{`, `{"name": "net", "type": "probelet", "bpfDir": 3}`} {
		conf := parseConfForDel([]byte(stdin))
		if conf.bpfDir != datapath.DefaultDir { // if not, DEL would look elsewhere
			t.Errorf("%s: %+v", stdin, conf)
		}
	}
}

// A runtime retries only after an error.
func TestDelFailsIfTheRuntimeMustRetry(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	w.add(pod).must(t)
	if err := os.MkdirAll(filepath.Join(w.pins(pod), "respond", "foreign"), 0o700); err != nil {
		t.Fatal(err)
	}
	wantFault(t, w.del(pod).err, codeDetach, "respond")
	if _, err := attach.ReadRecord(w.stateDir(), idOf(pod)); err != nil {
		t.Errorf("the record was removed before the attachment: %v", err)
	}
}

// troubles are worlds in which ADD cannot do its work.
func troubles() map[string]trouble {
	return map[string]trouble{
		"foreign XDP program": {code: codeAttach, text: "XDP program", make: func(w *world, p *bpftest.Pod) *world {
			attachForeignXDP(w.t, p)
			return w.with(fields{"hook": "xdp"})
		}},
		"no room for a second tcx program": {code: codeAttach, text: "tcx", make: func(w *world, p *bpftest.Pod) *world {
			fillTCX(w.t, p, ebpf.AttachTCXEgress)
			w.writeChain("ptp", "probelet", "bandwidth")
			return w
		}},
		"an ingress qdisc and no room for a second tcx program": {code: codeAttach, text: "ingress qdisc", make: func(w *world, p *bpftest.Pod) *world {
			fillTCX(w.t, p, ebpf.AttachTCXEgress)
			bpftest.Do(w.t, w.node.NS, func() error { return netlink.QdiscAdd(ingressQdisc(p)) })
			return w
		}},

		"not a veth": {code: codeNoVeth, text: "type bridge", make: func(w *world, p *bpftest.Pod) *world {
			deleteVeth(w.t, p)
			bpftest.Do(w.t, p.NS, func() error {
				return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}})
			})
			return w
		}},
		"no such interface": {code: codeNoVeth, text: "eth0", make: func(w *world, p *bpftest.Pod) *world {
			deleteVeth(w.t, p)
			return w
		}},
		"peer elsewhere": {code: codeNoVeth, text: "not in this namespace", make: func(w *world, p *bpftest.Pod) *world {
			third := bpftest.NewNode(w.t)
			bpftest.Do(w.t, w.node.NS, func() error {
				device, err := netlink.LinkByIndex(p.IfIndex)
				if err != nil {
					return err
				}
				return netlink.LinkSetNsFd(device, int(third.NS.Fd()))
			})
			return w
		}},
		"peer elsewhere, its index in use here": {code: codeNoVeth, text: "is not the peer", make: func(w *world, p *bpftest.Pod) *world {
			third, stranger := bpftest.NewNode(w.t), bpftest.NewNode(w.t)
			bpftest.Do(w.t, w.node.NS, func() error {
				device, err := netlink.LinkByIndex(p.IfIndex)
				if err != nil {
					return err
				}
				return errors.Join(netlink.LinkSetNsFd(device, int(third.NS.Fd())), netlink.LinkAdd(&netlink.Veth{
					LinkAttrs: netlink.LinkAttrs{Name: p.HostIfName, Index: p.IfIndex},
					PeerName:  "eth0", PeerNamespace: netlink.NsFd(int(stranger.NS.Fd())),
				}))
			})
			return w
		}},
		"bpffs absent": {code: codeNoBPFFS, text: "mount -t bpf", make: func(w *world, _ *bpftest.Pod) *world {
			return w.with(fields{"bpfDir": filepath.Join(w.t.TempDir(), "probelet")})
		}},
		"bpffs directory absent": {code: codeNoBPFFS, text: "mount -t bpf", make: func(w *world, _ *bpftest.Pod) *world {
			return w.with(fields{"bpfDir": "/nonexistent/bpf/probelet"})
		}},
		"state directory impossible": {code: types.ErrIOFailure, text: "record", noRecord: true,
			make: func(w *world, _ *bpftest.Pod) *world { return w.with(fields{"stateDir": "/proc/nonexistent"}) }},
		"kernel too old": {code: codeKernelTooOld, text: "5.15", kernel: 5<<16 | 14<<8 | 255},
		"prevResult of another host device": {code: codePrevResult, text: "vethX", make: func(w *world, p *bpftest.Pod) *world {
			return w.withInterfaces(p, fields{"name": "vethX"}, fields{"name": "eth0", "sandbox": p.NS.Path()})
		}},
		"prevResult of another pod device": {code: codePrevResult, text: "eth7", make: func(w *world, p *bpftest.Pod) *world {
			return w.withInterfaces(p, fields{"name": p.HostIfName}, fields{"name": "eth7", "sandbox": p.NS.Path()})
		}},
	}
}

type trouble struct {
	make     func(*world, *bpftest.Pod) *world
	kernel   uint32
	code     uint
	text     string
	noRecord bool // no record can be written
}

func (w *world) withInterfaces(p *bpftest.Pod, interfaces ...fields) *world {
	return w.reporting(p, interfaces)
}

// reporting returns the world after a plugin that reported these interfaces, in whatever form.
func (w *world) reporting(p *bpftest.Pod, interfaces any) *world {
	prev := prevResult(p)
	prev["interfaces"] = interfaces
	prev["ips"] = []fields{{"address": p.IPv4.String() + "/32"}}
	return w.with(fields{"prevResult": prev})
}

// world returns a world with a pod, and the trouble in it.
func (tr trouble) world(t *testing.T) (*world, *bpftest.Pod) {
	t.Helper()
	w := newWorld(t)
	pod := w.node.AddPod(t)
	if tr.make != nil {
		w = tr.make(w, pod)
	}
	return w, pod
}

func (tr trouble) add(w *world, pod *bpftest.Pod) result {
	changes := fields{}
	if _, set := w.conf["prevResult"]; !set {
		changes["prevResult"] = prevResult(pod)
	}
	p := newPlugin()
	if tr.kernel != 0 {
		p.kernelVersion = func() (uint32, error) { return tr.kernel, nil }
	}
	return w.run(p, func(p *plugin) func(*skel.CmdArgs) error { return p.funcs().Add }, w.args(pod, w.stdin(changes)))
}

func TestFailingAddIsIgnoredByDefault(t *testing.T) {
	for name, tr := range troubles() {
		t.Run(name, func(t *testing.T) {
			w, pod := tr.world(t)
			before := w.state()
			r := tr.add(w, pod).must(t)
			if !strings.Contains(r.stderr, tr.text) || !strings.Contains(r.stdout, "interfaces") {
				t.Errorf("stderr %q, want %q; stdout %q", r.stderr, tr.text, r.stdout)
			}
			if !tr.noRecord {
				record := w.record(pod)
				if !strings.Contains(record.Error, tr.text) || record.PodName != "cart-0" {
					t.Errorf("record %+v, want the error %q", record, tr.text)
				}
				if passing := tr.code >= codeNoBPFFS && tr.code <= codeAttach; record.Passing != passing {
					t.Errorf("code %d passing: %v", tr.code, record.Passing)
				}
				w.check(pod).must(t) // the pod works without us
				wantFault(t, w.with(fields{"onError": "fail"}).check(pod).err, codeCheck, tr.text)
				if err := attach.RemoveRecord(w.stateDir(), idOf(pod)); err != nil {
					t.Fatal(err)
				}
			}
			w.wantState(before)
			w.del(pod).must(t)
			w.wantState(before)
		})
	}
}

func TestFailingAddFailsIfConfigured(t *testing.T) {
	for name, tr := range troubles() {
		t.Run(name, func(t *testing.T) {
			w, pod := tr.world(t)
			w = w.with(fields{"onError": "fail"})
			before := w.state()
			r := tr.add(w, pod)
			wantFault(t, r.err, tr.code, tr.text)
			if r.stdout != "" {
				t.Errorf("stdout %q in addition to the error", r.stdout)
			}
			w.wantState(before)
			w.del(pod).must(t)
			w.wantState(before)
		})
	}
}

// The pair of devices is the proof, and prevResult is only a hint.
func TestWhateverPluginsReport(t *testing.T) {
	base := newWorld(t).with(fields{"onError": "fail"})
	other, pod := base.node.AddPod(t), base.node.AddPod(t)
	for plugin, reported := range pod.Reported() {
		t.Run(plugin, func(t *testing.T) {
			w := base.reporting(pod, json.RawMessage(reported))
			r := w.add(pod).must(t)
			want, err := json.Marshal(w.conf["prevResult"])
			if err != nil {
				t.Fatal(err)
			}
			if !sameJSON(t, r.stdout, string(want)) {
				t.Errorf("stdout %s, want %s", r.stdout, want)
			}
			if got := w.record(pod); got.IfIndex != pod.IfIndex || got.HostIfName != pod.HostIfName || got.PodNetns != pod.Netns {
				t.Errorf("%+v", got)
			}
			w.check(pod).must(t)
			w.del(pod).must(t)
		})
	}
	before := base.state()
	for what, reported := range pod.Contradicting(other) {
		t.Run(what, func(t *testing.T) {
			wantFault(t, base.reporting(pod, json.RawMessage(reported)).add(pod).err, codePrevResult, "prevResult")
			base.wantState(before)
		})
	}
}

func TestNullsInPrevResult(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	prev := prevResult(pod)
	prev["interfaces"], prev["ips"] = []any{nil}, []any{nil, fields{"address": pod.IPv4.String() + "/32"}}
	w.with(fields{"prevResult": prev, "onError": "fail"}).add(pod).must(t)
	if got := w.record(pod); !slices.Equal(got.PodIPs, []string{pod.IPv4.String()}) {
		t.Errorf("%+v", got)
	}
}

func TestNoNetns(t *testing.T) {
	w := newWorld(t).with(fields{"onError": "fail"})
	pod := w.node.AddPod(t)
	for _, path := range []string{"/nonexistent/netns", "/etc/hostname", "/proc/self/ns/uts"} {
		args := w.args(pod, w.stdin(fields{"prevResult": prevResult(pod)}))
		args.Netns = path
		add := func(p *plugin) func(*skel.CmdArgs) error { return p.funcs().Add }
		wantFault(t, w.run(newPlugin(), add, args).err, types.ErrInvalidNetNS, path)
	}
}

// Files named after the ID cannot be created, so there is nothing to remove either.
func TestIDTooLong(t *testing.T) {
	for name, id := range map[string]string{
		"300 characters":              strings.Repeat("c", 300),
		"short, but escaped in files": strings.Repeat(".", 100),
		"too long by one":             strings.Repeat("c", 226),
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			pod, neighbour := w.node.AddPod(t), w.node.AddPod(t)
			w.add(neighbour).must(t)
			before := w.state()
			do := func(w *world, verb string) result {
				args := w.args(pod, w.stdin(fields{"prevResult": prevResult(pod)}))
				args.ContainerID = id
				return w.run(newPlugin(), func(p *plugin) func(*skel.CmdArgs) error {
					return map[string]func(*skel.CmdArgs) error{"ADD": p.funcs().Add, "CHECK": p.funcs().Check, "DEL": p.funcs().Del}[verb]
				}, args)
			}
			added := do(w, "ADD").must(t)
			checked := do(w, "CHECK").must(t)
			if !strings.Contains(added.stdout, "interfaces") {
				t.Errorf("stdout %q", added.stdout)
			}
			for _, r := range []result{added, checked} {
				if !strings.Contains(r.stderr, "ignored") || !strings.Contains(r.stderr, "container ID of") {
					t.Errorf("stderr %q", r.stderr)
				}
			}
			strict := w.with(fields{"onError": "fail"})
			wantFault(t, do(strict, "ADD").err, types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID")
			wantFault(t, do(strict, "CHECK").err, codeCheck, "container ID of")
			do(strict, "DEL").must(t)
			do(w, "DEL").must(t)
			w.wantState(before)
			w.gc(idOf(neighbour), attach.ID{ContainerID: id, IfName: "eth0"}).must(t)
			w.check(neighbour).must(t)
		})
	}
}

// An ID that is accepted can be attached, checked, collected and removed.
func TestLongestID(t *testing.T) {
	w := newWorld(t).with(fields{"onError": "fail"})
	pod := w.node.AddPod(t)
	before := w.state()
	args := w.args(pod, w.stdin(fields{"prevResult": prevResult(pod)}))
	args.ContainerID = strings.Repeat("c", 225)
	args.IfName = "eth0"
	run := func(command func(skel.CNIFuncs) func(*skel.CmdArgs) error) {
		t.Helper()
		w.run(newPlugin(), func(p *plugin) func(*skel.CmdArgs) error { return command(p.funcs()) }, args).must(t)
	}
	add := func(f skel.CNIFuncs) func(*skel.CmdArgs) error { return f.Add }
	run(add)
	run(func(f skel.CNIFuncs) func(*skel.CmdArgs) error { return f.Check })
	run(func(f skel.CNIFuncs) func(*skel.CmdArgs) error { return f.Del })
	w.wantState(before)
	run(add)
	w.gc().must(t)
	w.wantAttached()
}

// The attachment of the first ADD must not remain.
func TestSecondAddFails(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	before := w.state()
	w.add(pod).must(t)
	w.withInterfaces(pod, fields{"name": "vethX"}).add(pod).must(t)
	if got := w.record(pod); !strings.Contains(got.Error, "vethX") {
		t.Errorf("record %+v", got)
	}
	if err := attach.RemoveRecord(w.stateDir(), idOf(pod)); err != nil {
		t.Fatal(err)
	}
	w.wantState(before)
}

func TestAddGivesUpOnTheLock(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 5 s")
	}
	w := newWorld(t).with(fields{"onError": "fail"})
	pod := w.node.AddPod(t)
	if err := os.Mkdir(w.bpfDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	held, err := lock.Dir(t.Context(), w.bpfDir(), unix.LOCK_EX)
	if err != nil {
		t.Fatal(err)
	}
	defer held.Release()
	wantFault(t, w.add(pod).err, types.ErrTryAgainLater, "locked")
}

func TestInvalidConfigurationIsNeverIgnored(t *testing.T) {
	w := newWorld(t).with(fields{"onError": "ignore", "hook": "warp"})
	pod := w.node.AddPod(t)
	for name, r := range map[string]result{
		"ADD": w.add(pod), "CHECK": w.check(pod), "GC": w.gc(), "STATUS": w.status(newPlugin()),
	} {
		t.Run(name, func(t *testing.T) { wantFault(t, r.err, types.ErrInvalidNetworkConfig, "hook", "warp") })
	}
	r := w.with(fields{"hook": "xdp", "prevResult": nil}).add(pod)
	wantFault(t, r.err, types.ErrInvalidNetworkConfig, "prevResult", "chained")
}

func TestBadCNIArgs(t *testing.T) {
	w := newWorld(t).with(fields{"onError": "fail"})
	pod := w.node.AddPod(t)
	args := w.args(pod, w.stdin(fields{"prevResult": prevResult(pod)}))
	add := func(p *plugin) func(*skel.CmdArgs) error { return p.funcs().Add }
	args.Args = "K8S_POD_NAME"
	wantFault(t, w.run(newPlugin(), add, args).err, types.ErrInvalidEnvironmentVariables, "CNI_ARGS", "K8S_POD_NAME")
	args.Args = "UNKNOWN=1"
	w.run(newPlugin(), add, args).must(t)
}

func TestCheckFinds(t *testing.T) {
	type test struct {
		harm harm
		text string
	}
	common := map[string]test{
		"steer detached":      {detachProgram("steer"), "steer"},
		"observe detached":    {detachProgram("observe"), "observe"},
		"device forgotten":    {forgetDevice, "the programs know device"},
		"another generation":  {attachAnew, "the programs know device"},
		"device unnamed":      {unpinDevice, "names no device"},
		"nothing pinned":      {unpin(""), "not attached"},
		"objects not loaded":  {func(w *world, _ *bpftest.Pod) error { return os.RemoveAll(w.bpfDir()) }, "not loaded"},
		"no record":           {removeRecord, "no record"},
		"record unreadable":   {truncateRecord, "record"},
		"another's container": {editRecord(func(r *attach.Record) { r.ContainerID = "other" }), "other"},
		"another's interface": {editRecord(func(r *attach.Record) { r.IfName = "net1" }), "net1"},
		"another's network":   {editRecord(func(r *attach.Record) { r.Network = "other" }), "other"},
		"another device":      {editRecord(func(r *attach.Record) { r.IfIndex = 4711 }), "4711"},
		"another device name": {editRecord(func(r *attach.Record) { r.HostIfName = "vethX" }), "vethX"},
		"another namespace":   {editRecord(func(r *attach.Record) { r.NetnsCookie++ }), "cookie"},
		"namespace not known": {lookElsewhere, "looks into"},
		"ADD did not finish":  {editRecord(func(r *attach.Record) { r.Error = attach.Unfinished }), attach.Unfinished},
	}
	byVia := map[attach.Via]map[string]test{
		attach.ViaClsact: {
			"qdisc removed":        {removeQdisc, "observe"},
			"steer's filter taken": {replaceFilter, "steer"},
		},
		attach.ViaTCX: {
			"steer unpinned":   {unpin("steer"), "steer"},
			"observe unpinned": {unpin("observe"), "observe"},
		},
	}
	byHook := map[attach.Hook]map[string]test{
		attach.HookXDP: {
			"XDP detached": {detachProgram("respond"), "XDP program"},
			"XDP unpinned": {unpin("respond"), "XDP program"},
			"foreign XDP": {func(w *world, p *bpftest.Pod) error {
				if err := detachProgram("respond")(w, p); err != nil {
					return err
				}
				attachForeignXDP(w.t, p)
				return nil
			}, "want respond"},
		},
	}
	inEachWay(t, func(t *testing.T, w *world, way way) {
		w = w.with(fields{"onError": "fail"})
		for _, tests := range []map[string]test{common, byVia[way.via], byHook[way.hook]} {
			for name, test := range tests {
				t.Run(name, func(t *testing.T) {
					w := w.in(t)
					pod := w.node.AddPod(t)
					w.add(pod).must(t)
					w.check(pod).must(t)
					if err := test.harm(w, pod); err != nil {
						t.Fatal(err)
					}
					var found error
					polltest.Eventually(t, "CHECK finds the harm", func() bool { // the kernel detaches links asynchronously
						found = w.check(pod).err
						return found != nil
					})
					wantFault(t, found, codeCheck, test.text)
					w.del(pod).must(t) // the next pod may get the same namespace number
					w.gc().must(t)
				})
			}
		}
	})
}

// CHECK ignores programs of others as long as ours are there.
func TestCheckAcceptsNeighbours(t *testing.T) {
	inEachWay(t, func(t *testing.T, w *world, way way) {
		pod := w.node.AddPod(t)
		if way.hook == attach.HookTC {
			attachForeignXDP(t, pod)
		}
		w = w.with(fields{"onError": "fail"})
		w.add(pod).must(t)
		if err := attachForeignTCX(t, pod, ebpf.AttachTCXEgress); err != nil {
			t.Fatal(err)
		}
		w.check(pod).must(t)
	})
}

// A runtime that checks with the configuration of ADD, such as CRI-O, must not fail after an uninstall.
func TestCheckAfterUninstall(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	w.add(pod).must(t)
	if err := attach.RemoveRecord(w.stateDir(), idOf(pod)); err != nil {
		t.Fatal(err)
	}
	wantFault(t, w.check(pod).err, codeCheck, "no record")
	if err := os.RemoveAll(w.bpfDir()); err != nil {
		t.Fatal(err)
	}
	w.check(pod).must(t)
	wantFault(t, w.with(fields{"onError": "fail"}).check(pod).err, codeCheck, "no record")
}

// The pod's interface was replaced after ADD.
func TestCheckFindsAnotherVeth(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	w.add(pod).must(t)
	deleteVeth(t, pod)
	bpftest.Do(t, w.node.NS, func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: pod.HostIfName, Index: pod.IfIndex + 100},
			PeerName:  "eth0", PeerNamespace: netlink.NsFd(int(pod.NS.Fd())),
		})
	})
	wantFault(t, w.check(pod).err, codeCheck, "the record says")
}

func TestGCRemovesOnlyItsOwnUnlistedAttachments(t *testing.T) {
	w := newWorld(t)
	blue, red := w.with(fields{"name": "blue"}), w.with(fields{"name": "red"})
	kept, dropped, gone := w.node.AddPod(t), w.node.AddPod(t), w.node.AddPod(t)
	others := w.node.AddPod(t)
	for _, pod := range []*bpftest.Pod{kept, dropped, gone} {
		blue.add(pod).must(t)
	}
	red.add(others).must(t)
	deleteVeth(t, gone)

	blue.gc(idOf(kept)).must(t)
	blue.check(kept).must(t)
	red.check(others).must(t)
	for _, pod := range []*bpftest.Pod{dropped, gone} {
		if _, err := attach.ReadRecord(w.stateDir(), idOf(pod)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("record of %s: %v", idOf(pod), err)
		}
	}
	w.wantAttached(kept, others)
	blue.gc().must(t)
	w.wantAttached(others)
}

// wantAttached asserts that exactly these pods are attached and known to the programs.
func (w *world) wantAttached(pods ...*bpftest.Pod) {
	w.t.Helper()
	var want []uint32
	for _, p := range pods {
		want = append(want, uint32(p.IfIndex))
	}
	slices.Sort(want)
	ids, err := attach.List(w.bpfDir())
	if err != nil {
		w.t.Fatal(err)
	}
	var known []uint32
	err = w.inDatapath(func(d *datapath.Datapath) error {
		devices, err := d.Devices()
		known = slices.Sorted(maps.Keys(devices))
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	if len(ids) != len(pods) || !slices.Equal(known, want) {
		w.t.Errorf("attached: %v, devices known: %v; want devices %v", ids, known, want)
	}
}

// A missing list must not be mistaken for an empty one.
func TestGCWithoutAList(t *testing.T) {
	w := newWorld(t)
	pod, gone := w.node.AddPod(t), w.node.AddPod(t)
	w.add(pod).must(t)
	w.add(gone).must(t)
	deleteVeth(t, gone)
	if err := attach.RemoveRecord(w.stateDir(), idOf(gone)); err != nil {
		t.Fatal(err)
	}
	before := w.state()
	gc := func(changes fields) result {
		return w.run(newPlugin(), func(p *plugin) func(*skel.CmdArgs) error { return p.funcs().GC },
			&skel.CmdArgs{StdinData: w.stdin(changes)})
	}
	for _, changes := range []fields{
		{},
		{"cni.dev/attachments": []fields{}},
		{"cni.dev/valid-attachments": fields{}},
		{"cni.dev/valid-attachments": "none"},
		{"cni.dev/valid-attachments": []int{1}},
	} {
		wantFault(t, gc(changes).err, types.ErrInvalidNetworkConfig, "cni.dev/valid-attachments")
		w.wantState(before)
	}
	gc(fields{"cni.dev/valid-attachments": nil}).must(t) // how libcni writes an empty list
	w.wantAttached()
}

func TestGCRemovesOrphansWithoutRecord(t *testing.T) {
	w := newWorld(t)
	alive, gone, unpinned := w.node.AddPod(t), w.node.AddPod(t), w.node.AddPod(t)
	for _, pod := range []*bpftest.Pod{alive, gone, unpinned} {
		w.add(pod).must(t)
		if err := attach.RemoveRecord(w.stateDir(), idOf(pod)); err != nil {
			t.Fatal(err)
		}
	}
	deleteVeth(t, gone)
	if err := os.RemoveAll(w.pins(unpinned)); err != nil {
		t.Fatal(err)
	}
	w.gc().must(t)
	w.wantAttached(alive) // its network is unknown
}

func TestGCContinuesAfterAnError(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	w.add(pod).must(t)
	if err := os.WriteFile(filepath.Join(attach.RecordsDir(w.stateDir()), "broken@eth0.json"), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	wantFault(t, w.gc().err, codeDetach, "broken@eth0.json")
	w.wantAttached()
}

func TestStatus(t *testing.T) {
	w := newWorld(t)
	failing := w.with(fields{"onError": "fail"})
	failing.status(newPlugin()).must(t)

	old := func() *plugin { return &plugin{kernelVersion: func() (uint32, error) { return 5<<16 | 4<<8, nil }} }
	wantFault(t, failing.status(old()).err, types.ErrPluginNotAvailable, "5.4", "5.15")
	if r := w.status(old()).must(t); !strings.Contains(r.stderr, "5.15") {
		t.Errorf("stderr %q", r.stderr)
	}
	for field, text := range map[string]string{"bpfDir": "mount -t bpf", "stateDir": "/proc"} {
		r := failing.with(fields{field: "/proc/nonexistent/x"}).status(newPlugin())
		wantFault(t, r.err, types.ErrPluginNotAvailable, text)
		if r := w.with(fields{field: "/proc/nonexistent/x"}).status(newPlugin()).must(t); !strings.Contains(r.stderr, text) {
			t.Errorf("%s: stderr %q", field, r.stderr)
		}
	}
}

func TestStatusWithReadOnlyStateDir(t *testing.T) {
	w := newWorld(t).with(fields{"onError": "fail"})
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	w = w.with(fields{"stateDir": dir})
	w.status(newPlugin()).must(t)
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	wantFault(t, w.status(newPlugin()).err, types.ErrPluginNotAvailable, "not writable")
}

func TestLogFile(t *testing.T) {
	log := filepath.Join(t.TempDir(), "log")
	w := newWorld(t).with(fields{"logFile": log})
	pod := w.node.AddPod(t)
	w.add(pod).must(t)
	w.withInterfaces(pod, fields{"name": "vethX"}).add(pod).must(t)
	w.del(pod).must(t)
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(lines) != 3 || !strings.Contains(lines[0], "msg=ADD") || !strings.Contains(lines[1], `ignored="prevResult: the interfaces`) ||
		!strings.Contains(lines[2], "msg=DEL") || !strings.Contains(lines[2], "container=of."+pod.HostIfName) {
		t.Errorf("log:\n%s", text)
	}
	if r := w.with(fields{"logFile": "/nonexistent/log"}).add(pod).must(t); !strings.Contains(r.stderr, "/nonexistent/log") {
		t.Errorf("stderr %q does not mention the log that cannot be opened", r.stderr)
	}
	w.check(pod).must(t)
}

func TestConcurrentAddsAndDels(t *testing.T) {
	const n = 50
	w := newWorld(t)
	pods := make([]*bpftest.Pod, n)
	for i := range pods {
		pods[i] = w.node.AddPod(t)
	}
	before := w.state()
	each := func(f func(i int)) {
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() { f(i) })
		}
		wg.Wait()
	}
	mustOK := func(r result) {
		if r.err != nil || r.stderr != "" {
			t.Errorf("%v, stderr %q", r.err, r.stderr)
		}
	}
	each(func(i int) { mustOK(w.add(pods[i])) }) // the first one loads
	for _, pod := range pods {
		mustOK(w.check(pod))
	}
	each(func(i int) { // concurrently
		if i%2 == 0 {
			mustOK(w.del(pods[i]))
		} else {
			mustOK(w.add(pods[i]))
		}
	})
	for i, pod := range pods {
		if i%2 == 1 {
			mustOK(w.check(pod))
		}
	}
	each(func(i int) { mustOK(w.del(pods[i])) })
	w.wantState(before)
}

// command runs the plugin as a process on the node.
func (w *world) command(t *testing.T, env map[string]string, stdin string) (string, error) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{runMain + "=1", "CNI_PATH=/nonexistent", netDirVariable + "=" + w.netDir}
	for k, v := range env {
		cmd.Env = append(cmd.Env, k+"="+v)
	}
	cmd.Stdin = strings.NewReader(stdin)
	var out []byte
	var err error
	bpftest.Do(t, w.node.NS, func() error {
		out, err = cmd.Output()
		return nil
	})
	return string(out), err
}

func TestProcess(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	before := w.state()
	env := func(verb string) map[string]string {
		return map[string]string{
			"CNI_COMMAND": verb, "CNI_CONTAINERID": idOf(pod).ContainerID, "CNI_IFNAME": "eth0", "CNI_NETNS": pod.NS.Path(),
		}
	}
	out, err := w.command(t, env("VERSION"), "{}")
	if err != nil || !strings.Contains(out, `["0.3.0","0.3.1","0.4.0","1.0.0","1.1.0"]`) {
		t.Errorf("VERSION: %s, %v", out, err)
	}
	for _, version := range []string{"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		prev := prevResult(pod)
		prev["cniVersion"] = version
		if version < "1.0.0" {
			prev["ips"] = []fields{{"version": "4", "address": pod.IPv4.String() + "/24"}}
		}
		stdin := string(w.stdin(fields{"cniVersion": version, "prevResult": prev}))
		want, _ := json.Marshal(prev)
		if out, err := w.command(t, env("ADD"), stdin); err != nil || !sameJSON(t, out, string(want)) {
			t.Errorf("ADD %s: %s, %v", version, out, err)
		}
		if got := w.record(pod); len(got.PodIPs) == 0 || got.Error != "" {
			t.Errorf("ADD %s: record %+v", version, got)
		}
		for verb, from := range map[string]string{"CHECK": "0.4.0", "STATUS": "1.1.0"} {
			if out, err := w.command(t, env(verb), stdin); version >= from && err != nil {
				t.Errorf("%s %s: %s, %v", verb, version, out, err)
			}
		}
	}
	out, err = w.command(t, env("ADD"), string(w.stdin(fields{"onError": "never"})))
	if err == nil || !strings.Contains(out, `"code": 7`) || !strings.Contains(out, "onError") {
		t.Errorf("ADD with an invalid configuration: %s, %v", out, err)
	}
	// Name and type, and the two directories only because the test must not use the machine's.
	minimal := fmt.Sprintf(`{"name": "net", "type": "probelet", "bpfDir": %q, "stateDir": %q}`, w.bpfDir(), w.stateDir())
	gone := env("DEL")
	gone["CNI_NETNS"] = ""
	for range 2 {
		if out, err := w.command(t, gone, minimal); err != nil {
			t.Errorf("DEL: %s, %v", out, err)
		}
	}
	w.wantState(before)
}

// A pod must be removable whatever has become of its configuration. The plugin runs as a process, because skel parses the
// configuration, too.
func TestDelWithAnythingOnStdin(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	before := w.state()
	env := map[string]string{
		"CNI_COMMAND": "DEL", "CNI_CONTAINERID": idOf(pod).ContainerID, "CNI_IFNAME": "eth0", "CNI_NETNS": pod.NS.Path(),
	}
	dirs := fmt.Sprintf(`"bpfDir": %q, "stateDir": %q`, w.bpfDir(), w.stateDir())
	for name, stdin := range map[string]string{
		"no name":                          `{` + dirs + `}`,
		"no version":                       `{"name": "net", ` + dirs + `}`,
		"a future version":                 `{"cniVersion": "9.9.9", "name": "net", ` + dirs + `}`,
		"no version at all":                `{"cniVersion": {}, "name": "net", ` + dirs + `}`,
		"an invalid name":                  `{"cniVersion": "1.0.0", "name": "../..", ` + dirs + `}`,
		"wrong types":                      `{"cniVersion": 1, "name": [], "type": {}, "onError": 7, "logFile": [], "dns": 3, "ipam": "x", ` + dirs + `}`,
		"an invalid prevResult":            `{"cniVersion": "1.0.0", "name": "net", "prevResult": {"ips": 7, "interfaces": "x"}, ` + dirs + `}`,
		"a result of another spec version": `{"cniVersion": "1.0.0", "name": "net", "prevResult": {"cniVersion": "0.2.0", "ip4": []}, ` + dirs + `}`,
		"unknown fields":                   `{"cniVersion": "1.0.0", "name": "net", "what": 1, ` + dirs + `}`,
		"an impossible log file":           `{"name": "net", "logFile": "/dev/null/log", ` + dirs + `}`,
		"a long log name":                  `{"name": "net", "logFile": "/` + strings.Repeat("l", 300) + `", ` + dirs + `}`,
		"4 MiB beside":                     `{"name": "net", "what": "` + strings.Repeat("x", 4<<20) + `", ` + dirs + `}`,
		"9,000 levels beside":              `{"name": "net", "what": ` + strings.Repeat("[", 9000) + strings.Repeat("]", 9000) + `, ` + dirs + `}`,
		"keys in other letter cases":       `{"NAME": 1, "CNIVERSION": 2, ` + dirs + `}`,
	} {
		t.Run(name, func(t *testing.T) {
			w.add(pod).must(t)
			if out, err := w.command(t, env, stdin); err != nil {
				t.Errorf("%s, %v", out, err)
			}
			w.wantState(before)
		})
	}
	// These do not reveal the directories, so DEL looks in the machine's, which have no such container.
	for name, stdin := range map[string]string{
		"nothing":          ``,
		"blanks":           " \n",
		"cut off":          `{"cniVersion": "1.0.0", "name": "net", "bpfDir": "/sys`,
		"no JSON":          "\x00\xff\xfe, not JSON",
		"4 MiB of no JSON": strings.Repeat("x", 4<<20),
		"an array":         `[{"name": "net"}]`,
		"a string":         `"net"`,
		"null":             `null`,
		"a number":         `1e999`,
		"two objects":      `{"name": "net"}{"name": "net"}`,
		"too many levels":  strings.Repeat("[", 1<<20),
		"relative":         `{"name": "net", "bpfDir": "b", "stateDir": "../s"}`,
		"wrong types":      `{"name": "net", "bpfDir": 1, "stateDir": null, "logFile": {}}`,
	} {
		t.Run(name, func(t *testing.T) {
			if out, err := w.command(t, env, stdin); err != nil {
				t.Errorf("%s, %v", out, err)
			}
		})
	}
	for _, dir := range []string{
		"", "/", "/proc", "/proc/self/fd", "/sys", "/dev/null", "/etc/hostname", "/nonexistent", "/\x00", "/" + strings.Repeat("d", 300),
		"/sys/fs/bpf", "/sys/fs/bpf/state", "/sys/fs/bpf/a.b", "/sys/fs/bpf/a.b/probelet",
		strings.Repeat("/d", 2500), strings.Repeat("/d", 2040), strings.Repeat("/d", 1000), strings.Repeat("/proc/self/root", 50),
	} {
		for _, field := range []string{"bpfDir", "stateDir"} {
			t.Run(field+"="+dir[:min(len(dir), 20)], func(t *testing.T) {
				if out, err := w.command(t, env, string(w.stdin(fields{field: dir}))); err != nil {
					t.Errorf("%s, %v", out, err)
				}
			})
		}
	}
}

// Only the configuration may be arbitrary.
func TestDelStillChecksItsEnvironment(t *testing.T) {
	w := newWorld(t)
	out, err := w.command(t, map[string]string{"CNI_COMMAND": "DEL", "CNI_IFNAME": "eth0"}, "{}")
	if err == nil || !strings.Contains(out, "CNI_CONTAINERID") {
		t.Errorf("%s, %v", out, err)
	}
}

// A runtime cannot parse a result without a version.
func TestResultGetsAVersion(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	env := map[string]string{
		"CNI_COMMAND": "ADD", "CNI_CONTAINERID": idOf(pod).ContainerID, "CNI_IFNAME": "eth0", "CNI_NETNS": pod.NS.Path(),
	}
	for _, version := range []string{"0.3.1", "0.4.0", "1.0.0", "1.1.0"} {
		for given, want := range map[any]string{nil: version, "": version, version: version} {
			prev := prevResult(pod)
			prev["ips"] = []fields{{"version": "4", "address": pod.IPv4.String() + "/24"}}
			if prev["cniVersion"] = given; given == nil {
				delete(prev, "cniVersion")
			}
			out, err := w.command(t, env, string(w.stdin(fields{"cniVersion": version, "prevResult": prev})))
			prev["cniVersion"] = want
			if text, _ := json.Marshal(prev); err != nil || !sameJSON(t, out, string(text)) {
				t.Errorf("%s, given %v: %s, %v; want %s", version, given, out, err, text)
			}
		}
	}
}

func BenchmarkAddDel(b *testing.B) {
	w := newWorld(b)
	pod := w.node.AddPod(b)
	w.add(pod).must(b)
	var add, del time.Duration
	for b.Loop() {
		start := time.Now()
		w.add(pod).must(b)
		added := time.Now()
		w.del(pod).must(b)
		add += added.Sub(start)
		del += time.Since(added)
	}
	b.ReportMetric(float64(add.Microseconds())/float64(b.N), "µs/add")
	b.ReportMetric(float64(del.Microseconds())/float64(b.N), "µs/del")
}
