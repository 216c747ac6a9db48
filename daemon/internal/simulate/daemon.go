package simulate

import (
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"strconv"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// daemon models probeletd. The tracker is nil while the daemon is down.
type daemon struct {
	tracker    *probe.Tracker
	shadow     *probe.Shadow  // sees only the twins, because in mode observe all probes reach the pod
	known      map[uint16]int // container instances reported by its source
	refreshing map[probe.Endpoint]*asker
	staleness  map[probe.Endpoint]time.Duration
	traffic    map[probe.Endpoint]int // probe.EndpointSpec.Traffic
}

func newDaemon() daemon {
	return daemon{
		shadow: probe.NewShadow(), known: map[uint16]int{}, refreshing: map[probe.Endpoint]*asker{},
		staleness: map[probe.Endpoint]time.Duration{}, traffic: map[probe.Endpoint]int{},
	}
}

func (p *pod) startDaemon() {
	p.tracker = probe.NewTracker()
	p.setEndpoints()
	// Evidence in the maps outlives a daemon.
	for endpoint, evidence := range p.evidence {
		p.tracker.Restore(endpoint, evidence, p.now)
	}
	p.publish()
}

func (p *pod) setEndpoints() {
	specs := make([]probe.Spec, len(p.Probes))
	for i, s := range p.Probes {
		s.Instance = strconv.Itoa(p.known[s.Port] + 1)
		if p.Broken == Threshold {
			s.SuccessThreshold = 1
		}
		specs[i] = s
	}
	endpoints := p.endpoints(specs)
	for _, e := range endpoints {
		p.staleness[e.Endpoint], p.traffic[e.Endpoint] = e.SteadyStaleness, e.Traffic
	}
	p.tracker.SetEndpoints(endpoints, p.now)
	p.shadow.SetEndpoints(endpoints, p.now)
}

func (p *pod) endpoints(specs []probe.Spec) []probe.EndpointSpec {
	pod := probe.Pod{Namespace: "n", Name: "p", IPs: []netip.Addr{netip.MustParseAddr(address)}, Probes: specs}
	limits := probe.Limits{Request: 1024, Records: 64, Live: p.Live, Traffic: mostByTraffic}
	endpoints, err := probe.Endpoints(pod, p.Defaults.Settings(nil), limits)
	if err != nil {
		panic(err) // scenarios have few endpoints
	}
	return endpoints
}

// endpointOf returns the endpoint that a probe asks.
func (p *pod) endpointOf(s probe.Spec) probe.Endpoint {
	return p.endpoints([]probe.Spec{s})[0].Endpoint
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

// questionOf returns the question of an endpoint's request.
func questionOf(e probe.Endpoint) probe.Question {
	hash := fnv.New64a()
	_, _ = fmt.Fprintf(hash, "%+v", e)
	return probe.Question{Hash: hash.Sum64() | 1, Check: 1}
}

// meant returns the endpoint that e is mistaken for if Question is broken.
func (p *pod) meant(e probe.Endpoint) probe.Endpoint {
	if p.Broken != Question {
		return e
	}
	for _, own := range p.asked {
		if own.Port == e.Port && own.Kind == e.Kind && own.Path == e.Path {
			return own
		}
	}
	return e
}

// outcome reports a probe that has just ended.
func (p *pod) outcome(e probe.Endpoint, began uint64, x exchange) probe.Outcome {
	e = p.meant(e)
	o := probe.Outcome{
		Port: e.Port, Kind: e.Kind, Request: p.requests[e],
		Question: questionOf(e), Text: []byte(e.Path), // only has to be set
		Event: x.event, Status: x.status, ObservedAt: p.now, Duration: time.Duration(p.now - began),
	}
	if o.Kind.Keying() != probe.KeyedByRequest {
		o.Question, o.Text = probe.Question{}, nil
	}
	if x.event == probe.Failed && p.Broken == Malformed {
		o.Event, o.Status = probe.Answered, 200
	}
	if !x.connected {
		o.Kind = "" // it is unknown what would have been asked
	}
	return o
}

// observe makes the daemon read an outcome.
func (p *pod) observe(e probe.Endpoint, o probe.Outcome) {
	if p.tracker == nil {
		return
	}
	failure := o.Event == probe.Reset || o.Event == probe.Failed || o.Status >= 400
	if timeout := o.Event == probe.NoAnswer; failure || timeout {
		for endpoint := range p.successes {
			concerned := e == endpoint || o.Event == probe.Reset && e.Port == endpoint.Port
			if vouched := timeout && p.evidence[endpoint].TrafficUntil != 0; concerned && !vouched {
				p.failed[endpoint] = max(p.failed[endpoint], o.ObservedAt)
			}
		}
	}
	if (failure || o.Event == probe.NoAnswer) && p.Broken == Failures {
		return
	}
	p.tracker.Void(func(probe.Endpoint) bool { return true }, p.podWithdrawn)
	if slices.ContainsFunc(p.tracker.Endpoints(), func(s probe.EndpointSpec) bool { return s.SuccessThreshold > 1 }) {
		p.learnUnanswered()
	}
	p.tracker.Observe(o)
	p.publish()
}

// learnUnanswered tells the tracker about connections that the pod did not answer.
func (p *pod) learnUnanswered() {
	for port, all := range p.unanswered {
		for _, began := range all {
			p.tracker.Unanswered(port, began, p.now)
		}
	}
}

func (p *pod) sweep() {
	if p.tracker != nil {
		p.learnUnanswered()
		for endpoint := range p.successes {
			for _, began := range p.unanswered[endpoint.Port] {
				if p.evidence[endpoint].TrafficUntil != 0 {
					continue
				}
				p.failed[endpoint] = max(p.failed[endpoint], began)
			}
		}
		p.publish()
	}
	clear(p.unanswered)
}

// publish writes the evidence into the maps, and starts the requests of refresh.
func (p *pod) publish() {
	p.evidence, p.gates = p.tracker.Evidence(), p.tracker.Gates()
	wanted := map[probe.Endpoint]bool{}
	for _, s := range p.tracker.Refreshing() {
		wanted[s.Endpoint] = true
		if p.refreshing[s.Endpoint] == nil {
			a := &asker{spec: s.EndpointSpec}
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

// asker repeats the daemon's own request to an endpoint.
type asker struct{ spec probe.EndpointSpec }

// refresh repeats the request once per interval. Unlike package refresh it has no slots and no limits per pod.
func (p *pod) refresh(a *asker) {
	if p.refreshing[a.spec.Endpoint] != a {
		return
	}
	s := a.spec
	began := p.now
	p.result.Refreshes++
	server := p.servers[s.Port]
	x := server.ask(inquiry{began, s.Endpoint, s.Timeout, p.usual()}, &server.queue)
	// The kernel side follows the daemon's connections only to ports with a TCP endpoint whose listening socket it sees.
	if _, tcp := p.successes[probe.Endpoint{Port: s.Port, Kind: probe.TCP}]; x.connected && tcp && p.Live > 0 {
		p.connectedAt[s.Port], p.ignored[s.Port] = began, false
	}
	p.at(x.end, func() {
		if p.refreshing[s.Endpoint] != a {
			return
		}
		o := p.outcome(s.Endpoint, began, x)
		o.Refresh = true
		p.noteSuccess(s.Endpoint, began, x)
		next := began + uint64(s.Refresh)
		p.at(max(next, p.now), func() { p.refresh(a) })
		p.observe(s.Endpoint, o)
	})
}
