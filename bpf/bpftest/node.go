// Package bpftest provides tests with what they need from a real machine: namespaces, veths, a BPF file system, packets.
package bpftest

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/containernetworking/plugins/pkg/testutils"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// RequireRoot skips the test unless it runs as root. In CI the test fails instead.
func RequireRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("needs root, which CI must provide")
	}
	t.Skip("needs root")
}

// BPFDir mounts a BPF file system for the test and returns a directory on it to pin under, which does not exist yet.
func BPFDir(t testing.TB) string {
	t.Helper()
	mount := t.TempDir()
	if err := unix.Mount("bpf", mount, "bpf", 0, ""); err != nil {
		t.Fatalf("mounting a BPF file system: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
			t.Errorf("unmounting %s: %v", mount, err)
		}
	})
	return filepath.Join(mount, "probelet")
}

// Node is a network namespace that plays the role of a machine. Its processes are those of the test.
type Node struct {
	NS   ns.NetNS
	pods int
}

// Pod is a network namespace behind a veth of a node.
type Pod struct {
	Node         *Node
	NS           ns.NetNS
	Netns        uint32 // inode number of NS
	NetnsCookie  uint64 // of NS
	HostIfName   string
	IfIndex      int // of the host-side veth
	HostIPv4     netip.Addr
	HostIPv6     netip.Addr
	IPv4         netip.Addr
	IPv6         netip.Addr
	HostMAC, MAC net.HardwareAddr
}

func newNS(t testing.TB) ns.NetNS {
	t.Helper()
	n, err := testutils.NewNS()
	if err != nil {
		t.Fatalf("new network namespace: %v", err)
	}
	t.Cleanup(func() {
		// Detach it, because a process that is being started concurrently keeps it open for a moment.
		if err := errors.Join(n.Close(), unix.Unmount(n.Path(), unix.MNT_DETACH), os.Remove(n.Path())); err != nil {
			t.Errorf("removing a network namespace: %v", err)
		}
	})
	Do(t, n, func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		return netlink.LinkSetUp(lo)
	})
	return n
}

// Do runs f in a namespace. An error fails the test.
func Do(t testing.TB, n ns.NetNS, f func() error) {
	t.Helper()
	if err := n.Do(func(ns.NetNS) error { return f() }); err != nil {
		t.Fatal(err)
	}
}

// NetnsCookie returns the cookie of a network namespace.
func NetnsCookie(t testing.TB, in ns.NetNS) (cookie uint64) {
	t.Helper()
	Do(t, in, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_NETNS_COOKIE)
		return errors.Join(err, unix.Close(fd))
	})
	return cookie
}

// NewNode creates a node without pods.
func NewNode(t testing.TB) *Node {
	t.Helper()
	RequireRoot(t)
	return &Node{NS: newNS(t)}
}

// AddPod creates a pod: a namespace, a veth, and routed addresses of both families, like the ptp plugin.
func (n *Node) AddPod(t testing.TB) *Pod {
	t.Helper()
	n.pods++
	p := &Pod{
		Node:       n,
		NS:         newNS(t),
		HostIfName: fmt.Sprintf("veth%d", n.pods),
		HostIPv4:   netip.AddrFrom4([4]byte{10, 244 + byte(n.pods>>8), byte(n.pods), 1}),
		IPv4:       netip.AddrFrom4([4]byte{10, 244 + byte(n.pods>>8), byte(n.pods), 8}),
		HostIPv6:   netip.MustParseAddr(fmt.Sprintf("fd00:10:244:%x::1", n.pods)),
		IPv6:       netip.MustParseAddr(fmt.Sprintf("fd00:10:244:%x::8", n.pods)),
	}
	var stat unix.Stat_t
	if err := unix.Fstat(int(p.NS.Fd()), &stat); err != nil {
		t.Fatal(err)
	}
	p.Netns, p.NetnsCookie = uint32(stat.Ino), NetnsCookie(t, p.NS)
	Do(t, n.NS, func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs:     netlink.LinkAttrs{Name: p.HostIfName},
			PeerName:      "eth0",
			PeerNamespace: netlink.NsFd(int(p.NS.Fd())),
		})
	})
	Do(t, n.NS, func() error {
		attrs, err := configure(p.HostIfName, p.HostIPv4, p.HostIPv6)
		if err == nil {
			p.IfIndex, p.HostMAC = attrs.Index, attrs.HardwareAddr
		}
		return err
	})
	Do(t, p.NS, func() error {
		attrs, err := configure("eth0", p.IPv4, p.IPv6)
		if err == nil {
			p.MAC = attrs.HardwareAddr
		}
		return err
	})
	return p
}

// Configure assigns addresses to a device in the current namespace and brings it up.
func Configure(ifName string, addrs ...netip.Addr) error {
	_, err := configure(ifName, addrs...)
	return err
}

func configure(ifName string, addrs ...netip.Addr) (*netlink.LinkAttrs, error) {
	link, err := netlink.LinkByName(ifName)
	if err != nil {
		return nil, err
	}
	for _, a := range addrs {
		if err := netlink.AddrAdd(link, address(a)); err != nil {
			return nil, fmt.Errorf("%s to %s: %w", a, ifName, err)
		}
	}
	return link.Attrs(), netlink.LinkSetUp(link)
}

// Bridge attaches the host-side veths of pods to one bridge, like the bridge plugin. The other pods get addresses in the subnets of the
// first, and the node's addresses move to the bridge.
func (n *Node) Bridge(t testing.TB, pods ...*Pod) {
	t.Helper()
	Do(t, n.NS, func() error {
		err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "br0"}})
		if err != nil {
			return err
		}
		bridge, err := netlink.LinkByName("br0")
		if err != nil {
			return err
		}
		for _, p := range pods {
			veth, err := netlink.LinkByIndex(p.IfIndex)
			if err != nil {
				return err
			}
			for _, a := range []netip.Addr{p.HostIPv4, p.HostIPv6} {
				if err := netlink.AddrDel(veth, address(a)); err != nil {
					return err
				}
			}
			if err := netlink.LinkSetMaster(veth, bridge); err != nil {
				return err
			}
		}
		_, err = configure("br0", pods[0].HostIPv4, pods[0].HostIPv6)
		return err
	})
	for i, p := range pods[1:] {
		p.IPv4 = netip.AddrFrom4([4]byte{10, 244, pods[0].IPv4.As4()[2], byte(20 + i)})
		Do(t, p.NS, func() error {
			_, err := configure("eth0", p.IPv4)
			return err
		})
	}
}

func address(a netip.Addr) *netlink.Addr {
	bits := 24
	if a.Is6() {
		bits = 64
	}
	return &netlink.Addr{
		IPNet: &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(bits, a.BitLen())},
		Flags: unix.IFA_F_NODAD,
	}
}

// Dial connects from the node.
func (p *Pod) Dial(t testing.TB, address string) net.Conn {
	t.Helper()
	return Dial(t, p.Node.NS, address)
}

// Dial connects from a namespace.
func Dial(t testing.TB, from ns.NetNS, address string) net.Conn {
	t.Helper()
	var conn net.Conn
	Do(t, from, func() (err error) {
		conn, err = net.DialTimeout("tcp", address, 5*time.Second)
		return err
	})
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// Listen listens in the pod, on all addresses.
func (p *Pod) Listen(t testing.TB, port int) net.Listener {
	t.Helper()
	var l net.Listener
	Do(t, p.NS, func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf(":%d", port))
		return err
	})
	t.Cleanup(func() { _ = l.Close() })
	return l
}

// AcceptAll accepts connections and closes each immediately, until the listener is closed.
func AcceptAll(l net.Listener) {
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			_ = conn.Close()
		}
	}()
}
