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

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
)

// runMain makes the test binary be the plugin, so that commands can be run as a runtime runs them.
const runMain = "PROBELET_TEST_RUN_MAIN"

func TestMain(m *testing.M) {
	if os.Getenv(runMain) != "" {
		main()
		return
	}
	os.Exit(m.Run())
}

// fields are those of a network configuration or of a result.
type fields map[string]any

// world is a node, and a configuration with directories of the test's own.
type world struct {
	t    testing.TB
	node *bpftest.Node
	conf fields
}

func newWorld(t testing.TB) *world {
	node := bpftest.NewNode(t)
	return &world{t, node, fields{
		"cniVersion": "1.1.0",
		"name":       "net",
		"type":       "probelet",
		"bpfDir":     bpftest.BPFDir(t),
		"stateDir":   filepath.Join(t.TempDir(), "state"),
	}}
}

func (w *world) bpfDir() string   { return w.conf["bpfDir"].(string) }
func (w *world) stateDir() string { return w.conf["stateDir"].(string) }

// with is the configuration, changed.
func (w *world) with(changes fields) *world {
	conf := maps.Clone(w.conf)
	maps.Copy(conf, changes)
	return &world{w.t, w.node, conf}
}

// prevResult is what a plugin that made the pod's veth returns, and something that this build does not know.
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

// result is what a command did.
type result struct {
	err            error
	stdout, stderr string
}

// run runs a command in the node, in this process.
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

// recordFile is the only record's file.
func recordFile(w *world) string {
	w.t.Helper()
	files, err := filepath.Glob(attach.RecordsDir(w.stateDir()) + "/*.json")
	if err != nil || len(files) != 1 {
		w.t.Fatalf("records %v, %v; want one", files, err)
	}
	return files[0]
}

// pins is where the pod's attachment is pinned.
func (w *world) pins(p *bpftest.Pod) string {
	return filepath.Join(datapath.AttachmentsDir(w.bpfDir()), "of%2E"+p.HostIfName+"@eth0")
}

// unpin removes some of the pod's pins, or all of them.
func unpin(names ...string) func(*world, *bpftest.Pod) error {
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

// state is everything that ADD makes and DEL must remove, as text: pins, maps in use, records, and what hangs on the
// node's devices.
func (w *world) state() string {
	w.t.Helper()
	var lines []string
	for _, dir := range []string{datapath.AttachmentsDir(w.bpfDir()), w.stateDir()} {
		err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err == nil && (filepath.Dir(path) == datapath.AttachmentsDir(w.bpfDir()) || !e.IsDir()) {
				lines = append(lines, "file "+path)
			}
			return err
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			w.t.Fatal(err)
		}
	}
	if d, err := datapath.Open(w.bpfDir()); err == nil {
		pods, err := d.PodIDs()
		if err := errors.Join(err, d.Close()); err != nil {
			w.t.Fatal(err)
		}
		for ifindex := range pods {
			lines = append(lines, fmt.Sprintf("maps of device %d", ifindex))
		}
	}
	bpftest.Do(w.t, w.node.NS, func() error {
		onDevices, err := deviceState()
		lines = append(lines, onDevices...)
		return err
	})
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func deviceState() ([]string, error) {
	devices, err := netlinksafe.LinkList()
	if err != nil {
		return nil, err
	}
	var lines []string
	for _, device := range devices {
		name := device.Attrs().Name
		qdiscs, err := netlinksafe.QdiscList(device)
		if err != nil {
			return nil, err
		}
		for _, q := range qdiscs {
			lines = append(lines, fmt.Sprintf("%s: qdisc %s", name, q.Type()))
		}
		if xdp := device.Attrs().Xdp; xdp != nil && xdp.ProgId != 0 {
			lines = append(lines, fmt.Sprintf("%s: XDP %d", name, xdp.ProgId))
		}
		tcx, err := link.QueryPrograms(link.QueryOptions{Target: device.Attrs().Index, Attach: ebpf.AttachTCXEgress})
		if err != nil && !errors.Is(err, ebpf.ErrNotSupported) {
			return nil, err
		}
		if err == nil {
			lines = append(lines, fmt.Sprintf("%s: tcx %d", name, len(tcx.Programs)))
		}
	}
	return lines, nil
}

func (w *world) wantState(want string) {
	w.t.Helper()
	if got := w.state(); got != want {
		w.t.Errorf("state\n%s\nwant\n%s", got, want)
	}
}

// attachForeignXDP puts somebody else's XDP program on the pod's host side, for the rest of the test.
func attachForeignXDP(t testing.TB, p *bpftest.Pod) {
	t.Helper()
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.XDP,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 2), asm.Return()},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = program.Close() })
	bpftest.Do(t, p.Node.NS, func() error {
		l, err := link.AttachXDP(link.XDPOptions{Program: program, Interface: p.IfIndex, Flags: link.XDPGenericMode})
		if err == nil {
			t.Cleanup(func() { _ = l.Close() })
		}
		return err
	})
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
