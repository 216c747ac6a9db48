package simulate

import (
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// kernel models the kernel side: what the daemon wrote, and what the kernel side itself notes.
type kernel struct {
	evidence map[probe.Endpoint]probe.Evidence
	gates    map[uint16]probe.Gate
	// withdrawn is when the evidence of an endpoint, or of a whole port (no kind), was voided. podWithdrawn is when a
	// listening socket closed, which voids all evidence of the pod.
	withdrawn    map[probe.Endpoint]uint64
	podWithdrawn uint64
	answered     map[uint16]int         // by port: probes answered since a connection was last known to be accepted
	unanswered   map[uint16][]uint64    // by port: when unanswered connections began, until they are swept
	ignored      map[uint16]bool        // by port: whether neither the last connection passed on nor a later one was answered
	sinceReal    map[probe.Endpoint]int // by endpoint: probes answered since one was last passed on
	connectedAt  map[uint16]uint64      // by port: when the last connection was established, until it is known to be accepted
}

func newKernel() kernel {
	return kernel{
		withdrawn: map[probe.Endpoint]uint64{}, answered: map[uint16]int{}, unanswered: map[uint16][]uint64{},
		ignored: map[uint16]bool{}, sinceReal: map[probe.Endpoint]int{}, connectedAt: map[uint16]uint64{},
	}
}

// connect starts a probe now.
func (p *pod) connect(e probe.Endpoint, timeout, usual time.Duration) (answered bool, x exchange) {
	taken, byTraffic := p.taken(e.Port)
	if taken {
		p.answered[e.Port]++
	}
	if taken && (e.Kind.Keying() == probe.KeyedByPort || p.answerable(e, byTraffic)) {
		p.sinceReal[e]++
		return true, exchange{event: probe.Answered, status: 200, connected: true, end: p.now + uint64(refusal)}
	}
	p.sinceReal[e] = 0
	if !taken {
		p.sinceReal[probe.Endpoint{Port: e.Port, Kind: probe.TCP}] = 0
	}
	server := p.servers[e.Port]
	x = server.ask(inquiry{p.now, e, timeout, usual}, &server.queue)
	if x.connected {
		p.connectedAt[e.Port] = p.now
	}
	if !taken || x.seen() {
		p.ignored[e.Port] = !x.seen() && p.Broken != Unanswered
	}
	if x.handedOver = taken; taken { // which takes hardly any time
		p.result.HandedOver++
	}
	return false, x
}

// taken reports whether a connection that arrives now is taken, and whether only because of the pod's traffic.
func (p *pod) taken(port uint16) (taken, byTraffic bool) {
	g := p.gates[port]
	if p.Broken == Gate {
		for e, known := range p.evidence {
			if e.Port == port {
				g.ObservedAt, g.FreshUntil = max(g.ObservedAt, known.ObservedAt), max(g.FreshUntil, known.FreshUntil)
			}
		}
	}
	fresh := g.FreshUntil > p.now || p.Broken == Bound && g.FreshUntil != 0
	if g.ObservedAt <= max(p.withdrawn[portOf(port)], p.podWithdrawn) {
		return false, false
	}
	tcp := probe.Endpoint{Port: port, Kind: probe.TCP}
	_, asked := p.successes[tcp]
	if asked && p.due(tcp) {
		return false, false
	}
	if fresh && !p.ignored[port] && p.listening(port) {
		return true, false
	}
	serving := p.serving(port, g.TrafficUntil, g.TrafficWindow, asked)
	return serving, serving
}

// due reports whether a probe of the endpoint must reach the pod, whatever its traffic shows.
func (p *pod) due(e probe.Endpoint) bool {
	return p.Broken != Due && p.evidence[e].TrafficUntil != 0 && p.sinceReal[e] >= mostByTraffic
}

// serving reports whether traffic on a port shows that the pod serves its clients, or with byTCP that it closes their
// connections.
func (p *pod) serving(port uint16, until uint64, window time.Duration, byTCP bool) bool {
	if p.Broken == Traffic {
		return p.now < until
	}
	if p.now >= until && (p.Broken != Due || until == 0) || p.Clients == 0 {
		return false
	}
	return p.servers[port].served(port, p.Clients, window, p.now, byTCP)
}

// listening reports whether the port's listening socket would accept a connection now, and not too many probes were
// answered on that basis alone.
func (p *pod) listening(port uint16) bool {
	if p.Live == 0 {
		return true
	}
	s := p.servers[port]
	if p.Broken != Queue && !s.accepting(p.now, &s.queue) {
		return false
	}
	if at := p.connectedAt[port]; at != 0 && p.now-at >= headAge { // and no connection has waited that long
		p.connectedAt[port], p.answered[port] = 0, 0
	}
	_, asked := p.successes[probe.Endpoint{Port: port, Kind: probe.TCP}]
	return !asked || p.Broken == Limit || p.answered[port] < s.mostAnswered(p.Live)
}

// answerable reports whether a request on a connection taken just now is answered. One taken only because of traffic is for the
// endpoints that traffic vouches for.
func (p *pod) answerable(e probe.Endpoint, byTraffic bool) bool {
	e = p.meant(e)
	known := p.evidence[e]
	fresh := !byTraffic && (known.FreshUntil > p.now || p.Broken == Bound && known.FreshUntil != 0) ||
		p.serving(e.Port, known.TrafficUntil, known.TrafficWindow, false)
	return known.Result == probe.Success && fresh && !p.due(e) &&
		known.ObservedAt > max(p.withdrawn[e], p.withdrawn[portOf(e.Port)], p.podWithdrawn)
}

// sweepEvery is how often the daemon reads unanswered connections, and forgets them.
const sweepEvery = uint64(5 * time.Second)

// gather is how long outcomes may wait before the daemon reads them.
const gather = uint64(50 * time.Millisecond)

// report tells the daemon the outcome of a probe that reached the pod. An error status affects the endpoint that was
// asked, a reset or refusal the whole port.
func (p *pod) report(e probe.Endpoint, began uint64, x exchange) {
	if x.handedOver && p.Broken == Handover {
		return
	}
	if !x.seen() {
		if p.Broken != Unanswered {
			p.unanswered[e.Port] = append(p.unanswered[e.Port], began)
			p.at((p.now/sweepEvery+1)*sweepEvery, p.sweep)
		}
		return
	}
	if x.event == probe.Reset || x.event == probe.Answered && x.status >= 300 {
		about := e
		if x.event == probe.Reset {
			about = portOf(e.Port)
		}
		p.voided[about] = p.now
		about = p.meant(about)
		if p.Broken == Status {
			about = portOf(e.Port)
		}
		if p.Broken != Withdrawal {
			p.withdrawn[about] = p.now
		}
	}
	o := p.outcome(e, began, x)
	p.at((p.now/gather+1)*gather, func() { p.observe(e, o) })
}
