package main

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/probelet/probelet/e2e/harness/node"
	"github.com/probelet/probelet/e2e/harness/role"
)

const (
	httpPort = 8080
	httpPath = "/healthz"
	tcpPort  = 9090

	// longPeriod keeps evidence fresh for longer than all runs take.
	longPeriod = 600
)

// scene is a node with two pods, each running a server, and a prober.
type scene struct {
	node    *node.Node
	pods    [2]*node.Pod
	servers [2]*role.Server
	prober  *role.Client
	daemon  *node.Daemon
}

func setUp(m *node.Machine) (*scene, error) {
	n, err := m.NewNode(node.PTP)
	if err != nil {
		return nil, err
	}
	s := &scene{node: n}
	for i := range s.pods {
		if s.pods[i], err = n.NewPod(); err != nil {
			return nil, err
		}
		if err := s.pods[i].Add(); err != nil {
			return nil, err
		}
		if s.servers[i], err = role.StartServer(s.pods[i].Netns); err != nil {
			return nil, err
		}
		if err := s.servers[i].Listen(httpPort, tcpPort); err != nil {
			return nil, err
		}
		progress("%s: %s and %s, through ptp and probelet", s.pods[i].Name, s.pods[i].IPv4, s.pods[i].IPv6)
	}
	if s.prober, err = role.StartClient(n.CgroupPath(node.ProberCgroup)); err != nil {
		return nil, err
	}
	if err := n.WriteSpecs(); err != nil {
		return nil, err
	}
	if s.daemon, err = n.StartDaemon(); err != nil {
		return nil, err
	}
	return s, nil
}

// tearDown ends everything in the order in which a node would. Whatever it fails to end dies with the namespaces.
func (s *scene) tearDown() error {
	var errs []error
	for i := range s.pods {
		s.servers[i].Stop()
		errs = append(errs, s.pods[i].Del(), s.pods[i].Remove())
	}
	s.prober.Stop()
	return errors.Join(append(errs, s.daemon.Stop())...)
}

// printStatus prints the status, after probing each endpoint twice so that there is something to see.
func (s *scene) printStatus(w io.Writer) error {
	for _, q := range s.questions() {
		if err := s.makeFresh(q); err != nil {
			return err
		}
		if _, err := s.prober.Probe(q.probes(1)); err != nil {
			return err
		}
	}
	table, err := s.node.StatusTable()
	if err == nil {
		_, err = fmt.Fprintf(w, "\nprobeletctl status:\n\n%s\n", table)
	}
	return err
}

// Values of result.Entry: what the kernel knows about the endpoint.
const (
	absent = "absent"
	fresh  = "fresh"
)

// result is the outcome of a run.
type result struct {
	Probe          string  `json:"probe"`
	Family         string  `json:"family"`
	Entry          string  `json:"entry"`
	N              int     `json:"n"`
	Failures       int     `json:"failures"`
	P50            float64 `json:"p50_us"`
	P99            float64 `json:"p99_us"`
	TimeWaitHost   int     `json:"time_wait_host"`
	TimeWaitPod    int     `json:"time_wait_pod"`
	ServerRequests int     `json:"server_requests"` // TCP: connections
	Answered       int     `json:"answered"`

	segments int // received by the pod
	messages []string
}

// question is a probed endpoint of one of the pods.
type question struct {
	probe, family string
	pod           *node.Pod
	server        *role.Server
	address       netip.Addr
	port          int
	path          string
}

func (s *scene) questions() []question {
	var questions []question
	for i, family := range []string{"ipv4", "ipv6"} {
		q := question{family: family, pod: s.pods[i], server: s.servers[i], address: s.pods[i].IPv4}
		if family == "ipv6" {
			q.address = s.pods[i].IPv6
		}
		q.probe, q.port, q.path = "http", httpPort, httpPath
		questions = append(questions, q)
		q.probe, q.port, q.path = "tcp", tcpPort, ""
		questions = append(questions, q)
	}
	return questions
}

// runAll measures each question twice in a row, first with fresh evidence: the run without it leaves sockets in TIME_WAIT,
// which would make it harder for the next run to find a port.
func (s *scene) runAll(n int) ([]result, error) {
	var results []result
	for _, q := range s.questions() {
		if err := s.makeFresh(q); err != nil {
			return nil, err
		}
		answered, err := s.run(q, fresh, n)
		if err != nil {
			return nil, err
		}
		unanswered, err := s.runAbsent(q, n)
		if err != nil {
			return nil, err
		}
		results = append(results, unanswered, answered)
	}
	return results, nil
}

func (s *scene) runAbsent(q question, n int) (result, error) {
	if err := s.node.WriteSpecs(); err != nil {
		return result{}, err
	}
	if err := s.node.AwaitState(q.pod, q.port, q.path, node.Absent); err != nil {
		return result{}, err
	}
	return s.run(q, absent, n)
}

// makeFresh lets the kernel observe one probe of an endpoint.
func (s *scene) makeFresh(q question) error {
	var pods []node.Probed
	for i, p := range s.pods {
		pods = append(pods, node.Probed{Pod: p, IPv6: i == 1, Readiness: []node.Probe{
			{Port: httpPort, Path: httpPath, PeriodSeconds: longPeriod, TimeoutSeconds: 1},
			{Port: tcpPort, PeriodSeconds: longPeriod, TimeoutSeconds: 1},
		}})
	}
	if err := s.node.WriteSpecs(pods...); err != nil {
		return err
	}
	if err := s.node.AwaitState(q.pod, q.port, q.path, node.Unknown, node.Stale, node.Fresh); err != nil {
		return err
	}
	r, err := s.prober.Probe(q.probes(1))
	if err != nil || r.Failures > 0 {
		return fmt.Errorf("the first %s probe of %s failed: %q (%w)", q.probe, q.pod.Name, r.Messages, err)
	}
	return s.node.AwaitState(q.pod, q.port, q.path, node.Fresh)
}

func (q question) probes(n int) role.Probes {
	return role.Probes{Address: q.address.String(), Port: q.port, Path: q.path, Count: n, Timeout: time.Second}
}

// reading holds the counts for a question at one time.
type reading struct {
	host, pod map[node.Connection]bool // in TIME_WAIT
	seen      role.Seen
	segments  int
	answered  int
}

func (s *scene) read(q question) (r reading, err error) {
	endpoint := netip.AddrPortFrom(q.address, uint16(q.port))
	var errs [5]error
	r.host, errs[0] = node.TimeWaitOf(os.Getpid(), endpoint)
	r.pod, errs[1] = node.TimeWaitOf(q.server.Pid(), endpoint)
	r.seen, errs[2] = q.server.Seen(q.port)
	r.segments, errs[3] = node.SegmentsIn(q.server.Pid())
	var status node.Status
	status, errs[4] = s.node.Status()
	r.answered = status.Counters["answered_"+q.probe]
	return r, errors.Join(errs[:]...)
}

func (s *scene) run(q question, entry string, n int) (result, error) {
	progress("%d %s probes over %s, entry %s", n, q.probe, q.family, entry)
	before, err := s.read(q)
	if err != nil {
		return result{}, err
	}
	probed, err := s.prober.Probe(q.probes(n))
	if err != nil {
		return result{}, err
	}
	after, err := s.read(q)
	if err != nil {
		return result{}, err
	}
	slices.Sort(probed.Latencies)
	r := result{
		Probe: q.probe, Family: q.family, Entry: entry, N: n,
		Failures:       probed.Failures,
		messages:       probed.Messages,
		P50:            percentile(probed.Latencies, 50),
		P99:            percentile(probed.Latencies, 99),
		TimeWaitHost:   newIn(after.host, before.host),
		TimeWaitPod:    newIn(after.pod, before.pod),
		ServerRequests: after.seen.Requests - before.seen.Requests,
		Answered:       after.answered - before.answered,
		segments:       after.segments - before.segments,
	}
	if q.probe == "tcp" {
		r.ServerRequests = after.seen.Connections - before.seen.Connections
	}
	return r, nil
}

// percentile returns a percentile of sorted durations, in microseconds.
func percentile(sorted []time.Duration, p int) float64 {
	return float64(sorted[(len(sorted)-1)*p/100].Nanoseconds()) / 1000
}

func newIn(after, before map[node.Connection]bool) int {
	count := 0
	for c := range after {
		if !before[c] {
			count++
		}
	}
	return count
}
