package attach

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
)

// ending selects how an attachment is removed.
type ending struct {
	link    func(pin string) error
	filters func(ifindex int) error
}

var (
	staying = ending{detachLink, RemoveFilters} // the device stays in use
	leaving = ending{unpinLink, ClearClsact}    // the device is about to be removed
)

// Detach removes everything that Attach created under the ID, except for an empty clsact qdisc, whose removal would cost the device
// packets. It does so even if the device is gone, Attach was interrupted, or the build that attached had another ABI. It is no error
// if there is nothing to remove. d may be nil if the programs are not, or no longer, loaded.
func Detach(d *datapath.Datapath, bpfDir string, id ID) error {
	return detach(d, bpfDir, id, staying)
}

// Release is like Detach, but for a device that is about to be removed. It also removes an empty clsact, and it does not wait for RCU
// grace periods: it stops answering and removes the pins, and the kernel detaches tcx and XDP programs a moment later.
func Release(d *datapath.Datapath, bpfDir string, id ID) error {
	return detach(d, bpfDir, id, leaving)
}

func detach(d *datapath.Datapath, bpfDir string, id ID, how ending) error {
	dirs, err := dirsOf(bpfDir, id)
	errs := []error{err}
	for _, dir := range dirs {
		owner := d
		if !isOurs(bpfDir, dir) {
			owner = nil
		}
		errs = append(errs, detachFrom(owner, dir, how))
	}
	return errors.Join(errs...)
}

func detachFrom(d *datapath.Datapath, dir string, how ending) error {
	if _, err := os.Stat(dir); datapath.Absent(err) {
		return nil
	}
	ifindex, err := indexIn(dir)
	if err != nil {
		return err
	}
	// Must come first, so that no more connections are taken.
	if key, err := deviceIn(dir); err == nil && d != nil {
		if err := d.RemoveDevice(key); err != nil {
			return err
		}
	}
	if err := how.link(filepath.Join(dir, pinSteer)); err != nil {
		return err
	}
	if ifindex != 0 {
		if err := how.filters(ifindex); err != nil {
			return err
		}
	}
	for _, pin := range []string{pinObserve, pinRespond} {
		if err := how.link(filepath.Join(dir, pin)); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// detachLink detaches a pinned link immediately and unpins it. Unpinning alone would leave detaching to a kernel worker.
func detachLink(pin string) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", pin, err)
	}
	defer l.Close() //nolint:errcheck // detached
	if err := l.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) {
		return fmt.Errorf("detaching %s: %w", pin, err)
	}
	return l.Unpin()
}

// unpinLink unpins a link and leaves detaching to a kernel worker.
func unpinLink(pin string) error { return remove(pin) }
