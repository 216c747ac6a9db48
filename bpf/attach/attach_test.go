package attach_test

import (
	"errors"
	"maps"
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
	"github.com/probelet/probelet/internal/polltest"
)

// eachWay runs a test for every way to attach, each with a pod of its own.
func eachWay(t *testing.T, test func(t *testing.T, w *world, way way)) {
	t.Helper()
	w := newWorld(t)
	for _, way := range ways {
		t.Run(way.String(), func(t *testing.T) { test(t, w.withNewPod(t), way) })
	}
}

// removals lists the two ways to remove an attachment.
var removals = map[string]func(*world){"detach": (*world).detach, "release": (*world).release}

func TestRemovalLeavesNothingBehind(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		before := w.state()
		for name, remove := range removals {
			w.attach(way)
			w.wantWhole()
			if maps.Equal(w.state(), before) {
				t.Fatal("the state does not show an attachment")
			}
			for range 2 {
				remove(w)
				w.wantState(before)
			}
			if err := w.check(); !errors.Is(err, attach.ErrNotAttached) {
				t.Errorf("after %s: %v", name, err)
			}
		}
	})
}

func TestReattachReplaces(t *testing.T) {
	w := newWorld(t)
	before := w.state()
	for _, first := range ways {
		for _, second := range ways {
			t.Run(first.String()+", then "+second.String(), func(t *testing.T) {
				w := w.in(t)
				w.attach(first)
				w.attach(second)
				w.wantWhole()
				w.detach()
				w.wantState(before)
			})
		}
	}
}

func TestRemovalWithoutTheDevice(t *testing.T) {
	w := newWorld(t)
	before := onlyPins(w.state())
	for _, remove := range removals {
		for _, way := range ways {
			t.Run(way.String(), func(t *testing.T) {
				w := w.in(t)
				w.pod = w.pod.Node.AddPod(t)
				w.attach(way)
				w.do(netlink.LinkDel)
				w.wantOrphaned(true)
				for range 2 {
					remove(w)
					w.wantState(before)
				}
			})
		}
	}
}

func (w *world) wantOrphaned(want bool) {
	w.t.Helper()
	w.must(w.inNode(func() error {
		got, err := attach.Orphaned(w.bpfDir, w.id)
		if got != want {
			w.t.Errorf("orphaned: %v, want %v", got, want)
		}
		return err
	}))
}

// onlyPins returns the part of a state that does not disappear with the device.
func onlyPins(s state) state {
	s = maps.Clone(s)
	maps.DeleteFunc(s, func(thing string, _ int) bool { return !strings.HasPrefix(thing, "pin ") })
	return s
}

// hold attaches a program at tcx egress so that it cannot be attached there again.
func (w *world) hold(program *ebpf.Program) {
	w.t.Helper()
	w.do(func(device netlink.Link) error {
		l, err := link.AttachTCX(link.TCXOptions{Program: program, Interface: device.Attrs().Index, Attach: ebpf.AttachTCXEgress})
		if errors.Is(err, ebpf.ErrNotSupported) {
			return nil
		}
		w.t.Cleanup(func() { _ = l.Close() })
		return err
	})
}

// takeOurPriority makes adding our filter to egress fail after the one at ingress has been added, because a priority belongs to one
// protocol.
func (w *world) takeOurPriority(device netlink.Link) error {
	theirs := bpfFilter(device.Attrs().Index, netlink.HANDLE_MIN_EGRESS, 2, verdictProgram(w.t, verdictNext))
	theirs.Protocol = unix.ETH_P_IP
	return errors.Join(netlink.QdiscAdd(clsactQdisc(device.Attrs().Index)), netlink.FilterAdd(theirs))
}

// When a step fails, the previous ones are undone.
func TestAttachIsAllOrNothing(t *testing.T) {
	failures := map[string]struct {
		spoil  func(w *world)
		target func(t attach.Target) attach.Target
		onlyOf attach.Hook
	}{
		"the device is gone": {target: func(t attach.Target) attach.Target {
			t.IfIndex = 9999
			return t
		}},
		"no room for another device": {spoil: (*world).fillDevices},
		"the namespace has the maximum of devices": {spoil: func(w *world) {
			for i := range 4 {
				w.must(w.d.AddDevice(datapath.DeviceKey{Ifindex: uint32(5000 + i), Generation: 1}, w.pod.Netns, datapath.HookTC))
			}
		}},
		"the directory of attachments is gone": {spoil: func(w *world) {
			if err := os.Remove(datapath.AttachmentsDir(w.bpfDir)); !errors.Is(err, os.ErrNotExist) {
				w.must(err)
			}
		}},
		"the name is too long": {spoil: func(w *world) { w.id.ContainerID = strings.Repeat("c", 300) }},
		"steer cannot be attached": {spoil: func(w *world) {
			w.hold(w.d.Steer())
			w.do(w.takeOurPriority)
		}},
		"another XDP program is attached": {onlyOf: attach.HookXDP, spoil: func(w *world) {
			program := loadProgram(w.t, ebpf.XDP, "theirs", returns(2)) // XDP_PASS
			w.do(func(device netlink.Link) error {
				return netlink.LinkSetXdpFdWithFlags(device, program.FD(), unix.XDP_FLAGS_SKB_MODE)
			})
		}},
	}
	for name, failure := range failures {
		t.Run(name, func(t *testing.T) {
			eachWay(t, func(t *testing.T, w *world, way way) {
				if failure.onlyOf != "" && failure.onlyOf != way.hook {
					return
				}
				target := w.target(way.hook)
				if failure.target != nil {
					target = failure.target(target)
				}
				if failure.spoil != nil {
					failure.spoil(w)
				}
				before := w.state()
				err := w.inNode(func() error { return attach.Attach(w.d, w.bpfDir, w.id, target, way.via) })
				if err == nil {
					t.Fatal("attached")
				}
				t.Log(err)
				w.wantState(before)
			})
		})
	}
}

// fillDevices fills the map of devices.
func (w *world) fillDevices() {
	w.t.Helper()
	devices, err := ebpf.LoadPinnedMap(filepath.Join(w.d.Dir(), "devices"), nil)
	w.must(err)
	value := make([]byte, devices.ValueSize())
	for i := range devices.MaxEntries() {
		w.must(devices.Put(100_000+i, value))
	}
	w.must(devices.Close())
}

// A process that is killed in Attach leaves the completed steps behind.
func TestInterruptedAttach(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		before := w.state()
		w.attach(way)
		steps := w.steps(way)
		w.detach()
		for kept, next := range steps {
			t.Run("before "+next.name, func(t *testing.T) {
				w := w.in(t)
				w.attachUntil(way, kept)
				_, err := attach.Device(w.bpfDir, w.id)
				w.wantOrphaned(err != nil)
				if kept > 0 {
					if ids, err := attach.List(w.bpfDir); err != nil || !slices.Equal(ids, []attach.ID{w.id}) {
						t.Errorf("%v, %v", ids, err)
					}
					if err := w.check(); !errors.Is(err, attach.ErrIncomplete) {
						t.Errorf("checked: %v", err)
					}
				}
				w.detach()
				w.wantState(before)

				w.attachUntil(way, kept)
				w.attach(way)
				w.wantWhole()
				w.detach()
				w.wantState(before)
			})
		}
	})
}

// attachUntil performs only the first steps of Attach.
func (w *world) attachUntil(way way, kept int) {
	w.t.Helper()
	w.attach(way)
	for _, s := range slices.Backward(w.steps(way)[kept:]) {
		w.must(w.inNode(s.undo))
	}
}

// step is a step of Attach.
type step struct {
	name string
	undo func() error
}

// steps returns the steps that made the attachment, in order.
func (w *world) steps(way way) []step {
	w.t.Helper()
	dir := w.dir()
	key, err := attach.Device(w.bpfDir, w.id)
	w.must(err)
	marker, err := filepath.Glob(filepath.Join(dir, "device-*"))
	w.must(err)
	pin := func(name string) step {
		return step{name, func() error {
			l, err := link.LoadPinnedLink(filepath.Join(dir, name), nil)
			if err != nil {
				return err
			}
			return errors.Join(l.Detach(), l.Unpin(), l.Close())
		}}
	}
	remove := func(name string) step {
		return step{name, func() error { return os.Remove(filepath.Join(dir, name)) }}
	}
	filter := func(side string) step {
		return step{"filter at " + side, func() error {
			device, err := netlink.LinkByIndex(w.pod.IfIndex)
			if err != nil {
				return err
			}
			return deleteFilters(device, parents[side], "probelet/")
		}}
	}
	steps := []step{
		{"directory", func() error { return os.Remove(dir) }},
		{"name of the device", func() error { return os.Remove(marker[0]) }},
		{"device", func() error { return w.d.RemoveDevice(key) }},
	}
	if way.hook == attach.HookXDP {
		steps = append(steps, pin("respond"))
	}
	if w.isTCX() {
		return append(steps, pin("observe"), pin("steer"))
	}
	return append(steps, remove("clsact"),
		step{"qdisc", func() error { return netlink.QdiscDel(clsactQdisc(w.pod.IfIndex)) }},
		filter("ingress"), filter("egress"))
}

// breakages are the parts of an attachment that others may remove. Each reports whether the attachment has that part.
var breakages = map[string]func(w *world, way way) bool{
	"steer":   func(w *world, _ way) bool { return w.takeOff("steer", "egress") },
	"observe": func(w *world, _ way) bool { return w.takeOff("observe", "ingress") },
	"respond": func(w *world, way way) bool {
		if way.hook != attach.HookXDP {
			return false
		}
		w.detachLink("respond")
		return true
	},
	"device": func(w *world, _ way) bool {
		key, err := attach.Device(w.bpfDir, w.id)
		w.must(errors.Join(err, w.d.RemoveDevice(key)))
		return true
	},
	"another attachment of the device": func(w *world, _ way) bool {
		key, err := datapath.NewDeviceKey(w.pod.IfIndex)
		w.must(errors.Join(err, w.d.AddDevice(key, w.pod.Netns, datapath.HookTC)))
		return true
	},
	"name of the device": func(w *world, _ way) bool {
		marker, err := filepath.Glob(filepath.Join(w.dir(), "device-*"))
		w.must(errors.Join(err, os.Remove(marker[0])))
		return true
	},
	"qdisc": func(w *world, _ way) bool {
		if w.isTCX() {
			return false
		}
		w.do(func(device netlink.Link) error { return netlink.QdiscDel(clsactQdisc(device.Attrs().Index)) })
		return true
	},
}

// takeOff detaches one of the tc programs, however it is attached.
func (w *world) takeOff(pin, side string) bool {
	w.t.Helper()
	if w.isTCX() {
		w.detachLink(pin)
		return true
	}
	w.do(func(device netlink.Link) error { return deleteFilters(device, parents[side], "probelet/") })
	return true
}

// detachLink detaches a link by force, like bpftool. Its pin stays.
func (w *world) detachLink(pin string) {
	w.t.Helper()
	l, err := link.LoadPinnedLink(filepath.Join(w.dir(), pin), nil)
	w.must(err)
	w.must(errors.Join(l.Detach(), l.Close()))
}

func TestCheckFindsDamageAndAttachRepairsIt(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		before := w.state()
		for piece, breakIt := range breakages {
			t.Run(piece, func(t *testing.T) {
				w := w.in(t)
				w.attach(way)
				if !breakIt(w, way) {
					w.detach()
					return
				}
				if err := w.check(); !errors.Is(err, attach.ErrIncomplete) {
					t.Errorf("%v, want %v", err, attach.ErrIncomplete)
				}
				w.attach(way)
				w.wantWhole()
				if piece != "name of the device" { // without it only Attach finds the filters
					breakIt(w, way)
				}
				w.detach()
				w.must(attach.Prune(t.Context(), w.d, w.bpfDir)) // another attachment of the device is not ours to remove
				w.wantState(before)
			})
		}
	})
}

// Filters and qdisc outlive their pins and are recognized as ours.
func TestAttachAfterPinsWereLost(t *testing.T) {
	eachWay(t, func(_ *testing.T, w *world, way way) {
		before := w.state()
		w.attach(way)
		whole := len(w.state())
		for range 2 {
			w.must(os.RemoveAll(w.dir()))
			w.waitForRelease()
			w.attach(way)
			w.wantWhole()
			if now := len(w.state()); now != whole {
				w.t.Errorf("%d things, at first %d: %v", now, whole, w.state())
			}
		}
		w.detach()
		w.wantState(before)
	})
}

// waitForRelease waits until the kernel has detached the programs whose links are no longer pinned.
func (w *world) waitForRelease() {
	w.t.Helper()
	polltest.Eventually(w.t, "no programs are attached", func() bool {
		s := state{}
		w.do(func(device netlink.Link) error { return addDevice(s, device) })
		return !slices.ContainsFunc(slices.Collect(maps.Keys(s)), func(thing string) bool { return strings.Contains(thing, "program") })
	})
}

func TestForeignClsactStays(t *testing.T) {
	theirs := map[string]func(w *world, device netlink.Link) error{
		"empty": func(*world, netlink.Link) error { return nil },
		"egress": func(w *world, device netlink.Link) error {
			return netlink.FilterAdd(bpfFilter(device.Attrs().Index, netlink.HANDLE_MIN_EGRESS, 1, verdictProgram(w.t, verdictNext)))
		},
		"ingress": func(w *world, device netlink.Link) error {
			return netlink.FilterAdd(bpfFilter(device.Attrs().Index, netlink.HANDLE_MIN_INGRESS, 7, verdictProgram(w.t, verdictNext)))
		},
	}
	eachWay(t, func(t *testing.T, w *world, way way) {
		for name, add := range theirs {
			t.Run(name, func(t *testing.T) {
				w := w.withNewPod(t)
				w.do(func(device netlink.Link) error {
					return errors.Join(netlink.QdiscAdd(clsactQdisc(device.Attrs().Index)), add(w, device))
				})
				before := w.state()
				w.attach(way)
				w.wantWhole()
				w.detach()
				w.wantState(before)
			})
		}
	})
}

// The qdisc is ours, but removing it would remove foreign filters.
func TestSharedClsactStays(t *testing.T) {
	all := newWorld(t)
	for side, parent := range parents {
		w := all.withNewPod(t)
		w.attach(way{attach.HookTC, attach.ViaClsact})
		w.do(func(device netlink.Link) error {
			return netlink.FilterAdd(bpfFilter(device.Attrs().Index, parent, 7, verdictProgram(t, verdictNext)))
		})
		w.detach()
		s := w.state()
		if s["qdisc clsact"] != 1 || s["filter at "+side+", priority 7"] != 1 {
			t.Errorf("%s: %v", side, s)
		}
		if s["filter at "+side+", priority 2"] != 0 {
			t.Errorf("%s: ours is left behind: %v", side, s)
		}
	}
}

// An ingress qdisc has no egress side and excludes clsact, although the kernel reports the same error as for an existing clsact.
func TestIngressQdiscIsNotClsact(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		w.do(func(device netlink.Link) error { return netlink.QdiscAdd(ingressQdisc(device.Attrs().Index)) })
		before := w.state()
		err := w.tryAttach(way)
		if !hasTCX(t) {
			if err == nil || !strings.Contains(err.Error(), "ingress qdisc, which excludes clsact") {
				t.Errorf("%v", err)
			}
			w.wantState(before)
			return
		}
		w.must(err)
		w.wantWhole()
		if !w.isTCX() {
			t.Error("not attached by tcx")
		}
		w.detach()
		w.wantState(before)
	})
}

// Attach falls back to tcx if clsact fails for any reason.
func TestFallbackToTCX(t *testing.T) {
	requireTCX(t)
	w := newWorld(t)
	w.do(w.takeOurPriority)
	before := w.state()
	w.attach(way{attach.HookTC, attach.ViaClsact})
	w.wantWhole()
	if !w.isTCX() {
		t.Error("not attached by tcx")
	}
	w.detach()
	w.wantState(before)
}

func TestListAndOrphaned(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		if ids, err := attach.List(w.bpfDir); err != nil || len(ids) > 0 {
			t.Errorf("%v, %v", ids, err)
		}
		w.attach(way)
		if ids, err := attach.List(w.bpfDir); err != nil || !slices.Equal(ids, []attach.ID{w.id}) {
			t.Errorf("%v, %v; want %v", ids, err, w.id)
		}
		w.wantOrphaned(false)
	})
}

func TestPruneKeepsAttachments(t *testing.T) {
	eachWay(t, func(_ *testing.T, w *world, way way) {
		w.attach(way)
		before := w.state()
		stray := datapath.DeviceKey{Ifindex: 4711, Generation: 1}
		w.must(w.d.AddDevice(stray, 1, datapath.HookTC))
		pod, err := w.d.Pod(stray)
		w.must(err)
		w.must(pod.Put(datapath.PortKey(80), datapath.Evidence{}))
		w.must(attach.Prune(w.t.Context(), w.d, w.bpfDir))
		w.wantWhole()
		w.wantState(before)
	})
}

// The programs' pins are gone, but those of the attachment are not.
func TestDetachWithoutDatapath(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		before := w.state()
		w.attach(way)
		w.must(w.inNode(func() error { return attach.Detach(nil, w.bpfDir, w.id) }))
		w.must(attach.Prune(t.Context(), w.d, w.bpfDir))
		w.wantState(before)
	})
}

// Our own XDP program would be hard to find if the BPF file system where it is pinned is hidden by another one.
func TestConflictingXDPProgramIsNamed(t *testing.T) {
	w := newWorld(t)
	w.attach(way{attach.HookXDP, attach.ViaAuto})
	mount := filepath.Dir(w.bpfDir)
	w.must(unix.Mount("bpf", mount, "bpf", 0, ""))
	t.Cleanup(func() { _ = unix.Unmount(mount, unix.MNT_DETACH) })
	w.load()
	err := w.tryAttach(way{attach.HookXDP, attach.ViaAuto})
	if err == nil || !strings.Contains(err.Error(), "respond of another probelet; if another BPF file system is mounted over") {
		t.Errorf("%v", err)
	}
}

// Attaching and removing a thousand times leaves no more behind than once.
func TestNoLeaks(t *testing.T) {
	const rounds = 1000
	clsact := way{attach.HookTC, attach.ViaClsact}
	for name, remove := range removals {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			before, programs := w.state(), w.countPrograms()
			for range rounds {
				w.attach(clsact)
				pod, err := attach.OpenPod(w.d, w.bpfDir, w.id)
				w.must(err)
				w.must(pod.Put(datapath.PortKey(80), datapath.Evidence{}))
				remove(w)
			}
			w.wantState(before)
			if now := w.countPrograms(); now != programs {
				t.Errorf("%d programs use our maps, at first %d", now, programs)
			}
		})
	}
}

// countPrograms counts the programs in the kernel that use our map of devices.
func (w *world) countPrograms() (n int) {
	w.t.Helper()
	devices, err := ebpf.LoadPinnedMap(filepath.Join(w.d.Dir(), "devices"), nil)
	w.must(err)
	defer devices.Close() //nolint:errcheck // read only
	info, err := devices.Info()
	w.must(err)
	ours, _ := info.ID()
	for id := ebpf.ProgramID(0); ; {
		if id, err = ebpf.ProgramGetNextID(id); errors.Is(err, os.ErrNotExist) {
			return n
		}
		w.must(err)
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // it has just been unloaded
		}
		info, err := p.Info()
		w.must(errors.Join(err, p.Close()))
		if maps, _ := info.MapIDs(); slices.Contains(maps, ours) {
			n++
		}
	}
}
