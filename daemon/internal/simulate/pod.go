// Package simulate drives the freshness policy through days of a pod's life, with a model of the kubelet's workers, of
// the kernel side and of the daemon, and holds it against what plain Kubernetes would have done: each probe has a twin
// that reaches the pod at the same moment.
package simulate

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"net/http"
	"strconv"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// Config describes a pod and its time.
type Config struct {
	Probes []probe.Spec
	// Strangers are another pod's probes, with host: set to this one.
	Strangers []probe.Spec
	// Sidecar: another container, which never ends, owns the probed listening sockets and passes requests on.
	Sidecar bool
	// Live is probe.Limits.Live.
	Live int
	// Clients: each port has a client every so often; 0 means that it has none.
	Clients  time.Duration
	Defaults probe.Defaults
	Duration time.Duration
	Seed     uint64 // of everything that is drawn; the same seed, the same pod

	// Broken breaks a rule, for a test to see that it is noticed.
	Broken Rule
}

// Rule is one that can be broken.
type Rule uint8

// Rules.
const (
	None       Rule = iota
	Bound           // answers go on after their bound
	Withdrawal      // the kernel side withdraws nothing
	Failures        // the daemon does not learn of failures
	Gate            // fresh HTTP evidence opens a port that has a TCP probe
	Status          // an error status voids the evidence of all of its port
	Handover        // what is handed over is not observed
	Instance        // another container is not noticed, nor its listener's closing
	Malformed       // a response with status 200 is a success, whatever else it is
	Question        // requests of one path are the same, whatever their headers
	Threshold       // one success arms an endpoint, whatever its successThreshold
	WholePod        // a listening socket that closes voids the evidence of its own port only
	Queue           // a TCP probe is answered whatever waits in the listening socket's queue
	Unanswered      // a prober that finds no connection has not failed
	Limit           // any number of TCP probes is answered without one that reaches the pod
	Traffic         // traffic shows that the pod serves, whatever it does
	Due             // any number of probes is answered by traffic, for any time, without one that reaches the pod
)

// Result is what was counted of a pod.
type Result struct {
	Probes, Answered                 int // all of them
	HealthyProbes, HealthyAnswered   int // of servers that were well
	Estimated                        int // would have been answered, as mode observe says
	HandedOver                       int
	Refreshes                        int // the daemon's own requests
	Verdicts, PlainVerdicts          int // failures in a row up to the threshold
	Readied                          int // successes in a row up to a threshold of more than one
	Detected                         int // failures that lasted for longer than the bound
	Stopped                          int // failures of TCP probes because a stopped server's queue was full
	WorstDelay, WorstPlain, MaxBound time.Duration
	WorstShare                       float64 // the longest delay, as a share of its bound
	// Violations are promises that were broken, the first few of them.
	Violations []string
}

func (r *Result) add(o Result) {
	r.Probes, r.Answered = r.Probes+o.Probes, r.Answered+o.Answered
	r.HealthyProbes, r.HealthyAnswered = r.HealthyProbes+o.HealthyProbes, r.HealthyAnswered+o.HealthyAnswered
	r.Estimated, r.HandedOver = r.Estimated+o.Estimated, r.HandedOver+o.HandedOver
	r.Refreshes += o.Refreshes
	r.Verdicts, r.PlainVerdicts, r.Detected = r.Verdicts+o.Verdicts, r.PlainVerdicts+o.PlainVerdicts, r.Detected+o.Detected
	r.Readied, r.Stopped = r.Readied+o.Readied, r.Stopped+o.Stopped
	r.WorstDelay, r.WorstPlain = max(r.WorstDelay, o.WorstDelay), max(r.WorstPlain, o.WorstPlain)
	r.MaxBound, r.WorstShare = max(r.MaxBound, o.MaxBound), max(r.WorstShare, o.WorstShare)
	if len(r.Violations) < violationsKept {
		r.Violations = append(r.Violations, o.Violations...)
	}
}

const violationsKept = 10

// HitRate is the share of probes of healthy servers that were answered, from 0 to 1.
func (r Result) HitRate() float64 {
	return float64(r.HealthyAnswered) / float64(max(r.HealthyProbes, 1))
}

// TotalHitRate is the share of all probes.
func (r Result) TotalHitRate() float64 { return float64(r.Answered) / float64(max(r.Probes, 1)) }

// The simulated clock begins here: 0 means never.
const epoch = uint64(1000 * time.Hour)

// pod is one pod with all that concerns it.
type pod struct {
	Config
	rng    *rand.Rand
	now    uint64
	end    uint64
	events queue

	servers   map[uint16]*server
	instances map[uint16]int                   // of the container behind a port
	startup   map[string]*startup              // by container
	requests  map[probe.Endpoint]probe.Request // of HTTP endpoints, as they are sent
	asked     []probe.Endpoint                 // by Probes

	daemon
	kernel
	truth
	result Result
}

// truth is what there is to be known, for the promises to be held against.
type truth struct {
	successes  map[probe.Endpoint]map[uint64]bool // when each was asked that succeeded
	failed     map[probe.Endpoint]uint64          // the last failure that the daemon has read
	voided     map[probe.Endpoint]uint64          // the last error status; of a port, the last reset or refusal
	lastClosed uint64                             // when a listener last closed, of any port
	ended      map[uint16]uint64                  // when what is behind the port last closed its listener
}

// Run simulates one pod.
func Run(c Config) Result {
	p := &pod{
		Config: c, rng: rand.New(rand.NewPCG(c.Seed, 1)), now: epoch, end: epoch + uint64(c.Duration),
		servers: map[uint16]*server{}, instances: map[uint16]int{}, startup: map[string]*startup{},
		requests: map[probe.Endpoint]probe.Request{},
		daemon:   newDaemon(),
		kernel:   kernel{withdrawn: map[probe.Endpoint]uint64{}, answered: map[uint16]int{}, unanswered: map[uint16][]uint64{}, ignored: map[uint16]bool{}, connectedAt: map[uint16]uint64{}, spoken: map[probe.Endpoint]int{}},
		truth: truth{
			successes: map[probe.Endpoint]map[uint64]bool{}, failed: map[probe.Endpoint]uint64{},
			voided: map[probe.Endpoint]uint64{}, ended: map[uint16]uint64{},
		},
	}
	p.prepare()
	for p.events.Len() > 0 && p.now < p.end {
		e := heap.Pop(&p.events).(event)
		p.now = e.at
		e.do()
	}
	return p.result
}

func (p *pod) prepare() {
	paths := map[uint16][]string{}
	timeouts := map[uint16]time.Duration{}
	for _, s := range p.Probes {
		paths[s.Port] = append(paths[s.Port], s.Path)
		timeouts[s.Port] = max(timeouts[s.Port], s.Timeout)
		p.successes[p.endpointOf(s)] = map[uint64]bool{}
		if p.startup[s.Container] == nil {
			p.startup[s.Container] = &startup{succeeded: -1}
		}
		p.startup[s.Container].probed = p.startup[s.Container].probed || s.Type == probe.Startup
	}
	for _, s := range p.Probes { // in their order, so that a seed gives the same
		e := p.endpointOf(s)
		p.asked, p.requests[e] = append(p.asked, e), request(s)
		if p.servers[s.Port] == nil {
			p.servers[s.Port] = newServer(p.rng, epoch, p.end, paths[s.Port], timeouts[s.Port], p.Sidecar)
			p.scheduleWorld(s.Port)
		}
	}
	p.startDaemon()
	p.after(p.mean(8*time.Hour), p.killDaemon)
	for _, s := range p.Probes {
		p.newWorker(s)
	}
	for _, s := range p.Strangers {
		e := p.endpointOf(s)
		p.requests[e] = request(s)
		if p.successes[e] == nil {
			p.successes[e] = map[uint64]bool{}
		}
		p.after(p.upTo(s.Period), func() { p.visit(s, e) })
	}
}

// address is the pod's.
const address = "192.0.2.1"

// request is what the kubelet sends.
func request(s probe.Spec) probe.Request {
	header := http.Header{"User-Agent": {"kube-probe/1.37"}, "Accept": {"*/*"}, "Connection": {"close"}}
	for _, h := range s.Headers {
		header.Add(h.Name, h.Value)
	}
	return probe.Request{Path: s.Path, Host: address + ":" + strconv.Itoa(int(s.Port)), Header: header}
}

// portOf stands for all endpoints of a port.
func portOf(port uint16) probe.Endpoint { return probe.Endpoint{Port: port} }

// scheduleWorld has the kernel side and the runtime notice what they do: listeners that close, containers that end.
func (p *pod) scheduleWorld(port uint16) {
	for _, phase := range p.servers[port].phases {
		switch phase.condition {
		case closed:
			p.at(phase.from, func() { p.close(port) })
		case down:
			p.at(phase.from, func() { p.close(port) })
			p.at(phase.to, func() {
				p.instances[port]++
				n := p.instances[port]
				p.after(p.upTo(10*time.Second), func() { p.learnInstance(port, n) }) // the kubelet is polled
			})
		}
	}
}

// close closes the listening socket of what is behind a port. With a sidecar that is another port's.
func (p *pod) close(port uint16) {
	p.ended[port], p.lastClosed = p.now, p.now
	switch p.Broken {
	case Withdrawal, Instance:
	case WholePod:
		if !p.Sidecar {
			p.withdrawn[portOf(port)] = p.now
		}
	default:
		p.podWithdrawn = p.now
	}
}

// visit is a stranger's probe.
func (p *pod) visit(s probe.Spec, e probe.Endpoint) {
	began, known := p.now, p.evidence[e]
	answered, x := p.connect(e, s.Timeout, p.usual())
	if answered {
		p.checkAnswer(e, known)
	}
	p.at(max(x.end, p.now), func() {
		if !answered {
			p.learn(e, began, x)
		}
		p.at(max(began+uint64(s.Period), p.now), func() { p.visit(s, e) })
	})
}

// What is promised.

func (p *pod) violate(format string, a ...any) {
	if len(p.result.Violations) < violationsKept {
		at := time.Duration(p.now - epoch)
		p.result.Violations = append(p.result.Violations, fmt.Sprintf("seed %d, %s: ", p.Seed, at)+fmt.Sprintf(format, a...))
	}
}

// learn takes note of a probe that reached the pod.
func (p *pod) learn(e probe.Endpoint, began uint64, x exchange) {
	p.noteSuccess(e, began, x)
	p.report(e, began, x)
}

// noteSuccess notes what an exchange shows to succeed. An answer of any kind shows that a connection came about.
func (p *pod) noteSuccess(e probe.Endpoint, began uint64, x exchange) {
	if x.succeeded() {
		p.succeeded(e, began)
	}
	tcp := probe.Endpoint{Port: e.Port, Kind: probe.TCP}
	if p.successes[tcp] != nil && x.event == probe.Answered {
		p.succeeded(tcp, began)
	}
}

// succeeded notes when something was asked for that succeeded.
func (p *pod) succeeded(e probe.Endpoint, asked uint64) {
	const many, longAgo = 4096, uint64(time.Hour)
	if len(p.successes[e]) == many {
		for old := range p.successes[e] {
			if old+longAgo < p.now {
				delete(p.successes[e], old)
			}
		}
	}
	p.successes[e][asked] = true
}

// checkAnswer holds an answer, and the evidence for it, against the truth.
func (p *pod) checkAnswer(e probe.Endpoint, known probe.Evidence) {
	switch {
	case !p.successes[e][known.ObservedAt]:
		p.violate("%s answered with what was not observed", e)
	case p.now > known.ObservedAt+uint64(p.staleness[e]) && !p.truly(e, known):
		p.violate("%s answered %s after its bound", e, time.Duration(p.now-known.ObservedAt)-p.staleness[e])
	case p.failed[e] >= known.ObservedAt:
		p.violate("%s answered after a failure that the daemon knew", e)
	case p.ended[e.Port] >= known.ObservedAt:
		p.violate("%s answered after its listener had closed", e)
	}
}

// mayBeAnswered reports whether a probe that begins now need not reach the pod, whatever else its port is asked: its own
// last success is still to be believed, and the listening socket bears it out. For a request on a port that has a TCP probe
// that one's must be believable, too.
func (p *pod) mayBeAnswered(e probe.Endpoint) bool {
	tcp := probe.Endpoint{Port: e.Port, Kind: probe.TCP}
	_, asked := p.successes[tcp]
	return p.believable(e) && (!asked || p.believable(tcp)) && !p.ignored[e.Port] && p.listening(e.Port)
}

// truly reports whether traffic really speaks for the endpoint now.
func (p *pod) truly(e probe.Endpoint, known probe.Evidence) bool {
	return p.now < known.TrafficUntil && p.Clients > 0 &&
		p.servers[e.Port].served(e.Port, p.Clients, known.TrafficWindow, p.now, e.Kind == probe.TCP)
}

// spokenFor reports whether traffic may speak for the endpoint, and there is some.
func (p *pod) spokenFor(e probe.Endpoint) bool {
	return p.traffic[e] > 0 && p.Clients > 0
}

func (p *pod) believable(e probe.Endpoint) bool {
	known := p.evidence[e]
	return known.FreshUntil > p.now && !p.due(e) && known.ObservedAt > max(p.voided[e], p.voided[portOf(e.Port)], p.lastClosed)
}

// Time.

type event struct {
	at, order uint64
	do        func()
}

type queue struct {
	events []event
	count  uint64
}

func (q *queue) Len() int { return len(q.events) }
func (q *queue) Less(i, j int) bool {
	a, b := q.events[i], q.events[j]
	return a.at < b.at || a.at == b.at && a.order < b.order
}
func (q *queue) Swap(i, j int) { q.events[i], q.events[j] = q.events[j], q.events[i] }
func (q *queue) Push(e any)    { q.events = append(q.events, e.(event)) }
func (q *queue) Pop() any {
	last := q.events[len(q.events)-1]
	q.events[len(q.events)-1] = event{}
	q.events = q.events[:len(q.events)-1]
	return last
}

func (p *pod) at(t uint64, do func()) {
	p.events.count++
	heap.Push(&p.events, event{t, p.events.count, do})
}

func (p *pod) after(d time.Duration, do func()) { p.at(p.now+uint64(d), do) }

func (p *pod) upTo(d time.Duration) time.Duration {
	return time.Duration(p.rng.Float64() * float64(d))
}

func (p *pod) mean(d time.Duration) time.Duration {
	return time.Duration(p.rng.ExpFloat64() * float64(d))
}

// usual is how long a server takes that is well.
func (p *pod) usual() time.Duration { return time.Millisecond + p.upTo(20*time.Millisecond) }
