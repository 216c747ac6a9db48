// Package hostfs reads files below another root directory, such as /proc/1/root, as a process with that root directory would.
package hostfs

import (
	"io"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// FS resolves paths and symlinks below Root.
type FS struct{ Root string }

// Open opens a file or directory for reading.
func (f FS) Open(path string) (*os.File, error) { return f.open(path, unix.O_RDONLY) }

// Stat describes a file or directory. It follows symlinks.
func (f FS) Stat(path string) (os.FileInfo, error) {
	file, err := f.open(path, unix.O_PATH)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // read only
	return file.Stat()
}

func (f FS) open(path string, flags uint64) (*os.File, error) {
	root, err := os.Open(f.Root)
	if err != nil {
		return nil, err
	}
	defer root.Close() //nolint:errcheck // read only
	fd, err := unix.Openat2(int(root.Fd()), path, &unix.OpenHow{Flags: flags | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// ReadFile reads a file.
func (f FS) ReadFile(path string) ([]byte, error) {
	file, err := f.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // read only
	return io.ReadAll(file)
}

// Glob returns the sorted paths that match a pattern, which may have wildcards in its last element only. A missing directory has no
// matches.
func (f FS) Glob(pattern string) ([]string, error) {
	dir, last := filepath.Split(pattern)
	file, err := f.Open(filepath.Clean(dir))
	if os.IsNotExist(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // read only
	names, err := file.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var paths []string
	for _, name := range names {
		if ok, err := filepath.Match(last, name); err != nil {
			return nil, err
		} else if ok {
			paths = append(paths, filepath.Join(dir, name))
		}
	}
	slices.Sort(paths)
	return paths, nil
}
