// Package simulate drives the freshness policy through days of a pod's life, with a model of the kubelet's workers, of
// the kernel side and of the daemon, and holds it against what plain Kubernetes would have done: each probe has a twin
// that reaches the pod at the same moment.
package simulate

import (
	"cmp"
	"container/heap"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strconv"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// Config is of a pod and its time.
type Config struct {
	Probes   []probe.Spec
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
	Connection      // a connection is kept for ever, and an answer on it taken for one on a new connection
)

// Result is what was counted of a pod.
type Result struct {
	Probes, Answered                 int // all of them
	HealthyProbes, HealthyAnswered   int // of servers that were well
	HandedOver                       int
	Refreshes, Connections           int // of the daemon's own: requests, and connections opened for them
	Verdicts, PlainVerdicts          int // failures in a row up to the threshold
	Detected                         int // failures that lasted for longer than the bound
	WorstDelay, WorstPlain, MaxBound time.Duration
	WorstShare                       float64 // the longest delay, as a share of its bound
	// Violations are promises that were broken, the first few of them.
	Violations []string
}

func (r *Result) add(o Result) {
	r.Probes, r.Answered = r.Probes+o.Probes, r.Answered+o.Answered
	r.HealthyProbes, r.HealthyAnswered = r.HealthyProbes+o.HealthyProbes, r.HealthyAnswered+o.HealthyAnswered
	r.HandedOver += o.HandedOver
	r.Refreshes, r.Connections = r.Refreshes+o.Refreshes, r.Connections+o.Connections
	r.Verdicts, r.PlainVerdicts, r.Detected = r.Verdicts+o.Verdicts, r.PlainVerdicts+o.PlainVerdicts, r.Detected+o.Detected
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

// limits are the kernel side's.
var limits = probe.Limits{Path: 255, Request: 1024, Records: 64}

// pod is one pod with all that concerns it.
type pod struct {
	Config
	rng    *rand.Rand
	now    uint64
	end    uint64
	events queue

	servers   map[uint16]*server
	instances map[uint16]int      // of the container behind a port
	startup   map[string]*startup // by container

	// The daemon. While it is down the tracker is nil.
	tracker    *probe.Tracker
	known      map[uint16]int // instances that its source has told of
	refreshing map[probe.Endpoint]*asker
	staleness  map[probe.Endpoint]time.Duration

	// The kernel side: what the daemon wrote, and when the evidence of an endpoint was voided, or of a whole port (no
	// kind).
	evidence  map[probe.Endpoint]probe.Evidence
	gates     map[uint16]probe.Gate
	withdrawn map[probe.Endpoint]uint64

	// The truth.
	successes map[probe.Endpoint]map[uint64]bool // when each was asked that succeeded
	failed    map[probe.Endpoint]uint64          // the last failure that the daemon has read
	voided    map[probe.Endpoint]uint64          // the last error status; of a port, the last reset, refusal or closing
	ended     map[uint16]uint64                  // when the last listener closed

	result Result
}

// Run simulates one pod.
func Run(c Config) Result {
	p := &pod{
		Config: c, rng: rand.New(rand.NewPCG(c.Seed, 1)), now: epoch, end: epoch + uint64(c.Duration),
		servers: map[uint16]*server{}, instances: map[uint16]int{}, startup: map[string]*startup{}, known: map[uint16]int{},
		refreshing: map[probe.Endpoint]*asker{}, staleness: map[probe.Endpoint]time.Duration{},
		withdrawn: map[probe.Endpoint]uint64{}, failed: map[probe.Endpoint]uint64{},
		voided: map[probe.Endpoint]uint64{}, ended: map[uint16]uint64{},
		successes: map[probe.Endpoint]map[uint64]bool{},
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
		p.successes[endpointOf(s)] = map[uint64]bool{}
		if p.startup[s.Container] == nil {
			p.startup[s.Container] = &startup{succeeded: -1}
		}
		p.startup[s.Container].probed = p.startup[s.Container].probed || s.Type == probe.Startup
	}
	for _, s := range p.Probes { // in their order, so that a seed gives the same
		if p.servers[s.Port] == nil {
			p.servers[s.Port] = newServer(p.rng, epoch, p.end, paths[s.Port], timeouts[s.Port])
			p.scheduleWorld(s.Port)
		}
	}
	p.startDaemon()
	p.after(p.mean(8*time.Hour), p.killDaemon)
	for i := range p.Probes {
		p.newWorker(p.Probes[i])
	}
}

func endpointOf(s probe.Spec) probe.Endpoint {
	return probe.Endpoint{Port: s.Port, Kind: s.Kind, Path: s.Path}
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

func (p *pod) close(port uint16) {
	p.ended[port] = p.now
	p.voided[portOf(port)] = p.now
	if p.Broken != Withdrawal && p.Broken != Instance {
		p.withdrawn[portOf(port)] = p.now
	}
}

// The daemon.

func (p *pod) startDaemon() {
	p.tracker = probe.NewTracker()
	p.setEndpoints()
	// Evidence outlives a daemon in the maps.
	for endpoint, evidence := range p.evidence {
		p.tracker.Restore(endpoint, evidence, p.now)
	}
	p.publish()
}

func (p *pod) setEndpoints() {
	specs := make([]probe.Spec, len(p.Probes))
	for i, s := range p.Probes {
		s.Instance = strconv.Itoa(p.known[s.Port] + 1)
		specs[i] = s
	}
	settings := p.Defaults.Settings(nil)
	pod := probe.Pod{Namespace: "n", Name: "p", IPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Probes: specs}
	endpoints, err := probe.Endpoints(pod, settings, limits)
	if err != nil {
		panic(err) // scenarios have few endpoints
	}
	for _, e := range endpoints {
		p.staleness[e.Endpoint] = e.Staleness
	}
	p.tracker.SetEndpoints(endpoints, p.now)
}

func (p *pod) learnInstance(port uint16, n int) {
	if p.Broken == Instance {
		return
	}
	p.known[port] = n
	if p.tracker != nil {
		p.setEndpoints()
		p.publish()
	}
}

func (p *pod) killDaemon() {
	p.tracker = nil
	clear(p.refreshing)
	p.after(p.upTo(time.Minute), func() {
		p.startDaemon()
		p.after(p.mean(8*time.Hour), p.killDaemon)
	})
}

// observe is the daemon's reading of an outcome.
func (p *pod) observe(o probe.Outcome) {
	if p.tracker == nil {
		return
	}
	failure := o.Event == probe.Reset || o.Event == probe.NoAnswer || o.Status >= 400
	if failure {
		for endpoint := range p.successes {
			wholePort := o.Endpoint.Kind == "" || o.Event == probe.Reset
			if o.Endpoint == endpoint || wholePort && o.Endpoint.Port == endpoint.Port {
				p.failed[endpoint] = max(p.failed[endpoint], o.ObservedAt)
			}
		}
	}
	if failure && p.Broken == Failures {
		return
	}
	p.tracker.Observe(o)
	p.publish()
}

// publish writes what is known into the maps, and asks what is to be refreshed.
func (p *pod) publish() {
	p.evidence, p.gates = p.tracker.Evidence(), p.tracker.Gates()
	wanted := map[probe.Endpoint]bool{}
	for _, s := range p.tracker.Refreshing() {
		wanted[s.Endpoint] = true
		if p.refreshing[s.Endpoint] == nil {
			a := &asker{spec: s}
			p.refreshing[s.Endpoint] = a
			p.after(p.upTo(s.Refresh), func() { p.refresh(a) })
		}
	}
	for endpoint := range p.refreshing {
		if !wanted[endpoint] {
			delete(p.refreshing, endpoint)
		}
	}
}

// asker is the daemon's own request of an endpoint, again and again.
type asker struct {
	spec        probe.EndpointSpec
	connectedAt uint64 // 0: there is no connection
	instance    int    // that it is with
}

// refresh is as package refresh does it.
func (p *pod) refresh(a *asker) {
	if p.refreshing[a.spec.Endpoint] != a {
		return
	}
	s := a.spec
	began := p.now
	keep := max(0, s.Staleness-s.Refresh-s.Timeout)
	if p.Broken == Connection {
		keep = time.Duration(p.end)
	}
	lost := a.instance != p.instances[s.Port]
	if a.connectedAt == 0 || lost || s.Kind == probe.TCP || time.Duration(began-a.connectedAt) > keep {
		a.connectedAt = 0
	}
	kept := a.connectedAt != 0
	if !kept {
		a.connectedAt, a.instance = began, p.instances[s.Port]
		p.result.Connections++
	}
	p.result.Refreshes++
	x := p.servers[s.Port].ask(began, s.Endpoint, s.Timeout, kept, p.usual())
	p.at(x.end, func() {
		if p.refreshing[s.Endpoint] != a {
			return
		}
		o := probe.Outcome{
			Endpoint: s.Endpoint, Event: x.event, Status: x.status, ObservedAt: p.now, Refresh: true,
			Duration: time.Duration(p.now - began),
		}
		if x.succeeded() {
			if o.ConnectedAt = a.connectedAt; p.Broken == Connection {
				o.ConnectedAt = 0
			}
			p.succeeded(s.Endpoint, cmp.Or(o.ConnectedAt, began))
		} else {
			a.connectedAt = 0
		}
		next := began + uint64(s.Refresh-p.upTo(s.Refresh/5))
		p.at(max(next, p.now), func() { p.refresh(a) })
		p.observe(o)
	})
}

// The kernel side.

// taken reports whether a connection that comes now is taken.
func (p *pod) taken(port uint16) bool {
	g := p.gates[port]
	if p.Broken == Gate {
		for e, known := range p.evidence {
			if e.Port == port {
				g = probe.Gate{ObservedAt: max(g.ObservedAt, known.ObservedAt), FreshUntil: max(g.FreshUntil, known.FreshUntil)}
			}
		}
	}
	fresh := g.FreshUntil > p.now || p.Broken == Bound && g.FreshUntil != 0
	return fresh && g.ObservedAt > p.withdrawn[portOf(port)]
}

// answerable reports whether a request on a connection that was taken just now is answered.
func (p *pod) answerable(e probe.Endpoint) bool {
	known := p.evidence[e]
	fresh := known.FreshUntil > p.now || p.Broken == Bound && known.FreshUntil != 0
	return known.Result == probe.Success && fresh && known.ObservedAt > max(p.withdrawn[e], p.withdrawn[portOf(e.Port)])
}

// report tells the daemon what became of a probe that reached the pod. An error status is about what was asked, a reset or
// refusal about the whole port.
func (p *pod) report(e probe.Endpoint, began uint64, x exchange) {
	o := probe.Outcome{Endpoint: e, Event: x.event, Status: x.status, ObservedAt: p.now, Duration: time.Duration(p.now - began)}
	if x.event == probe.Reset && x.end-began <= uint64(refusal) {
		o.Endpoint = portOf(e.Port)
	}
	if x.event == probe.Reset || x.event == probe.Answered && x.status >= 300 {
		about := e
		if x.event == probe.Reset {
			about = portOf(e.Port)
		}
		p.voided[about] = p.now
		if p.Broken == Status {
			about = portOf(e.Port)
		}
		if p.Broken != Withdrawal {
			p.withdrawn[about] = p.now
		}
	}
	const gather = uint64(50 * time.Millisecond) // the daemon reads them in their order, but not at once
	p.at((p.now/gather+1)*gather, func() { p.observe(o) })
}

// What is promised.

func (p *pod) violate(format string, a ...any) {
	if len(p.result.Violations) < violationsKept {
		at := time.Duration(p.now - epoch)
		p.result.Violations = append(p.result.Violations, fmt.Sprintf("seed %d, %s: ", p.Seed, at)+fmt.Sprintf(format, a...))
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

// checkAnswer holds an answer against the truth.
func (p *pod) checkAnswer(e probe.Endpoint) {
	known := p.evidence[e]
	switch {
	case !p.successes[e][known.ObservedAt]:
		p.violate("%s answered with what was not observed", e)
	case p.now > known.ObservedAt+uint64(p.staleness[e]):
		p.violate("%s answered %s after its bound", e, time.Duration(p.now-known.ObservedAt)-p.staleness[e])
	case p.failed[e] >= known.ObservedAt:
		p.violate("%s answered after a failure that the daemon knew", e)
	case p.ended[e.Port] >= known.ObservedAt:
		p.violate("%s answered after its listener had closed", e)
	}
}

// checkReached holds a probe that reached the pod against the truth: whatever else its port is asked, it need not have, if
// its own last success was still to be believed. For a request on a port that has a TCP probe, so must be that one's.
func (p *pod) checkReached(e probe.Endpoint) {
	tcp := probe.Endpoint{Port: e.Port, Kind: probe.TCP}
	_, asked := p.successes[tcp]
	if p.believable(e) && (!asked || p.believable(tcp)) {
		p.violate("%s reached the pod though it could have been answered", e)
	}
}

func (p *pod) believable(e probe.Endpoint) bool {
	known := p.evidence[e]
	return known.FreshUntil > p.now && known.ObservedAt > max(p.voided[e], p.voided[portOf(e.Port)])
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
