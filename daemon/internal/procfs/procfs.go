// Package procfs tells which processes can be trusted, from their directories in a proc file system.
package procfs

import (
	"path/filepath"

	"golang.org/x/sys/unix"
)

// StartedByRoot reports whether root started the process with the given directory. Its name, arguments and environment
// prove nothing, because any user can choose them; nor does its UID, if the program has the set-user-ID bit (execve(2)).
func StartedByRoot(dir string) bool {
	var process, program unix.Stat_t
	return unix.Stat(dir, &process) == nil && process.Uid == 0 &&
		unix.Stat(filepath.Join(dir, "exe"), &program) == nil && program.Mode&unix.S_ISUID == 0
}
