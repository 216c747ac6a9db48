package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
)

// proberFlag is the value of --prober.
type proberFlag struct {
	cgroup string // directory; empty: every local process
}

func parseProber(value string) (proberFlag, error) {
	if value == "host" {
		return proberFlag{}, nil
	}
	path, ok := strings.CutPrefix(value, "cgroup:")
	if !ok || !filepath.IsAbs(path) {
		return proberFlag{}, fmt.Errorf("--prober %q: must be host, or cgroup: and the absolute path of a cgroup v2 directory", value)
	}
	return proberFlag{cgroup: path}, nil
}

// resolve says what the kernel side is to compare with. A cgroup that is made anew (its service was restarted) has
// another id.
func (p proberFlag) resolve() (datapath.Prober, error) {
	if p.cgroup == "" {
		return datapath.Prober{AnyLocal: true}, nil
	}
	id, err := cgroupID(p.cgroup)
	if err != nil {
		return datapath.Prober{}, fmt.Errorf("--prober cgroup:%s: %w", p.cgroup, err)
	}
	return datapath.Prober{CgroupIDs: []uint64{id}}, nil
}

// cgroupID is the id of a cgroup v2 as the kernel reports it of a socket: the inode number of its directory.
func cgroupID(path string) (uint64, error) {
	dir, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer dir.Close() //nolint:errcheck // read only
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &fs); err != nil {
		return 0, fmt.Errorf("statfs: %w", err)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, fmt.Errorf("not a cgroup v2 directory (file system type %#x, want %#x)", fs.Type, unix.CGROUP2_SUPER_MAGIC)
	}
	var stat unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &stat); err != nil {
		return 0, fmt.Errorf("stat: %w", err)
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		return 0, unix.ENOTDIR
	}
	return stat.Ino, nil
}
