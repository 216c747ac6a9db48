// Package veth finds the host end of a pod's interface. It treats what CNI plugins report as a hint, and what the kernel reports about
// the pair of devices as proof. CAP_NET_ADMIN suffices; with CAP_SYS_ADMIN it also enters the namespace to read its cookie.
package veth

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

var (
	// ErrNoNetns: the file is not a network namespace.
	ErrNoNetns = errors.New("not a network namespace")
	// ErrNoHostEnd: the pod's interface is not a veth whose peer is in the caller's namespace.
	ErrNoHostEnd = errors.New("no veth leads to the pod's interface")
	// ErrContradicted: a hint names another device for this pod.
	ErrContradicted = errors.New("the interfaces reported for the pod do not match those it has")
)

// Hint describes a device as a CNI plugin reported it (CNI spec, "ADD Success", interfaces).
type Hint struct {
	Name    string `json:"name"`
	Sandbox string `json:"sandbox"` // path of the network namespace; empty for the host's
}

// HostEnd describes the end of a pod's veth in the caller's namespace.
type HostEnd struct {
	Index int
	Name  string
	// PodNetns is the inode number of the pod's network namespace.
	PodNetns uint32
	// NetnsCookie is the namespace's cookie (SO_NETNS_COOKIE), which is never reused; 0 if the caller may not enter the namespace.
	NetnsCookie uint64
	// Hinted reports whether a hint names the device.
	Hinted bool
}

// Find returns the host end of the interface ifName in the network namespace netns, which hints refer to as sandbox. Call it in the
// host's network namespace. The error is ErrNoNetns, ErrNoHostEnd, ErrContradicted, or one from netlink.
func Find(netns *os.File, sandbox, ifName string, hints []Hint) (HostEnd, error) {
	var stat unix.Stat_t
	if err := unix.Fstat(int(netns.Fd()), &stat); err != nil {
		return HostEnd{}, &os.PathError{Op: "fstat", Path: netns.Name(), Err: err}
	}
	id, err := namespaceID(netns)
	if err != nil {
		return HostEnd{}, err
	}
	inPod, err := deviceIn(id, ifName)
	if err != nil {
		return HostEnd{}, err
	}
	onHost, err := peerOf(inPod, id)
	if err != nil {
		return HostEnd{}, err
	}
	end := HostEnd{Index: onHost.Index, Name: onHost.Name, PodNetns: uint32(stat.Ino)}
	if end.Hinted, err = checkHints(hints, sandbox, ifName, end.Name); err != nil {
		return end, err
	}
	end.NetnsCookie, err = cookieOf(netns)
	return end, err
}

// cookieOf returns the cookie of a network namespace, or 0 if the caller may not enter it. The cookie can be read only from a socket
// created inside.
func cookieOf(netns *os.File) (cookie uint64, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		cookie, err = cookieFromInside(netns)
	}()
	<-done
	if errors.Is(err, unix.EPERM) {
		return 0, nil
	}
	return cookie, err
}

// cookieFromInside leaves the thread in the namespace and locked to the goroutine, so that both end together.
func cookieFromInside(netns *os.File) (uint64, error) {
	runtime.LockOSThread()
	if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
		return 0, fmt.Errorf("entering the network namespace %s: %w", netns.Name(), err)
	}
	socket, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(socket) //nolint:errcheck // nothing was sent
	return unix.GetsockoptUint64(socket, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
}

// namespaceID returns the id by which the caller's namespace knows another one, and assigns one if necessary. The kernel assigns
// ids when it first reports a device whose peer is in the other namespace (rtnl_fill_link_netnsid in net/core/rtnetlink.c), which
// may not have happened yet: a veth created from within the pod's namespace is reported only there.
func namespaceID(netns *os.File) (int, error) {
	id, err := netlink.GetNetNsIdByFd(int(netns.Fd()))
	if errors.Is(err, unix.EINVAL) {
		return 0, fmt.Errorf("%s: %w", netns.Name(), ErrNoNetns)
	}
	if err != nil || id >= 0 {
		return id, err
	}
	const anyID = -1
	if err := netlink.SetNetNsIdByFd(int(netns.Fd()), anyID); err != nil && !errors.Is(err, unix.EEXIST) {
		return 0, fmt.Errorf("assigning an id to the network namespace %s: %w", netns.Name(), err)
	}
	return netlink.GetNetNsIdByFd(int(netns.Fd()))
}

// deviceIn returns a device in another namespace. It needs CAP_NET_ADMIN over that namespace (rtnl_get_net_ns_capable in
// net/core/rtnetlink.c).
func deviceIn(namespaceID int, name string) (netlink.Link, error) {
	request := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_ACK)
	request.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	request.AddData(nl.NewRtAttr(unix.IFLA_TARGET_NETNSID, nl.Uint32Attr(uint32(namespaceID))))
	request.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	replies, err := request.Execute(unix.NETLINK_ROUTE, 0)
	if errors.Is(err, unix.ENODEV) {
		return nil, fmt.Errorf("%w: the pod has no %s", ErrNoHostEnd, name)
	}
	if err != nil {
		return nil, fmt.Errorf("interface %s in the pod: %w", name, err)
	}
	if len(replies) != 1 {
		return nil, fmt.Errorf("interface %s in the pod: %d replies", name, len(replies))
	}
	return netlink.LinkDeserialize(nil, replies[0])
}

// peerOf returns the peer of a device in the namespace with the given id. An index alone proves nothing, because it is unique only
// within a namespace. IFLA_LINK and IFLA_LINK_NETNSID together identify a veth's peer exactly, so the host's device must confirm that
// it is the one that the pod's device points to.
func peerOf(inPod netlink.Link, namespaceID int) (*netlink.LinkAttrs, error) {
	pod := inPod.Attrs()
	if !isVeth(inPod) {
		return nil, fmt.Errorf("%w: %s in the pod is of type %s, not veth", ErrNoHostEnd, pod.Name, inPod.Type())
	}
	device, err := netlink.LinkByIndex(pod.ParentIndex)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		return nil, fmt.Errorf("%w: the peer of %s, device %d, is not in this namespace", ErrNoHostEnd, pod.Name, pod.ParentIndex)
	}
	if err != nil {
		return nil, fmt.Errorf("device %d: %w", pod.ParentIndex, err)
	}
	host := device.Attrs()
	if !isVeth(device) || host.ParentIndex != pod.Index || host.NetNsID != namespaceID {
		return nil, fmt.Errorf("%w: device %d, %s, is not the peer of %s, which is in another namespace",
			ErrNoHostEnd, host.Index, host.Name, pod.Name)
	}
	return host, nil
}

func isVeth(device netlink.Link) bool {
	_, ok := device.(*netlink.Veth)
	return ok
}

// checkHints reports whether a hint names the host end. The error is ErrContradicted if the hints place only other devices where the
// two ends should be. Plugins differ in what they report:
//
//	bridge, ptp, AWS, Cilium   the host end without a sandbox, the pod's interface with the pod's; and a bridge, or placeholders
//	Calico                     the host end with the pod's sandbox
//	Azure, kindnet             the pod's interface, and possibly a second one, without a sandbox
//
// MAC addresses prove nothing: plugins report that of either end, and both may change later (udev, tuning).
func checkHints(hints []Hint, sandbox, ifName, hostEnd string) (hinted bool, err error) {
	var onHost, inPod []string
	for _, h := range hints {
		switch {
		case h.Name == "":
		case h.Sandbox == "":
			onHost = append(onHost, h.Name)
		case h.Sandbox == sandbox:
			inPod = append(inPod, h.Name)
		}
	}
	hinted = slices.Contains(onHost, hostEnd) || slices.Contains(inPod, hostEnd)
	if len(inPod) > 0 && !slices.Contains(inPod, ifName) && !slices.Contains(inPod, hostEnd) {
		return hinted, fmt.Errorf("%w: the pod's end is %s, not %s", ErrContradicted, ifName, strings.Join(inPod, ", "))
	}
	if hinted || slices.Contains(onHost, ifName) {
		return hinted, nil
	}
	onHost = slices.DeleteFunc(onHost, isOtherKind)
	if len(onHost) > 0 {
		return false, fmt.Errorf("%w: the host end is %s, not %s", ErrContradicted, hostEnd, strings.Join(onHost, ", "))
	}
	return false, nil
}

// isOtherKind reports whether a device in the caller's namespace is not a veth, such as the bridge that the host end is attached to.
// A hint that names such a device does not refer to the host end.
func isOtherKind(name string) bool {
	device, err := netlinksafe.LinkByName(name)
	return err == nil && !isVeth(device)
}
