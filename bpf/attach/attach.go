// Package attach puts the programs of package datapath on the host-side veth of a pod, checks that they are there, and
// takes them off. It knows nothing of Kubernetes or CNI; what it records of a pod is carried, not interpreted.
package attach

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/datapath"
)

var (
	// ErrNotAttached: there is no attachment with that ID.
	ErrNotAttached = errors.New("not attached")
	// ErrIncomplete: part of the attachment is missing, or is not ours.
	ErrIncomplete = errors.New("attachment is not as it was made")
)

// ID names an attachment by the pod's container ID and interface, as CNI does.
type ID struct {
	ContainerID string
	IfName      string
}

// An ID's name on disk escapes dots, which bpffs reserves. The first "@" ends the container ID, which cannot contain one
// (CNI spec, section 2).
var (
	escape   = strings.NewReplacer("%", "%25", ".", "%2E", "/", "%2F")
	unescape = strings.NewReplacer("%25", "%", "%2E", ".", "%2F", "/")
)

func (id ID) name() string { return escape.Replace(id.ContainerID) + "@" + escape.Replace(id.IfName) }

func parseName(name string) (ID, bool) {
	container, ifName, ok := strings.Cut(name, "@")
	return ID{unescape.Replace(container), unescape.Replace(ifName)}, ok
}

func (id ID) String() string { return id.ContainerID + "/" + id.IfName }

// Hook tells where a device's answers are made. The empty value means HookTC.
type Hook string

// Hooks.
const (
	HookTC  Hook = "tc"  // in the tc program steer
	HookXDP Hook = "xdp" // in the XDP program respond, through which every packet of the pod then goes
)

// ParseHook returns the hook with that name. The error lists the names.
func ParseHook(name string) (Hook, error) {
	hook := Hook(name)
	if hook != HookTC && hook != HookXDP {
		return "", fmt.Errorf("must be %q or %q", HookTC, HookXDP)
	}
	return hook, nil
}

func (h Hook) kernel() datapath.Hook {
	if h == HookXDP {
		return datapath.HookXDP
	}
	return datapath.HookTC
}

// Via tells how the tc programs are attached.
type Via string

// Ways to attach. tcx links are first in line, and no other program or filter can push them out, but attaching waits for an RCU
// grace period for each of the two programs. Clsact does not wait, but a device cannot have both clsact and an ingress qdisc.
const (
	ViaAuto   Via = "" // tcx where the kernel has it (6.6), clsact elsewhere
	ViaTCX    Via = "tcx"
	ViaClsact Via = "clsact" // tcx where clsact fails
)

// Names of pins.
const (
	pinSteer   = "steer"
	pinObserve = "observe"
	pinRespond = "respond"
)

// Target tells what to attach to, and how.
type Target struct {
	IfIndex int // of the host-side veth
	// PodNetns is the inode number of the pod's network namespace.
	PodNetns uint32
	// NetnsCookie is the namespace's cookie (SO_NETNS_COOKIE); 0 if it is not known.
	NetnsCookie uint64
	Hook        Hook
}

// Attach makes the target known to the programs, without evidence, and attaches them: completely, or not at all. It removes what
// an earlier attachment with the same ID left first.
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
	// Before AddDevice, so that Prune does not take the device for a stray.
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

// linkAt returns the device with an index.
func linkAt(ifindex int) (netlink.Link, error) {
	device, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return nil, fmt.Errorf("device %d: %w", ifindex, err)
	}
	return device, nil
}

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

// deviceName names the directory that tells which device is attached. It is a directory because bpffs has no files but pins.
func deviceName(key datapath.DeviceKey) string {
	return fmt.Sprintf("device-%d-%d", key.Ifindex, key.Generation)
}

// deviceIn returns the device that was attached under dir. The error is os.ErrNotExist if no directory tells which.
func deviceIn(dir string) (key datapath.DeviceKey, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return key, err
	}
	for _, e := range entries {
		if n, _ := fmt.Sscanf(e.Name(), "device-%d-%d", &key.Ifindex, &key.Generation); n == 2 {
			return key, nil
		}
	}
	return key, fmt.Errorf("%s names no device: %w", dir, os.ErrNotExist)
}

// Device returns the key of the device that is attached under an ID. The error is os.ErrNotExist if none is.
func Device(bpfDir string, id ID) (datapath.DeviceKey, error) {
	return deviceIn(filepath.Join(datapath.AttachmentsDir(bpfDir), id.name()))
}

// OpenPod opens what is known of an attachment's pod. The error is os.ErrNotExist if nothing is attached under the ID.
func OpenPod(d *datapath.Datapath, bpfDir string, id ID) (*datapath.Pod, error) {
	key, err := Device(bpfDir, id)
	if err != nil {
		return nil, err
	}
	return d.Pod(key)
}

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

// dirsOf returns the directories in which an attachment may be pinned. The one of this build's ABI comes last.
func dirsOf(bpfDir string, id ID) ([]string, error) {
	others, err := datapath.Others(bpfDir)
	var dirs []string
	for _, other := range others {
		dirs = append(dirs, filepath.Join(datapath.AttachmentsIn(other), id.name()))
	}
	return append(dirs, filepath.Join(datapath.AttachmentsDir(bpfDir), id.name())), err
}

// isOurs reports whether an attachment pinned in dir has this build's ABI.
func isOurs(bpfDir, dir string) bool { return filepath.Dir(dir) == datapath.AttachmentsDir(bpfDir) }

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

// indexIn returns the index of the device that was attached under dir, 0 if none was, or if it was an older build's and is gone.
func indexIn(dir string) (int, error) {
	key, err := deviceIn(dir)
	if errors.Is(err, os.ErrNotExist) { // ABI v3 and older, which always attached XDP
		return xdpDevice(filepath.Join(dir, pinRespond))
	}
	return int(key.Ifindex), err
}

// List returns the attachments that are pinned, complete or not, by any build.
func List(bpfDir string) ([]ID, error) {
	others, err := datapath.Others(bpfDir)
	if err != nil {
		return nil, err
	}
	var ids []ID
	seen := map[ID]bool{}
	for _, dir := range append(others, filepath.Dir(datapath.AttachmentsDir(bpfDir))) {
		entries, err := os.ReadDir(datapath.AttachmentsIn(dir))
		if err != nil && !datapath.Absent(err) {
			return nil, err
		}
		for _, e := range entries {
			if id, ok := parseName(e.Name()); ok && !seen[id] {
				seen[id] = true
				ids = append(ids, id)
			}
		}
	}
	return ids, nil
}

// Orphaned reports whether an attachment's device is gone, or never was attached to.
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

// Prune makes the programs forget devices that no attachment names. Detach leaves none; they remain when pins were removed by
// other means. When ctx ends it returns nil, and leaves the rest.
func Prune(ctx context.Context, d *datapath.Datapath, bpfDir string) error {
	// Devices before names, because Attach names a device before it adds it.
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
