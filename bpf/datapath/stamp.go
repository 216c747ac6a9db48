package datapath

import (
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// Stamp changes when a file or directory does, or is replaced. The zero Stamp is nothing's.
type Stamp struct {
	dev, ino     uint64
	mtime, ctime unix.Timespec
}

// StampOf returns the stamp of what is at the path now.
func StampOf(path string) (Stamp, error) {
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		return Stamp{}, fmt.Errorf("%s: %w", path, err)
	}
	return Stamp{stat.Dev, stat.Ino, stat.Mtim, stat.Ctim}, nil
}

// Settled returns the stamp, or the zero one if it is so young that another change might have the same times.
func (s Stamp) Settled() Stamp {
	if time.Since(time.Unix(s.mtime.Unix())) < time.Second {
		return Stamp{}
	}
	return s
}
