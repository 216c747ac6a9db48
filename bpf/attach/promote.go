package attach

import (
	"os"
	"path/filepath"

	"github.com/probelet/probelet/bpf/datapath"
)

// Promote replaces the clsact filters of an attachment with tcx links and leaves the empty qdisc behind. For a moment both are
// attached; the program that runs second ignores packets that the first has handled. A device that lost trust is put on trial again,
// because its answers may have been lost to a program that now runs after ours. Promote is a no-op for an attachment that already
// has tcx links. The error is ebpf.ErrNotSupported on a kernel without tcx.
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
	for _, side := range sides { // links left by an interrupted attempt
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

// Promotable reports whether an attachment uses clsact and has not been fully promoted.
func Promotable(bpfDir string, id ID) bool {
	_, err := os.Stat(filepath.Join(datapath.AttachmentsDir(bpfDir), id.name(), viaClsact))
	return err == nil
}
