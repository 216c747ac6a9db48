package attach

import (
	"os"
	"path/filepath"

	"github.com/probelet/probelet/bpf/datapath"
)

// Promote replaces the clsact filters of an attachment with tcx links, and leaves the empty qdisc. For a moment both are there;
// the second program leaves alone what the first has dealt with. A device that lost trust is put on trial again, because its
// answers may have been lost to a program that now runs after ours. Promote does nothing to an attachment that has tcx links
// already. The error is ebpf.ErrNotSupported on a kernel without tcx.
func Promote(d *datapath.Datapath, bpfDir string, id ID) error {
	dir := filepath.Join(datapath.AttachmentsDir(bpfDir), id.name())
	key, err := deviceIn(dir)
	if err != nil || !Promotable(bpfDir, id) {
		return err
	}
	device, err := d.Device(key)
	if err != nil {
		return err
	}
	for _, side := range sides { // left by an attempt that was interrupted
		if err := detachLink(filepath.Join(dir, side.pin)); err != nil {
			return err
		}
	}
	if err := attachTCX(d, dir, int(key.Ifindex)); err != nil {
		return err
	}
	if err := RemoveFilters(int(key.Ifindex)); err != nil {
		return err
	}
	if err := remove(filepath.Join(dir, viaClsact)); err != nil {
		return err
	}
	if device.Trust == datapath.TrustLost {
		return d.TrustAgain(key)
	}
	return nil
}

// Promotable reports whether an attachment was made by clsact and has not been promoted completely.
func Promotable(bpfDir string, id ID) bool {
	_, err := os.Stat(filepath.Join(datapath.AttachmentsDir(bpfDir), id.name(), viaClsact))
	return err == nil
}
