package e2e

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/e2e/harness/node"
)

// The whole promise, with both chains and both address families.
func TestAnsweredProbesNeverReachThePod(t *testing.T) {
	for _, test := range []struct {
		name  string
		chain node.Chain
		ipv6  bool
		count int
	}{
		{"routed IPv4", node.PTP, false, 10_000},
		{"routed IPv6", node.PTP, true, 1000},
		{"bridged IPv4", node.Bridge, false, 1000},
		{"bridged IPv6", node.Bridge, true, 1000},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t, test.chain)
			p := s.newFreshPod(longHTTP, longTCP)
			address := p.IPv4
			if test.ipv6 {
				address = p.IPv6
				p.probeByIPv6(longHTTP, longTCP)
			}
			for _, probe := range []node.Probe{longHTTP, longTCP} {
				expectAnswered(t, p, probe, address, test.count)
			}
		})
	}
}

// expectAnswered sends probes to a fresh endpoint and checks that those answered in the kernel leave nothing behind. These
// are all HTTP probes, and most TCP probes, of which at most nine in a row are answered.
func expectAnswered(t *testing.T, p *pod, probe node.Probe, address netip.Addr, count int) {
	t.Helper()
	endpoint := netip.AddrPortFrom(address, uint16(probe.Port))
	waiting, err := node.TimeWaitOf(os.Getpid(), endpoint)
	must(t, err)
	segments, err := node.SegmentsIn(p.Pid())
	must(t, err)
	hits, seen := p.hits(probe), p.seen(probe.Port).Connections

	p.probe(probe, address, count)

	passed := count - (p.hits(probe) - hits)
	if isTCP := probe.Path == ""; !isTCP && passed > 0 || isTCP && (passed < count/10-1 || passed > count*3/4) {
		t.Errorf("port %d: %d of %d probes were forwarded", probe.Port, passed, count)
	}
	if got := p.connections(probe.Port, seen+passed) - seen; got != passed {
		t.Errorf("port %d: the server saw %d connections for %d forwarded probes", probe.Port, got, passed)
	}
	after, err := node.SegmentsIn(p.Pid())
	must(t, err)
	if most := node.SegmentsOfTCPProbe * passed; after-segments > most {
		t.Errorf("port %d: %d segments reached the pod, want at most %d", probe.Port, after-segments, most)
	}
	left, err := node.TimeWaitOf(os.Getpid(), endpoint)
	must(t, err)
	if n := countNew(left, waiting); n > passed {
		t.Errorf("port %d: %d sockets are left in TIME_WAIT", probe.Port, n)
	}
}

func countNew(now, before map[node.Connection]bool) (n int) {
	for c := range now {
		if !before[c] {
			n++
		}
	}
	return n
}

// A client next to the prober: same host, same address, same port, but another cgroup.
func TestOthersGetTheServer(t *testing.T) {
	for _, chain := range []node.Chain{node.PTP, node.Bridge} {
		t.Run(string(chain), func(t *testing.T) {
			s := newScene(t, chain)
			p := s.newPod()
			must(t, s.WriteSpecs(node.Probed{Pod: p.Pod, Readiness: []node.Probe{longHTTP, longTCP}}))
			request := "GET /healthz HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n"
			before := exchange(t, s.dial(t, s.other, p.address(httpPort)), send(request))
			p.makeFresh(longHTTP, longTCP)
			before.expectSame(t, exchange(t, s.dial(t, s.other, p.address(httpPort)), send(request)))

			probing := make(chan error)
			go func() {
				result, err := s.prober.Probe(probesOf(longHTTP, p.IPv4, 3000))
				if result.Failures > 0 {
					t.Errorf("%d probes failed: %q", result.Failures, result.Messages)
				}
				probing <- err
			}()
			requests := p.seen(httpPort).Requests
			made := useServer(t, s, p)
			must(t, <-probing)
			if got := p.seen(httpPort).Requests - requests; got != made {
				t.Errorf("the server saw %d of %d requests", got, made)
			}
		})
	}
}

// useServer does what an ordinary client does on one connection, and returns the number of requests.
func useServer(t *testing.T, s *scene, p *pod) int {
	t.Helper()
	conn := s.dial(t, s.other, p.address(httpPort))
	responses := bufio.NewReader(conn)
	base := "http://" + p.address(httpPort)
	const rounds = 50
	for range rounds {
		expectBody(t, conn, responses, http.MethodGet, base+healthz, nil, []byte("healthy\n"))
		megabyte := make([]byte, 1<<20)
		_, _ = rand.Read(megabyte)
		expectBody(t, conn, responses, http.MethodPost, base+"/echo", megabyte, megabyte)
	}
	return 2 * rounds
}

func expectBody(t *testing.T, conn net.Conn, responses *bufio.Reader, method, url string, body, want []byte) {
	t.Helper()
	request, err := http.NewRequest(method, url, bytes.NewReader(body))
	must(t, err)
	must(t, request.Write(conn))
	response, err := http.ReadResponse(responses, request)
	must(t, err)
	defer response.Body.Close() //nolint:errcheck // read only
	got, err := io.ReadAll(response.Body)
	must(t, err)
	if response.StatusCode != http.StatusOK || !bytes.Equal(got, want) {
		t.Errorf("%s %s: status %d, %d bytes; not the server's response", method, url, response.StatusCode, len(got))
	}
}

// If the endpoint was fresh when the kernel accepted the connection, the request is answered if it arrives without delay.
func TestExpiringBetweenSYNAndRequest(t *testing.T) {
	s := newScene(t, node.PTP)
	short := node.Probe{Port: httpPort, Path: healthz, PeriodSeconds: 1, TimeoutSeconds: 1}
	p := s.newFreshPod(short)
	for range 10 {
		must(t, s.AwaitState(p.Pod, short.Port, short.Path, node.Stale, node.Fresh))
		p.makeFresh(short)
		e, err := s.Endpoint(p.Pod, short.Port, short.Path)
		must(t, err)
		const before = 300 * time.Millisecond
		time.Sleep(time.Duration(e.FreshFor*float64(time.Second)) - before)
		connections := p.seen(httpPort).Connections
		dialled := time.Now()
		conn := s.dial(t, s.prober, p.address(httpPort))
		e, err = s.Endpoint(p.Pod, short.Port, short.Path)
		must(t, err)
		taken := e.State == node.Fresh
		must(t, s.AwaitState(p.Pod, short.Port, short.Path, node.Stale))
		_, err = io.WriteString(conn, strings.Replace(probeRequest, "10.88.1.2:8080", p.address(httpPort), 1))
		must(t, err)
		// The kernel waits for one second. Try again if this machine was too slow.
		if inTime := time.Since(dialled) < 900*time.Millisecond; !taken || !inTime {
			continue
		}
		answered, err := answeredByKernel(conn)
		must(t, err)
		if got := p.seen(httpPort).Connections - connections; !answered || got != 0 {
			t.Fatalf("answered by the kernel: %t; connections to the pod: %d", answered, got)
		}
		return
	}
	t.Fatal("this machine is too slow for the test")
}

// Expired evidence is not served, and the next probe renews it.
func TestExpiredBeforeSYN(t *testing.T) {
	s := newScene(t, node.PTP)
	short := node.Probe{Port: httpPort, Path: healthz, PeriodSeconds: 1, TimeoutSeconds: 1}
	shortTCP := node.Probe{Port: tcpPort, PeriodSeconds: 1, TimeoutSeconds: 1}
	p := s.newFreshPod(short, shortTCP)
	for _, probe := range []node.Probe{short, shortTCP} {
		must(t, s.AwaitState(p.Pod, probe.Port, probe.Path, node.Stale))
		seen, hits := p.seen(probe.Port).Connections, p.hits(probe)
		p.probe(probe, p.IPv4, 1)
		if got := p.connections(probe.Port, seen+1) - seen; got != 1 {
			t.Errorf("port %d: the pod saw %d probes after evidence had expired, want 1", probe.Port, got)
		}
		must(t, s.AwaitState(p.Pod, probe.Port, probe.Path, node.Fresh))
		if got := p.hits(probe) - hits; got != 0 {
			t.Errorf("port %d: the kernel answered %d probes without evidence", probe.Port, got)
		}
	}
}

// Every failure reaches the prober from the pod itself, and so does the recovery.
func TestFailuresAreNeverServed(t *testing.T) {
	s := newScene(t, node.PTP)
	short := node.Probe{Port: httpPort, Path: healthz, PeriodSeconds: 1, TimeoutSeconds: 1}
	p := s.newFreshPod(short)
	must(t, p.SetStatus(http.StatusInternalServerError))
	must(t, s.AwaitState(p.Pod, short.Port, short.Path, node.Stale))
	requests, hits := p.seen(httpPort).Requests, p.hits(short)
	const failing = 20
	result, err := s.prober.Probe(probesOf(short, p.IPv4, failing))
	must(t, err)
	if result.Failures != failing || p.seen(httpPort).Requests != requests+failing || p.hits(short) != hits {
		t.Errorf("%d probes: %d failures, %d requests at the pod, %d answered", failing, result.Failures,
			p.seen(httpPort).Requests-requests, p.hits(short)-hits)
	}
	must(t, s.AwaitState(p.Pod, short.Port, short.Path, node.Failed))
	must(t, p.SetStatus(http.StatusOK))
	p.probe(short, p.IPv4, 1)
	must(t, s.AwaitState(p.Pod, short.Port, short.Path, node.Fresh))
}

// Evidence ends together with the socket it is about, long before it expires, however the socket is closed.
func TestNotAnsweredOnceTheServerIsGone(t *testing.T) {
	needBTF(t)
	for name, end := range map[string]func(*pod) error{
		"closed": func(p *pod) error { return errors.Join(p.Close(httpPort), p.Close(tcpPort)) },
		"killed": func(p *pod) error {
			p.Stop()
			return nil
		},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, node.PTP)
			p := s.newFreshPod(longHTTP, longTCP)
			must(t, end(p))
			for _, probe := range []node.Probe{longHTTP, longTCP} {
				result, err := s.prober.Probe(probesOf(probe, p.IPv4, 1))
				must(t, err)
				if result.Failures != 1 || p.hits(probe) != 0 {
					t.Errorf("port %d: %d of 1 probes failed, %d were answered", probe.Port, result.Failures, p.hits(probe))
				}
			}
		})
	}
}

// When the daemon dies, answers end within the staleness bound, and no probe fails.
func TestDaemonKilled(t *testing.T) {
	s := newScene(t, node.PTP)
	short := node.Probe{Port: httpPort, Path: healthz, PeriodSeconds: 1, TimeoutSeconds: 1}
	p := s.newFreshPod(short)
	go func() { time.Sleep(500 * time.Millisecond); s.daemon.Kill() }()
	probes := probesOf(short, p.IPv4, 100)
	probes.Every = 40 * time.Millisecond // extends past the bound after the kill
	result, err := s.prober.Probe(probes)
	must(t, err)
	if result.Failures > 0 {
		t.Errorf("%d probes failed: %q", result.Failures, result.Messages)
	}
	e, err := s.Endpoint(p.Pod, short.Port, short.Path)
	must(t, err)
	if e.State != node.Stale {
		t.Errorf("after the bound: %+v", e)
	}
	requests := p.seen(httpPort).Requests
	p.probe(short, p.IPv4, 10)
	if got := p.seen(httpPort).Requests - requests; got != 10 || p.hits(short) != e.Hits {
		t.Errorf("after the bound: %d of 10 probes reached the pod, %d were answered", got, p.hits(short)-e.Hits)
	}
	s.startDaemon()
	p.makeFresh(short)
	hits := p.hits(short)
	p.probe(short, p.IPv4, 1)
	if got := p.hits(short) - hits; got != 1 {
		t.Errorf("with a new daemon, %d of 1 probes were answered", got)
	}
}
