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
	// ABIs never open each other's objects, and builds with the same ABI share whatever the first of them loaded.
	ABI = "v6"
	// DefaultDir is the default directory for pins.
	DefaultDir = "/sys/fs/bpf/probelet"
)

// AttachmentsDir returns the directory of this ABI's attachments, which are directories themselves.
func AttachmentsDir(bpfDir string) string { return AttachmentsIn(filepath.Join(bpfDir, ABI)) }

// AttachmentsIn returns the equivalent of AttachmentsDir for a directory returned by Others.
func AttachmentsIn(other string) string { return filepath.Join(other, attachmentsDir) }

const (
	attachmentsDir = "attachments"
	loading        = "-loading" // suffix of a directory that is being filled
)

// Others returns the directories under bpfDir that hold objects of other ABIs, or incomplete sets that were put aside.
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

// RemoveOthers removes the directories returned by Others that have no attachment left.
func RemoveOthers(bpfDir string) error {
	others, err := Others(bpfDir)
	errs := []error{err}
	for _, dir := range others {
		// Fails while another build is attaching, whose directory then stays.
		if err := os.Remove(filepath.Join(dir, attachmentsDir)); err == nil || Absent(err) {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

// putAside moves an incomplete set of objects out of the way. Devices stay attached to it until they are reattached.
func putAside(bpfDir string) error {
	for i := 1; ; i++ {
		err := os.Rename(filepath.Join(bpfDir, ABI), filepath.Join(bpfDir, fmt.Sprintf("%s-incomplete-%d", ABI, i)))
		if !errors.Is(err, os.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
}
