package attach

import (
	"context"
	"errors"
	"os"

	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/datapath"
)

// Orphaned reports whether the device of an attachment is gone, or was never attached to.
func Orphaned(bpfDir string, id ID) (bool, error) {
	dirs, err := dirsOf(bpfDir, id)
	if err != nil {
		return false, err
	}
	for _, dir := range dirs {
		if _, err := os.Stat(dir); datapath.Absent(err) {
			continue
		}
		ifindex, err := indexIn(dir)
		if err != nil {
			return false, err
		}
		if ifindex == 0 {
			continue
		}
		_, err = netlink.LinkByIndex(ifindex)
		var gone netlink.LinkNotFoundError
		if !errors.As(err, &gone) {
			return false, err
		}
	}
	return true, nil
}

// Prune removes devices that no attachment names. Detach leaves none behind; they remain when pins were removed by other means.
// When ctx ends, Prune returns nil and leaves the rest.
func Prune(ctx context.Context, d *datapath.Datapath, bpfDir string) error {
	// List devices before attachments, because Attach names a device before adding it.
	devices, err := d.Devices()
	if err != nil {
		return err
	}
	ids, err := List(bpfDir)
	if err != nil {
		return err
	}
	named := map[datapath.DeviceKey]bool{}
	for _, id := range ids {
		key, err := Device(bpfDir, id)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
		named[key] = true
	}
	for _, device := range devices {
		if ctx.Err() != nil {
			return nil
		}
		if named[device.Key] {
			continue
		}
		if err := d.RemoveDevice(device.Key); err != nil {
			return err
		}
	}
	return d.RemoveStrays()
}
