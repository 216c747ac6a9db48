package datapath

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// ABI versions the programs and the layout of maps and orders. Objects are pinned under it, so builds with different
	// ABIs never open each other's objects, and builds with the same ABI share what the first of them loaded.
	ABI = "v5"
	// DefaultDir is where everything is pinned by default.
	DefaultDir = "/sys/fs/bpf/probelet"
)

// AttachmentsDir is the directory with this ABI's attachments, one directory each.
func AttachmentsDir(bpfDir string) string { return AttachmentsIn(filepath.Join(bpfDir, ABI)) }

// AttachmentsIn is the AttachmentsDir of one of Others.
func AttachmentsIn(other string) string { return filepath.Join(other, attachmentsDir) }

const (
	attachmentsDir = "attachments"
	loading        = "-loading" // ends the name of a directory that is being filled
)

// Others returns the directories under bpfDir with objects of other ABIs, and with incomplete sets that were put aside.
func Others(bpfDir string) ([]string, error) {
	entries, err := os.ReadDir(bpfDir)
	if Absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var others []string
	for _, e := range entries {
		if e.IsDir() && e.Name() != ABI && !strings.HasSuffix(e.Name(), loading) {
			others = append(others, filepath.Join(bpfDir, e.Name()))
		}
	}
	return others, nil
}

// RemoveOthers removes those of Others that have no attachment left.
func RemoveOthers(bpfDir string) error {
	others, err := Others(bpfDir)
	errs := []error{err}
	for _, dir := range others {
		// Fails if another build is just attaching, and then leaves its directory alone.
		if err := os.Remove(filepath.Join(dir, attachmentsDir)); err == nil || Absent(err) {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

// putAside makes room for a new set of objects. What the old set is attached to stays attached, until it is reattached.
func putAside(bpfDir string) error {
	for i := 1; ; i++ {
		err := os.Rename(filepath.Join(bpfDir, ABI), filepath.Join(bpfDir, fmt.Sprintf("%s-incomplete-%d", ABI, i)))
		if !errors.Is(err, os.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
}
