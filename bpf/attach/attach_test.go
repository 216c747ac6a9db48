package attach_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
)

var podID = attach.ID{ContainerID: "c.1_%2E", IfName: "eth0.7"}

type world struct {
	t      *testing.T
	pod    *bpftest.Pod
	d      *datapath.Datapath
	bpfDir string
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{t: t, pod: bpftest.NewNode(t).AddPod(t), bpfDir: bpftest.BPFDir(t)}
	d, err := datapath.Ensure(t.Context(), w.bpfDir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	w.d = d
	return w
}

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

func (w *world) attach(hook attach.Hook) {
	w.t.Helper()
	bpftest.Do(w.t, w.pod.Node.NS, func() error {
		return attach.Attach(w.d, w.bpfDir, podID, attach.Target{IfIndex: w.pod.IfIndex, PodNetns: w.pod.Netns}, hook)
	})
}

func (w *world) detach(d *datapath.Datapath) {
	w.t.Helper()
	bpftest.Do(w.t, w.pod.Node.NS, func() error { return attach.Detach(d, w.bpfDir, podID) })
}

func (w *world) check() (err error) {
	w.t.Helper()
	bpftest.Do(w.t, w.pod.Node.NS, func() error {
		err = attach.Check(w.d, w.bpfDir, podID, w.pod.IfIndex)
		return nil
	})
	return err
}

// wantTC compares the number of clsact qdiscs, and of filters at its two sides.
func (w *world) wantTC(clsact, egress, ingress int) {
	w.t.Helper()
	w.do(func(device netlink.Link) error {
		qdiscs, err := netlinksafe.QdiscList(device)
		if err != nil {
			return err
		}
		qdiscs = slices.DeleteFunc(qdiscs, func(q netlink.Qdisc) bool { return q.Type() != "clsact" })
		out, errOut := netlinksafe.FilterList(device, netlink.HANDLE_MIN_EGRESS)
		in, errIn := netlinksafe.FilterList(device, netlink.HANDLE_MIN_INGRESS)
		if len(qdiscs) != clsact || len(out) != egress || len(in) != ingress {
			w.t.Errorf("%d clsact, %d egress filters (%v), %d ingress filters (%v); want %d, %d, %d",
				len(qdiscs), len(out), errOut, len(in), errIn, clsact, egress, ingress)
		}
		return nil
	})
}

func (w *world) wantNothing() {
	w.t.Helper()
	ids, err := attach.List(w.bpfDir)
	pods, podsErr := w.d.PodIDs()
	if err := errors.Join(err, podsErr); err != nil || len(ids)+len(pods) > 0 {
		w.t.Errorf("attachments %v, maps in use %v, %v; want none", ids, pods, err)
	}
	w.do(func(device netlink.Link) error {
		if xdp := device.Attrs().Xdp; xdp != nil && xdp.ProgId != 0 {
			w.t.Errorf("XDP program %d is still there", xdp.ProgId)
		}
		return nil
	})
}

func TestListNamesWhatIsAttached(t *testing.T) {
	w := newWorld(t)
	w.attach(attach.HookAuto)
	ids, err := attach.List(w.bpfDir)
	if err != nil || !slices.Equal(ids, []attach.ID{podID}) {
		t.Errorf("%+v, %v; want %+v", ids, err, podID)
	}
}

func TestClsactLeavesNoQdisc(t *testing.T) {
	w := newWorld(t)
	w.attach(attach.HookClsact)
	w.wantTC(1, 1, 0)
	if err := w.check(); err != nil {
		t.Error(err)
	}
	w.attach(attach.HookClsact)
	w.wantTC(1, 1, 0)
	w.detach(w.d)
	w.wantTC(0, 0, 0)
	w.wantNothing()
}

func TestClsactOfOthersStays(t *testing.T) {
	w := newWorld(t)
	w.do(func(device netlink.Link) error {
		return netlink.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
			LinkIndex: device.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
		}})
	})
	w.attach(attach.HookClsact)
	w.detach(w.d)
	w.wantTC(1, 0, 0)
	w.wantNothing()
}

// TestClsactInUseByOthersStays: removing the qdisc would remove their filters.
func TestClsactInUseByOthersStays(t *testing.T) {
	for name, parent := range map[string]uint32{"egress": netlink.HANDLE_MIN_EGRESS, "ingress": netlink.HANDLE_MIN_INGRESS} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.attach(attach.HookClsact)
			w.do(func(device netlink.Link) error {
				return netlink.FilterAdd(&netlink.BpfFilter{
					FilterAttrs: netlink.FilterAttrs{
						LinkIndex: device.Attrs().Index, Parent: parent, Handle: 1, Protocol: unix.ETH_P_ALL, Priority: 7,
					},
					Fd: w.d.Steer().FD(), Name: "theirs", DirectAction: true,
				})
			})
			w.detach(w.d)
			if parent == netlink.HANDLE_MIN_EGRESS {
				w.wantTC(1, 1, 0)
			} else {
				w.wantTC(1, 0, 1)
			}
			w.wantNothing()
		})
	}
}

func TestClsactCheckFindsAMissingFilter(t *testing.T) {
	w := newWorld(t)
	w.attach(attach.HookClsact)
	w.do(func(device netlink.Link) error {
		filters, err := netlinksafe.FilterList(device, netlink.HANDLE_MIN_EGRESS)
		if err != nil {
			return err
		}
		return netlink.FilterDel(filters[0])
	})
	if err := w.check(); !errors.Is(err, attach.ErrIncomplete) {
		t.Errorf("%v, want %v", err, attach.ErrIncomplete)
	}
}

// TestDetachKnowsTheDeviceInAnyWay: by the XDP link, by the evidence in use, by the tallies in use.
func TestDetachKnowsTheDeviceInAnyWay(t *testing.T) {
	pins := func(w *world, name string) string {
		found, err := filepath.Glob(filepath.Join(datapath.AttachmentsDir(w.bpfDir), "*", name))
		if err != nil || len(found) != 1 {
			t.Fatalf("%s: %v, %v", name, found, err)
		}
		return found[0]
	}
	unpin := func(w *world, names ...string) {
		for _, name := range names {
			if err := os.Remove(pins(w, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	forget := func(w *world, outer string) {
		m, err := ebpf.LoadPinnedMap(filepath.Join(w.d.Dir(), outer), nil)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(m.Delete(uint32(w.pod.IfIndex)), m.Close()); err != nil {
			t.Fatal(err)
		}
	}
	for name, lose := range map[string]func(w *world){
		"link":     func(w *world) { unpin(w, "evidence", "tallies") },
		"evidence": func(w *world) { unpin(w, "respond"); forget(w, "pod_tallies") },
		"tallies":  func(w *world) { unpin(w, "respond"); forget(w, "pod_evidence") },
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.attach(attach.HookClsact)
			lose(w)
			w.detach(w.d)
			w.wantTC(0, 0, 0)
			if ids, err := attach.List(w.bpfDir); err != nil || len(ids) > 0 {
				t.Errorf("attachments %v, %v", ids, err)
			}
			if pods, err := w.d.PodIDs(); err != nil || len(pods) > 0 {
				t.Errorf("maps in use %v, %v", pods, err)
			}
		})
	}
}

// TestDetachWithoutDatapath: the objects' pins are gone, the attachment's are not.
func TestDetachWithoutDatapath(t *testing.T) {
	w := newWorld(t)
	w.attach(attach.HookClsact)
	w.detach(nil)
	w.wantTC(0, 0, 0)
	if ids, err := attach.List(w.bpfDir); err != nil || len(ids) > 0 {
		t.Errorf("attachments %v, %v", ids, err)
	}
}

func TestOrphaned(t *testing.T) {
	w := newWorld(t)
	w.attach(attach.HookAuto)
	want := func(want bool) {
		t.Helper()
		bpftest.Do(t, w.pod.Node.NS, func() error {
			got, err := attach.Orphaned(w.d, w.bpfDir, podID)
			if got != want {
				t.Errorf("orphaned: %v, want %v", got, want)
			}
			return err
		})
	}
	want(false)
	w.do(netlink.LinkDel)
	want(true)
}

func TestPruneKeepsWhatIsPinned(t *testing.T) {
	w := newWorld(t)
	w.attach(attach.HookAuto)
	stray, err := w.d.NewPod()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(w.d.AddPod(4711, 1, stray), stray.Close(), attach.Prune(w.d, w.bpfDir)); err != nil {
		t.Fatal(err)
	}
	if err := w.check(); err != nil {
		t.Error(err)
	}
	if pods, err := w.d.PodIDs(); err != nil || len(pods) != 1 {
		t.Errorf("maps in use %v, %v; want those of the pod", pods, err)
	}
}

// TestClsactIsStillOursWhenPinsAreLost: attaching again is not in its own way, and leaves no qdisc either.
func TestClsactIsStillOursWhenPinsAreLost(t *testing.T) {
	w := newWorld(t)
	w.attach(attach.HookClsact)
	for range 2 {
		if err := os.RemoveAll(w.pins(datapath.ABI)); err != nil {
			t.Fatal(err)
		}
		w.attach(attach.HookClsact)
		w.wantTC(1, 1, 0)
		if err := w.check(); err != nil {
			t.Error(err)
		}
	}
	w.detach(w.d)
	w.wantTC(0, 0, 0)
	w.wantNothing()
}

// pins are where the attachment is pinned under an ABI.
func (w *world) pins(abi string) string {
	w.t.Helper()
	found, err := filepath.Glob(filepath.Join(w.bpfDir, abi, "attachments", "*"))
	if err != nil || len(found) != 1 {
		w.t.Fatalf("pinned under %s: %v, %v", abi, found, err)
	}
	return found[0]
}

// upgrade makes what is attached that of an earlier build.
func (w *world) upgrade() {
	w.t.Helper()
	if err := os.Rename(filepath.Join(w.bpfDir, datapath.ABI), filepath.Join(w.bpfDir, "v0")); err != nil {
		w.t.Fatal(err)
	}
	d, err := datapath.Ensure(w.t.Context(), w.bpfDir)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { _ = d.Close() })
	w.d = d
}

func TestWhatAnotherABIAttachedIsReplaced(t *testing.T) {
	for _, hook := range []attach.Hook{attach.HookAuto, attach.HookClsact} {
		w := newWorld(t)
		w.attach(hook)
		w.upgrade()
		if err := w.check(); !errors.Is(err, attach.ErrNotAttached) {
			t.Errorf("before: %v", err)
		}
		w.attach(hook)
		if err := w.check(); err != nil {
			t.Error(err)
		}
		if left, _ := os.ReadDir(filepath.Join(w.bpfDir, "v0", "attachments")); len(left) > 0 {
			t.Errorf("left of it: %v", left)
		}
		w.detach(w.d)
		w.wantTC(0, 0, 0)
		w.wantNothing()
	}
}

func TestWhatAnotherABIAttachedIsListedAndDetached(t *testing.T) {
	for _, hook := range []attach.Hook{attach.HookAuto, attach.HookClsact} {
		w := newWorld(t)
		w.attach(hook)
		w.upgrade()
		if ids, err := attach.List(w.bpfDir); err != nil || !slices.Equal(ids, []attach.ID{podID}) {
			t.Errorf("%v, %v", ids, err)
		}
		w.do(func(netlink.Link) error {
			if orphaned, err := attach.Orphaned(w.d, w.bpfDir, podID); err != nil || orphaned {
				t.Errorf("orphaned: %v, %v", orphaned, err)
			}
			return nil
		})
		w.detach(w.d)
		w.wantTC(0, 0, 0)
		w.wantNothing()
	}
}

// TestAnXDPProgramInTheWayIsNamed: probelet's own, of a BPF file system that cannot be seen any more, is a puzzle otherwise.
func TestAnXDPProgramInTheWayIsNamed(t *testing.T) {
	w := newWorld(t)
	w.attach(attach.HookAuto)
	if err := unix.Mount("bpf", filepath.Dir(w.bpfDir), "bpf", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(filepath.Dir(w.bpfDir), unix.MNT_DETACH) })
	d, err := datapath.Ensure(t.Context(), w.bpfDir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close() //nolint:errcheck // a test's
	w.do(func(netlink.Link) error {
		err := attach.Attach(d, w.bpfDir, podID, attach.Target{IfIndex: w.pod.IfIndex, PodNetns: w.pod.Netns}, attach.HookAuto)
		if err == nil || !strings.Contains(err.Error(), "respond of another probelet; if another BPF file system was mounted over") {
			t.Errorf("%v", err)
		}
		return nil
	})
}
