// Package version reports the version of the running program.
package version

import (
	"cmp"
	"runtime/debug"
)

// linked is set at link time by make, and by packagers whose builds see no repository:
// -ldflags "-X github.com/probelet/probelet/internal/version.linked=v1.2.3".
var linked string

// String returns the version given at link time. Without one it falls back to what the Go toolchain recorded of the module and its
// revision (debug.BuildInfo), such as v0.0.0-20261127001640-a1457187ac30, and then to "devel".
func String() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = &debug.BuildInfo{}
	}
	return of(linked, info)
}

func of(linked string, info *debug.BuildInfo) string {
	recorded := info.Main.Version
	if recorded == "(devel)" { // built without VCS stamping
		recorded = ""
	}
	return cmp.Or(linked, recorded, "devel")
}
