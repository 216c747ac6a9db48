package main

import (
	"bytes"
	"encoding/json"
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
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/internal/polltest"
)

// runMain turns the test binary into the plugin, so that commands can run as a runtime runs them.
const runMain = "PROBELET_TEST_RUN_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(runMain) != "" {
		main()
		return
	}
	bpftest.RunInOwnCgroup(m.Run)
}

// fields holds the fields of a network configuration or a result.
type fields map[string]any

// world is a node, and a configuration with directories of its own.
type world struct {
	t      testing.TB
	node   *bpftest.Node
	netDir string // of network configurations; empty at first
	conf   fields
}

// newWorld returns a world in which ADD attaches by clsact.
func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t, bpftest.NewNode(t), t.TempDir(), fields{
		"cniVersion": "1.1.0",
		"name":       "net",
		"type":       "probelet",
		"bpfDir":     bpftest.BPFDir(t),
		"stateDir":   filepath.Join(t.TempDir(), "state"),
	}}
	t.Setenv(netDirVariable, w.netDir)
	w.writeChain("ptp", "probelet")
	return w
}

// writeChain makes these plugins the chain of the network "net".
func (w *world) writeChain(types ...string) {
	w.t.Helper()
	var plugins []fields
	for _, t := range types {
		plugins = append(plugins, fields{"type": t})
	}
	text, err := json.Marshal(fields{"cniVersion": "1.1.0", "name": "net", "plugins": plugins})
	if err == nil {
		err = os.WriteFile(filepath.Join(w.netDir, "10-net.conflist"), text, 0o600)
	}
	if err != nil {
		w.t.Fatal(err)
	}
}

// way is a way in which ADD attaches.
type way struct {
	hook attach.Hook
	via  attach.Via
}

// inEachWay runs a test once for each way.
func inEachWay(t *testing.T, test func(t *testing.T, w *world, way way)) {
	for _, way := range []way{
		{attach.HookTC, attach.ViaClsact}, {attach.HookTC, attach.ViaTCX}, {attach.HookXDP, attach.ViaClsact}, {attach.HookXDP, attach.ViaTCX},
	} {
		t.Run(fmt.Sprintf("hook %s via %s", way.hook, way.via), func(t *testing.T) {
			test(t, way.world(t), way)
		})
	}
}

// world returns a world in which ADD attaches in this way.
func (way way) world(t testing.TB) *world {
	t.Helper()
	w := newWorld(t).with(fields{"hook": way.hook})
	if way.via == attach.ViaTCX {
		w.writeChain("ptp", "probelet", "bandwidth")
	}
	return w
}

func (w *world) bpfDir() string   { return w.conf["bpfDir"].(string) }
func (w *world) stateDir() string { return w.conf["stateDir"].(string) }

// in returns the world for a subtest.
func (w *world) in(t testing.TB) *world { return &world{t, w.node, w.netDir, w.conf} }

// with returns the world with changes to its configuration.
func (w *world) with(changes fields) *world {
	conf := maps.Clone(w.conf)
	maps.Copy(conf, changes)
	return &world{w.t, w.node, w.netDir, conf}
}

// prevResult returns the result of a plugin that created the pod's veth, with fields that this build does not know.
func prevResult(p *bpftest.Pod) fields {
	return fields{
		"cniVersion": "1.1.0",
		"interfaces": []fields{
			{"name": p.HostIfName, "mac": p.HostMAC.String()},
			{"name": "eth0", "mac": p.MAC.String(), "sandbox": p.NS.Path()},
		},
		"ips": []fields{
			{"address": p.IPv4.String() + "/24", "interface": 1},
			{"address": p.IPv6.String() + "/64", "interface": 1},
		},
		"org.example/unknown": fields{"a": 1},
	}
}

func idOf(p *bpftest.Pod) attach.ID {
	return attach.ID{ContainerID: "of." + p.HostIfName, IfName: "eth0"}
}

// result is the outcome of a command.
type result struct {
	err            error
	stdout, stderr string
}

// run runs a command on the node, in this process.
func (w *world) run(p *plugin, command func(*plugin) func(*skel.CmdArgs) error, args *skel.CmdArgs) result {
	w.t.Helper()
	var stdout, stderr bytes.Buffer
	p.stdout, p.stderr = &stdout, &stderr
	var r result
	err := w.node.NS.Do(func(ns.NetNS) error {
		r.err = command(p)(args)
		return nil
	})
	if err != nil {
		w.t.Error(err)
	}
	r.stdout, r.stderr = stdout.String(), stderr.String()
	return r
}

func (w *world) stdin(changes fields) []byte {
	text, err := json.Marshal(w.with(changes).conf)
	if err != nil {
		w.t.Error(err)
	}
	return text
}

func (w *world) args(p *bpftest.Pod, stdin []byte) *skel.CmdArgs {
	return &skel.CmdArgs{
		ContainerID: idOf(p).ContainerID,
		Netns:       p.NS.Path(),
		IfName:      "eth0",
		Args:        "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;K8S_POD_UID=u-1;K8S_POD_INFRA_CONTAINER_ID=x",
		StdinData:   stdin,
	}
}

func newPlugin() *plugin { return &plugin{kernelVersion: features.LinuxVersionCode} }

func (w *world) add(p *bpftest.Pod) result {
	w.t.Helper()
	changes := fields{}
	if _, set := w.conf["prevResult"]; !set {
		changes["prevResult"] = prevResult(p)
	}
	return w.run(newPlugin(), func(p *plugin) func(*skel.CmdArgs) error { return p.funcs().Add }, w.args(p, w.stdin(changes)))
}

func (w *world) del(p *bpftest.Pod) result {
	w.t.Helper()
	return w.delWith(w.args(p, w.stdin(nil)))
}

func (w *world) delWith(args *skel.CmdArgs) result {
	w.t.Helper()
	return w.run(newPlugin(), func(p *plugin) func(*skel.CmdArgs) error { return p.funcs().Del }, args)
}

func (w *world) check(p *bpftest.Pod) result {
	w.t.Helper()
	return w.run(newPlugin(), func(p *plugin) func(*skel.CmdArgs) error { return p.funcs().Check },
		w.args(p, w.stdin(fields{"prevResult": prevResult(p)})))
}

func (w *world) gc(valid ...attach.ID) result {
	w.t.Helper()
	list := []fields{}
	for _, id := range valid {
		list = append(list, fields{"containerID": id.ContainerID, "ifname": id.IfName})
	}
	return w.run(newPlugin(), func(p *plugin) func(*skel.CmdArgs) error { return p.funcs().GC },
		&skel.CmdArgs{StdinData: w.stdin(fields{"cni.dev/valid-attachments": list})})
}

func (w *world) status(p *plugin) result {
	w.t.Helper()
	return w.run(p, func(p *plugin) func(*skel.CmdArgs) error { return p.funcs().Status }, &skel.CmdArgs{StdinData: w.stdin(nil)})
}

func (r result) must(t testing.TB) result {
	t.Helper()
	if r.err != nil {
		t.Fatal(r.err)
	}
	return r
}

func (w *world) record(p *bpftest.Pod) attach.Record {
	w.t.Helper()
	r, err := attach.ReadRecord(w.stateDir(), idOf(p))
	if err != nil {
		w.t.Fatal(err)
	}
	return r
}

// fileName returns the name of files and pins of the pod's attachment.
func fileName(p *bpftest.Pod) string { return "of%2E" + p.HostIfName + "@eth0" }

// recordFile returns the path of the pod's record.
func (w *world) recordFile(p *bpftest.Pod) string {
	return filepath.Join(attach.RecordsDir(w.stateDir()), fileName(p)+".json")
}

// pins returns the directory where the pod's attachment is pinned.
func (w *world) pins(p *bpftest.Pod) string {
	return filepath.Join(datapath.AttachmentsDir(w.bpfDir()), fileName(p))
}

// harm damages an attachment.
type harm func(*world, *bpftest.Pod) error

// unpin removes some of the pod's pins. An empty name stands for all of them.
func unpin(names ...string) harm {
	return func(w *world, p *bpftest.Pod) error {
		if _, err := os.Stat(w.pins(p)); err != nil {
			return err
		}
		var errs []error
		for _, name := range names {
			errs = append(errs, os.RemoveAll(filepath.Join(w.pins(p), name)))
		}
		return errors.Join(errs...)
	}
}

// unpinDevice removes the marker that identifies the attached device.
func unpinDevice(w *world, p *bpftest.Pod) error {
	return unpin(fmt.Sprintf("device-%d-%d", p.IfIndex, w.device(p).Generation))(w, p)
}

// detachProgram detaches one of the programs from the pod's device.
func detachProgram(program string) harm {
	return func(w *world, p *bpftest.Pod) error {
		l, err := link.LoadPinnedLink(filepath.Join(w.pins(p), program), nil)
		if errors.Is(err, fs.ErrNotExist) {
			return w.node.NS.Do(func(ns.NetNS) error {
				filter, err := filterOf(p, program)
				if err != nil {
					return err
				}
				return netlink.FilterDel(filter)
			})
		}
		if err != nil {
			return err
		}
		return errors.Join(l.Detach(), l.Unpin(), l.Close())
	}
}

// filterOf returns the filter of one of the programs on the pod's device.
func filterOf(p *bpftest.Pod, program string) (netlink.Filter, error) {
	device, err := netlink.LinkByIndex(p.IfIndex)
	if err != nil {
		return nil, err
	}
	for _, side := range sides {
		if side.program != program {
			continue
		}
		filters, err := netlinksafe.FilterList(device, side.parent)
		if err != nil || len(filters) != 1 {
			return nil, fmt.Errorf("filters %v, %w; want one", filters, err)
		}
		return filters[0], nil
	}
	return nil, fmt.Errorf("%s is not a tc program", program)
}

// removeQdisc removes the qdisc of the filters, and with it the filters.
func removeQdisc(w *world, p *bpftest.Pod) error {
	return w.node.NS.Do(func(ns.NetNS) error { return netlink.QdiscDel(clsact(p)) })
}

// inDatapath runs a function on the objects that are loaded in the world.
func (w *world) inDatapath(do func(*datapath.Datapath) error) error {
	d, err := datapath.Open(w.bpfDir())
	if err != nil {
		return err
	}
	return errors.Join(do(d), d.Close())
}

// device returns the device that is attached for the pod.
func (w *world) device(p *bpftest.Pod) datapath.DeviceKey {
	w.t.Helper()
	key, err := attach.Device(w.bpfDir(), idOf(p))
	if err != nil {
		w.t.Fatal(err)
	}
	return key
}

// forgetDevice removes the pod's device from the maps.
func forgetDevice(w *world, p *bpftest.Pod) error {
	return w.inDatapath(func(d *datapath.Datapath) error { return d.RemoveDevice(w.device(p)) })
}

// lookElsewhere changes the recorded id of the pod's namespace.
func lookElsewhere(w *world, p *bpftest.Pod) error {
	return w.inDatapath(func(d *datapath.Datapath) error { return d.LookInto(w.device(p), 4711, 0) })
}

// interruptRemoval performs only the first step of RemoveDevice, as if it had been interrupted.
func interruptRemoval(w *world, p *bpftest.Pod) error {
	w.putEvidence(p)
	devices, err := ebpf.LoadPinnedMap(filepath.Join(w.bpfDir(), datapath.ABI, "devices"), nil)
	if err != nil {
		return err
	}
	return errors.Join(devices.Delete(uint32(p.IfIndex)), devices.Close())
}

// attachAnew gives the pod's device another generation.
func attachAnew(w *world, p *bpftest.Pod) error {
	key, err := datapath.NewDeviceKey(p.IfIndex)
	if err != nil {
		return err
	}
	return w.inDatapath(func(d *datapath.Datapath) error { return d.AddDevice(key, p.Netns, datapath.HookTC) })
}

// editRecord changes the pod's record.
func editRecord(change func(*attach.Record)) harm {
	return func(w *world, p *bpftest.Pod) error {
		r := w.record(p)
		change(&r)
		text, err := json.Marshal(r)
		return errors.Join(err, os.WriteFile(w.recordFile(p), text, 0o600))
	}
}

func truncateRecord(w *world, p *bpftest.Pod) error {
	return os.WriteFile(w.recordFile(p), []byte("{"), 0o600)
}

func removeRecord(w *world, p *bpftest.Pod) error { return attach.RemoveRecord(w.stateDir(), idOf(p)) }

// putEvidence puts evidence about a port of the pod and its TCP endpoint.
func (w *world) putEvidence(p *bpftest.Pod) {
	w.t.Helper()
	err := w.inDatapath(func(d *datapath.Datapath) error {
		pod, err := d.Pod(w.device(p))
		if err != nil {
			return err
		}
		e := datapath.Evidence{ObservedAt: datapath.Now(), Result: datapath.ResultSuccess}
		return errors.Join(pod.Put(datapath.PortKey(80), e), pod.Put(datapath.TCPKey(80), e))
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// evidence returns the keys of the pod's evidence.
func (w *world) evidence(p *bpftest.Pod) (keys []datapath.EndpointKey) {
	w.t.Helper()
	err := w.inDatapath(func(d *datapath.Datapath) error {
		pod, err := d.Pod(w.device(p))
		if err == nil {
			keys, err = pod.Keys()
		}
		return err
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return keys
}

// wantAttachedTo compares what is attached to the pod's device with what ADD attaches in this way.
func (w *world) wantAttachedTo(p *bpftest.Pod, way way) {
	w.t.Helper()
	want := []string{"egress tcx program", "ingress tcx program"}
	if way.via == attach.ViaClsact {
		want = []string{"egress filter of type bpf, priority 2", "ingress filter of type bpf, priority 2", "qdisc clsact"}
	}
	if way.hook == attach.HookXDP {
		want = append([]string{"XDP program"}, want...)
	}
	var got []string
	bpftest.Do(w.t, w.node.NS, func() error {
		lines, err := attachedToDevices()
		for _, line := range lines {
			if what, ours := strings.CutPrefix(line, p.HostIfName+": "); ours && what != "qdisc noqueue" {
				got = append(got, what)
			}
		}
		return err
	})
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		w.t.Errorf("attached to %s: %q, want %q", p.HostIfName, got, want)
	}
}

// state describes everything that ADD creates and DEL must remove: pins, map entries, records, and what is attached to
// the node's devices.
func (w *world) state() string {
	w.t.Helper()
	lines, err := w.files()
	entries, entriesErr := w.mapEntries()
	if err := errors.Join(err, entriesErr); err != nil {
		w.t.Fatal(err)
	}
	lines = append(lines, entries...)
	bpftest.Do(w.t, w.node.NS, func() error {
		attached, err := attachedToDevices()
		lines = append(lines, attached...)
		return err
	})
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// files lists pins of attachments, and records.
func (w *world) files() (lines []string, err error) {
	for _, dir := range []string{datapath.AttachmentsDir(w.bpfDir()), attach.RecordsDir(w.stateDir())} {
		walkErr := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
			if err == nil && path != dir {
				lines = append(lines, "file "+path)
			}
			return err
		})
		if !errors.Is(walkErr, fs.ErrNotExist) {
			err = errors.Join(err, walkErr)
		}
	}
	return lines, err
}

// mapEntries lists the entries of all pinned hash maps.
func (w *world) mapEntries() (lines []string, err error) {
	pins, err := filepath.Glob(filepath.Join(w.bpfDir(), datapath.ABI, "*"))
	for _, pin := range pins {
		m, openErr := ebpf.LoadPinnedMap(pin, nil)
		if openErr != nil {
			continue // a program, a link or a directory
		}
		if m.Type() == ebpf.Hash || m.Type() == ebpf.LRUHash {
			var key, value []byte
			entries := m.Iterate()
			for entries.Next(&key, &value) {
				lines = append(lines, fmt.Sprintf("%s: %x is %x", filepath.Base(pin), key, value))
			}
			err = errors.Join(err, entries.Err())
		}
		err = errors.Join(err, m.Close())
	}
	return lines, err
}

// attachedToDevices lists the qdiscs, filters and programs on both sides of each device in this namespace.
func attachedToDevices() (lines []string, err error) {
	devices, err := netlinksafe.LinkList()
	if err != nil {
		return nil, err
	}
	for _, device := range devices {
		add := func(format string, args ...any) {
			lines = append(lines, device.Attrs().Name+": "+fmt.Sprintf(format, args...))
		}
		qdiscs, err := netlinksafe.QdiscList(device)
		if err != nil {
			return nil, err
		}
		for _, q := range qdiscs {
			add("qdisc %s", q.Type())
		}
		if xdp := device.Attrs().Xdp; xdp != nil && xdp.ProgId != 0 {
			add("XDP program")
		}
		for _, side := range sides {
			filters, err := netlinksafe.FilterList(device, side.parent)
			if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) { // no such qdisc
				return nil, err
			}
			for _, f := range filters {
				add("%s filter of type %s, priority %d", side.name, f.Type(), f.Attrs().Priority)
			}
			tcx, err := link.QueryPrograms(link.QueryOptions{Target: device.Attrs().Index, Attach: side.tcx})
			if err != nil && !errors.Is(err, ebpf.ErrNotSupported) && !errors.Is(err, unix.EINVAL) {
				return nil, err
			}
			for range tcxPrograms(tcx) {
				add("%s tcx program", side.name)
			}
		}
	}
	return lines, nil
}

func tcxPrograms(found *link.QueryResult) []link.AttachedProgram {
	if found == nil {
		return nil
	}
	return found.Programs
}

// side is one of the two sides of a device, with the name of the program that ADD attaches there.
type side struct {
	name, program string
	parent        uint32
	tcx           ebpf.AttachType
}

var sides = []side{
	{"ingress", "observe", netlink.HANDLE_MIN_INGRESS, ebpf.AttachTCXIngress},
	{"egress", "steer", netlink.HANDLE_MIN_EGRESS, ebpf.AttachTCXEgress},
}

// wantState waits for a state, because the kernel detaches a link without a pin asynchronously.
func (w *world) wantState(want string) {
	w.t.Helper()
	w.wantStateWithout("", want)
}

// wantStateWithout is like wantState, but ignores lines with a prefix; an empty prefix ignores none.
func (w *world) wantStateWithout(prefix, want string) {
	w.t.Helper()
	var got string
	if !polltest.Within(polltest.Limit, func() bool {
		got = without(prefix, w.state())
		return got == without(prefix, want)
	}) {
		w.t.Errorf("state\n%s\nwant\n%s", got, without(prefix, want))
	}
}

func without(prefix, state string) string {
	var lines []string
	for line := range strings.SplitSeq(state, "\n") {
		if prefix == "" || !strings.HasPrefix(line, prefix) {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines, "\n")
}

// foreignProgram loads a foreign program that passes every packet, for the rest of the test.
func foreignProgram(t testing.TB, kind ebpf.ProgramType, pass int32) *ebpf.Program {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         kind,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, pass), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = program.Close() })
	return program
}

// Verdicts that let a packet pass.
const (
	xdpPass  = 2  // XDP_PASS
	tcxNext  = -1 // TCX_NEXT
	tcUnspec = -1 // TC_ACT_UNSPEC
)

// attachForeignXDP attaches another XDP program to the pod's host end, for the rest of the test.
func attachForeignXDP(t testing.TB, p *bpftest.Pod) {
	t.Helper()
	program := foreignProgram(t, ebpf.XDP, xdpPass)
	bpftest.Do(t, p.Node.NS, func() error {
		l, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: p.IfIndex, Flags: link.XDPGenericMode})
		if err == nil {
			t.Cleanup(func() { _ = l.Close() })
		}
		return err
	})
}

// attachForeignTCX attaches another tcx program to one side of the pod's device, after existing ones, for the rest of
// the test.
func attachForeignTCX(t testing.TB, p *bpftest.Pod, side ebpf.AttachType) error {
	t.Helper()
	program := foreignProgram(t, ebpf.SchedCLS, tcxNext)
	return p.Node.NS.Do(func(ns.NetNS) error {
		l, err := link.AttachTCX(link.TCXOptions{Program: program, Interface: p.IfIndex, Attach: side})
		if err == nil {
			t.Cleanup(func() { _ = l.Close() })
		}
		return err
	})
}

// fillTCX attaches as many tcx programs as possible: BPF_MPROG_MAX in include/linux/bpf_mprog.h.
func fillTCX(t testing.TB, p *bpftest.Pod, side ebpf.AttachType) {
	t.Helper()
	for {
		err := attachForeignTCX(t, p, side)
		if errors.Is(err, unix.ERANGE) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// replaceFilter replaces steer's filter with another program.
func replaceFilter(w *world, p *bpftest.Pod) error {
	program := foreignProgram(w.t, ebpf.SchedCLS, tcUnspec)
	return w.node.NS.Do(func(ns.NetNS) error {
		filter, err := filterOf(p, "steer")
		if err != nil {
			return err
		}
		return netlink.FilterReplace(&netlink.BpfFilter{
			FilterAttrs: *filter.Attrs(), Fd: program.FD(), Name: "other", DirectAction: true,
		})
	})
}

// A device has room for only one of the two.
func clsact(p *bpftest.Pod) *netlink.Clsact { return &netlink.Clsact{QdiscAttrs: ingressOf(p)} }

func ingressQdisc(p *bpftest.Pod) *netlink.Ingress { return &netlink.Ingress{QdiscAttrs: ingressOf(p)} }

func ingressOf(p *bpftest.Pod) netlink.QdiscAttrs {
	return netlink.QdiscAttrs{LinkIndex: p.IfIndex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}
}

func deleteVeth(t testing.TB, p *bpftest.Pod) {
	t.Helper()
	bpftest.Do(t, p.Node.NS, func() error {
		device, err := netlink.LinkByIndex(p.IfIndex)
		if err != nil {
			return err
		}
		return netlink.LinkDel(device)
	})
}
