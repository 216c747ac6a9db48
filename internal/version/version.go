// Package version tells which version of probelet a program is.
package version

import (
	"cmp"
	"runtime/debug"
)

// linked is set by packagers whose builds know nothing of version control, such as that of the container image:
// -ldflags "-X github.com/probelet/probelet/internal/version.linked=v1.2.3".
var linked string

// String returns the version given at link time; otherwise what the Go toolchain noted of the module and its revision
// (debug.BuildInfo), such as v0.0.0-20261127001640-a1457187ac30; or "devel" if nothing did.
func String() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		info = &debug.BuildInfo{}
	}
	return of(linked, info)
}

func of(linked string, info *debug.BuildInfo) string {
	noted := info.Main.Version
	if noted == "(devel)" { // no version control, or told not to look
		noted = ""
	}
	return cmp.Or(linked, noted, "devel")
}
