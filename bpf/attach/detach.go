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

// ending tells how an attachment is removed.
type ending struct {
	link    func(pin string) error
	filters func(ifindex int) error
}

var (
	staying = ending{detachLink, RemoveFilters} // of a device that goes on
	leaving = ending{unpinLink, ClearClsact}    // of a device that is about to be removed
)

// Detach removes everything that Attach made under the ID but an empty clsact qdisc, whose removal would cost the device packets.
// That is so even if the device is gone, the attempt was interrupted, or the build had another ABI. Finding nothing is no error. d
// may be nil if the programs are not loaded (any more).
func Detach(d *datapath.Datapath, bpfDir string, id ID) error {
	return detach(d, bpfDir, id, staying)
}

// Release is Detach for a device that is about to be removed. It takes an empty clsact off too, and does not wait for RCU grace
// periods: it stops the answering and removes the pins, and the kernel takes tcx and XDP programs off a moment later.
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
	// First, so that no more connections are taken.
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

// detachLink detaches a pinned link at once, and unpins it. Unpinning alone would leave the detaching to a kernel worker.
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

// unpinLink unpins a link, and leaves the detaching to a kernel worker.
func unpinLink(pin string) error { return remove(pin) }
