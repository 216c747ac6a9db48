package attach_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"unsafe"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/containernetworking/plugins/pkg/testutils"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
)

// txOff stops a device from offering checksum computation, like ethtool -K DEVICE tx off.
func txOff(t testing.TB, n ns.NetNS, ifName string) {
	t.Helper()
	const setTxChecksums = 0x17 // ETHTOOL_STXCSUM in linux/ethtool.h
	value := struct{ command, on uint32 }{command: setTxChecksums}
	request := struct {
		name [unix.IFNAMSIZ]byte
		data unsafe.Pointer
		_    [16]byte
	}{data: unsafe.Pointer(&value)}
	copy(request.name[:], ifName)
	bpftest.Do(t, n, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd) //nolint:errcheck // a test's
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&request)))
		if errno != 0 {
			return fmt.Errorf("%s: tx off: %w", ifName, errno)
		}
		return nil
	})
}

// checksumErrors returns how many TCP segments with a wrong checksum a namespace has received.
func checksumErrors(t testing.TB, n ns.NetNS) (errors string) {
	t.Helper()
	bpftest.Do(t, n, func() error {
		counters, err := os.ReadFile("/proc/thread-self/net/snmp")
		if err != nil {
			return err
		}
		var names []string
		for line := range strings.Lines(string(counters)) {
			fields := strings.Fields(line)
			if fields[0] != "Tcp:" {
				continue
			}
			if names == nil {
				names = fields
				continue
			}
			for i, name := range names {
				if name == "InCsumErrors" {
					errors = fields[i]
				}
			}
		}
		return nil
	})
	return errors
}

// addBackend gives the pod a network of its own behind it, and returns the namespace in it. Nothing there computes
// checksums for a sender.
func addBackend(t *testing.T, pod *bpftest.Pod) (ns.NetNS, [2]netip.Addr) {
	t.Helper()
	backend, err := testutils.NewNS()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(backend.Close(), testutils.UnmountNS(backend)); err != nil {
			t.Error(err)
		}
	})
	forward(t, pod.NS)
	addrs := [2]netip.Addr{netip.MustParseAddr("10.99.0.2"), netip.MustParseAddr("fd99::2")}
	routers := []netip.Addr{netip.MustParseAddr("10.99.0.1"), netip.MustParseAddr("fd99::1")}
	bpftest.Do(t, pod.NS, func() error {
		err := netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "inner"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(int(backend.Fd())),
		})
		if err != nil {
			return err
		}
		return bpftest.Configure("inner", routers...)
	})
	bpftest.Do(t, backend, func() error { return bpftest.Configure("eth0", addrs[:]...) })
	defaultRoutes(t, backend, routers...)
	txOff(t, pod.NS, "inner")
	txOff(t, backend, "eth0")
	return backend, addrs
}

// checksumTest is a pod with a place on the way where checksums are computed by software.
type checksumTest struct {
	*served
	server  ns.NetNS
	targets []netip.Addr
}

// places maps names to such places.
var places = map[string]func(t *testing.T, c *checksumTest){
	"nowhere": func(*testing.T, *checksumTest) {},
	"the pod": func(t *testing.T, c *checksumTest) { txOff(t, c.NS, "eth0") },
	"the host's side": func(t *testing.T, c *checksumTest) {
		txOff(t, c.Node.NS, c.HostIfName)
	},
	"nowhere, while packets are captured": func(t *testing.T, c *checksumTest) {
		bpftest.Do(t, c.Node.NS, func() error {
			all := uint16(unix.ETH_P_ALL)
			fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(all<<8|all>>8))
			if err == nil {
				t.Cleanup(func() { _ = unix.Close(fd) })
			}
			return err
		})
	},
	"both sides": func(t *testing.T, c *checksumTest) {
		txOff(t, c.NS, "eth0")
		txOff(t, c.Node.NS, c.HostIfName)
	},
	"a bridge": func(t *testing.T, c *checksumTest) {
		c.Node.Bridge(t, c.Pod)
		txOff(t, c.Node.NS, "br0")
	},
	"a bridge and the pod": func(t *testing.T, c *checksumTest) {
		c.Node.Bridge(t, c.Pod)
		txOff(t, c.Node.NS, "br0")
		txOff(t, c.NS, "eth0")
	},
	"behind a pod that routes": func(t *testing.T, c *checksumTest) {
		backend, addrs := addBackend(t, c.Pod)
		c.server, c.targets = backend, addrs[:]
		bpftest.Do(t, c.Node.NS, func() error {
			var errs []error
			for i, via := range []netip.Addr{c.IPv4, c.IPv6} {
				to := &net.IPNet{IP: addrs[i].AsSlice(), Mask: net.CIDRMask(addrs[i].BitLen(), addrs[i].BitLen())}
				errs = append(errs, netlink.RouteAdd(&netlink.Route{LinkIndex: c.IfIndex, Dst: to, Gw: via.AsSlice()}))
			}
			return errors.Join(errs...)
		})
		defaultRoutes(t, c.NS, c.HostIPv4, c.HostIPv6)
	},
	"behind a pod that translates addresses": func(t *testing.T, c *checksumTest) {
		backend, addrs := addBackend(t, c.Pod)
		c.server = backend
		nft(t, c.NS, fmt.Sprintf(`table inet t {
			chain c {
				type nat hook prerouting priority -100
				iifname eth0 ip daddr %s meta l4proto tcp dnat ip to %s
				iifname eth0 ip6 daddr %s meta l4proto tcp dnat ip6 to %s
			}
		}`, c.IPv4, addrs[0], c.IPv6, addrs[1]))
	},
}

// Wherever checksums are computed, those of answered and handed-over connections are correct.
func TestChecksumsWithoutOffload(t *testing.T) {
	for _, way := range ways {
		for place, set := range places {
			t.Run(fmt.Sprintf("%s in %s", way, place), func(t *testing.T) {
				t.Parallel()
				node := bpftest.NewNode(t)
				pod := node.AddPod(t)
				c := &checksumTest{served: serve(t, pod, way), server: pod.NS, targets: []netip.Addr{pod.IPv4, pod.IPv6}}
				set(t, c)
				c.run(t)
			})
		}
	}
}

func (c *checksumTest) run(t *testing.T) {
	const nobody = 9999
	bpftest.Do(t, c.server, func() error {
		listener, err := net.Listen("tcp", fmt.Sprintf(":%d", echoPort))
		if err == nil {
			t.Cleanup(func() { _ = listener.Close() })
			serveEcho(listener)
		}
		return err
	})
	c.lookAway(t) // the server may be behind the pod, and one of the ports has no listener
	for _, target := range c.targets {
		c.armPort(t, echoPort)
		c.armPort(t, nobody)
		if reply := c.ask(t, c.Node.NS, target, probe); !strings.Contains(reply, hit) {
			t.Errorf("%v: not answered: %q", target, reply)
		}
		bpftest.Do(t, c.Node.NS, func() error {
			conn, err := dialFrom(netip.AddrPort{}, netip.AddrPortFrom(target, echoPort))
			if err == nil {
				err = exchange(conn, 1<<20)
			}
			if err != nil {
				return fmt.Errorf("%v: handed over: %w", target, err)
			}
			conn, err = dialFrom(netip.AddrPort{}, netip.AddrPortFrom(target, nobody))
			if err != nil {
				return err
			}
			defer conn.Close() //nolint:errcheck // a test's
			if _, err := io.WriteString(conn, "hello"); err != nil {
				return err
			}
			if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
				return fmt.Errorf("%v: refused: the client got %w", target, err)
			}
			return nil
		})
	}
	if n := c.counters(t)["handed_over"]; n != uint64(2*len(c.targets)) {
		t.Errorf("%d connections were handed over", n)
	}
	for name, n := range map[string]ns.NetNS{"the node": c.Node.NS, "the pod": c.NS, "the server's namespace": c.server} {
		if errors := checksumErrors(t, n); errors != "0" {
			t.Errorf("%s received %s wrong checksums", name, errors)
		}
	}
	c.wantNothingLeft(t)
}

// Packets of more than 64 KiB (BIG TCP) are translated like any other.
func TestBigTCP(t *testing.T) {
	const size = 200_000
	for _, way := range ways {
		node := bpftest.NewNode(t)
		pod := node.AddPod(t)
		s := serve(t, pod, way)
		for n, name := range map[ns.NetNS]string{node.NS: pod.HostIfName, pod.NS: "eth0"} {
			bpftest.Do(t, n, func() error {
				device, err := netlink.LinkByName(name)
				if err != nil {
					return err
				}
				return errors.Join(netlink.LinkSetGSOMaxSize(device, size), netlink.LinkSetGROMaxSize(device, size),
					netlink.LinkSetGSOIPv4MaxSize(device, size), netlink.LinkSetGROIPv4MaxSize(device, size))
			})
		}
		s.serveEchoOn(t, echoPort)
		for _, addr := range []netip.Addr{pod.IPv4, pod.IPv6} {
			bpftest.Do(t, node.NS, func() error {
				conn, err := dialFrom(netip.AddrPort{}, netip.AddrPortFrom(addr, echoPort))
				if err == nil {
					err = exchange(conn, 24<<20)
				}
				if err != nil {
					return fmt.Errorf("%v %v: %w", way, addr, err)
				}
				return nil
			})
		}
	}
}
