package agent

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/install"
	"github.com/probelet/probelet/daemon/internal/repair"
	"github.com/probelet/probelet/daemon/internal/repair/repairtest"
)

// v3 is what builds with ABI v3 left: under <bpfDir>/v3 the objects, and for each attachment its two maps, an XDP link, and a
// tcx link or else the mark of a qdisc with a filter. Programs and maps are stand-ins under their names.
type v3 struct {
	t              *testing.T
	dir            string
	steer, respond *ebpf.Program
}

func newV3(t *testing.T, bpfDir string) *v3 {
	t.Helper()
	v := &v3{t: t, dir: filepath.Join(bpfDir, "v3")}
	v.must(os.MkdirAll(filepath.Join(v.dir, "attachments"), 0o700))
	v.steer = v.program("steer", ebpf.SchedCLS, -1)
	v.respond = v.program("respond", ebpf.XDP, 2)
	for _, name := range []string{
		"prober", "pod_evidence", "pod_tallies", "pod_netns", "own_sockets", "flows", "outcomes", "counters", "answer_ages",
	} {
		v.pinMap(filepath.Join(v.dir, name))
	}
	return v
}

func (v *v3) must(err error) {
	v.t.Helper()
	if err != nil {
		v.t.Fatal(err)
	}
}

func (v *v3) program(name string, kind ebpf.ProgramType, verdict int32) *ebpf.Program {
	v.t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: kind, License: "MIT", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()},
	})
	v.must(err)
	v.t.Cleanup(func() { _ = p.Close() })
	v.must(p.Pin(filepath.Join(v.dir, name)))
	return p
}

func (v *v3) pinMap(path string) {
	v.t.Helper()
	m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 8, MaxEntries: 1})
	v.must(err)
	v.must(errors.Join(m.Pin(path), m.Close()))
}

// attach attaches a pod as that build did, by tcx or by clsact.
func (v *v3) attach(stateDir string, p *bpftest.Pod, tcx bool) {
	v.t.Helper()
	dir := filepath.Join(v.dir, "attachments", repairtest.ID(p).ContainerID+"@eth0")
	v.must(os.Mkdir(dir, 0o700))
	for _, name := range []string{"evidence", "tallies"} {
		v.pinMap(filepath.Join(dir, name))
	}
	bpftest.Do(v.t, p.Node.NS, func() error {
		l, err := link.AttachXDP(link.XDPOptions{Program: v.respond, Interface: p.IfIndex, Flags: link.XDPGenericMode})
		if err != nil {
			return err
		}
		if err := errors.Join(l.Pin(filepath.Join(dir, "respond")), l.Close()); err != nil {
			return err
		}
		if !tcx {
			return errors.Join(os.Mkdir(filepath.Join(dir, "owns-clsact"), 0o700), v.addFilter(p))
		}
		l, err = link.AttachTCX(link.TCXOptions{Program: v.steer, Interface: p.IfIndex, Attach: ebpf.AttachTCXEgress})
		if errors.Is(err, ebpf.ErrNotSupported) {
			v.t.Skip("this kernel has no tcx")
		}
		if err != nil {
			return err
		}
		return errors.Join(l.Pin(filepath.Join(dir, "steer")), l.Close())
	})
	v.must(attach.WriteRecord(stateDir, attach.Record{
		ContainerID: repairtest.ID(p).ContainerID, IfName: "eth0", Network: "pods", IfIndex: p.IfIndex, HostIfName: p.HostIfName,
		PodNetns: p.Netns, PodNamespace: "shop", PodName: p.HostIfName, PodUID: "u-1", PodIPs: []string{p.IPv4.String()},
	}))
}

func (v *v3) addFilter(p *bpftest.Pod) error {
	qdisc := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: p.IfIndex, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	return errors.Join(netlink.QdiscAdd(qdisc), netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: p.IfIndex, Parent: netlink.HANDLE_MIN_EGRESS, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 1,
		},
		Fd: v.steer.FD(), Name: "probelet/steer, owns-clsact", DirectAction: true,
	}))
}

// wantBare expects nothing on the pod's device but, if attached, this build's tc programs as tcx links.
func wantBare(t *testing.T, p *bpftest.Pod, attached bool) {
	t.Helper()
	bpftest.Do(t, p.Node.NS, func() error {
		device, err := netlink.LinkByIndex(p.IfIndex)
		if err != nil {
			return err
		}
		if xdp := device.Attrs().Xdp; xdp != nil && xdp.ProgId != 0 {
			t.Errorf("XDP program %d is left on %s", xdp.ProgId, p.HostIfName)
		}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			filters, err := netlinksafe.FilterList(device, parent)
			if err == nil && len(filters) > 0 {
				t.Errorf("filters are left on %s: %v", p.HostIfName, filters)
			}
		}
		want := 0
		if attached {
			want = 1
		}
		for _, side := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			result, err := link.QueryPrograms(link.QueryOptions{Target: p.IfIndex, Attach: side})
			if err != nil && !errors.Is(err, ebpf.ErrNotSupported) {
				return err
			}
			if err == nil && len(result.Programs) != want {
				t.Errorf("%s of %s: %d programs, want %d", side, p.HostIfName, len(result.Programs), want)
			}
		}
		return nil
	})
}

// Running pods get the programs of this build at the second look, those of the old one go, and when the last has gone, all
// that it had loaded.
func TestUpgradeFromV3(t *testing.T) {
	for name, tcx := range map[string]bool{"tcx": true, "clsact": false} {
		t.Run(name, func(t *testing.T) {
			k := newKept(t)
			k.RequireTCX()
			old := newV3(t, k.bpfDir)
			p, gone, deleted := k.run(), k.run(), k.run()
			for _, p := range []*bpftest.Pod{p, gone, deleted} {
				old.attach(k.stateDir, p, tcx)
			}
			k.pods = k.pods[:1]
			k.DeleteDevice(gone)
			if err := attach.RemoveRecord(k.stateDir, repairtest.ID(gone)); err != nil {
				t.Fatal(err)
			}
			if err := k.DEL(deleted); err != nil { // before the daemon has looked
				t.Fatal(err)
			}
			wantBare(t, deleted, false)
			k.look(1)
			if _, err := os.Stat(old.dir); err != nil {
				t.Errorf("removed with what is attached: %v", err)
			}
			k.look(1)
			k.WantWhole(p)
			wantBare(t, p, true)
			if k.fresh(p) {
				t.Error("fresh by what the old build knew")
			}
			if k.arm(p); !k.fresh(p) {
				t.Error("nothing is learned of what is attached again")
			}
			k.look(1)
			wantGone(t, old.dir)
			k.wantRepairs(repair.Reattached, 1)
			k.wantRepairs(repair.Removed, 1)
		})
	}
}

// uninstall takes probelet off a node.
func uninstall(t *testing.T, netns ns.NetNS, bpfDir, stateDir string) {
	t.Helper()
	o := install.Options{
		NetDir: t.TempDir(), BinDir: t.TempDir(), BPFDir: bpfDir, StateDir: stateDir,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	bpftest.Do(t, netns, func() error { return install.Uninstall(context.Background(), o) })
}

func wantGone(t *testing.T, paths ...string) {
	t.Helper()
	for _, path := range paths {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
}

// An uninstall of this build removes what the old one left, whether or not a daemon of this one has run.
func TestUninstallOfV3(t *testing.T) {
	for name, loaded := range map[string]bool{"only v3": false, "and this build": true} {
		t.Run(name, func(t *testing.T) {
			node := bpftest.NewNode(t)
			bpfDir, stateDir := bpftest.BPFDir(t), filepath.Join(t.TempDir(), "state")
			old := newV3(t, bpfDir)
			if loaded {
				d, err := datapath.Ensure(t.Context(), bpfDir)
				old.must(err)
				old.must(d.Close())
			}
			byClsact, byTCX := node.AddPod(t), node.AddPod(t)
			old.attach(stateDir, byClsact, false)
			old.attach(stateDir, byTCX, true)
			uninstall(t, node.NS, bpfDir, stateDir)
			wantBare(t, byClsact, false)
			wantBare(t, byTCX, false)
			wantGone(t, bpfDir, stateDir)
		})
	}
}

// Filters are held by the device, not by a pin: they outlive the loss of the pins, and must not outlive probelet, nor run behind
// what is attached in their place.
func TestFiltersWhosePinsAreLost(t *testing.T) {
	lost := func(t *testing.T) (*kept, *bpftest.Pod) {
		k := newKept(t)
		k.RequireTCX()
		p := k.adopted()
		k.attachClsact(p)
		if err := os.RemoveAll(k.bpfDir); err != nil {
			t.Fatal(err)
		}
		if len(k.Filters(p)) != 2 {
			t.Fatalf("filters %q", k.Filters(p))
		}
		return k, p
	}
	t.Run("uninstall", func(t *testing.T) {
		k, p := lost(t)
		uninstall(t, k.NS, k.bpfDir, k.stateDir)
		wantBare(t, p, false)
		wantGone(t, k.bpfDir, k.stateDir)
	})
	t.Run("attached again", func(t *testing.T) {
		k, p := lost(t)
		k.Load()
		k.start()
		k.look(2)
		k.WantWhole(p)
		wantBare(t, p, true)
	})
}

// An uninstall that was killed is run again, from wherever it was.
func TestUninstallAgain(t *testing.T) {
	k := newKept(t)
	p := k.adopted()
	k.In(func() error { return attach.Detach(k.datapath, k.bpfDir, repairtest.ID(p)) })
	for range 2 {
		uninstall(t, k.NS, k.bpfDir, k.stateDir)
	}
	wantBare(t, p, false)
	wantGone(t, k.bpfDir, k.stateDir)
}
