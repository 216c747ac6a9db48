package main

import (
	"io"
	"os"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/attach"
)

// A hook that there is not is refused before anything is done, and by name.
func TestHookFlag(t *testing.T) {
	refused := func(name string, args ...string) {
		t.Helper()
		err := execute(t.Context(), args, io.Discard, io.Discard)
		if err == nil || !strings.Contains(err.Error(), "--hook") || !strings.Contains(err.Error(), `"tcx"`) ||
			!strings.Contains(err.Error(), `must be "tc" or "xdp"`) {
			t.Errorf("%s: %v", name, err)
		}
	}
	dir := t.TempDir()
	refused("run", "run", "--hook", "tcx", "--state-dir", dir)
	refused("install", "install", "--hook=tcx", "--cni-net-dir", dir, "--cni-bin-dir", dir)
	t.Setenv("PROBELET_HOOK", "tcx")
	refused("environment", "run", "--state-dir", dir)
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("%v, %v", left, err)
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
