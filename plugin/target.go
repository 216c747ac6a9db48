package main

import (
	"errors"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// target is the device to attach to: the host side of a pod's veth.
type target struct {
	ifIndex int
	ifName  string
	// podNetns is the inode number of the pod's network namespace.
	podNetns uint32
}

// findTarget follows the pod's interface to its peer in the current namespace, and makes sure that the two belong
// together and are those that prevResult tells of.
func findTarget(netnsPath, ifName string, prevResult *current.Result) (target, error) {
	podNS, err := ns.GetNS(netnsPath)
	if err != nil {
		return target{}, fault(types.ErrInvalidNetNS, "the pod's network namespace %q: %v", netnsPath, err)
	}
	defer podNS.Close() //nolint:errcheck // only read
	inPod, err := vethInPod(podNS, ifName)
	if err != nil {
		return target{}, err
	}
	onHost, err := peerOf(inPod, podNS)
	if err != nil {
		return target{}, err
	}
	if err := crossCheck(prevResult, ifName, onHost.Name); err != nil {
		return target{}, err
	}
	var stat unix.Stat_t
	if err := unix.Fstat(int(podNS.Fd()), &stat); err != nil {
		return target{}, fault(types.ErrInvalidNetNS, "the pod's network namespace %q: %v", netnsPath, err)
	}
	return target{onHost.Index, onHost.Name, uint32(stat.Ino)}, nil
}

func vethInPod(podNS ns.NetNS, ifName string) (*netlink.LinkAttrs, error) {
	var device netlink.Link
	err := podNS.Do(func(ns.NetNS) (err error) {
		device, err = netlinksafe.LinkByName(ifName)
		return err
	})
	if err != nil {
		return nil, fault(codeNoVeth, "interface %s in the pod: %v", ifName, err)
	}
	if _, ok := device.(*netlink.Veth); !ok {
		return nil, fault(codeNoVeth, "interface %s in the pod is of type %s, not veth", ifName, device.Type())
	}
	return device.Attrs(), nil
}

// peerOf returns the other end of the pod's veth. An index alone would not do: it is unique within a namespace only, and
// the other end may be in a third one.
func peerOf(inPod *netlink.LinkAttrs, podNS ns.NetNS) (*netlink.LinkAttrs, error) {
	device, err := netlink.LinkByIndex(inPod.ParentIndex)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil, fault(codeNoVeth, "the peer of the pod's interface %s, index %d, is not in this namespace",
			inPod.Name, inPod.ParentIndex)
	}
	if err != nil {
		return nil, fault(codeNoVeth, "device %d: %v", inPod.ParentIndex, err)
	}
	podNSID, err := netlink.GetNetNsIdByFd(int(podNS.Fd()))
	if err != nil {
		return nil, fault(codeNoVeth, "the id of the pod's network namespace: %v", err)
	}
	onHost := device.Attrs()
	if _, ok := device.(*netlink.Veth); !ok || onHost.ParentIndex != inPod.Index || onHost.NetNsID != podNSID {
		return nil, fault(codeNoVeth, "device %d, %s, is not the peer of the pod's interface %s",
			onHost.Index, onHost.Name, inPod.Name)
	}
	return onHost, nil
}

// crossCheck compares with what the plugins before tell. Not all of them list both sides, but one that lists a side and
// has another device there speaks of another interface. Names suffice: they are unique within a namespace, and MAC
// addresses are changed by others (udev).
func crossCheck(prevResult *current.Result, ifName, hostIfName string) error {
	if prevResult == nil {
		return nil
	}
	var inPod, onHost []string
	for _, i := range prevResult.Interfaces {
		if i.Sandbox == "" {
			onHost = append(onHost, i.Name)
		} else {
			inPod = append(inPod, i.Name)
		}
	}
	switch {
	case len(inPod)+len(onHost) == 0:
		return fault(codePrevResult, "prevResult has no interfaces")
	case len(inPod) > 0 && !slices.Contains(inPod, ifName):
		return fault(codePrevResult, "the pod's interface %s is not in prevResult, which has %s",
			ifName, strings.Join(inPod, ", "))
	case len(onHost) > 0 && !slices.Contains(onHost, hostIfName):
		return fault(codePrevResult, "%s, the host side of %s, is not in prevResult, which has %s",
			hostIfName, ifName, strings.Join(onHost, ", "))
	}
	return nil
}
