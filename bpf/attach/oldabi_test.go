package attach_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
)

// v3Layouts are the forms of an attachment under ABI v3, which always had XDP, and only steer at tc.
var v3Layouts = map[string]func(w *world, dir string){
	"tcx":           func(w *world, dir string) { w.v3TCX(dir) },
	"clsact":        func(w *world, dir string) { w.v3Clsact(dir, true) },
	"others clsact": func(w *world, dir string) { w.v3Clsact(dir, false) },
	"ingress qdisc": func(w *world, dir string) { w.v3Clsact(dir, false) }, // which v3 mistook for clsact
	"no steer yet":  func(*world, string) {},
}

// layV3 attaches what ABI v3 attached, using programs that do nothing, and returns its directory.
func (w *world) layV3(steer func(w *world, dir string)) string {
	w.t.Helper()
	name := strings.NewReplacer("%", "%25", ".", "%2E").Replace(w.id.ContainerID) + "@" + strings.ReplaceAll(w.id.IfName, ".", "%2E")
	dir := filepath.Join(w.bpfDir, "v3", "attachments", name)
	w.must(os.MkdirAll(dir, 0o700))
	for _, pin := range []string{filepath.Join(dir, "evidence"), filepath.Join(dir, "tallies"), filepath.Join(w.bpfDir, "v3", "pod_evidence")} {
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 8, ValueSize: 8, MaxEntries: 1})
		w.must(err)
		w.must(errors.Join(m.Pin(pin), m.Close()))
	}
	respond := loadProgram(w.t, ebpf.XDP, "respond", returns(2)) // XDP_PASS
	l, err := link.AttachXDP(link.XDPOptions{Program: respond, Interface: w.pod.IfIndex, Flags: link.XDPGenericMode})
	w.must(err)
	w.must(errors.Join(l.Pin(filepath.Join(dir, "respond")), l.Close()))
	steer(w, dir)
	return dir
}

func (w *world) v3TCX(dir string) {
	w.t.Helper()
	l, err := link.AttachTCX(link.TCXOptions{
		Program: verdictProgram(w.t, verdictNext), Interface: w.pod.IfIndex, Attach: ebpf.AttachTCXEgress,
	})
	w.must(err)
	w.must(errors.Join(l.Pin(filepath.Join(dir, "steer")), l.Close()))
}

func (w *world) v3Clsact(dir string, owned bool) {
	w.t.Helper()
	filter := bpfFilter(w.pod.IfIndex, netlink.HANDLE_MIN_EGRESS, 1, verdictProgram(w.t, verdictNext))
	filter.Name = "probelet/steer"
	if owned {
		filter.Name += ", owns-clsact"
		w.must(os.Mkdir(filepath.Join(dir, "owns-clsact"), 0o700))
	}
	if err := netlink.QdiscAdd(clsactQdisc(w.pod.IfIndex)); owned || !errors.Is(err, unix.EEXIST) {
		w.must(err)
	}
	w.must(netlink.FilterAdd(filter))
}

// withV3 returns the world with a new pod, attached by v3, and the previous state.
func (w *world) withV3(t *testing.T, layout string) (*world, state) {
	t.Helper()
	if layout == "tcx" {
		requireTCX(t)
	}
	w = w.withNewPod(t)
	w.must(w.inNode(func() error {
		switch layout {
		case "others clsact":
			return netlink.QdiscAdd(clsactQdisc(w.pod.IfIndex))
		case "ingress qdisc":
			return netlink.QdiscAdd(ingressQdisc(w.pod.IfIndex))
		}
		return nil
	}))
	before := w.state()
	w.do(func(netlink.Link) error {
		w.layV3(v3Layouts[layout])
		return nil
	})
	return w, before
}

func TestV3AttachmentIsListedAndDetached(t *testing.T) {
	w := newWorld(t)
	for layout := range v3Layouts {
		for name, remove := range removals {
			t.Run(layout+" "+name, func(t *testing.T) {
				w, before := w.withV3(t, layout)
				if ids, err := attach.List(w.bpfDir); err != nil || !slices.Equal(ids, []attach.ID{w.id}) {
					t.Errorf("%v, %v", ids, err)
				}
				w.wantOrphaned(false)
				w.must(datapath.RemoveOthers(w.bpfDir))
				if _, err := os.Stat(filepath.Join(w.bpfDir, "v3", "attachments")); err != nil {
					t.Fatalf("removed although it is in use: %v", err)
				}
				remove(w)
				w.must(datapath.RemoveOthers(w.bpfDir))
				w.wantState(before)
			})
		}
	}
}

func TestV3AttachmentIsReplaced(t *testing.T) {
	w := newWorld(t)
	for layout := range v3Layouts {
		for _, way := range ways {
			t.Run(layout+" "+way.String(), func(t *testing.T) {
				if layout == "ingress qdisc" {
					requireTCX(t)
				}
				w, before := w.withV3(t, layout)
				if err := w.check(); !errors.Is(err, attach.ErrNotAttached) {
					t.Errorf("before: %v", err)
				}
				w.attach(way)
				w.must(datapath.RemoveOthers(w.bpfDir))
				w.wantWhole()
				w.detach()
				w.wantState(before)
			})
		}
	}
}

// Remains of an attachment by v3 to a device that is gone.
func TestOrphanedV3Attachment(t *testing.T) {
	w := newWorld(t)
	for layout := range v3Layouts {
		t.Run(layout, func(t *testing.T) {
			w, before := w.withV3(t, layout)
			w.do(netlink.LinkDel)
			w.wantOrphaned(true)
			w.detach()
			w.must(datapath.RemoveOthers(w.bpfDir))
			w.wantState(onlyPins(before))
		})
	}
}

// An incomplete set of programs is put aside, along with its attachments.
func TestAttachmentPutAsideIsReplaced(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		w.load()
		w.attach(way)
		w.must(os.Remove(filepath.Join(w.d.Dir(), "steer")))
		w.load()
		if err := w.check(); !errors.Is(err, attach.ErrNotAttached) {
			t.Errorf("before: %v", err)
		}
		w.attach(way)
		w.must(datapath.RemoveOthers(w.bpfDir))
		w.wantWhole()
		if others, err := datapath.Others(w.bpfDir); err != nil || len(others) > 0 {
			t.Errorf("%v, %v", others, err)
		}
		before := w.state()
		w.detach()
		w.attach(way)
		if now := w.state(); len(now) != len(before) {
			t.Errorf("%v, before: %v", now, before)
		}
	})
}
