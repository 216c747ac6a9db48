package attach_test

import (
	"bufio"
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

// served is a pod with a server, attached, its /healthz fresh, every local process a prober.
type served struct {
	*bpftest.Pod
	d        *datapath.Datapath
	bpfDir   string
	listener net.Listener
	seen     atomic.Int64
}

var servedID = attach.ID{ContainerID: "c", IfName: "eth0"}

func serve(t testing.TB, pod *bpftest.Pod, hook attach.Hook) *served {
	t.Helper()
	s := &served{Pod: pod}
	s.listener = pod.Listen(t, 8080)
	go func() {
		_ = http.Serve(s.listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			s.seen.Add(1)
			n, _ := io.Copy(io.Discard, r.Body)
			_, _ = fmt.Fprintf(w, "%s %s %d", r.Method, r.URL, n)
		}))
	}()
	dir := bpftest.BPFDir(t)
	d, err := datapath.Ensure(context.Background(), dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	s.d, s.bpfDir = d, dir
	bpftest.Do(t, pod.Node.NS, func() error {
		return attach.Attach(d, dir, servedID, attach.Target{IfIndex: pod.IfIndex, PodNetns: pod.Netns}, hook)
	})
	if err := d.SetProber(datapath.Prober{AnyLocal: true}); err != nil {
		t.Fatal(err)
	}
	s.arm(t)
	return s
}

// arm makes /healthz fresh for an hour.
func (s *served) arm(t testing.TB) {
	t.Helper()
	maps, err := attach.OpenPod(s.bpfDir, servedID)
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close() //nolint:errcheck // a test's
	now := datapath.Now()
	e := datapath.Evidence{ObservedAt: now, FreshUntil: now + uint64(time.Hour), Result: datapath.ResultSuccess}
	if err := e.SetReply(200); err != nil {
		t.Fatal(err)
	}
	for _, key := range []datapath.EndpointKey{datapath.HTTPKey(8080, "/healthz"), datapath.PortKey(8080)} {
		if err := maps.Put(key, e); err != nil {
			t.Fatal(err)
		}
	}
}

// armPort makes connections to another port taken, as those to 8080 are.
func (s *served) armPort(t testing.TB, number uint16) {
	t.Helper()
	maps, err := attach.OpenPod(s.bpfDir, servedID)
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close() //nolint:errcheck // a test's
	port, _, err := maps.Get(datapath.PortKey(8080))
	if err == nil {
		err = maps.Put(datapath.PortKey(number), port)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// ask sends a request from a namespace and returns all that comes back.
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
	for _, hook := range []attach.Hook{attach.HookAuto, attach.HookClsact} {
		for _, bridged := range []bool{false, true} {
			t.Run(fmt.Sprintf("hook %q bridged %v", hook, bridged), func(t *testing.T) {
				node := bpftest.NewNode(t)
				pod := node.AddPod(t)
				if bridged {
					node.Bridge(t, pod)
				}
				s := serve(t, pod, hook)
				for _, addr := range []netip.Addr{pod.IPv4, pod.IPv6} {
					if reply := s.ask(t, node.NS, addr, probe); !strings.Contains(reply, hit) {
						t.Fatalf("%v: reply %q", addr, reply)
					}
					reply := s.ask(t, node.NS, addr, strings.Replace(probe, "healthz", "x", 1))
					if !strings.HasSuffix(reply, "GET /x 0") {
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

// Every local process is a prober here, but a pod's processes are not the node's, though their packets arrive with their
// sockets' cgroup on a bridge.
func TestAPodIsNoProberOfAnother(t *testing.T) {
	node := bpftest.NewNode(t)
	a, b := node.AddPod(t), node.AddPod(t)
	node.Bridge(t, a, b)
	s := serve(t, a, attach.HookAuto)
	for range 3 {
		if reply := s.ask(t, b.NS, a.IPv4, probe); strings.Contains(reply, hit) {
			t.Fatalf("answered to a pod: %q", reply)
		}
	}
	if reply := s.ask(t, node.NS, a.IPv4, probe); !strings.Contains(reply, hit) {
		t.Fatalf("not answered to the node: %q", reply)
	}
}

// A connection that was handed over ends as any other: nothing is left of it in the flow table or in the pod.
func TestHandedOverConnectionsEnd(t *testing.T) {
	node := bpftest.NewNode(t)
	pod := node.AddPod(t)
	s := serve(t, pod, attach.HookAuto)

	conn := s.Dial(t, fmt.Sprintf("%s:8080", pod.IPv4))
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
	waitFor(t, "the flow table to be empty", func() bool {
		n, err := s.d.Flows()
		return err == nil && n == 0
	})
}

// The pod stopped listening after the SYN was answered: the client is told, by a reset.
func TestAPodThatStoppedListening(t *testing.T) {
	node := bpftest.NewNode(t)
	pod := node.AddPod(t)
	s := serve(t, pod, attach.HookAuto)
	s.armPort(t, 8081) // and nobody listens
	conn := s.Dial(t, fmt.Sprintf("%s:8081", pod.IPv4))
	if _, err := io.WriteString(conn, probe); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	_, err := conn.Read(make([]byte, 1))
	if err == nil || !strings.Contains(err.Error(), "connection reset by peer") {
		t.Fatalf("the client got: %v", err)
	}
}

// A server that speaks first is heard once the client's keep-alive shows that it waits.
func TestAServerThatSpeaksFirst(t *testing.T) {
	node := bpftest.NewNode(t)
	pod := node.AddPod(t)
	s := serve(t, pod, attach.HookAuto)
	listener := pod.Listen(t, 2525)
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			_, _ = io.WriteString(conn, "220 ready\r\n")
			_ = conn.Close()
		}
	}()
	s.armPort(t, 2525)
	conn := s.Dial(t, fmt.Sprintf("%s:2525", pod.IPv4))
	if err := conn.(*net.TCPConn).SetKeepAliveConfig(net.KeepAliveConfig{
		Enable: true, Idle: time.Second, Interval: time.Second, Count: 9,
	}); err != nil {
		t.Fatal(err)
	}
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	banner, err := io.ReadAll(conn)
	if err != nil || string(banner) != "220 ready\r\n" {
		t.Fatalf("the client got %q, %v", banner, err)
	}
}

// Of the two programs respond alone is gone, and steer goes on taking: the client's second SYN reaches the pod.
func TestWithoutRespondThePodGetsTheSecondSYN(t *testing.T) {
	for _, hook := range []attach.Hook{attach.HookAuto, attach.HookClsact} {
		node := bpftest.NewNode(t)
		pod := node.AddPod(t)
		s := serve(t, pod, hook)
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
		for _, addr := range []netip.Addr{pod.IPv4, pod.IPv6} {
			began := time.Now()
			if reply := s.ask(t, node.NS, addr, probe); !strings.HasSuffix(reply, "GET /healthz 0") {
				t.Errorf("hook %q, %v: reply %q", hook, addr, reply)
			}
			// The first repetition is after 1 s, the second one would be after 3 s.
			if took := time.Since(began); took > 2500*time.Millisecond {
				t.Errorf("hook %q, %v: took %v", hook, addr, took)
			}
		}
	}
}

func waitFor(t *testing.T, what string, done func() bool) {
	t.Helper()
	for range 1000 {
		if done() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("waited in vain for %s", what)
}

// When the server's socket closes, by whatever cause, its port is not answered any more: before anything asks.
func TestAListenerThatClosesEndsItsEvidence(t *testing.T) {
	node := bpftest.NewNode(t)
	pod := node.AddPod(t)
	s := serve(t, pod, attach.HookAuto)
	if !s.d.Watched() {
		t.Skip("this kernel does not describe its types (BTF)")
	}
	other := pod.Listen(t, 9090)
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	elsewhere := node.AddPod(t).Listen(t, 8080)
	if err := elsewhere.Close(); err != nil {
		t.Fatal(err)
	}
	if reply := s.ask(t, node.NS, pod.IPv4, probe); !strings.Contains(reply, hit) {
		t.Fatalf("withdrawn by another port's or another pod's listener: %q", reply)
	}
	if err := s.listener.Close(); err != nil {
		t.Fatal(err)
	}
	maps, err := attach.OpenPod(s.bpfDir, servedID)
	if err != nil {
		t.Fatal(err)
	}
	defer maps.Close() //nolint:errcheck // a test's
	_, tally, err := maps.Get(datapath.PortKey(8080))
	if err != nil || datapath.WithdrawalCauses[tally.WithdrawnCause] != "listener_closed" {
		t.Fatalf("%+v, %v", tally, err)
	}
	counters, err := s.d.Counters()
	if err != nil || counters["withdrawn_listener_closed"] != 1 {
		t.Fatalf("%v, %v", counters, err)
	}
	bpftest.Do(t, node.NS, func() error {
		conn, err := net.DialTimeout("tcp", fmt.Sprintf("%s:8080", pod.IPv4), 5*time.Second)
		if err == nil {
			_ = conn.Close()
			return fmt.Errorf("a connection was accepted in the closed server's name")
		}
		return nil
	})
}

// What the daemon asks by itself reaches the pod, though every local process is a prober, and all is fresh.
func TestAnExemptSocketIsNoProbers(t *testing.T) {
	node := bpftest.NewNode(t)
	pod := node.AddPod(t)
	const n = 2 // requests
	for _, hook := range []attach.Hook{attach.HookAuto, attach.HookClsact} {
		s := serve(t, pod, hook)
		var cookie uint64
		dialer := net.Dialer{Timeout: 5 * time.Second, Control: func(_, _ string, socket syscall.RawConn) (err error) {
			control := socket.Control(func(fd uintptr) {
				cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE)
			})
			return errors.Join(control, err, s.d.ExemptSocket(cookie))
		}}
		bpftest.Do(t, node.NS, func() error {
			conn, err := dialer.Dial("tcp", fmt.Sprintf("%s:8080", pod.IPv4))
			if err != nil {
				return err
			}
			defer conn.Close() //nolint:errcheck // a test's
			// Again, as it does no harm, on the same connection, which goes on.
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
		if reply := s.ask(t, node.NS, pod.IPv4, probe); !strings.Contains(reply, hit) || s.seen.Load() != n {
			t.Fatalf("another socket was answered with %q", reply)
		}
		counters, err := s.d.Counters()
		if err != nil || counters["passed_own"] != 1 || counters["observed"] != 0 || counters["answered_http"] != 1 {
			t.Fatalf("%v, %v", counters, err)
		}
		_ = s.listener.Close()
		bpftest.Do(t, node.NS, func() error {
			return attach.Detach(s.d, filepath.Dir(s.d.Dir()), attach.ID{ContainerID: "c", IfName: "eth0"})
		})
	}
}
