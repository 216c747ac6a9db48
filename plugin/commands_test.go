package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
)

func TestAddAttachesRecordsAndReturnsPrevResult(t *testing.T) {
	w := newWorld(t)
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

	got := w.record(pod)
	if age := time.Since(got.CreatedAt); age < 0 || age > time.Minute {
		t.Errorf("created at %v", got.CreatedAt)
	}
	got.CreatedAt = time.Time{}
	if want := (attach.Record{
		ContainerID: idOf(pod).ContainerID, IfName: "eth0", Network: "net",
		IfIndex: pod.IfIndex, HostIfName: pod.HostIfName, PodNetns: pod.Netns,
		PodNamespace: "shop", PodName: "cart-0", PodUID: "u-1",
		PodIPs: []string{pod.IPv4.String(), pod.IPv6.String()},
	}); !reflect.DeepEqual(got, want) {
		t.Errorf("record %+v, want %+v", got, want)
	}
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
	w := newWorld(t)
	pod := w.node.AddPod(t)
	before := w.state()
	w.add(pod).must(t)
	w.add(pod).must(t)
	w.check(pod).must(t)
	maps := podMaps(t, w, pod)
	w.del(pod).must(t)
	w.wantState(before)
	w.del(pod).must(t)
	w.wantState(before)
	for _, id := range []ebpf.MapID{maps.Evidence, maps.Tallies} {
		if !mapGone(id) {
			t.Errorf("map %d still exists", id)
		}
	}
	w.add(pod).must(t)
	w.check(pod).must(t)
}

func podMaps(t *testing.T, w *world, pod *bpftest.Pod) datapath.PodIDs {
	t.Helper()
	d, err := datapath.Open(w.bpfDir())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close() //nolint:errcheck // only read
	pods, err := d.PodIDs()
	if err != nil {
		t.Fatal(err)
	}
	return pods[uint32(pod.IfIndex)]
}

// mapGone waits: the kernel frees maps after a grace period.
func mapGone(id ebpf.MapID) bool {
	for range 200 {
		m, err := ebpf.NewMapFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			return true
		}
		_ = m.Close()
		time.Sleep(10 * time.Millisecond)
	}
	return false
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

// The daemon may be repairing what is to be removed. It is waited for; one that hangs does not keep the pod.
func TestDelWaitsForTheDaemon(t *testing.T) {
	for _, busy := range []time.Duration{200 * time.Millisecond, time.Hour} {
		w := newWorld(t)
		pod := w.node.AddPod(t)
		w.add(pod).must(t)
		unlock, err := attach.LockRecords(t.Context(), w.stateDir(), unix.LOCK_EX)
		if err != nil {
			t.Fatal(err)
		}
		done := time.AfterFunc(busy, unlock)
		began := time.Now()
		w.del(pod).must(t)
		if took := time.Since(began); took < min(busy, daemonDeadline) || took > daemonDeadline+time.Second {
			t.Errorf("the daemon is busy for %v, DEL took %v", busy, took)
		}
		if done.Stop() {
			unlock()
		}
	}
}

func TestDelWithWhatIsLeft(t *testing.T) {
	tests := map[string]struct {
		lose func(w *world, p *bpftest.Pod) error
		veth bool
	}{
		"all there":         {},
		"veth gone":         {veth: true},
		"record gone":       {lose: func(w *world, p *bpftest.Pod) error { return attach.RemoveRecord(w.stateDir(), idOf(p)) }},
		"evidence unpinned": {lose: unpin("evidence")},
		"tallies unpinned":  {lose: unpin("tallies")},
		"maps unpinned":     {lose: unpin("evidence", "tallies")},
		"links unpinned":    {lose: unpin("steer", "respond")},
		"all unpinned":      {lose: unpin("")},
		"only tallies in use": {veth: true, lose: func(w *world, p *bpftest.Pod) error {
			return forget(w, "pod_evidence", p)
		}},
		"only evidence in use": {veth: true, lose: func(w *world, p *bpftest.Pod) error {
			return forget(w, "pod_tallies", p)
		}},
		"record of an unfinished ADD": {lose: func(w *world, p *bpftest.Pod) error {
			r := w.record(p)
			r.Error = addUnfinished
			return attach.WriteRecord(w.stateDir(), r)
		}},
		"record unreadable": {lose: func(w *world, _ *bpftest.Pod) error {
			return os.WriteFile(recordFile(w), []byte("{"), 0o600)
		}},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			other, pod := w.node.AddPod(t), w.node.AddPod(t)
			before := stateWithout(w, pod, test.veth)
			w.add(pod).must(t)
			if test.lose != nil {
				if err := test.lose(w, pod); err != nil {
					t.Fatal(err)
				}
			}
			if test.veth {
				deleteVeth(t, pod)
			}
			w.del(pod).must(t)
			got := stateWithout(w, pod, test.veth)
			for deadline := time.Now().Add(2 * time.Second); got != before && time.Now().Before(deadline); {
				time.Sleep(10 * time.Millisecond) // a link that lost its pin is detached by a kernel worker
				got = stateWithout(w, pod, test.veth)
			}
			if got != before {
				t.Errorf("state\n%s\nwant\n%s", got, before)
			}
			w.add(other).must(t)
			w.check(other).must(t)
		})
	}
}

// stateWithout is the state but for the pod's device, if that is to be left out.
func stateWithout(w *world, p *bpftest.Pod, leaveOut bool) string {
	var lines []string
	for line := range strings.Lines(w.state()) {
		if !leaveOut || !strings.HasPrefix(line, p.HostIfName+":") {
			lines = append(lines, strings.TrimSpace(line))
		}
	}
	return strings.Join(lines, "\n")
}

// forget makes one of the two outer maps lose the pod's device.
func forget(w *world, outer string, p *bpftest.Pod) error {
	m, err := ebpf.LoadPinnedMap(filepath.Join(w.bpfDir(), datapath.ABI, outer), nil)
	if err != nil {
		return err
	}
	return errors.Join(m.Delete(uint32(p.IfIndex)), m.Close())
}

func TestDelWithObjectsIncomplete(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	w.add(pod).must(t)
	if err := os.Remove(filepath.Join(w.bpfDir(), datapath.ABI, "counters")); err != nil {
		t.Fatal(err)
	}
	w.del(pod).must(t)
	if state := w.state(); strings.Contains(state, "file") || strings.Contains(state, "XDP") || strings.Contains(state, "tcx 1") {
		t.Errorf("state\n%s", state)
	}
}

func TestDelLeavesOthersAlone(t *testing.T) {
	w := newWorld(t)
	one, two := w.node.AddPod(t), w.node.AddPod(t)
	w.add(one).must(t)
	w.add(two).must(t)
	if err := os.RemoveAll(w.pins(one)); err != nil {
		t.Fatal(err)
	}
	w.del(one).must(t)
	w.check(two).must(t)
}

func TestDelNeedsNoNamespaceNorConfiguration(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	before := w.state()
	w.add(pod).must(t)
	args := w.args(pod, w.stdin(fields{"onError": 7, "xdpMode": "warp", "what": 1, "prevResult": "garbage", "dns": 3}))
	args.Netns = "/nonexistent/netns"
	w.delWith(args).must(t)
	w.wantState(before)

	for _, stdin := range []string{``, `{`, `{"name": "net", "type": "probelet", "bpfDir": 3}`} {
		conf := parseConfForDel([]byte(stdin))
		if conf.bpfDir != datapath.DefaultDir { // otherwise DEL would look elsewhere
			t.Errorf("%s: %+v", stdin, conf)
		}
	}
}

// TestDelFailsWhereItMayNotGiveUp: a runtime tries again only if it is told.
func TestDelFailsWhereItMayNotGiveUp(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	w.add(pod).must(t)
	foreign := filepath.Join(w.pins(pod), "respond")
	if err := os.Remove(foreign); err != nil {
		t.Fatal(err)
	}
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(m.Pin(foreign), m.Close()); err != nil {
		t.Fatal(err)
	}
	wantFault(t, w.del(pod).err, codeDetach, "respond")
	if _, err := attach.ReadRecord(w.stateDir(), idOf(pod)); err != nil {
		t.Errorf("the record went before the attachment: %v", err)
	}
}

// troubles are worlds in which ADD can't do its work.
func troubles() map[string]trouble {
	return map[string]trouble{
		"foreign XDP program": {code: codeAttach, text: "XDP program", make: func(w *world, p *bpftest.Pod) *world {
			attachForeignXDP(w.t, p)
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
		"prevResult without interfaces": {code: codePrevResult, text: "no interfaces", make: func(w *world, p *bpftest.Pod) *world {
			return w.withInterfaces(p)
		}},
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
	noRecord bool // can be left
}

func (w *world) withInterfaces(p *bpftest.Pod, interfaces ...fields) *world {
	prev := prevResult(p)
	prev["interfaces"] = interfaces
	return w.with(fields{"prevResult": prev})
}

// world is one with a pod, and the trouble in it.
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

func TestAddInTroubleIsIgnoredByDefault(t *testing.T) {
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

func TestAddInTroubleFailsIfAsked(t *testing.T) {
	for name, tr := range troubles() {
		t.Run(name, func(t *testing.T) {
			w, pod := tr.world(t)
			w = w.with(fields{"onError": "fail"})
			before := w.state()
			r := tr.add(w, pod)
			wantFault(t, r.err, tr.code, tr.text)
			if r.stdout != "" {
				t.Errorf("stdout %q beside the error", r.stdout)
			}
			w.wantState(before)
			w.del(pod).must(t)
			w.wantState(before)
		})
	}
}

// TestSecondAddInTrouble: what the first one attached must not stay.
func TestSecondAddInTrouble(t *testing.T) {
	w := newWorld(t)
	pod := w.node.AddPod(t)
	before := w.state()
	w.add(pod).must(t)
	w.withInterfaces(pod).add(pod).must(t)
	if got := w.record(pod); !strings.Contains(got.Error, "no interfaces") {
		t.Errorf("record %+v", got)
	}
	if err := attach.RemoveRecord(w.stateDir(), idOf(pod)); err != nil {
		t.Fatal(err)
	}
	w.wantState(before)
}

func TestAddWaitsForTheLockInVain(t *testing.T) {
	if testing.Short() {
		t.Skip("takes 5 s")
	}
	w := newWorld(t).with(fields{"onError": "fail"})
	pod := w.node.AddPod(t)
	if err := os.Mkdir(w.bpfDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	holder := exec.Command("flock", w.bpfDir(), "sleep", "30")
	if err := holder.Start(); err != nil {
		t.Skipf("flock(1): %v", err)
	}
	defer func() { _ = holder.Process.Kill(); _ = holder.Wait() }()
	time.Sleep(200 * time.Millisecond)
	wantFault(t, w.add(pod).err, types.ErrTryAgainLater, "locked")
}

func TestInvalidConfigurationIsNeverIgnored(t *testing.T) {
	w := newWorld(t).with(fields{"onError": "ignore", "xdpMode": "warp"})
	pod := w.node.AddPod(t)
	for name, r := range map[string]result{
		"ADD": w.add(pod), "CHECK": w.check(pod), "GC": w.gc(), "STATUS": w.status(newPlugin()),
	} {
		t.Run(name, func(t *testing.T) { wantFault(t, r.err, types.ErrInvalidNetworkConfig, "xdpMode", "warp") })
	}
	r := w.with(fields{"xdpMode": "generic", "prevResult": nil}).add(pod)
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
	detach := func(name string) func(*world, *bpftest.Pod) error {
		return func(w *world, p *bpftest.Pod) error {
			l, err := link.LoadPinnedLink(filepath.Join(w.pins(p), name), nil)
			if err != nil {
				return err
			}
			return errors.Join(l.Detach(), l.Unpin(), l.Close())
		}
	}
	replace := func(w *world, p *bpftest.Pod) error {
		d, err := datapath.Open(w.bpfDir())
		if err != nil {
			return err
		}
		foreign, err := d.NewPod()
		if err != nil {
			return err
		}
		return errors.Join(d.AddPod(uint32(p.IfIndex), p.Netns, foreign), foreign.Close(), d.Close())
	}
	edit := func(change func(*attach.Record)) func(*world, *bpftest.Pod) error {
		return func(w *world, p *bpftest.Pod) error {
			r := w.record(p)
			change(&r)
			text, err := json.Marshal(r)
			return errors.Join(err, os.WriteFile(recordFile(w), text, 0o600))
		}
	}
	tests := map[string]struct {
		harm func(*world, *bpftest.Pod) error
		text string
	}{
		"XDP removed":   {detach("respond"), "XDP program"},
		"steer removed": {detach("steer"), "steer"},
		"foreign XDP": {func(w *world, p *bpftest.Pod) error {
			if err := detach("respond")(w, p); err != nil {
				return err
			}
			attachForeignXDP(w.t, p)
			return nil
		}, "not respond"},
		"evidence not in use": {func(w *world, p *bpftest.Pod) error { return forget(w, "pod_evidence", p) }, "maps"},
		"tallies not in use":  {func(w *world, p *bpftest.Pod) error { return forget(w, "pod_tallies", p) }, "maps"},
		"foreign maps in use": {replace, "maps"},
		"evidence not pinned": {unpin("evidence"), "not pinned"},
		"tallies not pinned":  {unpin("tallies"), "not pinned"},
		"nothing pinned":      {unpin(""), "not attached"},
		"objects not loaded":  {func(w *world, _ *bpftest.Pod) error { return os.RemoveAll(w.bpfDir()) }, "not loaded"},
		"no record":           {func(w *world, p *bpftest.Pod) error { return attach.RemoveRecord(w.stateDir(), idOf(p)) }, "no record"},
		"record unreadable": {func(w *world, _ *bpftest.Pod) error {
			return os.WriteFile(recordFile(w), []byte("{"), 0o600)
		}, "record"},
		"another's container": {edit(func(r *attach.Record) { r.ContainerID = "other" }), "other"},
		"another's interface": {edit(func(r *attach.Record) { r.IfName = "net1" }), "net1"},
		"another's network":   {edit(func(r *attach.Record) { r.Network = "other" }), "other"},
		"another device":      {edit(func(r *attach.Record) { r.IfIndex = 4711 }), "4711"},
		"another device name": {edit(func(r *attach.Record) { r.HostIfName = "vethX" }), "vethX"},
		"ADD did not finish":  {edit(func(r *attach.Record) { r.Error = addUnfinished }), addUnfinished},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t).with(fields{"onError": "fail"})
			pod := w.node.AddPod(t)
			w.add(pod).must(t)
			w.check(pod).must(t)
			if err := test.harm(w, pod); err != nil {
				t.Fatal(err)
			}
			wantFault(t, w.check(pod).err, codeCheck, test.text)
		})
	}
}

// A runtime that checks with the configuration of ADD, CRI-O, is not to fail for what was uninstalled.
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

// TestCheckFindsAnotherVeth: the pod's interface was replaced after ADD.
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

func TestGCRemovesOnlyWhatIsItsOwnAndNotListed(t *testing.T) {
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

func (w *world) wantAttached(pods ...*bpftest.Pod) {
	w.t.Helper()
	ids, err := attach.List(w.bpfDir())
	if err != nil {
		w.t.Fatal(err)
	}
	d, err := datapath.Open(w.bpfDir())
	if err != nil {
		w.t.Fatal(err)
	}
	defer d.Close() //nolint:errcheck // only read
	used, err := d.PodIDs()
	if err != nil {
		w.t.Fatal(err)
	}
	if len(ids) != len(pods) || len(used) != len(pods) {
		w.t.Errorf("attached: %v, maps in use: %v; want those of %d pods", ids, used, len(pods))
	}
	for _, p := range pods {
		if _, ok := used[uint32(p.IfIndex)]; !ok {
			w.t.Errorf("no maps in use for %s", idOf(p))
		}
	}
}

func TestGCRemovesWhatHasNoRecord(t *testing.T) {
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
	w.wantAttached(alive) // whose network is not known
}

func TestGCGoesOnAfterAnError(t *testing.T) {
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

func TestStatusOfAReadOnlyStateDirectory(t *testing.T) {
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
	w.withInterfaces(pod).add(pod).must(t)
	w.del(pod).must(t)
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	if len(lines) != 3 || !strings.Contains(lines[0], "msg=ADD") || !strings.Contains(lines[1], `ignored="prevResult has no interfaces`) ||
		!strings.Contains(lines[2], "msg=DEL") || !strings.Contains(lines[2], "container=of."+pod.HostIfName) {
		t.Errorf("log:\n%s", text)
	}
	if r := w.with(fields{"logFile": "/nonexistent/log"}).add(pod).must(t); !strings.Contains(r.stderr, "/nonexistent/log") {
		t.Errorf("stderr %q does not tell of the log that can't be opened", r.stderr)
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
	each(func(i int) { mustOK(w.add(pods[i])) }) // the first of them loads
	for _, pod := range pods {
		mustOK(w.check(pod))
	}
	each(func(i int) { // beside each other
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

// command runs the plugin as a process of the node.
func (w *world) command(t *testing.T, env map[string]string, stdin string) (string, error) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{runMain + "=1", "CNI_PATH=/nonexistent"}
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
	// Name and type; the two directories only because the test must not use the machine's.
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
