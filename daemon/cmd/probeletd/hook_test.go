package main

import (
	"io"
	"os"
	"strings"
	"testing"
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
