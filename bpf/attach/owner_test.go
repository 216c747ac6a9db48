package attach_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/internal/polltest"
)

// dialFrom connects from an address and port, which may have been in use.
func dialFrom(local, remote netip.AddrPort) (*net.TCPConn, error) {
	dialer := net.Dialer{Timeout: patience, Control: func(_, _ string, socket syscall.RawConn) (err error) {
		control := socket.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
		})
		return errors.Join(control, err)
	}}
	if local.IsValid() {
		dialer.LocalAddr = net.TCPAddrFromAddrPort(local)
	}
	conn, err := dialer.Dial("tcp", remote.String())
	if err != nil {
		return nil, err
	}
	return conn.(*net.TCPConn), conn.SetDeadline(time.Now().Add(patience))
}

// exchange sends n random bytes, expects them echoed, and ends the connection.
func exchange(conn *net.TCPConn, n int) error {
	defer conn.Close() //nolint:errcheck // a test's
	sent := make([]byte, n)
	source := rand.NewChaCha8([32]byte{})
	_, _ = source.Read(sent)
	wrote := make(chan error, 1)
	go func() {
		_, err := conn.Write(sent)
		wrote <- errors.Join(err, conn.CloseWrite())
	}()
	got, err := io.ReadAll(conn)
	if err := errors.Join(err, <-wrote); err != nil {
		return fmt.Errorf("after %d of %d bytes: %w", len(got), n, err)
	}
	if !bytes.Equal(sent, got) {
		return fmt.Errorf("%d of %d bytes came back, or different ones", len(got), n)
	}
	return nil
}

const echoed = 100_000 // bytes of an exchange

// clientEnv turns the test binary into a client that performs an exchange. Its value holds both addresses.
const clientEnv = "PROBELET_TEST_CLIENT"

func runClient(addresses string) error {
	from, to, _ := strings.Cut(addresses, " ")
	conn, err := dialFrom(netip.MustParseAddrPort(from), netip.MustParseAddrPort(to))
	if err != nil {
		return err
	}
	return exchange(conn, echoed)
}

// exchangeIn performs an exchange by another process, in a cgroup.
func exchangeIn(cgroup string, n ns.NetNS, c connection) error {
	dir, err := os.Open(cgroup)
	if err != nil {
		return err
	}
	defer dir.Close() //nolint:errcheck // read only
	var out bytes.Buffer
	client := exec.Command("/proc/self/exe")
	client.Env = append(os.Environ(), clientEnv+"="+c.from.String()+" "+c.to.String())
	client.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd()), Pdeathsig: unix.SIGKILL}
	client.Stderr = &out
	if err := inNS(n, client.Start); err != nil {
		return err
	}
	if err := client.Wait(); err != nil {
		return fmt.Errorf("%w: %s", err, out.String())
	}
	return nil
}

// abandon makes a socket vanish without a packet, as if its last packets were lost (tcp_close in net/ipv4/tcp.c).
func abandon(conn *net.TCPConn) error {
	socket, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	control := socket.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_REPAIR, 1)
	})
	return errors.Join(control, err, conn.Close())
}

// ownerTest is a pod whose only prober is this process.
type ownerTest struct {
	*served
	dropper *bpftest.Dropper
	addrs   [2]netip.Addr // of the client and of the pod
	ports   uint16        // used so far: each connection has one of the client's and one of the pod's
}

func newOwnerTest(t *testing.T, way way, ipv6, bridged bool) *ownerTest {
	t.Helper()
	node := bpftest.NewNode(t)
	pod := node.AddPod(t)
	if bridged {
		node.Bridge(t, pod)
	}
	o := &ownerTest{served: serve(t, pod, way), dropper: pod.NewDropper(t), addrs: [2]netip.Addr{pod.HostIPv4, pod.IPv4}}
	if ipv6 {
		o.addrs = [2]netip.Addr{pod.HostIPv6, pod.IPv6}
	}
	o.prove(t)
	id, err := bpftest.CurrentCgroup()
	if err == nil {
		err = o.d.SetProber(datapath.Prober{CgroupIDs: []uint64{id}})
	}
	if err != nil {
		t.Fatal(err)
	}
	return o
}

// eachOwnerTest runs the test for all ways and both families, in parallel.
func eachOwnerTest(t *testing.T, test func(t *testing.T, o *ownerTest)) {
	t.Helper()
	for _, way := range ways {
		for _, ipv6 := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s IPv6 %v", way, ipv6), func(t *testing.T) {
				t.Parallel()
				test(t, newOwnerTest(t, way, ipv6, false))
			})
		}
	}
}

// connection holds the addresses of a connection, the client's first.
type connection struct{ from, to netip.AddrPort }

// open makes a connection whose flow is in the given state. If that is handed over, "hello" has been sent, and comes back once it is.
func (o *ownerTest) open(t *testing.T, state string) (connection, *net.TCPConn) {
	t.Helper()
	o.ports++
	port := basePort + o.ports
	c := connection{netip.AddrPortFrom(o.addrs[0], 20_000+o.ports), netip.AddrPortFrom(o.addrs[1], port)}
	o.serveEchoOn(t, port)
	switch state {
	case observing:
		o.expirePort(t, port)
	case handing:
		o.dropper.At(t, bpftest.PodIn, port, bpftest.Drop{Mask: bpftest.SYN, Flags: bpftest.SYN, Percent: 100})
	}
	var conn *net.TCPConn
	bpftest.Do(t, o.Node.NS, func() (err error) {
		conn, err = dialFrom(c.from, c.to)
		return err
	})
	t.Cleanup(func() { _ = conn.Close() })
	var err error
	if state == handing || state == handedOver {
		_, err = io.WriteString(conn, "hello")
	}
	if err == nil && state == handedOver {
		err = hello(conn)
	}
	if err != nil {
		t.Fatal(err)
	}
	o.armPort(t, port)
	return c, conn
}

func hello(conn net.Conn) error {
	reply := make([]byte, 5)
	if _, err := io.ReadFull(conn, reply); err != nil || string(reply) != "hello" {
		return fmt.Errorf("hello came back as %q: %w", reply, err)
	}
	return nil
}

// vanish leaves a flow in the given state behind, whose owner is gone.
func (o *ownerTest) vanish(t *testing.T, state string) connection {
	t.Helper()
	c, conn := o.open(t, state)
	if err := abandon(conn); err != nil {
		t.Fatal(err)
	}
	o.dropper.Stop(t, c.to.Port())
	return c
}

// States of a flow, as in bpf/flow.h.
const (
	observing  = "observing"
	taken      = "taken"
	handing    = "handing"
	handedOver = "handed over"
)

var states = []string{observing, taken, handing, handedOver}

// wantFlows fails the test unless there is the given number of flows.
func (s *served) wantFlows(t *testing.T, want int) {
	t.Helper()
	if n, err := s.d.Flows(); n != want || err != nil {
		t.Fatalf("%d flows, want %d; %v", n, want, err)
	}
}

func atOnce(all []func() error) error {
	errs := make([]error, len(all))
	var wg sync.WaitGroup
	for i, f := range all {
		wg.Go(func() { errs[i] = f() })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Another client that uses the ports of a connection whose owner has vanished has a connection of its own.
func TestPortsOfAVanishedOwnerAreReusable(t *testing.T) {
	other, _, err := bpftest.Cgroup("other")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(other) })
	root, err := bpftest.RootCgroup()
	if err != nil {
		t.Fatal(err)
	}
	// Another process on the node, or another socket of the prober.
	foreign := map[string]func(n ns.NetNS, c connection) error{
		"another cgroup":  func(n ns.NetNS, c connection) error { return exchangeIn(other, n, c) },
		"the root cgroup": func(n ns.NetNS, c connection) error { return exchangeIn(root, n, c) },
		"the prober": func(n ns.NetNS, c connection) error {
			return inNS(n, func() error {
				var conn *net.TCPConn
				var err error
				polltest.Within(polltest.Limit, func() bool { // until the vanished owner's socket is gone, too
					conn, err = dialFrom(c.from, c.to)
					return !errors.Is(err, unix.EADDRNOTAVAIL)
				})
				if err != nil {
					return err
				}
				return exchange(conn, echoed)
			})
		},
	}
	eachOwnerTest(t, func(t *testing.T, o *ownerTest) {
		var all []func() error
		for _, state := range states {
			for name, exchange := range foreign {
				c := o.vanish(t, state)
				o.wantFlows(t, int(o.ports))
				all = append(all, func() error {
					if err := exchange(o.Node.NS, c); err != nil {
						return fmt.Errorf("%s, then %s: %w", state, name, err)
					}
					return nil
				})
			}
		}
		before := o.counters(t)["handed_over"]
		if err := atOnce(all); err != nil {
			t.Error(err)
		}
		if handed := o.counters(t)["handed_over"] - before; handed != uint64(len(states)) {
			t.Errorf("%d connections were handed over, want those of the prober", handed)
		}
		o.wantNothingLeft(t)
	})
}

// While a client connects, it resets what the pod has left of an earlier connection. That is not recorded.
func TestStaleConnectionIsNotRecorded(t *testing.T) {
	eachOwnerTest(t, func(t *testing.T, o *ownerTest) {
		c := o.vanish(t, observing)
		o.expirePort(t, c.to.Port())
		reader, err := o.d.Records()
		if err != nil {
			t.Fatal(err)
		}
		defer reader.Close() //nolint:errcheck // a test's
		readRecords(t, reader)
		bpftest.Do(t, o.Node.NS, func() error {
			conn, err := dialFrom(c.from, c.to)
			if err != nil {
				return err
			}
			return conn.Close()
		})
		o.wantNothingLeft(t)
		got := readRecords(t, reader)
		if len(got) != 2 || got[0].TCPFlags != datapath.FlagSYN|datapath.FlagACK || endOfRecord(got[1]) != clientCloses {
			t.Errorf("records %+v, want a SYN-ACK and the client's FIN", got)
		}
	})
}

// nft applies rules in a namespace.
func nft(t testing.TB, n ns.NetNS, rules string) {
	t.Helper()
	requireCommand(t, "nft")
	command := exec.Command("nft", "-f", "-")
	command.Stdin = strings.NewReader(rules)
	bpftest.Do(t, n, func() error {
		if out, err := command.CombinedOutput(); err != nil {
			return fmt.Errorf("%w: %s in %s", err, out, rules)
		}
		return nil
	})
}

// requireCommand skips the test if the command does not exist.
func requireCommand(t testing.TB, name string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skip(err)
	}
}

// forward makes a namespace forward packets.
func forward(t testing.TB, n ns.NetNS) {
	t.Helper()
	bpftest.Do(t, n, func() error {
		return errors.Join(
			os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0),
			os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0),
		)
	})
}

// defaultRoutes makes eth0 a namespace's default route.
func defaultRoutes(t testing.TB, n ns.NetNS, via ...netip.Addr) {
	t.Helper()
	bpftest.Do(t, n, func() error {
		device, err := netlink.LinkByName("eth0")
		for _, addr := range via {
			all := &net.IPNet{IP: make(net.IP, addr.BitLen()/8), Mask: net.CIDRMask(0, addr.BitLen())}
			err = errors.Join(err, netlink.RouteAdd(&netlink.Route{LinkIndex: device.Attrs().Index, Dst: all, Gw: addr.AsSlice()}))
		}
		return err
	})
}

// Connections of another pod that get the node's address and the ports of a flow (masquerading) are not a prober's.
func TestForwardedConnectionsReusePorts(t *testing.T) {
	for _, way := range ways {
		for _, ipv6 := range []bool{false, true} {
			for _, bridged := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s IPv6 %v bridged %v", way, ipv6, bridged), func(t *testing.T) {
					t.Parallel()
					o := newOwnerTest(t, way, ipv6, bridged)
					other := o.Node.AddPod(t)
					forward(t, o.Node.NS)
					defaultRoutes(t, other.NS, other.HostIPv4, other.HostIPv6)
					family := "ip"
					if ipv6 {
						family = "ip6"
					}
					var all []func() error
					rules := "table inet t {\nchain c {\ntype nat hook postrouting priority 100\n"
					for _, state := range states {
						c := o.vanish(t, state)
						rules += fmt.Sprintf("iifname %s tcp dport %d snat %s to %s\n", other.HostIfName, c.to.Port(), family, c.from)
						all = append(all, func() error {
							return inNS(other.NS, func() error {
								conn, err := dialFrom(netip.AddrPort{}, c.to)
								if err == nil {
									err = exchange(conn, echoed)
								}
								if err != nil {
									return fmt.Errorf("%s: %w", state, err)
								}
								return nil
							})
						})
					}
					o.wantFlows(t, len(states))
					nft(t, o.Node.NS, rules+"}\n}\n")
					if err := atOnce(all); err != nil {
						t.Error(err)
					}
					o.wantFlows(t, 0)
					o.wantNothingLeft(t)
				})
			}
		}
	}
}

// Connections continue to their end when there is no prober any more.
func TestConnectionsOutliveTheProberSet(t *testing.T) {
	eachOwnerTest(t, func(t *testing.T, o *ownerTest) {
		var all []func() error
		for _, state := range states {
			_, conn := o.open(t, state)
			all = append(all, func() (err error) {
				if state == handing {
					err = hello(conn)
				}
				if err == nil {
					err = exchange(conn, 4<<20)
				}
				if err != nil {
					return fmt.Errorf("%s: %w", state, err)
				}
				return nil
			})
		}
		o.wantFlows(t, len(states))
		if err := o.d.SetProber(datapath.Prober{}); err != nil {
			t.Fatal(err)
		}
		for port := range o.ports {
			o.dropper.Stop(t, basePort+port+1)
		}
		if err := atOnce(all); err != nil {
			t.Error(err)
		}
		o.wantNothingLeft(t)
	})
}

// A client gives up while the pod does not answer, and sends no packet that says so. Its ports are free for others.
func TestClientGivesUpWhileHandedOver(t *testing.T) {
	eachOwnerTest(t, func(t *testing.T, o *ownerTest) {
		c, conn := o.open(t, handing)
		socket, err := conn.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		control := socket.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, 300)
		})
		if err := errors.Join(control, err); err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ETIMEDOUT) {
			t.Fatalf("the client got %v", err)
		}
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
		o.dropper.Stop(t, c.to.Port())
		root, err := bpftest.RootCgroup()
		if err == nil {
			err = exchangeIn(root, o.Node.NS, c)
		}
		if err != nil {
			t.Error(err)
		}
		o.wantNothingLeft(t)
	})
}
