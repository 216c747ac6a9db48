package e2e

import (
	"bufio"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/e2e/harness/node"
	"github.com/probelet/probelet/e2e/harness/role"
)

const (
	httpPort = 8080
	tcpPort  = 9090
	tlsPort  = 8443
	healthz  = "/healthz"

	// deadline limits everything that must not hang.
	deadline = 20 * time.Second
)

// Probes with periods that keep evidence fresh for longer than any test takes.
var (
	longHTTP = node.Probe{Port: httpPort, Path: healthz, PeriodSeconds: 600, TimeoutSeconds: 1}
	longTCP  = node.Probe{Port: tcpPort, PeriodSeconds: 600, TimeoutSeconds: 1}
	longTLS  = node.Probe{Port: tlsPort, PeriodSeconds: 600, TimeoutSeconds: 1}
)

// scene is a node with a daemon and two clients: the prober and another.
type scene struct {
	*node.Node
	t             *testing.T
	daemon        *node.Daemon
	prober, other *role.Client
}

// newScene returns a scene that ends with the test. If the test fails, it logs the status and the logs of daemon and plugin.
func newScene(t *testing.T, chain node.Chain, flags ...string) *scene {
	t.Helper()
	n, err := machine.NewNode(chain)
	must(t, err)
	s := &scene{Node: n, t: t}
	must(t, n.WriteSpecs())
	s.startDaemon(flags...)
	s.prober, err = role.StartClient(n.CgroupPath(node.ProberCgroup))
	must(t, err)
	t.Cleanup(s.prober.Stop)
	s.other, err = role.StartClient(n.CgroupPath(node.OtherCgroup))
	must(t, err)
	t.Cleanup(s.other.Stop)
	t.Cleanup(s.explain)
	return s
}

func (s *scene) startDaemon(flags ...string) {
	s.t.Helper()
	daemon, err := s.StartDaemon(flags...)
	must(s.t, err)
	s.daemon = daemon
	s.t.Cleanup(daemon.Kill)
}

func (s *scene) explain() {
	if !s.t.Failed() {
		return
	}
	table, err := s.StatusTable()
	s.t.Logf("status: %v\n%s", err, table)
	for _, file := range []string{s.DaemonLog(), s.LogFile} {
		text, err := os.ReadFile(file)
		s.t.Logf("%s: %v\n%s", file, err, lastLines(string(text), 40))
	}
}

func lastLines(text string, n int) string {
	lines := strings.SplitAfter(text, "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

// pod is a pod with a server.
type pod struct {
	*node.Pod
	*role.Server
	s *scene
}

// newPod creates a pod whose server listens on the usual ports.
func (s *scene) newPod() *pod {
	s.t.Helper()
	p, err := s.NewPod()
	must(s.t, err)
	must(s.t, p.Add())
	server, err := role.StartServer(p.Netns)
	must(s.t, err)
	s.t.Cleanup(server.Stop)
	must(s.t, server.Listen(httpPort, tcpPort))
	must(s.t, server.ListenTLS(tlsPort))
	return &pod{p, server, s}
}

// newFreshPod creates a pod and makes it the only one with specs: these probes, all of them fresh.
func (s *scene) newFreshPod(probes ...node.Probe) *pod {
	s.t.Helper()
	p := s.newPod()
	must(s.t, s.WriteSpecs(node.Probed{Pod: p.Pod, Readiness: probes}))
	p.makeFresh(probes...)
	return p
}

// probeByIPv6 moves the pod's endpoints to its IPv6 address and makes them fresh.
func (p *pod) probeByIPv6(probes ...node.Probe) {
	p.s.t.Helper()
	must(p.s.t, p.s.WriteSpecs(node.Probed{Pod: p.Pod, Readiness: probes, IPv6: true}))
	for _, probe := range probes {
		before := p.hits(probe)
		if !within(deadline, func() bool {
			p.probe(probe, p.IPv6, 1)
			return p.hits(probe) > before
		}) {
			p.s.t.Fatalf("port %d is not answered at its IPv6 address", probe.Port)
		}
	}
}

// makeFresh sends one probe to each endpoint, which the pod answers.
func (p *pod) makeFresh(probes ...node.Probe) {
	p.s.t.Helper()
	for _, probe := range probes {
		must(p.s.t, p.s.AwaitState(p.Pod, probe.Port, probe.Path, node.Unknown, node.Stale, node.Fresh))
		p.probe(probe, p.IPv4, 1)
	}
	for _, probe := range probes {
		fresh := func() bool {
			e, err := p.s.Endpoint(p.Pod, probe.Port, probe.Path)
			return err == nil && e.State == node.Fresh && e.WhyNotAnswered == ""
		}
		// The probe was not observed if the daemon was still attaching the pod.
		within(deadline, func() bool {
			if within(2*time.Second, fresh) {
				return true
			}
			p.probe(probe, p.IPv4, 1)
			return false
		})
		must(p.s.t, p.s.AwaitState(p.Pod, probe.Port, probe.Path, node.Fresh))
	}
}

// probe sends probes as the kubelet does. None of them may fail.
func (p *pod) probe(probe node.Probe, address netip.Addr, count int) {
	p.s.t.Helper()
	result, err := p.s.prober.Probe(probesOf(probe, address, count))
	must(p.s.t, err)
	if result.Failures > 0 {
		p.s.t.Fatalf("%d of %d probes of port %d failed: %q", result.Failures, count, probe.Port, result.Messages)
	}
}

func probesOf(probe node.Probe, address netip.Addr, count int) role.Probes {
	return role.Probes{
		Address: address.String(), Port: probe.Port, Path: probe.Path, Count: count, Timeout: time.Second,
	}
}

// seen returns what has reached a port of the pod.
func (p *pod) seen(port int) role.Seen {
	p.s.t.Helper()
	seen, err := p.Seen(port)
	must(p.s.t, err)
	return seen
}

// connections returns how many connections a port of the pod has seen, once it has seen as many as wanted: a client may have closed one
// before the server gets to accept it.
func (p *pod) connections(port, want int) (n int) {
	p.s.t.Helper()
	within(deadline, func() bool { n = p.seen(port).Connections; return n >= want })
	return n
}

// address returns the address of one of the pod's ports.
func (p *pod) address(port int) string {
	return net.JoinHostPort(p.IPv4.String(), strconv.Itoa(port))
}

func (s *scene) counter(t *testing.T, name string) int {
	t.Helper()
	status, err := s.Status()
	must(t, err)
	return status.Counters[name]
}

// hits returns how many probes of an endpoint the kernel has answered.
func (p *pod) hits(probe node.Probe) int {
	p.s.t.Helper()
	e, err := p.s.Endpoint(p.Pod, probe.Port, probe.Path)
	must(p.s.t, err)
	return e.Hits
}

// dial returns a connection of the client that is closed at the end of the test.
func (s *scene) dial(t *testing.T, c *role.Client, address string) net.Conn {
	t.Helper()
	conn, err := c.Dial(address)
	must(t, err)
	must(t, conn.SetDeadline(time.Now().Add(deadline)))
	t.Cleanup(func() { _ = conn.Close() })
	return conn
}

// answeredByKernel reads a response and reports whether it is the kernel's.
func answeredByKernel(conn net.Conn) (bool, error) {
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return false, err
	}
	defer response.Body.Close() //nolint:errcheck // read only
	return strings.HasPrefix(response.Header.Get("Cache-Status"), "probelet"), nil
}

// needBTF skips tests that depend on watching sockets, for which the kernel must have BTF.
func needBTF(t *testing.T) {
	t.Helper()
	if _, err := os.Stat("/sys/kernel/btf/vmlinux"); err == nil {
		return
	}
	if os.Getenv("CI") != "" {
		t.Fatal("this kernel has no BTF")
	}
	t.Skip("this kernel has no BTF")
}

// within polls until a condition holds, and reports whether it did within the limit. This module does not import the
// root module, which has polltest.
func within(limit time.Duration, holds func() bool) bool {
	for end := time.Now().Add(limit); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
