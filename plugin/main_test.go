package main

import (
	"os/exec"
	"testing"

	"github.com/probelet/probelet/internal/version"
)

func TestVersion(t *testing.T) {
	for _, arg := range []string{"--version", "version"} {
		cmd := exec.Command("/proc/self/exe", arg)
		cmd.Env = []string{runMain + "=1"}
		out, err := cmd.Output()
		if want := "probelet version " + version.String() + "\n"; err != nil || string(out) != want {
			t.Errorf("%s: %q, %v; want %q", arg, out, err, want)
		}
	}
}
