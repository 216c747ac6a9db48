package lock

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

var nobody = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}

// now is an expired context, so that locking tries only once.
func now() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}

// Other users cannot lock files or directories, whatever their previous mode, and so cannot block us.
func TestOtherUsersCannotLock(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	for name, test := range map[string]struct {
		make func(path string) error
		lock func(context.Context, string, int) (*Lock, error)
	}{
		"no file":        {func(string) error { return nil }, File},
		"file":           {func(path string) error { return os.WriteFile(path, nil, 0o644) }, File},
		"directory":      {func(path string) error { return os.Mkdir(path, 0o755) }, Dir},
		"root's only":    {func(path string) error { return os.Mkdir(path, 0o700) }, Dir},
		"open to anyone": {func(path string) error { return errors.Join(os.Mkdir(path, 0o700), os.Chmod(path, 0o777)) }, Dir},
	} {
		t.Run(name, func(t *testing.T) {
			dir, err := os.MkdirTemp("", "lock") // t.TempDir is not accessible to others
			if err == nil {
				err = os.Chmod(dir, 0o755)
			}
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = os.RemoveAll(dir) })
			path := filepath.Join(dir, "l")
			if err := test.make(path); err != nil {
				t.Fatal(err)
			}
			l, err := test.lock(t.Context(), path, unix.LOCK_EX)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := test.lock(now(), path, unix.LOCK_SH); !errors.Is(err, ErrHeld) {
				t.Errorf("while held: %v", err)
			}
			l.Release()
			attempt := exec.Command("flock", "--nonblock", path, "true")
			attempt.SysProcAttr = nobody
			if text, err := attempt.CombinedOutput(); err == nil {
				t.Errorf("another user can lock it: %s", text)
			}
			l, err = test.lock(now(), path, unix.LOCK_EX)
			if err != nil {
				t.Fatal(err)
			}
			l.Release()
		})
	}
}

func TestNoDirectory(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "missing")
	if _, err := File(t.Context(), filepath.Join(missing, "l"), unix.LOCK_EX); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if _, err := Dir(t.Context(), missing, unix.LOCK_EX); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// A link would make us create a file elsewhere, or remove others' access to one.
func TestLinksAreNotFollowed(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(dir, "l")
	if err := os.Symlink(filepath.Join(dir, "elsewhere"), link); err != nil {
		t.Fatal(err)
	}
	if _, err := File(t.Context(), link, unix.LOCK_EX); !errors.Is(err, unix.ELOOP) {
		t.Error(err)
	}
}

// Only one holder at a time, although some of them remove the file.
func TestRemoveKeepsExclusion(t *testing.T) {
	path := filepath.Join(t.TempDir(), "l")
	var inside atomic.Int32
	var all sync.WaitGroup
	for i := range 8 {
		all.Go(func() {
			for range 50 {
				l, err := File(t.Context(), path, unix.LOCK_EX)
				if err != nil {
					t.Error(err)
					return
				}
				if inside.Add(1) != 1 {
					t.Error("two holders at once")
				}
				inside.Add(-1)
				if i%2 == 0 {
					l.Release()
				} else if err := l.Remove(); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
}
