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
	// filterPriority and filterHandle avoid 1, which Cilium's legacy loader and the AWS network policy agent use. Handles
	// below 64 fit into one node of the kernel's tree of handles.
	filterPriority = 2
	filterHandle   = 42
	// filterPrefix starts the names of our filters in every ABI.
	filterPrefix = "probelet/"
	// viaClsact marks an attachment that uses clsact. The marker is a directory, because bpffs holds no files but pins, and is
	// created before the filters, in case the process is killed in between.
	viaClsact = "clsact"
)

// errIngressQdisc: the device has an ingress qdisc, such as the bandwidth plugin's. It has no egress side and excludes clsact.
var errIngressQdisc = errors.New("the device has an ingress qdisc, which excludes clsact")

// attachClsact attaches both filters, or leaves nothing behind.
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

// addClsact ensures that the device has clsact without filters of ours, and reports whether it added the qdisc. It may already be
// there, from another agent or a previous attachment. The error is errIngressQdisc if the device has an ingress qdisc instead.
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

// ingressQdisc returns the kind of the qdisc at the device's ingress: clsact, ingress, or empty if there is none. It requests only
// this qdisc, whereas netlink.QdiscList makes the kernel dump the qdiscs of all devices.
func ingressQdisc(ifindex int) (kind string, err error) {
	// Without NLM_F_ECHO the kernel sends the reply only to listeners, not to us (qdisc_get_notify in net/sched/sch_api.c).
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

// removeFilters removes our filters from a device and returns the number of foreign ones. On a device that is gone there are none.
func removeFilters(ifindex int) (others int, err error) {
	device := &netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: ifindex}} // all that the kernel needs; saves DEL a lookup
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

// RemoveFilters removes our filters from a device, whichever build attached them, and needs no pins. It leaves the qdisc in place:
// adding or removing one makes the kernel drop everything that the host sends to the device for some milliseconds (dev_deactivate
// in qdisc_graft, net/sched/sch_api.c), while an empty one costs packets nothing. It is no error if the device is gone.
func RemoveFilters(ifindex int) error {
	_, err := removeFilters(ifindex)
	return err
}

// ClearClsact is like RemoveFilters, but for a device that carries no traffic yet, or no more: it also removes the clsact qdisc,
// unless that has foreign filters.
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

// removeClsact removes the qdisc by kind, because netlink.QdiscDel would also remove an ingress qdisc. It is no error if there is
// no qdisc.
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

// filtersOf returns the filters on one side of the device's clsact, if any, in the order in which they run.
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
