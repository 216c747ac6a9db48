package chain

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"github.com/google/renameio/v2"
	"golang.org/x/sys/unix"
)

// writeFile replaces a file, whole and for good: also should the machine lose its power now. owner, if not nil, is a file
// whose owner it has.
func writeFile(file string, text []byte, mode fs.FileMode, owner fs.FileInfo) error {
	dir := filepath.Dir(file)
	// Beside the file: a runtime sees a file that is renamed within the directory, not one that comes from elsewhere.
	f, err := renameio.NewPendingFile(file, renameio.WithTempDir(dir), renameio.WithStaticPermissions(mode))
	if err != nil {
		return err
	}
	defer f.Cleanup() //nolint:errcheck // nothing is left but after an error
	if owner != nil {
		if err := f.Chown(ownerOf(owner)); err != nil {
			return err
		}
	}
	if _, err := f.Write(text); err != nil {
		return err
	}
	if err := f.CloseAtomicallyReplace(); err != nil {
		return err
	}
	return syncDir(dir)
}

func ownerOf(info fs.FileInfo) (uid, gid int) {
	stat := info.Sys().(*syscall.Stat_t)
	return int(stat.Uid), int(stat.Gid)
}

func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = f.Sync()
	if errors.Is(err, unix.EINVAL) { // a file system that has nothing to be synced
		err = nil
	}
	return errors.Join(err, f.Close())
}

// put writes a file if it does not have that text, and has the runtime read it. It gets the mode and the owner of like.
func (n Node) put(file string, text []byte, like fs.FileInfo) (changed bool, err error) {
	if isAs(file, text, like) {
		return false, nil
	}
	if dir := filepath.Dir(file); dir != n.NetDir {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return false, err
		}
		if err := syncDir(n.NetDir); err != nil {
			return false, err
		}
	}
	mode := fs.FileMode(0o644)
	if like != nil {
		mode = like.Mode().Perm()
	}
	if err := writeFile(file, text, mode, like); err != nil {
		return false, err
	}
	return true, n.Wake()
}

// isAs reports whether a file has that text, and the mode and the owner of like.
func isAs(file string, text []byte, like fs.FileInfo) bool {
	old, err := os.ReadFile(file)
	if err != nil || !bytes.Equal(old, text) {
		return false
	}
	if like == nil {
		return true
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != like.Mode().Perm() {
		return false
	}
	uid, gid := ownerOf(info)
	wantUID, wantGID := ownerOf(like)
	return uid == wantUID && gid == wantGID
}

// bell begins the name of the file that comes and goes to wake the runtime.
const bell = "." + PluginType

// Wake makes the runtime read its configuration again: it watches NetDir, and not the directories in it.
func (n Node) Wake() error {
	f, err := os.CreateTemp(n.NetDir, bell)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nothing to be read
	}
	if err != nil {
		return err
	}
	err = errors.Join(f.Close(), os.Remove(f.Name()))
	if errors.Is(err, fs.ErrNotExist) { // somebody has cleaned up
		return nil
	}
	return err
}

// interrupted are patterns of the files that writing in NetDir leaves when it is interrupted.
func (n Node) interrupted() []string {
	patterns := []string{
		filepath.Join(n.NetDir, bell+"[0-9]*"), filepath.Join(n.NetDir, "*", "."+dropInName+"[0-9]*"),
	}
	for _, name := range copyNames {
		patterns = append(patterns, filepath.Join(n.NetDir, "."+name+"[0-9]*"))
	}
	return patterns
}

// removeAll removes the files that a pattern matches.
func removeAll(pattern string) error {
	files, err := filepath.Glob(pattern)
	errs := []error{err}
	for _, file := range files {
		if err := os.Remove(file); !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removeEmpty removes a network's directory if nobody has a file in it.
func (n Node) removeEmpty(dir string) {
	if dir != n.NetDir {
		_ = os.Remove(dir)
	}
}
