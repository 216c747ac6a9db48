package bench

import (
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

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
	unprobed variant = "no probes"
	plain1   variant = "plain, 1 s"
	plain2   variant = "plain, 2 s"
	default1 variant = "default, 1 s"
	stale1   variant = "staleness 5, 1 s"
	refresh1 variant = "refresh, 1 s"
	traffic1 variant = "traffic, 1 s"
)

const timeout = time.Second // of probes

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

// probedNode is a node whose pods are probed under a policy, with cgroups of its own.
type probedNode struct {
	policy
	*node.Node
	kubelet *kubelet
	members []*member
	cgroups map[string]string // directories by name
	created time.Time
}

const (
	kubeletCgroup = "kubelet"
	daemonCgroup  = "daemon"
)

// cgroupsFor names the cgroups of a node whose pods run these servers.
func cgroupsFor(servers []program) []string {
	names := []string{kubeletCgroup, daemonCgroup}
	for _, server := range servers {
		names = append(names, server.name)
	}
	return names
}

// probes returns the probes of a pod: one by HTTP and one by TCP.
func (p policy) probes() []node.Probe {
	if p.period == 0 {
		return nil
	}
	byTCP := node.Probe{Container: tcpContainer, Port: podPort, PeriodSeconds: p.period, TimeoutSeconds: int(timeout.Seconds())}
	byHTTP := byTCP
	byHTTP.Container, byHTTP.Path = httpContainer, healthPath
	return []node.Probe{byHTTP, byTCP}
}

const httpContainer, tcpContainer = "http", "tcp"

// newProbedNode creates a node with a number of pods of each server, which have the probes of a template.
func newProbedNode(t *testing.T, p policy, template node.Probed, podsEach int, servers ...program) *probedNode {
	t.Helper()
	inner, err := machine.NewNode(node.PTP)
	if err != nil {
		t.Fatal(err)
	}
	n := &probedNode{policy: p, Node: inner, created: time.Now(), cgroups: map[string]string{}}
	if p.flags == nil {
		err = n.WithoutProbelet()
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range cgroupsFor(servers) {
		if n.cgroups[name], err = n.NewCgroup(name); err != nil {
			t.Fatal(err)
		}
	}
	var specs []node.Probed
	for _, server := range servers {
		for range podsEach {
			m := n.newMember(t, server, template)
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
	n.kubelet = startKubelet(t, n.cgroups[kubeletCgroup])
	return n
}

func (n *probedNode) newMember(t *testing.T, server program, template node.Probed) *member {
	t.Helper()
	pod, err := n.NewPod()
	if err == nil {
		err = pod.Add()
	}
	if err != nil {
		t.Fatal(err)
	}
	template.Pod = pod
	m := &member{program: server, dir: t.TempDir(), Probed: template}
	if err := os.WriteFile(filepath.Join(m.dir, healthyFile), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if m.cmd, err = server.command(m.dir); err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(m.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() //nolint:errcheck // the server's
	m.cmd.Stdout, m.cmd.Stderr = log, log
	if err := role.StartCommand(m.cmd, pod.Netns, n.cgroups[server.name]); err != nil {
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
	daemon, err := n.StartDaemon(append([]string{"--prober", "cgroup:" + n.cgroups[kubeletCgroup]}, n.flags...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(daemon.Kill)
	if err := node.MoveToCgroup(daemon.Pid(), n.cgroups[daemonCgroup]); err != nil {
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
	for name, dir := range n.cgroups {
		text, err := os.ReadFile(filepath.Join(dir, "cpu.stat"))
		if err != nil {
			t.Fatal(err)
		}
		var usec float64
		if _, err := fmt.Sscanf(string(text), "usage_usec %f", &usec); err != nil {
			t.Fatalf("cpu.stat of %s: %v: %s", name, err, text)
		}
		used[name] = usec / 1000
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
	outcomes, answered := n.kubelet.counts(t), n.answeredTCP(t)
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
		c.answeredTCP[m.name] += answered[m.Pod.Name]
	}
	return c
}

// answeredTCP returns how many TCP probes were answered in the kernel, by pod.
func (n *probedNode) answeredTCP(t *testing.T) map[string]int {
	t.Helper()
	if n.flags == nil {
		return nil
	}
	s, err := n.Status()
	if err != nil {
		t.Fatal(err)
	}
	answered := map[string]int{}
	for _, a := range s.Attachments {
		for _, e := range a.Endpoints {
			if e.Path == "" {
				answered[strings.TrimPrefix(a.Pod, node.Namespace+"/")] += e.Hits
			}
		}
	}
	return answered
}

// remains counts what connections have left behind: sockets in TIME_WAIT on the node and in its pods, and tracked connections.
func (n *probedNode) remains(t *testing.T) (onNode, inPods, tracked int) {
	t.Helper()
	pods := map[netip.Addr]bool{}
	for _, m := range n.members {
		pods[m.Pod.IPv4] = true
		sockets, err := node.TimeWaitWhere(m.cmd.Process.Pid, func(netip.AddrPort) bool { return true })
		if err != nil {
			t.Fatal(err)
		}
		inPods += len(sockets)
	}
	sockets, err := node.TimeWaitWhere(os.Getpid(), func(a netip.AddrPort) bool { return pods[a.Addr()] })
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

// stated returns the longest times from the start of a failure to the verdict of the HTTP probe, in seconds, by failure (stopped,
// erring).
func (n *probedNode) stated(t *testing.T) map[string]float64 {
	t.Helper()
	if n.flags == nil {
		plain := float64(node.FailureThreshold*n.period) + timeout.Seconds()
		return map[string]float64{stopped: plain, erring: plain}
	}
	e, err := n.Endpoint(n.members[0].Pod, podPort, healthPath)
	if err != nil || len(e.Probes) != 1 {
		t.Fatalf("%s: no bound is stated: %v, %+v", n.variant, err, e)
	}
	p := e.Probes[0]
	return map[string]float64{stopped: p.WorstDetectionHang, erring: p.WorstDetection}
}
