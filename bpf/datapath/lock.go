package datapath

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Lock locks a file or a directory, exclusively (unix.LOCK_EX) or shared (unix.LOCK_SH). It tries at least once, and until ctx
// ends; the error is then ErrLocked. The returned function releases the lock, and so does the kernel if the process dies.
//
// Whoever can open a file can lock it. So it must be accessible to its owner only, who must be this process's user.
func Lock(ctx context.Context, path string, how int) (unlock func(), err error) {
	for {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		err = checkPrivate(path)
		if err == nil {
			err = flock(ctx, f, how)
		}
		if err != nil {
			_ = f.Close()
			return nil, err
		}
		if isStill(f, path) {
			return func() { _ = f.Close() }, nil
		}
		_ = f.Close() // whoever had the lock has removed the file
	}
}

func flock(ctx context.Context, f *os.File, how int) error {
	for wait := 50 * time.Microsecond; ; wait = min(2*wait, 5*time.Millisecond) { // it is mostly held for less
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("locking %s: %w", f.Name(), err)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: %w", f.Name(), ErrLocked)
		case <-time.After(wait):
		}
	}
}

func isStill(f *os.File, path string) bool {
	locked, err := f.Stat()
	current, currentErr := os.Stat(path)
	return err == nil && currentErr == nil && os.SameFile(locked, current)
}

// checkPrivate returns an error unless a file or directory belongs to this process's user, and only to that.
func checkPrivate(path string) error {
	var stat unix.Stat_t
	if err := unix.Lstat(path, &stat); err != nil {
		return &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	if int(stat.Uid) != os.Geteuid() || stat.Mode&0o077 != 0 {
		return fmt.Errorf("%s: owner %d, mode %04o: must be accessible to user %d only", path, stat.Uid, stat.Mode&0o7777, os.Geteuid())
	}
	return nil
}
