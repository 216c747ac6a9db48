// Package procfs tells whose processes are.
package procfs

import (
	"path/filepath"

	"golang.org/x/sys/unix"
)

// IsRoots reports whether root started a process, whose directory in a proc file system is given. Any user can give a process any
// name, arguments and environment, and a program with the set-user-ID bit is root's for whoever starts it (execve(2)).
func IsRoots(dir string) bool {
	var process, program unix.Stat_t
	return unix.Stat(dir, &process) == nil && process.Uid == 0 &&
		unix.Stat(filepath.Join(dir, "exe"), &program) == nil && program.Mode&unix.S_ISUID == 0
}
