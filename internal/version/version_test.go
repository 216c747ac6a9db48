package version

import (
	"runtime/debug"
	"testing"
)

func TestVersion(t *testing.T) {
	for _, test := range []struct{ linked, recorded, want string }{
		{"", "", "devel"},
		{"", "(devel)", "devel"},
		{"", "v1.2.3", "v1.2.3"},
		{"v2.0.0", "(devel)", "v2.0.0"},
		{"v2.0.0", "v0.0.0-20261127001640-a1457187ac30+dirty", "v2.0.0"},
	} {
		got := of(test.linked, &debug.BuildInfo{Main: debug.Module{Version: test.recorded}})
		if got != test.want {
			t.Errorf("linked %q, recorded %q: %q, want %q", test.linked, test.recorded, got, test.want)
		}
	}
	if String() == "" {
		t.Error("no version")
	}
}
