package attach

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/datapath"
)

// attachXDP attaches respond in generic mode. Native XDP on a veth sees what the pod sends, but not packets redirected into the
// device's receive path.
func attachXDP(d *datapath.Datapath, dir string, ifindex int) error {
	l, err := link.AttachXDP(link.XDPOptions{
		Program:   d.Respond(),
		Interface: ifindex,
		Flags:     link.XDPGenericMode,
	})
	if err != nil {
		return fmt.Errorf("attaching XDP to device %d%s: %w", ifindex, xdpUser(ifindex), err)
	}
	return errors.Join(l.Pin(filepath.Join(dir, pinRespond)), l.Close())
}

// xdpUser describes the XDP program that is already on the device, if any, and what to do about it.
func xdpUser(ifindex int) string {
	id, err := xdpProgram(ifindex)
	if err != nil || id == 0 {
		return ""
	}
	const do = `if another BPF file system is mounted over the one where it is pinned, unmount that; otherwise detach the link, which "bpftool link" lists`
	switch name := programName(id); name {
	case "":
		return fmt.Sprintf(" (it already has XDP program %d, of another agent or another probelet; %s)", id, do)
	case pinRespond:
		return fmt.Sprintf(" (it already has XDP program %d, respond of another probelet; %s)", id, do)
	default:
		return fmt.Sprintf(" (it already has XDP program %d, %s)", id, name)
	}
}

// xdpProgram returns the id of the XDP program on the device, or 0 if there is none.
func xdpProgram(ifindex int) (ebpf.ProgramID, error) {
	device, err := linkAt(ifindex)
	if err != nil {
		return 0, err
	}
	return xdpOn(device), nil
}

// xdpOn returns the id of the XDP program that device had when it was read, or 0 if it had none.
func xdpOn(device netlink.Link) ebpf.ProgramID {
	if xdp := device.Attrs().Xdp; xdp != nil {
		return ebpf.ProgramID(xdp.ProgId)
	}
	return 0
}

// xdpDevice returns the index of the device that the pinned XDP link is attached to, or 0 if there is no such pin or device.
func xdpDevice(pin string) (int, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("%s: %w", pin, err)
	}
	defer l.Close() //nolint:errcheck // read only
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", pin, err)
	}
	xdp := info.XDP()
	if xdp == nil {
		return 0, nil
	}
	return int(xdp.Ifindex), nil
}
