package simulate

import (
	"math/rand/v2"
	"sort"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// condition is the state of a server.
type condition uint8

const (
	healthy      condition = iota
	hanging                // accepts, but does not respond until the phase is over
	hangingOn              // likewise, but only on phase.path
	stuck                  // its queue is full of other clients' connections
	stopped                // does not accept, but the kernel does until the queue is full
	filtered               // packets to it are lost inside the pod
	slow                   // responds after phase.latency
	erring                 // responds with phase.status
	erringOn               // likewise, but only on phase.path
	unauthorized           // likewise, but only to requests without a custom header
	flapping               // likewise, but only now and then
	malformed              // responds with status 200 and invalid HTTP
	closed                 // does not listen, but keeps running
	down                   // the container has ended; a new one follows
	conditions
)

func (c condition) String() string {
	return [...]string{
		"healthy", "hanging", "hanging on one path", "stuck", "stopped", "filtered", "slow", "erring", "erring on one path", "unauthorized", "flapping",
		"malformed", "not listening", "restarting",
	}[c]
}

// phase is a period during which a server's condition stays the same.
type phase struct {
	condition condition
	from, to  uint64
	latency   time.Duration
	status    int
	path      string
}

// server listens on a port throughout the simulation. It does not react to verdicts: its fate is the same with and
// without probelet.
type server struct {
	phases  []phase
	limit   int  // length of the listening socket's queue
	sidecar bool // listens on behalf of the server, and goes on when that stops
	// queue holds the connections that are not accepted yet, and plain those that there would be without probelet.
	queue, plain backlog
}

// backlog is the queue of a listening socket while its server is stopped.
type backlog struct {
	phase  int // the phase it belongs to
	queued int
	since  uint64 // when the first of them was queued
}

// limits are the lengths of servers' queues: those of careless programs, and some short enough to fill up within a phase.
var limits = []int{0, 1, 5, 16, 128}

// newServer draws a server's fate until the end. paths are those that may fail alone.
func newServer(rng *rand.Rand, start, end uint64, paths []string, timeout time.Duration, sidecar bool) *server {
	s := &server{sidecar: sidecar, limit: limits[rng.IntN(len(limits))]}
	for t := start; t < end; {
		well := phase{condition: healthy, from: t, to: t + uint64(rng.ExpFloat64()*float64(40*time.Minute)) + uint64(time.Second)}
		ill := phase{condition: condition(1 + rng.IntN(int(conditions)-1)), from: well.to}
		// Short failures may fall between two probes; long ones must be detected.
		length := time.Duration(rng.ExpFloat64() * float64(20*time.Second))
		if rng.IntN(2) == 0 {
			length = time.Minute + time.Duration(rng.Int64N(int64(10*time.Minute)))
		}
		ill.to = ill.from + uint64(length) + uint64(time.Millisecond)
		switch ill.condition {
		case slow:
			ill.latency = timeout/4 + time.Duration(rng.Int64N(int64(2*timeout)))
		case erring, erringOn, unauthorized, flapping, hangingOn:
			ill.status = []int{404, 500, 503}[rng.IntN(3)]
			ill.path = paths[rng.IntN(len(paths))]
		}
		s.phases = append(s.phases, well, ill)
		t = ill.to
	}
	return s
}

// at returns the index of the phase at a time.
func (s *server) at(t uint64) int {
	return min(sort.Search(len(s.phases), func(i int) bool { return s.phases[i].to > t }), len(s.phases)-1)
}

// inquiry is a request, or a connection without one.
type inquiry struct {
	at       uint64
	endpoint probe.Endpoint
	timeout  time.Duration // when the client gives up
	usual    time.Duration // how long a healthy server takes
}

// exchange is the result of an inquiry.
type exchange struct {
	event      probe.Event
	status     int
	connected  bool
	handedOver bool
	end        uint64
}

// succeeded reports the kubelet's verdict.
func (x exchange) succeeded() bool {
	return x.event == probe.Connected || x.event == probe.Answered && x.status >= 200 && x.status < 400
}

// seen reports whether the kernel side sees the exchange end. A client that gives up connecting sends nothing, unless its
// connection was taken before.
func (x exchange) seen() bool { return x.event != probe.NoAnswer || x.connected || x.handedOver }

const refusal = 100 * time.Microsecond

// ask returns the result of an inquiry, which may have to wait in a queue.
func (s *server) ask(q inquiry, b *backlog) exchange {
	i := s.at(q.at)
	p := s.phases[i]
	if (p.condition == closed || p.condition == down) && !s.sidecar {
		return exchange{event: probe.Reset, end: q.at + uint64(refusal)}
	}
	if p.condition == stuck || p.condition == filtered || p.condition == stopped && !s.enqueue(q.at, b) {
		return exchange{event: probe.NoAnswer, end: q.at + uint64(q.timeout)}
	}
	if q.endpoint.Kind.Keying() == probe.KeyedByPort {
		return exchange{event: probe.Connected, connected: true, end: q.at + uint64(refusal)} // accepted by the pod's kernel, whatever the server does
	}
	return s.respond(q, i)
}

// enqueue reports whether the kernel queues another connection, following sk_acceptq_is_full in its include/net/sock.h.
func (s *server) enqueue(t uint64, b *backlog) bool {
	s.drain(t, b)
	if b.queued > s.limit {
		return false
	}
	if b.queued++; b.queued == 1 {
		b.since = t
	}
	return true
}

// drain empties a queue left over from an earlier phase.
func (s *server) drain(t uint64, b *backlog) {
	if i := s.at(t); b.phase != i {
		*b = backlog{phase: i}
	}
}

// headAge is how long the first connection in a queue may have waited for further probes to be answered.
const headAge = uint64(50 * time.Millisecond)

// accepting reports whether the listening socket appears to accept connections.
func (s *server) accepting(t uint64, b *backlog) bool {
	s.drain(t, b)
	switch s.phases[s.at(t)].condition {
	case closed, down:
		return s.sidecar
	case stuck:
		return false
	case stopped:
		return b.queued == 0 || 2*b.queued <= s.limit && t-b.since < headAge
	}
	return true
}

// mostAnswered returns how many probes in a row may be answered on the basis of the listening socket alone.
func (s *server) mostAnswered(live int) int {
	if s.limit == 0 {
		return 0
	}
	return min(max(s.limit/8, 1), live)
}

// respond returns the result of a request, sent on a connection in phase i.
func (s *server) respond(q inquiry, i int) exchange {
	p := s.phases[i]
	x := exchange{event: probe.Answered, status: 200, connected: true, end: q.at + uint64(q.usual)}
	switch p.condition {
	case hanging, stopped:
		x.end = p.to + uint64(q.usual)
	case hangingOn:
		if q.endpoint.Path == p.path {
			x.end = p.to + uint64(q.usual)
		}
	case slow:
		x.end = q.at + uint64(p.latency)
	case malformed:
		x.event, x.status = probe.Failed, 0
	case closed, down:
		if s.sidecar {
			x.status = 503
		}
	default:
		if p.refuses(q) {
			x.status = p.status
		}
	}
	return s.overtake(x, q, i)
}

// refuses reports whether the server responds with the phase's error status.
func (p phase) refuses(q inquiry) bool {
	const slot = uint64(7 * time.Second)
	switch p.condition {
	case erring:
		return true
	case erringOn:
		return q.endpoint.Path == p.path
	case unauthorized:
		return q.endpoint.Headers == ""
	case flapping:
		return (q.at/slot*0x9e3779b97f4a7c15)>>62 != 0 // in three of four slots
	}
	return false
}

// overtake adjusts the result of a request to later phases that begin before the server has responded.
func (s *server) overtake(x exchange, q inquiry, i int) exchange {
	gaveUp := exchange{event: probe.NoAnswer, connected: true, end: q.at + uint64(q.timeout)}
	for i++; i < len(s.phases) && s.phases[i].from < x.end; i++ {
		switch s.phases[i].condition {
		case down:
			if s.phases[i].from < gaveUp.end && !s.sidecar {
				return exchange{event: probe.Reset, connected: true, end: s.phases[i].from}
			}
		case hangingOn:
			if q.endpoint.Path == s.phases[i].path {
				x.end = s.phases[i].to + uint64(q.usual)
			}
		case hanging, stopped, filtered:
			x.end = s.phases[i].to + uint64(q.usual)
		}
	}
	if x.end >= gaveUp.end {
		return gaveUp
	}
	return x
}

// client is the path that the pod's clients request, and patience is how long they wait.
const client, patience = "/app", 30 * time.Second

// served reports whether, within the given time before now, the server began a response to one of its clients with a status
// below 500. Clients arrive at regular intervals (every). With byTCP any status will do, because the server closes the
// connection after the response.
func (s *server) served(port uint16, every, within time.Duration, now uint64, byTCP bool) bool {
	for t := now - now%uint64(every); t+uint64(within+patience) > now; t -= uint64(every) {
		q := inquiry{t, probe.Endpoint{Port: port, Kind: probe.HTTP, Path: client}, patience, time.Millisecond}
		x := s.ask(q, &backlog{})
		if x.event == probe.Answered && (x.status < 500 || byTCP) && x.end <= now && x.end+uint64(within) > now {
			return true
		}
	}
	return false
}

// failing returns, for each phase in which all probes of the endpoint fail, when the first and the last of these probes
// may begin. With byTraffic, timeouts are no failures while the pod serves its clients.
func (s *server) failing(e probe.Endpoint, timeout time.Duration, byTraffic bool) (intervals [][2]uint64) {
	for _, p := range s.phases {
		to, fails := p.to, e.Kind.Keying() != probe.KeyedByPort
		switch p.condition {
		case healthy, down, flapping: // a container that has ended is not probed
			fails = false
		case stuck, filtered:
			to, fails = to-min(to, uint64(timeout)), true
		case hanging, stopped:
			to -= min(to, uint64(timeout))
		case hangingOn:
			to -= min(to, uint64(timeout))
			fails = fails && e.Path == p.path && !byTraffic
		case slow:
			fails = fails && p.latency >= timeout && !byTraffic
		case erringOn:
			fails = fails && e.Path == p.path
		case unauthorized:
			fails = fails && e.Headers == ""
		case closed:
			fails = fails || !s.sidecar
		}
		if fails && to > p.from {
			intervals = append(intervals, [2]uint64{p.from, to})
		}
	}
	return intervals
}
