package attach_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/internal/polltest"
)

// twins are two pods on a node. One of them is attached, and every connection to it is handed over.
type twins struct {
	*served
	plain    *bpftest.Pod
	droppers map[*bpftest.Pod]*bpftest.Dropper
}

func newTwins(t *testing.T, way way) *twins {
	t.Helper()
	node := bpftest.NewNode(t)
	handed, plain := node.AddPod(t), node.AddPod(t)
	grantMSSOnly(t, plain)
	tw := &twins{served: serve(t, handed, way), plain: plain, droppers: map[*bpftest.Pod]*bpftest.Dropper{}}
	for _, pod := range []*bpftest.Pod{handed, plain} {
		tw.droppers[pod] = pod.NewDropper(t)
	}
	tw.prove(t)
	tw.lookAway(t) // or a busy server would keep connections from being taken
	return tw
}

// grantMSSOnly makes a pod grant its clients no option but the MSS, which is all that a handed-over connection has. With SACK and
// timestamps the plain pod's connections would recover from loss many times faster.
func grantMSSOnly(t *testing.T, pod *bpftest.Pod) {
	t.Helper()
	bpftest.Do(t, pod.NS, func() (err error) {
		for _, option := range []string{"tcp_sack", "tcp_timestamps", "tcp_window_scaling"} {
			err = errors.Join(err, os.WriteFile("/proc/sys/net/ipv4/"+option, []byte("0"), 0))
		}
		return err
	})
}

// prove lets the device answer a connection so that it becomes trusted.
func (s *served) prove(t *testing.T) {
	t.Helper()
	if reply := s.ask(t, s.Node.NS, s.IPv4, probe); !strings.Contains(reply, hit) {
		t.Fatalf("reply %q", reply)
	}
}

func inNS(n ns.NetNS, f func() error) error {
	return n.Do(func(ns.NetNS) error { return f() })
}

// basePort is the port of the first of the concurrent conversations.
const basePort = 10_000

// hold holds conversations with one of the pods concurrently.
func (tw *twins) hold(t *testing.T, pod *bpftest.Pod, all []*conversation) []transcript {
	t.Helper()
	got, errs := make([]transcript, len(all)), make([]error, len(all))
	var wg sync.WaitGroup
	for i, c := range all {
		port := uint16(basePort + i)
		for place, drop := range c.Drops {
			tw.droppers[pod].At(t, place, port, drop)
		}
		wg.Go(func() { got[i], errs[i] = c.hold(t, pod, port) })
	}
	wg.Wait()
	for i, err := range errs {
		tw.droppers[pod].Stop(t, uint16(basePort+i))
		if err != nil {
			t.Fatalf("%v: %v", all[i], err)
		}
	}
	return got
}

// A handed-over conversation is, byte for byte, what the client and the pod would have had without us.
func TestHandedOverEqualsThePodAlone(t *testing.T) {
	for _, way := range ways {
		t.Run(way.String(), func(t *testing.T) {
			t.Parallel()
			tw := newTwins(t, way)
			rapid.Check(t, func(r *rapid.T) {
				all := rapid.SliceOfN(conversations, 16, 24).Draw(r, "conversations")
				lasting := success()
				lasting.ObservedAt += uint64(time.Minute) // closing a listener voids all earlier evidence
				for i := range all {
					tw.put(t, datapath.PortKey(uint16(basePort+i)), lasting)
				}
				before := tw.counters(t)
				got := make(chan []transcript, 1)
				go func() { got <- tw.hold(t, tw.plain, all) }()
				handed, plain := tw.hold(t, tw.Pod, all), <-got
				want := uint64(0)
				for i, c := range all {
					if err := c.compare(plain[i], plain[i]); err != nil {
						r.Logf("nothing to compare with, the pod alone: %v: %v in %v", err, plain[i], c)
						continue // on a machine too busy to end it in time
					}
					if err := c.compare(handed[i], plain[i]); err != nil {
						r.Errorf("%v: %v\nthe pod alone: %v\nin %v", err, handed[i], plain[i], c)
					}
					if !c.aborted() {
						want++
					}
				}
				if n := tw.counters(t)["handed_over"] - before["handed_over"]; n < want {
					r.Errorf("%d connections were handed over, want %d", n, want)
				}
				if left := tw.left(t); left != "" {
					r.Errorf("left: %s", left)
				}
			})
		})
	}
}

func (s *served) counters(t testing.TB) map[string]uint64 {
	t.Helper()
	counters, err := s.d.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return counters
}

// left waits until nothing is left of connections, and returns what is left nevertheless: flows, stored requests, and sockets of
// the pod. It waits for a minute: the retransmission timeout of a lost FIN depends on earlier losses.
func (s *served) left(t testing.TB) (left string) {
	t.Helper()
	polltest.Within(time.Minute, func() bool {
		flows, err := s.d.Flows()
		if err != nil {
			t.Fatal(err)
		}
		left = strings.Join(sockets(t, s.NS), "\n")
		if requests := s.requests(t); flows+requests > 0 {
			left += fmt.Sprintf("\n%d flows and %d requests", flows, requests)
		}
		return left == ""
	})
	return left
}

func (s *served) wantNothingLeft(t testing.TB) {
	t.Helper()
	if left := s.left(t); left != "" {
		t.Errorf("left: %s", left)
	}
}

// requests returns the number of stored requests.
func (s *served) requests(t testing.TB) (n int) {
	t.Helper()
	info, err := s.d.Steer().Info()
	if err != nil {
		t.Fatal(err)
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		m, err := ebpf.NewMapFromID(id)
		if err != nil {
			t.Fatal(err)
		}
		if info, err := m.Info(); err == nil && info.Name == "requests" {
			key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
			for entries := m.Iterate(); entries.Next(&key, &value); {
				n++
			}
		}
		_ = m.Close()
	}
	return n
}

// sockets returns the TCP sockets in a namespace as the kernel lists them, except those in LISTEN and TIME_WAIT. It also omits
// LAST_ACK: a flow ends with the last acknowledgement, and one that is lost after us is not repeated (bpf/flow.h).
func sockets(t testing.TB, n ns.NetNS) (all []string) {
	t.Helper()
	const timeWait, lastACK, listen = "06", "09", "0A" // include/net/tcp_states.h
	bpftest.Do(t, n, func() error {
		for _, table := range []string{"tcp", "tcp6"} {
			list, err := os.ReadFile("/proc/thread-self/net/" + table)
			if err != nil {
				return err
			}
			lines := bufio.NewScanner(bytes.NewReader(list))
			for lines.Scan() {
				fields := strings.Fields(lines.Text())
				if len(fields) < 4 || fields[0] == "sl" || fields[3] == timeWait || fields[3] == listen || fields[3] == lastACK {
					continue
				}
				all = append(all, lines.Text())
			}
		}
		return nil
	})
	return all
}

// uses lists ways of using the pod's HTTP server, each with the expected response.
var uses = []struct {
	request, reply string
	end            func(conn *net.TCPConn) error // after the request
	answered       bool
}{
	{request: probe, reply: "HTTP/1.1 200 OK\r\n", answered: true},
	{request: "", answered: true}, // as a TCP probe
	{request: unknown, reply: "GET /x 0"},
	{request: unknown, reply: "GET /x 0", end: (*net.TCPConn).CloseWrite},
	{request: post(600), reply: "POST /x 600"},
	{request: post(30_000), reply: "POST /x 30000"},
	{request: unknown, end: func(conn *net.TCPConn) error { return errors.Join(conn.SetLinger(0), conn.Close()) }},
	{request: unknown, end: (*net.TCPConn).Close},
	{request: probe, end: func(conn *net.TCPConn) error { return errors.Join(conn.SetLinger(0), conn.Close()) }},
}

func post(n int) string {
	return fmt.Sprintf("POST /x HTTP/1.1\r\nHost: pod\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", n, strings.Repeat("x", n))
}

// manyFor is how long TestManyAtOnce spends on each way.
const manyFor = 2 * time.Second

func TestManyAtOnce(t *testing.T) {
	const clients = 64
	for _, way := range ways {
		t.Run(way.String(), func(t *testing.T) {
			node := bpftest.NewNode(t)
			s := serve(t, node.AddPod(t), way)
			s.prove(t)
			s.lookAway(t) // the server is as busy as possible
			var made atomic.Int64
			all := make([]func() error, clients)
			for i := range all {
				all[i] = func() error {
					return inNS(node.NS, func() error {
						for end := time.Now().Add(manyFor); time.Now().Before(end); made.Add(1) {
							addr := s.IPv4
							if made.Load()%2 == 0 {
								addr = s.IPv6
							}
							if err := s.use(rand.IntN(len(uses)), addr); err != nil {
								return err
							}
						}
						return nil
					})
				}
			}
			if err := atOnce(all); err != nil {
				t.Error(err)
			}
			if left := s.left(t); left != "" {
				t.Errorf("of %d connections, left: %s", made.Load(), left)
			}
			t.Logf("%d connections, %v", made.Load(), s.counters(t))
		})
	}
}

// use uses the pod's server in one way, from the current namespace.
func (s *served) use(i int, addr netip.Addr) error {
	u := uses[i]
	conn, err := dialFrom(netip.AddrPort{}, netip.AddrPortFrom(addr, 8080))
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // a test's
	if _, err := io.WriteString(conn, u.request); err != nil {
		return fmt.Errorf("%q: %w", u.request[:min(len(u.request), 20)], err)
	}
	if u.end != nil {
		if err := u.end(conn); err != nil {
			return err
		}
	}
	if u.reply == "" {
		return nil
	}
	reply, err := io.ReadAll(conn)
	if err != nil || !strings.Contains(string(reply), u.reply) || strings.Contains(string(reply), hit) != u.answered {
		return fmt.Errorf("%q: %q, %w", u.request[:20], reply, err)
	}
	return nil
}

// The pod's end of its veth may have a smaller MTU (the CNI plugin tuning sets it there). A packet that is longer, and no longer
// segmented, would be dropped on its way.
func TestPodWithASmallerMTU(t *testing.T) {
	const mtu = 1300
	eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
		bpftest.Do(t, s.NS, func() error {
			device, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return netlink.LinkSetMTU(device, mtu)
		})
		s.serveEchoOn(t, echoPort)
		bpftest.Do(t, s.Node.NS, func() error {
			for _, n := range []int{100, mtu + 50, echoed} { // the first one teaches us the MTU
				conn, err := dialFrom(netip.AddrPort{}, netip.AddrPortFrom(addr, echoPort))
				if err != nil {
					return err
				}
				_, err = io.WriteString(conn, "hello")
				if err == nil {
					err = hello(conn)
				}
				if err == nil {
					err = exchange(conn, n)
				}
				if err != nil {
					return fmt.Errorf("%d bytes: %w", n, err)
				}
			}
			return nil
		})
	})
}

// The pod never sends more than fits the client's window, from the first packet on.
func TestClientWithASmallWindow(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
		listener := s.Listen(t, echoPort)
		s.armPort(t, echoPort)
		retransmitted := make(chan uint32, 1)
		go func() {
			for {
				conn, err := listener.Accept()
				if err != nil {
					return
				}
				_, _ = conn.Read(make([]byte, 5))
				_, _ = conn.Write(make([]byte, echoed))
				_ = conn.(*net.TCPConn).CloseWrite()
				_, _ = io.Copy(io.Discard, conn)
				retransmitted <- tcpInfo(conn.(*net.TCPConn)).Total_retrans
				_ = conn.Close()
			}
		}()
		least := uint32(math.MaxUint32)
		for range 5 {
			bpftest.Do(t, s.Node.NS, func() error {
				dialer := net.Dialer{Control: func(_, _ string, socket syscall.RawConn) (err error) {
					control := socket.Control(func(fd uintptr) {
						err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, 2304) // the minimum, see socket(7)
					})
					return errors.Join(control, err)
				}}
				conn, err := dialer.Dial("tcp", netip.AddrPortFrom(addr, echoPort).String())
				if err != nil {
					return err
				}
				defer conn.Close() //nolint:errcheck // a test's
				_, _ = io.WriteString(conn, "hello")
				if n, err := io.Copy(io.Discard, conn); n != echoed || err != nil {
					return fmt.Errorf("%d bytes, %w", n, err)
				}
				return nil
			})
			least = min(least, <-retransmitted)
		}
		if least > 0 {
			t.Errorf("the pod repeated at least %d segments of each download", least)
		}
	})
}

func tcpInfo(conn *net.TCPConn) (info *unix.TCPInfo) {
	info = &unix.TCPInfo{}
	if socket, err := conn.SyscallConn(); err == nil {
		_ = socket.Control(func(fd uintptr) {
			if i, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO); err == nil {
				info = i
			}
		})
	}
	return info
}

// Urgent data stays urgent: it does not become part of the stream.
func TestUrgentDataIsHandedOver(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
		s.serveEchoOn(t, echoPort)
		conn := s.Dial(t, netip.AddrPortFrom(addr, echoPort).String()).(*net.TCPConn)
		socket, err := conn.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		control := socket.Control(func(fd uintptr) { err = unix.Sendto(int(fd), []byte("hello!"), unix.MSG_OOB, nil) })
		if err := errors.Join(control, err, conn.SetDeadline(time.Now().Add(patience))); err != nil {
			t.Fatal(err)
		}
		if err := hello(conn); err != nil {
			t.Fatal(err)
		}
		_ = conn.CloseWrite()
		if rest, _ := io.ReadAll(conn); len(rest) > 0 {
			t.Errorf("the urgent byte came back too: %q", rest)
		}
	})
}
