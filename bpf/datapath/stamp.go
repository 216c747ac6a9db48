package datapath

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Stamp identifies a version of a file or directory: it differs once that is changed or replaced. No file has the zero Stamp.
type Stamp struct {
	dev, ino     uint64
	mtime, ctime unix.Timespec
}

// StampOf returns the current stamp of the file or directory at path.
func StampOf(path string) (Stamp, error) {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return Stamp{}, fmt.Errorf("%s: %w", path, err)
	}
	return Stamp{stat.Dev, stat.Ino, stat.Mtim, stat.Ctim}, nil
}

// Settled returns the stamp, or the zero Stamp if it is so recent that another change could produce the same timestamps.
func (s Stamp) Settled() Stamp {
	if time.Since(time.Unix(s.mtime.Unix())) < time.Second {
		return Stamp{}
	}
	return s
}
