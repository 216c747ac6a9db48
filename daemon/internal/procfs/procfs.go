// Package procfs tells which processes are trusted.
package procfs

import (
	"path/filepath"

	"golang.org/x/sys/unix"
)

// IsRoots reports whether root started the process with the given directory in a proc file system. Its name, arguments and environment
// prove nothing, because any user can choose them; nor does its UID, if the program has the set-user-ID bit (execve(2)).
func IsRoots(dir string) bool {
	var process, program unix.Stat_t
	return unix.Stat(dir, &process) == nil && process.Uid == 0 &&
		unix.Stat(filepath.Join(dir, "exe"), &program) == nil && program.Mode&unix.S_ISUID == 0
}
