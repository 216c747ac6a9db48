// Package simulate drives the freshness policy through days of a pod's life, using models of the kubelet's workers, of
// the kernel side and of the daemon. It compares the result with plain Kubernetes: each probe has a twin that reaches the
// pod at the same moment.
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

// Config describes a pod and its simulation.
type Config struct {
	Probes []probe.Spec
	// Strangers are probes of another pod, with host: set to this one.
	Strangers []probe.Spec
	// Sidecar: another container, which never ends, owns the probed listening sockets and forwards requests.
	Sidecar bool
	// Live is probe.Limits.Live.
	Live int
	// Clients is the interval at which clients send requests to each port; 0 means that there are none.
	Clients  time.Duration
	Defaults probe.Defaults
	Duration time.Duration
	Seed     uint64 // seed of the random numbers; the same seed gives the same pod

	// Broken breaks a rule, so that a test can check that this is noticed.
	Broken Rule
}

// Rule is a rule that can be broken.
type Rule uint8

// Rules.
const (
	None       Rule = iota
	Bound           // answers continue past their bound
	Withdrawal      // the kernel side withdraws nothing
	Failures        // the daemon does not learn of failures
	Gate            // fresh HTTP evidence opens a port that has a TCP probe
	Status          // an error status voids all evidence of its port
	Handover        // connections that are handed over are not observed
	Instance        // a replaced container goes unnoticed, and so does its listener's closing
	Malformed       // a response with status 200 is a success even if it is malformed
	Question        // requests for the same path count as equal, whatever their headers
	Threshold       // one success arms an endpoint, whatever the successThreshold
	WholePod        // closing a listening socket voids only the evidence of its own port
	Queue           // a TCP probe is answered regardless of the listening socket's queue
	Unanswered      // a probe that gets no connection does not count as a failure
	Limit           // any number of TCP probes in a row is answered
	Traffic         // traffic vouches for the pod, whatever it shows
	Due             // traffic answers any number of probes in a row, even past its bound
)

// Result holds the counts of one or more pods.
type Result struct {
	Probes, Answered                 int // of all probes
	HealthyProbes, HealthyAnswered   int // of probes of healthy servers
	Predicted                        int // would have been answered, according to mode observe
	HandedOver                       int
	Refreshes                        int // requests of the daemon's own
	Verdicts, PlainVerdicts          int // rows of failureThreshold failures
	Readied                          int // rows of successThreshold successes, if that is more than one
	Detected                         int // failures that lasted longer than the bound
	Hangs                            int // failures of a pod that served no one, for longer than the bound for these
	Stopped                          int // failures of TCP probes because the queue of a stopped server was full
	WorstDelay, WorstPlain, MaxBound time.Duration
	WorstShare                       float64 // the longest delay, as a share of its bound
	// Violations describes the first few broken promises.
	Violations []string
}

func (r *Result) add(o Result) {
	r.Probes, r.Answered = r.Probes+o.Probes, r.Answered+o.Answered
	r.HealthyProbes, r.HealthyAnswered = r.HealthyProbes+o.HealthyProbes, r.HealthyAnswered+o.HealthyAnswered
	r.Predicted, r.HandedOver = r.Predicted+o.Predicted, r.HandedOver+o.HandedOver
	r.Refreshes += o.Refreshes
	r.Verdicts, r.PlainVerdicts, r.Detected = r.Verdicts+o.Verdicts, r.PlainVerdicts+o.PlainVerdicts, r.Detected+o.Detected
	r.Hangs, r.Readied, r.Stopped = r.Hangs+o.Hangs, r.Readied+o.Readied, r.Stopped+o.Stopped
	r.WorstDelay, r.WorstPlain = max(r.WorstDelay, o.WorstDelay), max(r.WorstPlain, o.WorstPlain)
	r.MaxBound, r.WorstShare = max(r.MaxBound, o.MaxBound), max(r.WorstShare, o.WorstShare)
	if len(r.Violations) < violationsKept {
		r.Violations = append(r.Violations, o.Violations...)
	}
}

const violationsKept = 10

// HitRate returns the share of probes of healthy servers that were answered, from 0 to 1.
func (r Result) HitRate() float64 {
	return float64(r.HealthyAnswered) / float64(max(r.HealthyProbes, 1))
}

// TotalHitRate returns the share of all probes that were answered.
func (r Result) TotalHitRate() float64 { return float64(r.Answered) / float64(max(r.Probes, 1)) }

// epoch is when the simulated clock starts: 0 would mean never.
const epoch = uint64(1000 * time.Hour)

// pod is a simulated pod, with everything that concerns it.
type pod struct {
	Config
	rng    *rand.Rand
	now    uint64
	end    uint64
	events queue

	servers   map[uint16]*server
	instances map[uint16]int                   // of the container that owns a port
	startup   map[string]*startup              // by container
	requests  map[probe.Endpoint]probe.Request // as sent to HTTP endpoints
	asked     []probe.Endpoint                 // parallel to Probes

	daemon
	kernel
	truth
	result Result
}

// truth is what the promises are checked against.
type truth struct {
	successes  map[probe.Endpoint]map[uint64]bool // when each success was requested
	failed     map[probe.Endpoint]uint64          // the last failure that the daemon has read
	voided     map[probe.Endpoint]uint64          // the last error status; of a port, the last reset or refusal
	lastClosed uint64                             // when any listener last closed
	ended      map[uint16]uint64                  // when the owner of the port last closed its listener
}

// Run simulates one pod.
func Run(c Config) Result {
	p := &pod{
		Config: c, rng: rand.New(rand.NewPCG(c.Seed, 1)), now: epoch, end: epoch + uint64(c.Duration),
		servers: map[uint16]*server{}, instances: map[uint16]int{}, startup: map[string]*startup{},
		requests: map[probe.Endpoint]probe.Request{},
		daemon:   newDaemon(),
		kernel:   newKernel(),
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
	for _, s := range p.Probes { // in order, so that a seed always gives the same result
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

// address is the pod's address.
const address = "192.0.2.1"

// request returns the request that the kubelet sends.
func request(s probe.Spec) probe.Request {
	header := http.Header{"User-Agent": {"kube-probe/1.37"}, "Accept": {"*/*"}, "Connection": {"close"}}
	for _, h := range s.Headers {
		header.Add(h.Name, h.Value)
	}
	return probe.Request{Path: s.Path, Host: address + ":" + strconv.Itoa(int(s.Port)), Header: header}
}

// portOf stands for all endpoints of a port.
func portOf(port uint16) probe.Endpoint { return probe.Endpoint{Port: port} }

// scheduleWorld schedules the events that the kernel side and the runtime notice: closing listeners, and ending
// containers.
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

// close closes the listening socket of the owner of a port. With a sidecar that is another port's socket.
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

// visit sends a stranger's probe.
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

// Promises.

func (p *pod) violate(format string, a ...any) {
	if len(p.result.Violations) < violationsKept {
		at := time.Duration(p.now - epoch)
		p.result.Violations = append(p.result.Violations, fmt.Sprintf("seed %d, %s: ", p.Seed, at)+fmt.Sprintf(format, a...))
	}
}

// learn processes a probe that reached the pod.
func (p *pod) learn(e probe.Endpoint, began uint64, x exchange) {
	p.noteSuccess(e, began, x)
	p.report(e, began, x)
}

// noteSuccess records what an exchange shows to succeed. Any response shows that the connection was established.
func (p *pod) noteSuccess(e probe.Endpoint, began uint64, x exchange) {
	if x.succeeded() {
		p.succeeded(e, began)
	}
	tcp := probe.Endpoint{Port: e.Port, Kind: probe.TCP}
	if p.successes[tcp] != nil && x.event == probe.Answered {
		p.succeeded(tcp, began)
	}
}

// succeeded records when a successful request was made.
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

// checkAnswer checks an answer, and the evidence for it, against the truth.
func (p *pod) checkAnswer(e probe.Endpoint, known probe.Evidence) {
	switch {
	case !p.successes[e][known.ObservedAt]:
		p.violate("%s answered with evidence that was not observed", e)
	case p.now > known.ObservedAt+uint64(p.staleness[e]) && !p.vouched(e, known):
		p.violate("%s answered %s after its bound", e, time.Duration(p.now-known.ObservedAt)-p.staleness[e])
	case p.failed[e] >= known.ObservedAt:
		p.violate("%s answered after a failure that the daemon knew of", e)
	case p.ended[e.Port] >= known.ObservedAt:
		p.violate("%s answered after its listener had closed", e)
	}
}

// mayBeAnswered reports whether a probe that begins now should be answered, whatever else its port is asked: its own last
// success is still believable, and the listening socket bears it out. On a port with a TCP probe, that probe's success
// must be believable, too.
func (p *pod) mayBeAnswered(e probe.Endpoint) bool {
	tcp := probe.Endpoint{Port: e.Port, Kind: probe.TCP}
	_, asked := p.successes[tcp]
	return p.believable(e) && (!asked || p.believable(tcp)) && !p.ignored[e.Port] && p.listening(e.Port)
}

// vouched reports whether traffic really vouches for the endpoint now.
func (p *pod) vouched(e probe.Endpoint, known probe.Evidence) bool {
	return p.now < known.TrafficUntil && p.Clients > 0 &&
		p.servers[e.Port].served(e.Port, p.Clients, known.TrafficWindow, p.now, e.Kind == probe.TCP)
}

// hasTraffic reports whether the pod has clients, and their requests may vouch for the endpoint.
func (p *pod) hasTraffic(e probe.Endpoint) bool {
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

// usual returns how long a healthy server takes.
func (p *pod) usual() time.Duration { return time.Millisecond + p.upTo(20*time.Millisecond) }
