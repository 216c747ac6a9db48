package datapath

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// checkPrivate returns an error unless a directory belongs to, and is accessible to, only the user of this process.
func checkPrivate(dir string) error {
	var stat unix.Stat_t
	if err := unix.Lstat(dir, &stat); err != nil {
		return &os.PathError{Op: "lstat", Path: dir, Err: err}
	}
	if int(stat.Uid) != os.Geteuid() || stat.Mode&0o077 != 0 {
		return fmt.Errorf("%s: owner %d, mode %04o: must be owned by and accessible only to user %d", dir, stat.Uid, stat.Mode&0o7777, os.Geteuid())
	}
	return nil
}
