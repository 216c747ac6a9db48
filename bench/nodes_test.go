package bench

import (
	"bytes"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/e2e/harness/node"
	"github.com/probelet/probelet/e2e/harness/role"
)

// policy is a way to probe the pods of a node.
type policy struct {
	variant
	period int      // of all probes, in seconds; 0: there are none
	flags  []string // of the daemon; nil: a node without probelet
}

const (
	unprobed  variant = "no probes"
	plain1    variant = "plain, 1 s"
	plain2    variant = "plain, 2 s"
	default1  variant = "default, 1 s"
	stale1    variant = "staleness 5, 1 s"
	refresh1  variant = "refresh, 1 s"
	traffic1  variant = "traffic, 1 s"
	threshold         = 3 // failures in a row after which the kubelet restarts a container
	timeout           = time.Second
)

var policies = []policy{
	{unprobed, 0, nil},
	{plain1, 1, nil},
	{plain2, 2, nil},
	{"plain, 5 s", 5, nil},
	{"plain, 10 s", 10, nil},
	{"plain, 20 s", 20, nil},
	{default1, 1, []string{}},
	{stale1, 1, []string{"--staleness", "5"}},
	{refresh1, 1, []string{"--refresh", "true"}},
	{traffic1, 1, []string{"--liveness", "traffic"}},
}

// policiesOf returns the policies of some variants.
func policiesOf(variants ...variant) []policy {
	return slices.DeleteFunc(slices.Clone(policies), func(p policy) bool { return !slices.Contains(variants, p.variant) })
}

// program is a server that pods run. It answers healthPath as long as the file "healthy" exists in its directory, and everything
// else in any case, and logs each request.
type program struct {
	name    string
	command func(dir string) (*exec.Cmd, error)
	fail    func(*member) error // from then on it answers healthPath with status 500
}

var programs = []program{
	{"Go", goServer, func(m *member) error {
		client := http.Client{Timeout: 5 * time.Second}
		response, err := client.Get("http://" + m.address() + "/set?status=500")
		if err != nil {
			return err
		}
		return response.Body.Close()
	}},
	{"nginx", nginx, (*member).sicken},
	{"Python", pythonServer, (*member).sicken},
}

const (
	servedPath  = "/seen" // answered whatever the health
	healthyFile = "healthy"
)

func goServer(string) (*exec.Cmd, error) {
	return exec.Command(filepath.Join(machine.Bin, "app"), "-listen", strconv.Itoa(podPort)), nil
}

func nginx(dir string) (*exec.Cmd, error) {
	file := filepath.Join(dir, "nginx.conf")
	cmd := exec.Command("nginx", "-p", dir, "-c", file, "-e", "stderr", "-g", "daemon off; master_process off;")
	return cmd, os.WriteFile(file, fmt.Appendf(nil, `
pid %[1]s/nginx.pid;
events { worker_connections 64; }
http {
	access_log /dev/stdout;
	server {
		listen %[2]d;
		root %[1]s;
		location = %[3]s { try_files /%[4]s =500; }
		location / { return 200; }
	}
}
`, dir, podPort, healthPath, healthyFile), 0o644)
}

// Python's server is the one in its library, with the listen backlog of common servers (128 in aiohttp, 2,048 in uvicorn and
// gunicorn).
func pythonServer(dir string) (*exec.Cmd, error) {
	cmd := exec.Command("/usr/bin/python3", "-c", fmt.Sprintf(`
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Server(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        healthy = self.path != %q or os.path.exists(%q)
        self.send_response(200 if healthy else 500)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"ok\n")

ThreadingHTTPServer.request_queue_size = 128
ThreadingHTTPServer(("", %d), Server).serve_forever()
`, healthPath, healthyFile, podPort))
	cmd.Dir = dir
	return cmd, nil
}

// member is a pod of a probed node.
type member struct {
	node.Probed
	program
	dir string
	cmd *exec.Cmd
}

func (m *member) address() string { return addrPort(m.Pod.IPv4, podPort) }

func (m *member) sicken() error { return os.Remove(filepath.Join(m.dir, healthyFile)) }

func (m *member) stop() error { return m.cmd.Process.Signal(unix.SIGSTOP) }

// requests returns how many requests for healthPath the server has logged.
func (m *member) requests(t testing.TB) int {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(m.dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(text, []byte(healthPath))
}

// probedNode is a node whose pods are probed under a policy, with cgroups of its own.
type probedNode struct {
	policy
	*node.Node
	kubelet *kubelet
	members []*member
	cgroup  string
	created time.Time
}

// cgroups of a probed node, in addition to one for each program.
const (
	kubeletCgroup = "kubelet"
	daemonCgroup  = "daemon"
)

func (n *probedNode) cgroupOf(name string) string { return filepath.Join(n.cgroup, name) }

// probes returns the probes of a pod: one by HTTP and one by TCP.
func (p policy) probes() []node.Probe {
	if p.period == 0 {
		return nil
	}
	byTCP := node.Probe{Port: podPort, PeriodSeconds: p.period, TimeoutSeconds: int(timeout.Seconds())}
	byHTTP := byTCP
	byHTTP.Path = healthPath
	return []node.Probe{byHTTP, byTCP}
}

// The containers of these probes.
const httpContainer, tcpContainer = "container0", "container1"

// newProbedNode creates a node with a number of pods of each program, which have the probes of a pod.
func newProbedNode(t *testing.T, p policy, of node.Probed, pods int, runs ...program) *probedNode {
	t.Helper()
	inner, err := machine.NewNode(node.PTP)
	if err != nil {
		t.Fatal(err)
	}
	n := &probedNode{policy: p, Node: inner, created: time.Now(), cgroup: machine.CgroupPath(filepath.Base(inner.BPFDir))}
	if p.flags == nil {
		err = n.WithoutProbelet()
	}
	if err != nil {
		t.Fatal(err)
	}
	names := []string{kubeletCgroup, daemonCgroup}
	for _, p := range runs {
		names = append(names, p.name)
	}
	for _, name := range names {
		if err := os.MkdirAll(n.cgroupOf(name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	var specs []node.Probed
	for _, p := range runs {
		for range pods {
			m := n.newMember(t, p, of)
			n.members = append(n.members, m)
			specs = append(specs, m.Probed)
		}
	}
	if err := n.WriteSpecs(specs...); err != nil {
		t.Fatal(err)
	}
	if p.flags != nil {
		n.startDaemon(t)
	}
	n.kubelet = startKubelet(t, n.cgroupOf(kubeletCgroup))
	return n
}

func (n *probedNode) newMember(t *testing.T, p program, of node.Probed) *member {
	t.Helper()
	pod, err := n.NewPod()
	if err == nil {
		err = pod.Add()
	}
	if err != nil {
		t.Fatal(err)
	}
	of.Pod = pod
	m := &member{program: p, dir: t.TempDir(), Probed: of}
	if err := os.WriteFile(filepath.Join(m.dir, healthyFile), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if m.cmd, err = p.command(m.dir); err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(m.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() //nolint:errcheck // the server's
	m.cmd.Stdout, m.cmd.Stderr = log, log
	if err := role.StartCommand(m.cmd, pod.Netns, n.cgroupOf(p.name)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = m.cmd.Process.Kill()
		_ = m.cmd.Wait()
	})
	return m
}

func (n *probedNode) startDaemon(t *testing.T) {
	t.Helper()
	daemon, err := n.StartDaemon(append([]string{"--prober", "cgroup:" + n.cgroupOf(kubeletCgroup)}, n.flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(daemon.Kill)
	if err := node.MoveToCgroup(daemon.Pid(), n.cgroupOf(daemonCgroup)); err != nil {
		t.Fatal(err)
	}
}

// awaitServing waits until all pods accept connections.
func (n *probedNode) awaitServing(t *testing.T) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for _, m := range n.members {
		for {
			conn, err := net.DialTimeout("tcp", m.address(), time.Second)
			if err == nil {
				_ = conn.Close()
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s, %s: %v", n.variant, m.name, err)
			}
			time.Sleep(50 * time.Millisecond)
		}
	}
}

// cpu returns the CPU time in ms that the processes of each cgroup have used.
func (n *probedNode) cpu(t *testing.T) map[string]float64 {
	t.Helper()
	used := map[string]float64{}
	dirs, err := os.ReadDir(n.cgroup)
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		if !dir.IsDir() {
			continue
		}
		text, err := os.ReadFile(filepath.Join(n.cgroupOf(dir.Name()), "cpu.stat"))
		if err != nil {
			t.Fatal(err)
		}
		var usec float64
		if _, err := fmt.Sscanf(string(text), "usage_usec %f", &usec); err != nil {
			t.Fatalf("cpu.stat of %s: %v: %s", dir.Name(), err, text)
		}
		used[dir.Name()] = usec / 1000
	}
	return used
}

// census is what has happened on a probed node since it was created, or since another census.
type census struct {
	seconds             float64
	connections, logged int
	probes, failed      int
	tcp, answeredTCP    map[string]int // by program
}

// since returns what has happened since an earlier census.
func (c census) since(earlier census) census {
	c.seconds -= earlier.seconds
	c.connections -= earlier.connections
	c.logged -= earlier.logged
	c.probes -= earlier.probes
	c.failed -= earlier.failed
	c.tcp, c.answeredTCP = maps.Clone(c.tcp), maps.Clone(c.answeredTCP)
	for name := range c.tcp {
		c.tcp[name] -= earlier.tcp[name]
		c.answeredTCP[name] -= earlier.answeredTCP[name]
	}
	return c
}

func (n *probedNode) census(t *testing.T) census {
	t.Helper()
	c := census{seconds: time.Since(n.created).Seconds(), tcp: map[string]int{}, answeredTCP: map[string]int{}}
	outcomes := n.kubelet.counts(t)
	programs := map[string]string{}
	for _, m := range n.members {
		accepted, err := node.AcceptedIn(m.cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		c.connections += accepted
		c.logged += m.requests(t)
		for _, container := range []string{httpContainer, tcpContainer} {
			o := outcomes[Container{m.Pod.Name, container}]
			c.probes += o.Probes
			c.failed += o.Failed
		}
		c.tcp[m.name] += outcomes[Container{m.Pod.Name, tcpContainer}].Probes
		programs[node.Namespace+"/"+m.Pod.Name] = m.name
	}
	if n.flags == nil {
		return c
	}
	s, err := n.Status()
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range s.Attachments {
		for _, e := range a.Endpoints {
			if e.Path == "" {
				c.answeredTCP[programs[a.Pod]] += e.Hits
			}
		}
	}
	return c
}

// remains counts what connections have left behind: sockets in TIME_WAIT on the node and in its pods, and tracked connections.
func (n *probedNode) remains(t *testing.T) (onNode, inPods, tracked int) {
	t.Helper()
	pods := map[netip.Addr]bool{}
	for _, m := range n.members {
		pods[m.Pod.IPv4] = true
		sockets, err := node.TimeWaits(m.cmd.Process.Pid, func(netip.AddrPort) bool { return true })
		if err != nil {
			t.Fatal(err)
		}
		inPods += len(sockets)
	}
	sockets, err := node.TimeWaits(os.Getpid(), func(a netip.AddrPort) bool { return pods[a.Addr()] })
	if err != nil {
		t.Fatal(err)
	}
	network, err := n.members[0].Pod.IPv4.Prefix(24)
	if err != nil {
		t.Fatal(err)
	}
	tracked, err = node.Tracked(network)
	if err != nil {
		t.Fatal(err)
	}
	return len(sockets), inPods, tracked
}

// stated returns the longest times from the start of a failure to the verdict of the HTTP probe, in seconds.
func (n *probedNode) stated(t *testing.T) map[string]float64 {
	t.Helper()
	if n.flags == nil {
		plain := float64(threshold*n.period) + timeout.Seconds()
		return map[string]float64{stopped: plain, erring: plain}
	}
	e, err := n.Endpoint(n.members[0].Pod, podPort, healthPath)
	if err != nil || len(e.Probes) != 1 {
		t.Fatalf("%s: no bound is stated: %v, %+v", n.variant, err, e)
	}
	p := e.Probes[0]
	return map[string]float64{stopped: p.WorstDetectionHang, erring: p.WorstDetection}
}
