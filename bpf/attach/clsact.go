package attach

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
)

const (
	// filterPriority and filterHandle are not 1, which Cilium's legacy loader and AWS' network policy agent use. Handles
	// below 64 fit into one node of the kernel's tree of handles.
	filterPriority = 2
	filterHandle   = 42
	// The names of our filters begin with filterPrefix, in every ABI.
	filterPrefix = "probelet/"
	// viaClsact is a marker in the attachment's directory: it was made by clsact. A directory, because bpffs has no files but
	// pins. It is created before the filters, in case the process is killed in between.
	viaClsact = "clsact"
)

// errIngressQdisc: the device has an ingress qdisc, such as the bandwidth plugin's. It has no egress side, and keeps clsact out.
var errIngressQdisc = errors.New("an ingress qdisc is in the way of clsact")

// attachClsact attaches completely, or leaves nothing behind.
func attachClsact(d *datapath.Datapath, dir string, ifindex int) (err error) {
	marker := filepath.Join(dir, viaClsact)
	if err := os.Mkdir(marker, 0o700); err != nil {
		return err
	}
	undo := RemoveFilters
	defer func() {
		if err != nil {
			err = errors.Join(err, undo(ifindex), remove(marker))
		}
	}()
	added, err := addClsact(ifindex)
	if added {
		undo = ClearClsact
	}
	if err != nil {
		return fmt.Errorf("adding clsact to device %d: %w", ifindex, err)
	}
	for _, side := range sides {
		filter := &netlink.BpfFilter{
			FilterAttrs: netlink.FilterAttrs{
				LinkIndex: ifindex, Parent: side.parent,
				Protocol: unix.ETH_P_ALL, Priority: filterPriority, Handle: filterHandle,
			},
			Fd: side.program(d).FD(), Name: filterPrefix + side.pin, DirectAction: true,
		}
		if err := netlink.FilterAdd(filter); err != nil {
			return fmt.Errorf("adding a tc filter to %s of device %d: %w", side.name, ifindex, err)
		}
	}
	return nil
}

// addClsact makes sure that the device has clsact without filters of ours, and reports whether it was added. There may be one
// already, another agent's or an earlier attachment's. The error is errIngressQdisc if the device has that instead.
func addClsact(ifindex int) (added bool, err error) {
	err = netlink.QdiscAdd(clsact(ifindex))
	if !errors.Is(err, unix.EEXIST) {
		return err == nil, err
	}
	kind, err := ingressQdisc(ifindex)
	if err != nil {
		return false, err
	}
	if kind != "clsact" {
		return false, errIngressQdisc
	}
	return false, RemoveFilters(ifindex)
}

// ingressQdisc returns the kind of the qdisc at the device's ingress: clsact, ingress, or empty if there is none. It asks for this
// qdisc only, whereas netlink.QdiscList has the kernel send those of all devices.
func ingressQdisc(ifindex int) (kind string, err error) {
	// Without NLM_F_ECHO the kernel sends the reply to listeners, but not to us (qdisc_get_notify in net/sched/sch_api.c).
	request := nl.NewNetlinkRequest(unix.RTM_GETQDISC, unix.NLM_F_ACK|unix.NLM_F_ECHO)
	request.AddData(&nl.TcMsg{Family: unix.AF_UNSPEC, Ifindex: int32(ifindex), Parent: netlink.HANDLE_INGRESS})
	messages, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWQDISC)
	if errors.Is(err, unix.ENOENT) || err == nil && len(messages) == 0 { // there never was one, or it was removed
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("qdisc of device %d: %w", ifindex, err)
	}
	attributes, err := nl.ParseRouteAttr(messages[0][nl.SizeofTcMsg:])
	if err != nil {
		return "", fmt.Errorf("qdisc of device %d: %w", ifindex, err)
	}
	for _, a := range attributes {
		if a.Attr.Type == nl.TCA_KIND {
			return unix.ByteSliceToString(a.Value), nil
		}
	}
	return "", nil
}

// removeFilters removes our filters from the device, and returns how many filters of others there are. Of a device that is gone
// it finds none.
func removeFilters(ifindex int) (others int, err error) {
	device := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: ifindex}} // the kernel needs no more, and DEL is in a hurry
	for _, side := range sides {
		filters, err := filtersOf(device, side.parent)
		if err != nil {
			return others, err
		}
		for _, f := range filters {
			b, ok := f.(*netlink.BpfFilter)
			if !ok || !strings.HasPrefix(b.Name, filterPrefix) {
				others++
				continue
			}
			if err := netlink.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
				return others, fmt.Errorf("removing the tc filter at %s of device %d: %w", side.name, ifindex, err)
			}
		}
	}
	return others, nil
}

func clsact(ifindex int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_CLSACT,
	}}
}

// RemoveFilters removes our filters from a device, of any build and without need of pins, and leaves the qdisc where it is:
// adding or removing one makes the kernel drop all that the host sends to the device for some milliseconds (dev_deactivate in
// qdisc_graft, net/sched/sch_api.c). An empty one costs packets nothing. A device that is gone is no error.
func RemoveFilters(ifindex int) error {
	_, err := removeFilters(ifindex)
	return err
}

// ClearClsact is RemoveFilters for a device that nobody sends to yet, or any more: it removes the clsact qdisc too, if that has no
// other filters.
func ClearClsact(ifindex int) error {
	others, err := removeFilters(ifindex)
	if err != nil || others > 0 {
		return err
	}
	if err := removeClsact(ifindex); err != nil {
		return fmt.Errorf("removing clsact from device %d: %w", ifindex, err)
	}
	return nil
}

// removeClsact removes the qdisc by kind, because netlink.QdiscDel would remove an ingress qdisc, too. No qdisc is no error.
func removeClsact(ifindex int) error {
	q := clsact(ifindex)
	request := nl.NewNetlinkRequest(unix.RTM_DELQDISC, unix.NLM_F_ACK)
	request.AddData(&nl.TcMsg{Family: unix.AF_UNSPEC, Ifindex: int32(ifindex), Handle: q.Handle, Parent: q.Parent})
	request.AddData(nl.NewRtAttr(nl.TCA_KIND, nl.ZeroTerminated(q.Type())))
	_, err := request.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENODEV) {
		return nil
	}
	return err
}

// filtersOf returns the filters at one side of the device's clsact, if it has one, in the order in which they run.
func filtersOf(device netlink.Link, parent uint32) ([]netlink.Filter, error) {
	filters, err := netlinksafe.FilterList(device, parent)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // no such qdisc
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("tc filters of device %d: %w", device.Attrs().Index, err)
	}
	return filters, nil
}
