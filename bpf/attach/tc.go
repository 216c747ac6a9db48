package attach

import (
	"errors"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/datapath"
)

// Via selects how the tc programs are attached.
type Via string

// Ways to attach. tcx links run first, and no other program or filter can displace them, but attaching waits for an RCU grace period
// for each of the two programs. Clsact does not wait, but a device cannot have both clsact and an ingress qdisc.
const (
	ViaAuto   Via = "" // tcx where the kernel has it (6.6), clsact elsewhere
	ViaTCX    Via = "tcx"
	ViaClsact Via = "clsact" // falls back to tcx
)

// side describes one of the two sides of a device where a tc program is attached.
type side struct {
	name    string // in tc's terms
	pin     string
	tcx     ebpf.AttachType
	parent  uint32 // of the side's filters
	program func(*datapath.Datapath) *ebpf.Program
}

// sides is in the order of attaching: observe comes first, because it must see the connections that steer takes.
var sides = [...]side{
	{"ingress", pinObserve, ebpf.AttachTCXIngress, netlink.HANDLE_MIN_INGRESS, (*datapath.Datapath).Observe},
	{"egress", pinSteer, ebpf.AttachTCXEgress, netlink.HANDLE_MIN_EGRESS, (*datapath.Datapath).Steer},
}

// attachTC attaches by tcx, or by clsact if via asks for it or the kernel has no tcx. If clsact fails, for instance because the
// device has an ingress qdisc, it falls back to tcx.
func attachTC(d *datapath.Datapath, dir string, ifindex int, via Via) error {
	var clsactErr error
	if via == ViaClsact {
		if clsactErr = attachClsact(d, dir, ifindex); clsactErr == nil {
			return nil
		}
	}
	err := attachTCX(d, dir, ifindex)
	switch {
	case err == nil:
		return RemoveFilters(ifindex) // of a previous attachment
	case via == ViaAuto && errors.Is(err, ebpf.ErrNotSupported):
		return attachClsact(d, dir, ifindex)
	}
	return errors.Join(clsactErr, err)
}
