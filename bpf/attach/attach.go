// Package attach attaches the programs of package datapath to the host-side veth of a pod, checks that they are attached, and
// detaches them. It knows nothing of Kubernetes or CNI; it stores what it is told about a pod, but does not interpret it.
package attach

import (
	"errors"
	"os"
	"path/filepath"

	"github.com/probelet/probelet/bpf/datapath"
)

var (
	// ErrNotAttached: there is no attachment with that ID.
	ErrNotAttached = errors.New("not attached")
	// ErrIncomplete: part of the attachment is missing or not ours.
	ErrIncomplete = errors.New("attachment is incomplete or was changed")
)

// Target specifies what to attach to, and how.
type Target struct {
	IfIndex int // of the host-side veth
	// PodNetns is the inode number of the pod's network namespace.
	PodNetns uint32
	// NetnsCookie is the namespace's cookie (SO_NETNS_COOKIE); 0 if unknown.
	NetnsCookie uint64
	Hook        Hook
}

// Attach makes the target known to the programs, without any evidence, and attaches them, either completely or not at all. It first
// removes whatever a previous attachment with the same ID left behind.
func Attach(d *datapath.Datapath, bpfDir string, id ID, target Target, via Via) (err error) {
	if err := Detach(d, bpfDir, id); err != nil {
		return err
	}
	device, err := datapath.NewDeviceKey(target.IfIndex)
	if err != nil {
		return err
	}
	dir := filepath.Join(datapath.AttachmentsDir(bpfDir), id.name())
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, Detach(d, bpfDir, id))
		}
	}()
	// Must precede AddDevice, so that Prune does not mistake the device for a stray.
	if err := os.Mkdir(filepath.Join(dir, deviceName(device)), 0o700); err != nil {
		return err
	}
	link, err := linkAt(target.IfIndex)
	if err != nil {
		return err
	}
	if err := d.AddDevice(device, target.PodNetns, target.Hook.kernel()); err != nil {
		return err
	}
	if err := d.LookInto(device, link.Attrs().NetNsID, target.NetnsCookie); err != nil {
		return err
	}
	if target.Hook == HookXDP {
		if err := attachXDP(d, dir, target.IfIndex); err != nil {
			return err
		}
	}
	return attachTC(d, dir, target.IfIndex, via)
}
