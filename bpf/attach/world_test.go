package attach_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/internal/polltest"
)

// world is a pod, the loaded programs, and an attachment's name.
type world struct {
	t      testing.TB
	pod    *bpftest.Pod
	d      *datapath.Datapath
	bpfDir string
	id     attach.ID
	// released: the last removal was a release, not a detach.
	released bool
}

// oddID contains every character that file names treat specially.
var oddID = attach.ID{ContainerID: "c.1_%2E", IfName: "eth0.7"}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, pod: bpftest.NewNode(t).AddPod(t), bpfDir: bpftest.BPFDir(t), id: oddID}
	w.load()
	return w
}

// withNewPod returns the same world for a subtest, with a pod of its own. The programs need not be loaded again.
func (w *world) withNewPod(t testing.TB) *world {
	t.Helper()
	w = w.in(t)
	w.pod = bpftest.NewNode(t).AddPod(t)
	t.Cleanup(func() {
		_ = w.pod.Node.NS.Do(func(ns.NetNS) error { return attach.Detach(w.d, w.bpfDir, w.id) })
		_ = errors.Join(attach.Prune(context.Background(), w.d, w.bpfDir), w.d.Sweep())
	})
	return w
}

// serve is like the function serve, for the world's pod and programs.
func (w *world) serve(way way) *served {
	w.t.Helper()
	w.id = servedID
	return serveBy(w.t, w.d, w.bpfDir, w.pod, way)
}

// load loads the programs, or opens the pinned ones.
func (w *world) load() {
	w.t.Helper()
	d, err := datapath.Ensure(w.t.Context(), w.bpfDir)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = d.Close() })
	w.d = d
}

// in returns the same world for a subtest.
func (w *world) in(t testing.TB) *world {
	sub := *w
	sub.t = t
	return &sub
}

// world returns the world of a pod with a server.
func (s *served) world(t testing.TB) *world {
	return &world{t: t, pod: s.Pod, d: s.d, bpfDir: s.bpfDir, id: servedID}
}

// do runs f in the node's namespace with the pod's host-side veth.
func (w *world) do(f func(device netlink.Link) error) {
	w.t.Helper()
	bpftest.Do(w.t, w.pod.Node.NS, func() error {
		device, err := netlink.LinkByIndex(w.pod.IfIndex)
		if err != nil {
			return err
		}
		return f(device)
	})
}

// inNode runs f in the node's namespace and returns its error.
func (w *world) inNode(f func() error) (err error) {
	w.t.Helper()
	bpftest.Do(w.t, w.pod.Node.NS, func() error {
		err = f()
		return nil
	})
	return err
}

func (w *world) must(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

func (w *world) target(hook attach.Hook) attach.Target {
	return attach.Target{IfIndex: w.pod.IfIndex, PodNetns: w.pod.Netns, Hook: hook}
}

func (w *world) tryAttach(way way) error {
	w.t.Helper()
	return w.inNode(func() error { return attach.Attach(w.d, w.bpfDir, w.id, w.target(way.hook), way.via) })
}

func (w *world) attach(way way) {
	w.t.Helper()
	w.must(w.tryAttach(way))
}

func (w *world) detach() {
	w.t.Helper()
	w.released = false
	w.must(w.inNode(func() error { return attach.Detach(w.d, w.bpfDir, w.id) }))
}

func (w *world) release() {
	w.t.Helper()
	w.released = true
	w.must(w.inNode(func() error { return attach.Release(w.d, w.bpfDir, w.id) }))
}

func (w *world) check() error {
	w.t.Helper()
	return w.inNode(func() error { return attach.Check(w.d, w.bpfDir, w.id, w.pod.IfIndex) })
}

func (w *world) wantWhole() {
	w.t.Helper()
	if err := w.check(); err != nil {
		w.t.Error(err)
	}
}

// dir returns the directory where the attachment is pinned.
func (w *world) dir() string {
	w.t.Helper()
	found, err := filepath.Glob(filepath.Join(datapath.AttachmentsDir(w.bpfDir), "*"))
	if err != nil || len(found) != 1 {
		w.t.Fatalf("pinned: %v, %v", found, err)
	}
	return found[0]
}

// isTCX reports whether the attachment's tc programs are tcx links.
func (w *world) isTCX() bool {
	w.t.Helper()
	_, err := os.Stat(filepath.Join(w.dir(), "steer"))
	return err == nil
}

// hasTCX reports whether the kernel has tcx (6.6).
func hasTCX(t testing.TB) bool {
	t.Helper()
	_, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXEgress})
	return !errors.Is(err, ebpf.ErrNotSupported) && !errors.Is(err, unix.EINVAL)
}

func requireTCX(t testing.TB) {
	t.Helper()
	if !hasTCX(t) {
		t.Skip("this kernel has no tcx")
	}
}

// clsactQdisc returns the qdisc that tc filters of a device belong to.
func clsactQdisc(ifindex int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
}

func ingressQdisc(ifindex int) *netlink.Ingress {
	return &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS,
	}}
}

// parents are the two sides of clsact.
var parents = map[string]uint32{"egress": netlink.HANDLE_MIN_EGRESS, "ingress": netlink.HANDLE_MIN_INGRESS}

var tcxSides = map[string]ebpf.AttachType{"egress": ebpf.AttachTCXEgress, "ingress": ebpf.AttachTCXIngress}

// bpfFilter returns a filter of another agent.
func bpfFilter(ifindex int, parent uint32, priority uint16, program *ebpf.Program) *netlink.BpfFilter {
	return &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex, Parent: parent, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: priority,
		},
		Fd: program.FD(), Name: "theirs", DirectAction: true,
	}
}

// deleteFilters removes the filters on one side whose names have the prefix.
func deleteFilters(device netlink.Link, parent uint32, prefix string) error {
	filters, err := netlinksafe.FilterList(device, parent)
	if err != nil {
		return err
	}
	for _, f := range filters {
		if b, ok := f.(*netlink.BpfFilter); ok && strings.HasPrefix(b.Name, prefix) {
			if err := netlink.FilterDel(f); err != nil {
				return err
			}
		}
	}
	return nil
}

// state counts everything that an attachment may leave behind.
type state map[string]int

func (s state) without(other state) []string {
	var lines []string
	for thing, n := range s {
		if other[thing] != n {
			lines = append(lines, fmt.Sprintf("%s (%d)", thing, n))
		}
	}
	slices.Sort(lines)
	return lines
}

// state inspects the BPF file system, the maps, the device, and the links of our programs.
func (w *world) state() state {
	w.t.Helper()
	s := state{}
	w.must(filepath.WalkDir(w.bpfDir, func(path string, _ fs.DirEntry, err error) error {
		s["pin "+strings.TrimPrefix(path, w.bpfDir)]++
		return err
	}))
	w.addMaps(s)
	w.addLinks(s)
	w.must(w.inNode(func() error {
		device, err := netlink.LinkByIndex(w.pod.IfIndex)
		var gone netlink.LinkNotFoundError
		if errors.As(err, &gone) {
			return nil
		}
		if err != nil {
			return err
		}
		return addDevice(s, device)
	}))
	return s
}

func (w *world) addMaps(s state) {
	w.t.Helper()
	for _, name := range []string{"devices", "endpoint_evidence", "endpoint_tallies", "endpoint_lists", "pod_netns"} {
		m, err := ebpf.LoadPinnedMap(filepath.Join(w.d.Dir(), name), nil)
		w.must(err)
		entries := m.Iterate()
		for key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize()); entries.Next(&key, &value); {
			s[fmt.Sprintf("%s %x", name, key)]++
		}
		w.must(errors.Join(entries.Err(), m.Close()))
	}
}

// addLinks counts the links of our programs, whether they are pinned or not.
func (w *world) addLinks(s state) {
	w.t.Helper()
	ours := map[ebpf.ProgramID]string{}
	for name, p := range map[string]*ebpf.Program{"steer": w.d.Steer(), "observe": w.d.Observe(), "respond": w.d.Respond()} {
		info, err := p.Info()
		w.must(err)
		id, _ := info.ID()
		ours[id] = name
	}
	for name, n := range w.countLinks(ours) {
		s["link of "+name] = n
	}
}

// countLinks retries if another process was just creating a link.
func (w *world) countLinks(ours map[ebpf.ProgramID]string) (counts map[string]int) {
	w.t.Helper()
	for {
		counts = map[string]int{}
		var all link.Iterator
		for all.Next() {
			info, err := all.Link.Info()
			if err != nil {
				continue // of a kind that the library does not know
			}
			if name, ok := ours[info.Program]; ok {
				counts[name]++
			}
		}
		all.Close()
		if err := all.Err(); !errors.Is(err, unix.EAGAIN) {
			w.must(err)
			return counts
		}
	}
}

func addDevice(s state, device netlink.Link) error {
	if xdp := device.Attrs().Xdp; xdp != nil && xdp.ProgId != 0 {
		s[fmt.Sprintf("XDP program %d", xdp.ProgId)]++
	}
	qdiscs, err := netlinksafe.QdiscList(device)
	if err != nil {
		return err
	}
	for _, q := range qdiscs {
		s["qdisc "+q.Type()]++
	}
	for side, parent := range parents {
		filters, err := netlinksafe.FilterList(device, parent)
		if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) { // no such qdisc
			return err
		}
		for _, f := range filters {
			s[fmt.Sprintf("filter at %s, priority %d", side, f.Attrs().Priority)]++
		}
	}
	for side, hook := range tcxSides {
		programs, err := link.QueryPrograms(link.QueryOptions{Target: device.Attrs().Index, Attach: hook})
		if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL) {
			continue
		}
		if err != nil {
			return err
		}
		for _, p := range programs.Programs {
			s[fmt.Sprintf("tcx program at %s: %d", side, p.ID)]++
		}
	}
	return nil
}

// wantState compares with an earlier state, once the kernel has released links without pins, which takes a moment. Unless the
// attachment was released, an empty clsact may remain, because its removal would cost the device packets
// (TestAttachingLosesNoPackets).
func (w *world) wantState(want state) {
	w.t.Helper()
	var now state
	if !polltest.Within(polltest.Limit, func() bool {
		now = w.state()
		without := now.withoutEmptyClsact()
		return maps.Equal(without, want.withoutEmptyClsact()) && (!w.released || len(without) == len(now))
	}) {
		w.t.Errorf("now %q, previously %q", now.without(want), want.without(now))
	}
}

const clsactKey = "qdisc clsact"

// withoutEmptyClsact omits a clsact qdisc that has no filters.
func (s state) withoutEmptyClsact() state {
	if slices.ContainsFunc(slices.Collect(maps.Keys(s)), func(thing string) bool { return strings.HasPrefix(thing, "filter") }) {
		return s
	}
	without := maps.Clone(s)
	delete(without, clsactKey)
	return without
}
