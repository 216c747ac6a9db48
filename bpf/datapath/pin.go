package datapath

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/lock"
)

const (
	// pinBlind is a directory that exists if steer does not look at listening sockets.
	pinBlind = "blind"
	// pinWatch is the pin of watch's link. watch is attached once, for all pods.
	pinWatch = "watch"
	// pinUnwatched is a directory that replaces pinWatch on a kernel without BTF.
	pinUnwatched = "unwatched"
)

// Open opens the objects pinned under bpfDir. It returns ErrNotLoaded if there are none, and ErrIncomplete if some are missing.
func Open(bpfDir string) (*Datapath, error) {
	d := &Datapath{dir: filepath.Join(bpfDir, ABI)}
	if _, err := os.Stat(d.dir); Absent(err) {
		return nil, fmt.Errorf("%s: %w", d.dir, ErrNotLoaded)
	}
	if err := checkPrivate(bpfDir); err != nil {
		return nil, err
	}
	for name, m := range d.maps() {
		loaded, err := ebpf.LoadPinnedMap(filepath.Join(d.dir, name), nil)
		if err != nil {
			return nil, errors.Join(openError(filepath.Join(d.dir, name), err), d.Close())
		}
		*m = loaded
	}
	for name, p := range d.programs() {
		loaded, err := openPinnedProgram(filepath.Join(d.dir, name))
		if err != nil {
			return nil, errors.Join(openError(filepath.Join(d.dir, name), err), d.Close())
		}
		*p = loaded
	}
	return d, nil
}

// openPinnedProgram is like ebpf.LoadPinnedProgram, but does not read the machine's mounts to look for a BPF token first. A node
// with many pods has thousands of mounts, and reading them took longer than the rest of a CNI ADD.
func openPinnedProgram(pin string) (*ebpf.Program, error) {
	path, err := unix.BytePtrFromString(pin)
	if err != nil {
		return nil, err
	}
	// The part of union bpf_attr that BPF_OBJ_GET uses (include/uapi/linux/bpf.h).
	attr := struct {
		pathname  unsafe.Pointer
		fd, flags uint32
	}{pathname: unsafe.Pointer(path)}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_GET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return nil, errno
	}
	return ebpf.NewProgramFromFD(int(fd))
}

func openError(pin string, err error) error {
	if Absent(err) {
		err = fmt.Errorf("%w: %w", ErrIncomplete, err)
	}
	return fmt.Errorf("opening %s: %w", pin, err)
}

// openWhole is like Open, but also returns ErrIncomplete if the pin of watch is missing.
func openWhole(bpfDir string) (*Datapath, error) {
	d, err := Open(bpfDir)
	if err != nil || d.watchPinned() {
		return d, err
	}
	return nil, errors.Join(fmt.Errorf("%s: %w", filepath.Join(d.dir, pinWatch), ErrIncomplete), d.Close())
}

// watchPinned reports whether watch is pinned, or was never attached.
func (d *Datapath) watchPinned() bool {
	_, err := os.Stat(filepath.Join(d.dir, pinUnwatched))
	return err == nil || d.Watched()
}

// Absent reports whether err means that a path does not exist, which includes a parent that is not a directory.
func Absent(err error) bool { return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) }

// Ensure opens the objects pinned under bpfDir. If there are none, or some are missing, it first loads and pins a new set, either
// completely or not at all. Concurrent callers wait for each other; if ctx ends first, the error is ErrLocked.
func Ensure(ctx context.Context, bpfDir string) (*Datapath, error) {
	missing := func(err error) bool { return errors.Is(err, ErrNotLoaded) || errors.Is(err, ErrIncomplete) }
	if d, err := openWhole(bpfDir); !missing(err) {
		return d, err
	}
	if err := makeBPFDir(bpfDir); err != nil {
		return nil, err
	}
	locked, err := lock.Dir(ctx, bpfDir, unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer locked.Release()
	d, err := openWhole(bpfDir)
	if !missing(err) {
		return d, err
	}
	if errors.Is(err, ErrIncomplete) {
		if err := putAside(bpfDir); err != nil {
			return nil, err
		}
	}
	return loadAndPin(bpfDir)
}

// loadAndPin pins into a staging directory and renames it into place, so that a partially pinned set is never visible. The caller
// holds the lock on bpfDir.
func loadAndPin(bpfDir string) (_ *Datapath, err error) {
	d, err := Load()
	if err != nil {
		return nil, err
	}
	// We hold the lock, so any staging directory was left by a process that died.
	staging := filepath.Join(bpfDir, ABI+loading)
	if err := os.RemoveAll(staging); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(staging), d.Close())
		}
	}()
	if err := os.Mkdir(staging, 0o700); err != nil {
		return nil, err
	}
	for name, m := range d.maps() {
		if err := (*m).Pin(filepath.Join(staging, name)); err != nil {
			return nil, fmt.Errorf("pinning map %s: %w", name, err)
		}
	}
	for name, p := range d.programs() {
		if err := (*p).Pin(filepath.Join(staging, name)); err != nil {
			return nil, fmt.Errorf("pinning program %s: %w", name, err)
		}
	}
	if d.watch == nil {
		err = os.Mkdir(filepath.Join(staging, pinUnwatched), 0o700)
	} else {
		err = d.watch.Pin(filepath.Join(staging, pinWatch))
	}
	if err != nil {
		return nil, fmt.Errorf("pinning the link of watch: %w", err)
	}
	if d.blind {
		if err := os.Mkdir(filepath.Join(staging, pinBlind), 0o700); err != nil {
			return nil, err
		}
	}
	if err := os.Mkdir(filepath.Join(staging, attachmentsDir), 0o700); err != nil {
		return nil, err
	}
	d.dir = filepath.Join(bpfDir, ABI)
	if err := os.Rename(staging, d.dir); err != nil {
		return nil, err
	}
	return d, nil
}

// CheckDir returns an error unless dir can be a directory on a BPF file system.
func CheckDir(dir string) error {
	dir = filepath.Clean(dir)
	_, err := os.Stat(dir)
	// The kernel refuses even to look up a name with a dot there (bpf_lookup in kernel/bpf/inode.c).
	if errors.Is(err, unix.EPERM) || strings.Contains(filepath.Base(dir), ".") {
		return errors.New("must not contain a dot below the mount point: BPF file systems reserve such names")
	}
	return nil
}

func makeBPFDir(dir string) error {
	parent := filepath.Dir(dir)
	var fs unix.Statfs_t
	if err := unix.Statfs(parent, &fs); err != nil {
		return fmt.Errorf("%s: %w: %w", parent, ErrNoBPFFS, err)
	}
	if fs.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("%s: %w", parent, ErrNoBPFFS)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return checkPrivate(dir) // any user may have created it: the root of a BPF file system is world-writable and sticky, like /tmp
}

// Claim makes the caller the only daemon that manages what is pinned under bpfDir, until it calls release or ends. The error is
// ErrLocked if there is another daemon. Claim is a no-op if nothing is pinned.
func Claim(bpfDir string) (release func(), err error) {
	once, cancel := context.WithCancel(context.Background())
	cancel()
	l, err := lock.Dir(once, AttachmentsDir(bpfDir), unix.LOCK_EX)
	if Absent(err) {
		return func() {}, nil
	}
	if err != nil {
		return nil, err
	}
	return l.Release, nil
}

// Current reports whether exactly these objects are still pinned. They are not if another BPF file system was mounted over them, or
// if pins were removed. Current looks at the pins only if their directory has changed since the last call. It is not safe for
// concurrent use.
func (d *Datapath) Current() (bool, error) {
	stamp, err := StampOf(d.dir)
	if err == nil && stamp == d.found {
		return true, nil
	}
	d.found = Stamp{}
	current, err := d.isPinned()
	if err == nil && current {
		d.found = stamp.Settled()
	}
	return current, err
}

func (d *Datapath) isPinned() (bool, error) {
	pinned, err := openWhole(filepath.Dir(d.dir))
	if errors.Is(err, ErrNotLoaded) || errors.Is(err, ErrIncomplete) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer pinned.Close() //nolint:errcheck // read only
	theirs, err := pinned.ids()
	if err != nil {
		return false, err
	}
	ours, err := d.ids()
	return maps.Equal(theirs, ours), err
}

// ids returns the kernel's ids of the maps and programs, by name.
func (d *Datapath) ids() (map[string]uint32, error) {
	ids := map[string]uint32{}
	for name, m := range d.maps() {
		info, err := (*m).Info()
		if err != nil {
			return nil, fmt.Errorf("map %s: %w", name, err)
		}
		id, _ := info.ID()
		ids[name] = uint32(id)
	}
	for name, p := range d.programs() {
		info, err := (*p).Info()
		if err != nil {
			return nil, fmt.Errorf("program %s: %w", name, err)
		}
		id, _ := info.ID()
		ids[name] = uint32(id)
	}
	return ids, nil
}
