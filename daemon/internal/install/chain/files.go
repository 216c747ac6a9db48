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

// writeFile replaces a file atomically and durably: it survives a power failure right afterwards. The file gets the owner of owner,
// unless that is nil.
func writeFile(file string, text []byte, mode fs.FileMode, owner fs.FileInfo) error {
	dir := filepath.Dir(file)
	// Rename within the directory: runtimes miss a file that is moved in from elsewhere.
	f, err := renameio.NewPendingFile(file, renameio.WithTempDir(dir), renameio.WithStaticPermissions(mode))
	if err != nil {
		return err
	}
	defer f.Cleanup() //nolint:errcheck // removes the temporary file after an error
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
	if errors.Is(err, unix.EINVAL) { // a file system that does not support fsync on directories
		err = nil
	}
	return errors.Join(err, f.Close())
}

// put writes a file with the mode and owner of like, and makes the runtime read it. It does nothing if the file is already up to date.
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

// isAs reports whether a file has this content, and the mode and owner of like.
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

// bell is the name prefix of the temporary file that Wake creates and removes.
const bell = "." + PluginType

// Wake makes the runtime reread its configuration. It is needed for drop-ins, because runtimes watch NetDir but not its subdirectories.
func (n Node) Wake() error {
	f, err := os.CreateTemp(n.NetDir, bell)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // nothing to read
	}
	if err != nil {
		return err
	}
	err = errors.Join(f.Close(), os.Remove(f.Name()))
	if errors.Is(err, fs.ErrNotExist) { // another process cleaned up
		return nil
	}
	return err
}

// interrupted returns glob patterns for the temporary files that an interrupted write leaves in NetDir.
func (n Node) interrupted() []string {
	patterns := []string{
		filepath.Join(n.NetDir, bell+"[0-9]*"), filepath.Join(n.NetDir, "*", "."+dropInName+"[0-9]*"),
	}
	for _, name := range copyNames {
		patterns = append(patterns, filepath.Join(n.NetDir, "."+name+"[0-9]*"))
	}
	return patterns
}

// removeAll removes the files that match a pattern.
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

// removeEmpty removes a network's directory if it is empty.
func (n Node) removeEmpty(dir string) {
	if dir != n.NetDir {
		_ = os.Remove(dir)
	}
}
