package attach_test

import (
	"bufio"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
)

const probe = "GET /healthz HTTP/1.1\r\nHost: pod\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n"

// served is an attached pod with a server whose /healthz is answered. Every local process is a prober.
type served struct {
	*bpftest.Pod
	d        *datapath.Datapath
	bpfDir   string
	listener net.Listener
	seen     atomic.Int64 // requests that reached the server
}

// way is a way to attach a pod.
type way struct {
	hook attach.Hook
	via  attach.Via
}

func (w way) String() string { return fmt.Sprintf("hook %s via %s", w.hook, cmp.Or(w.via, "auto")) }

// ways lists them all, with the default first.
var ways = []way{
	{attach.HookTC, attach.ViaAuto}, {attach.HookTC, attach.ViaClsact}, {attach.HookXDP, attach.ViaAuto}, {attach.HookXDP, attach.ViaClsact},
}

// eachServed runs a test for every way to attach a pod.
func eachServed(t *testing.T, test func(t *testing.T, s *served)) {
	for _, way := range ways {
		t.Run(way.String(), func(t *testing.T) {
			t.Parallel()
			test(t, serve(t, bpftest.NewNode(t).AddPod(t), way))
		})
	}
}

// eachFamily is like eachServed, with each of the pod's addresses. The device is already proven.
func eachFamily(t *testing.T, test func(t *testing.T, s *served, addr netip.Addr)) {
	for _, family := range []string{"IPv4", "IPv6"} {
		t.Run(family, func(t *testing.T) {
			t.Parallel()
			eachServed(t, func(t *testing.T, s *served) {
				s.prove(t)
				addr := s.IPv4
				if family == "IPv6" {
					addr = s.IPv6
				}
				test(t, s, addr)
			})
		})
	}
}

var servedID = attach.ID{ContainerID: "c", IfName: "eth0"}

func serve(t testing.TB, pod *bpftest.Pod, way way) *served {
	t.Helper()
	dir := bpftest.BPFDir(t)
	d, err := datapath.Ensure(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return serveBy(t, d, dir, pod, way)
}

// serveBy is like serve, with programs that are already loaded. Their previous attachments are detached.
func serveBy(t testing.TB, d *datapath.Datapath, dir string, pod *bpftest.Pod, way way) *served {
	t.Helper()
	s := &served{Pod: pod, d: d, bpfDir: dir}
	s.listener = pod.Listen(t, 8080)
	go func() {
		_ = http.Serve(s.listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.seen.Add(1)
			n, _ := io.Copy(io.Discard, r.Body)
			_, _ = fmt.Fprintf(w, "%s %s %d", r.Method, r.URL, n)
		}))
	}()
	bpftest.Do(t, pod.Node.NS, func() error {
		return attach.Attach(d, dir, servedID, attach.Target{IfIndex: pod.IfIndex, PodNetns: pod.Netns, Hook: way.hook}, way.via)
	})
	if err := d.SetProber(datapath.Prober{AnyLocal: true}); err != nil {
		t.Fatal(err)
	}
	s.arm(t)
	return s
}

// known returns what the programs know about the pod.
func (s *served) known(t testing.TB) *datapath.Pod {
	t.Helper()
	pod, err := attach.OpenPod(s.d, s.bpfDir, servedID)
	if err != nil {
		t.Fatal(err)
	}
	return pod
}

func (s *served) put(t testing.TB, key datapath.EndpointKey, e datapath.Evidence) {
	t.Helper()
	if err := s.known(t).Put(key, e); err != nil {
		t.Fatal(err)
	}
}

// putProbe puts evidence for what probe asks on a port.
func (s *served) putProbe(t testing.TB, port uint16, e datapath.Evidence) {
	t.Helper()
	q := s.question(t)
	e.Check = q.Check
	s.put(t, datapath.HTTPKey(port, q), e)
}

// question returns what probe asks.
func (s *served) question(t testing.TB) (q datapath.Question) {
	t.Helper()
	q.Hash, q.Check = bpftest.KeysOf(t, s.d.Steer()).Question(probe)
	return q
}

// success returns evidence that is fresh for an hour.
func success() datapath.Evidence {
	now := datapath.Now()
	return datapath.Evidence{ObservedAt: now, FreshUntil: now + uint64(time.Hour), Result: datapath.ResultSuccess, Status: 200}
}

// arm makes the programs answer /healthz.
func (s *served) arm(t testing.TB) {
	t.Helper()
	s.putProbe(t, 8080, success())
	s.armPort(t, 8080)
}

// armPort makes the programs take connections to a port.
func (s *served) armPort(t testing.TB, port uint16) {
	t.Helper()
	s.put(t, datapath.PortKey(port), success())
}

// expirePort makes the programs only observe connections to a port.
func (s *served) expirePort(t testing.TB, port uint16) {
	t.Helper()
	s.put(t, datapath.PortKey(port), datapath.Evidence{ObservedAt: 1, FreshUntil: 1, Result: datapath.ResultSuccess})
}

// serveEchoOn makes the pod echo on a port, and the programs take connections to it.
func (s *served) serveEchoOn(t testing.TB, port uint16) {
	t.Helper()
	serveEcho(s.Listen(t, int(port)))
	s.armPort(t, port)
}

// serveEcho echoes what it receives.
func serveEcho(listener net.Listener) {
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(conn, conn)
				_ = conn.Close()
			}()
		}
	}()
}

// ask sends a request from a namespace and returns everything that comes back.
func (s *served) ask(t *testing.T, from ns.NetNS, addr netip.Addr, request string) string {
	t.Helper()
	conn := bpftest.Dial(t, from, netip.AddrPortFrom(addr, 8080).String())
	defer conn.Close() //nolint:errcheck // a test's
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, request); err != nil {
		t.Fatal(err)
	}
	reply, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(reply)
}

const hit = "Cache-Status: probelet; hit"

func TestBothHooksAnswerRealSockets(t *testing.T) {
	for _, way := range ways {
		for _, bridged := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s bridged %v", way, bridged), func(t *testing.T) {
				t.Parallel()
				node := bpftest.NewNode(t)
				pod := node.AddPod(t)
				if bridged {
					node.Bridge(t, pod)
				}
				s := serve(t, pod, way)
				for _, addr := range []netip.Addr{pod.IPv4, pod.IPv6} {
					if reply := s.ask(t, node.NS, addr, probe); !strings.Contains(reply, hit) {
						t.Fatalf("%v: reply %q", addr, reply)
					}
					if reply := s.ask(t, node.NS, addr, unknown); !strings.HasSuffix(reply, "GET /x 0") {
						t.Fatalf("%v: handed over, reply %q", addr, reply)
					}
				}
				if seen := s.seen.Load(); seen != 2 {
					t.Fatalf("the pod saw %d requests, want the 2 for /x", seen)
				}
			})
		}
	}
}

// Every local process is a prober here. A pod's processes are not local to the node, even though their packets keep the cgroup of
// their socket when they cross a bridge.
func TestPodsAreNotProbers(t *testing.T) {
	for _, way := range ways {
		t.Run(way.String(), func(t *testing.T) {
			t.Parallel()
			node := bpftest.NewNode(t)
			a, b := node.AddPod(t), node.AddPod(t)
			node.Bridge(t, a, b)
			s := serve(t, a, way)
			for range 3 {
				if reply := s.ask(t, b.NS, a.IPv4, probe); strings.Contains(reply, hit) {
					t.Fatalf("answered a pod: %q", reply)
				}
			}
			if reply := s.ask(t, node.NS, a.IPv4, probe); !strings.Contains(reply, hit) {
				t.Fatalf("did not answer the node: %q", reply)
			}
		})
	}
}

// A kept-alive connection leaves nothing behind in the flow table or in the pod.
func TestHandedOverConnectionsEnd(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
		conn := s.Dial(t, netip.AddrPortFrom(addr, 8080).String())
		replies := bufio.NewReader(conn)
		for _, path := range []string{"/healthz", "/again", "/healthz"} { // kept alive, so not a prober's
			if _, err := fmt.Fprintf(conn, "GET %s HTTP/1.1\r\nHost: pod\r\n\r\n", path); err != nil {
				t.Fatal(err)
			}
			reply, err := http.ReadResponse(replies, nil)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(reply.Body)
			if err != nil || string(body) != "GET "+path+" 0" {
				t.Fatalf("%s: %q, %v", path, body, err)
			}
		}
		if err := conn.Close(); err != nil {
			t.Fatal(err)
		}
		s.wantNothingLeft(t)
	})
}

// The pod stops listening after the SYN was answered. The client learns that from a reset.
func TestPodStopsListening(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
		s.lookAway(t)
		s.armPort(t, 8081) // no listener
		conn := s.Dial(t, netip.AddrPortFrom(addr, 8081).String())
		if _, err := io.WriteString(conn, probe); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		if _, err := conn.Read(make([]byte, 1)); !errors.Is(err, unix.ECONNRESET) {
			t.Fatalf("the client got: %v", err)
		}
		s.wantNothingLeft(t)
	})
}

// A client hears from a server that speaks first once its keep-alive shows that it waits.
func TestServerSpeaksFirst(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
		s.serveBanner(t)
		conn := s.Dial(t, netip.AddrPortFrom(addr, bannerPort).String())
		if err := conn.(*net.TCPConn).SetKeepAliveConfig(net.KeepAliveConfig{
			Enable: true, Idle: time.Second, Interval: time.Second, Count: 9,
		}); err != nil {
			t.Fatal(err)
		}
		_ = conn.SetReadDeadline(time.Now().Add(patience))
		if text, err := io.ReadAll(conn); err != nil || string(text) != banner {
			t.Fatalf("the client got %q, %v", text, err)
		}
		_ = conn.Close()
		s.wantNothingLeft(t)
	})
}

const (
	bannerPort = 2525
	banner     = "220 ready\r\n"
)

// serveBanner makes the pod greet clients that connect to bannerPort, and close.
func (s *served) serveBanner(t testing.TB) {
	t.Helper()
	listener := s.Listen(t, bannerPort)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, banner)
			_ = conn.Close()
		}
	}()
	s.armPort(t, bannerPort)
}

// With respond detached no answer arrives. The client's second SYN reaches the pod, and no connection is taken any more.
func TestPodGetsTheSecondSYNWithoutRespond(t *testing.T) {
	for _, via := range []attach.Via{attach.ViaAuto, attach.ViaClsact} {
		for _, family := range []string{"IPv4", "IPv6"} {
			t.Run(fmt.Sprintf("via %s %s", cmp.Or(via, "auto"), family), func(t *testing.T) {
				t.Parallel()
				pod := bpftest.NewNode(t).AddPod(t)
				s := serve(t, pod, way{attach.HookXDP, via})
				s.prove(t)
				s.detachRespond(t)
				addr := pod.IPv4
				if family == "IPv6" {
					addr = pod.IPv6
				}
				for range 2 {
					if reply := s.ask(t, pod.Node.NS, addr, probe); !strings.HasSuffix(reply, "GET /healthz 0") {
						t.Errorf("reply %q", reply)
					}
				}
				counters := s.counters(t)
				if counters["devices_lost"] != 1 || counters["passed_untrusted"] != 1 {
					t.Errorf("%v, want the second connection passed on", counters)
				}
				if device := s.device(t); device.Trust != datapath.TrustLost || device.Loss != "syn_repeated" {
					t.Errorf("%+v", device)
				}
			})
		}
	}
}

// If something drops our answers, the pod answers instead, and no connection is taken any more. An answer to a request is sent twice,
// in case the first was only delayed.
func TestDroppedAnswer(t *testing.T) {
	for loss, drop := range map[string]bpftest.Drop{
		"syn_repeated":     {Mask: bpftest.SYN, Flags: bpftest.SYN, First: 1},
		"request_repeated": {Mask: bpftest.PSH, Flags: bpftest.PSH, First: 2},
	} {
		t.Run(loss, func(t *testing.T) {
			eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
				dropper := s.NewDropper(t)
				dropper.At(t, bpftest.HostIn, 8080, drop)
				for range 2 {
					if reply := s.ask(t, s.Node.NS, addr, probe); !strings.HasSuffix(reply, "GET /healthz 0") {
						t.Errorf("reply %q", reply)
					}
				}
				if device := s.device(t); device.Trust != datapath.TrustLost || device.Loss != loss {
					t.Errorf("%+v", device)
				}
				if n := s.counters(t)["passed_untrusted"]; n != 1 {
					t.Errorf("%d connections were passed on", n)
				}
				s.wantNothingLeft(t)
			})
		})
	}
}

func (s *served) detachRespond(t *testing.T) {
	t.Helper()
	pins, err := filepath.Glob(filepath.Join(datapath.AttachmentsDir(s.bpfDir), "*", "respond"))
	if err != nil || len(pins) != 1 {
		t.Fatal(pins, err)
	}
	respond, err := link.LoadPinnedLink(pins[0], nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(respond.Detach(), respond.Close()); err != nil {
		t.Fatal(err)
	}
}

// lookAway makes steer take connections without looking at the pod's listening sockets, as if the namespace's id were unknown.
func (s *served) lookAway(t *testing.T) {
	t.Helper()
	if err := s.d.LookInto(s.device(t).Key, -1, 0); err != nil {
		t.Fatal(err)
	}
}

func (s *served) device(t *testing.T) datapath.Device {
	t.Helper()
	device, err := s.d.Device(s.known(t).Device())
	if err != nil {
		t.Fatal(err)
	}
	return device
}

// When a listening socket of the pod closes, for whatever reason and on whatever port, nothing about the pod is answered any more,
// even before the next probe.
func TestClosedListenerVoidsAllEvidence(t *testing.T) {
	eachServed(t, func(t *testing.T, s *served) {
		if !s.d.Watched() {
			t.Skip("this kernel has no BTF")
		}
		s.armPort(t, 9090)
		elsewhere := s.Node.AddPod(t).Listen(t, 8080)
		if err := elsewhere.Close(); err != nil {
			t.Fatal(err)
		}
		if reply := s.ask(t, s.Node.NS, s.IPv4, probe); !strings.Contains(reply, hit) {
			t.Fatalf("withdrawn by another pod's listener: %q", reply)
		}
		for _, l := range []net.Listener{
			s.Listen(t, 9091), // for instance a sidecar's
			socket{address: netip.IPv6Loopback(), protocol: unix.IPPROTO_MPTCP}.listen(t, s.NS),
			s.listener,
		} {
			s.arm(t)
			before, closed := datapath.Now(), s.counters(t)["withdrawn_listener_closed"]
			if err := l.Close(); err != nil {
				t.Fatal(err)
			}
			for _, port := range []uint16{8080, 9090} {
				_, tally, err := s.known(t).Get(datapath.PortKey(port))
				if err != nil || tally.WithdrawnAt < before || datapath.WithdrawalCauses[tally.WithdrawnCause] != "listener_closed" {
					t.Fatalf("port %d: %+v, %v", port, tally, err)
				}
			}
			// An MPTCP socket contains a TCP one, which counts as well.
			if n := s.counters(t)["withdrawn_listener_closed"] - closed; n < 1 || n > 2 {
				t.Fatalf("counted %d withdrawals", n)
			}
			if reply, err := s.get(); strings.Contains(reply, hit) {
				t.Fatalf("answered on withdrawn evidence: %q, %v", reply, err)
			}
		}
	})
}

// get is like ask, but returns an error if it fails.
func (s *served) get() (reply string, err error) {
	err = inNS(s.Node.NS, func() error {
		reply, err = get(fmt.Sprintf("%s:8080", s.IPv4))
		return err
	})
	return reply, err
}

// The daemon's own requests reach the pod, although every local process is a prober and everything is fresh.
func TestExemptSocketIsNotAProbers(t *testing.T) {
	eachServed(t, func(t *testing.T, s *served) {
		const n = 2 // requests
		var cookie uint64
		dialer := net.Dialer{Timeout: patience, Control: func(_, _ string, socket syscall.RawConn) (err error) {
			control := socket.Control(func(fd uintptr) {
				cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE)
			})
			return errors.Join(control, err, s.d.ExemptSocket(cookie))
		}}
		bpftest.Do(t, s.Node.NS, func() error {
			conn, err := dialer.Dial("tcp", fmt.Sprintf("%s:8080", s.IPv4))
			if err != nil {
				return err
			}
			defer conn.Close() //nolint:errcheck // a test's
			// Twice, which is harmless, while the connection lasts.
			if err := errors.Join(s.d.ForgetSocket(cookie), s.d.ForgetSocket(cookie)); err != nil {
				return err
			}
			for r := bufio.NewReader(conn); s.seen.Load() < n; {
				if _, err := io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: pod\r\n\r\n"); err != nil {
					return err
				}
				reply, err := http.ReadResponse(r, nil)
				if err != nil {
					return err
				}
				if _, err := io.Copy(io.Discard, reply.Body); err != nil || reply.Header.Get("Cache-Status") != "" {
					return fmt.Errorf("answered with %+v, %w", reply.Header, err)
				}
			}
			return nil
		})
		if reply := s.ask(t, s.Node.NS, s.IPv4, probe); !strings.Contains(reply, hit) || s.seen.Load() != n {
			t.Fatalf("another socket was answered with %q", reply)
		}
		counters := s.counters(t)
		if counters["passed_own"] != 1 || counters["observed"] != 0 || counters["answered_http"] != 1 {
			t.Fatalf("%v", counters)
		}
	})
}
