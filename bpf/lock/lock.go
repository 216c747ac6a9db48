// Package lock provides advisory locks between probelet's processes. Only root can take them: any process that can open a file
// can lock it (flock(2)), so a lock on a file that others may read could be held by others.
package lock

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// ErrHeld: another process held the lock until the context ended.
var ErrHeld = errors.New("locked by another process")

// Lock is an acquired lock. The kernel releases it if the process dies.
type Lock struct{ file *os.File }

// File locks a file, exclusively (unix.LOCK_EX) or shared (unix.LOCK_SH), and creates it if necessary. It tries at least once and
// returns ErrHeld when ctx ends. The error is fs.ErrNotExist if the directory does not exist.
func File(ctx context.Context, path string, how int) (*Lock, error) {
	for {
		l, err := take(ctx, path, unix.O_RDWR|unix.O_CREAT, how)
		if err != nil {
			return nil, err
		}
		if l.isAt(path) {
			return l, nil
		}
		l.Release() // the previous holder removed the file
	}
}

// Dir is like File, but locks an existing directory. Use it on a BPF file system, which holds no regular files.
func Dir(ctx context.Context, path string, how int) (*Lock, error) {
	return take(ctx, path, unix.O_RDONLY|unix.O_DIRECTORY, how)
}

// take opens a file or directory, removes other users' access to it, and locks it.
func take(ctx context.Context, path string, flags, how int) (*Lock, error) {
	f, err := os.OpenFile(path, flags|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	l := &Lock{f}
	if err := l.closeToOthers(); err != nil {
		l.Release()
		return nil, fmt.Errorf("%s: removing other users' access: %w", path, err)
	}
	if err := l.wait(ctx, how); err != nil {
		l.Release()
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return l, nil
}

func (l *Lock) closeToOthers() error {
	info, err := l.file.Stat()
	if err != nil || info.Mode().Perm()&0o077 == 0 {
		return err
	}
	return l.file.Chmod(info.Mode().Perm() &^ 0o077)
}

func (l *Lock) wait(ctx context.Context, how int) error {
	for wait := 50 * time.Microsecond; ; wait = min(2*wait, 5*time.Millisecond) { // most holders need less
		err := unix.Flock(int(l.file.Fd()), how|unix.LOCK_NB)
		if err == nil || !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return err
		}
		select {
		case <-ctx.Done():
			return ErrHeld
		case <-time.After(wait):
		}
	}
}

// isAt reports whether the locked file is still the one at path.
func (l *Lock) isAt(path string) bool {
	ours, err := l.file.Stat()
	theirs, pathErr := os.Lstat(path)
	return err == nil && pathErr == nil && os.SameFile(ours, theirs)
}

// Release releases the lock. On a nil Lock it is a no-op.
func (l *Lock) Release() {
	if l != nil {
		_ = l.file.Close()
	}
}

// Remove removes the file and releases the lock; waiters then lock a new file. On a nil Lock it is a no-op.
func (l *Lock) Remove() error {
	if l == nil {
		return nil
	}
	defer l.Release()
	if err := os.Remove(l.file.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
