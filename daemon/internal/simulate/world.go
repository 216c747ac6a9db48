package simulate

import (
	"math/rand/v2"
	"sort"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// condition is what is the matter with a server.
type condition uint8

const (
	healthy  condition = iota
	hanging            // accepts, and answers nothing until it is over
	stuck              // accepts nothing new, and goes on answering on the connections that it has
	slow               // takes phase.latency
	erring             // answers with phase.status
	erringOn           // likewise, on phase.path only
	closed             // does not listen, and runs on
	down               // the container has ended; another one runs afterwards
	conditions
)

func (c condition) String() string {
	return [...]string{"healthy", "hanging", "stuck", "slow", "erring", "erring on one path", "not listening", "restarting"}[c]
}

// phase is a time for which a server's condition stays the same.
type phase struct {
	condition condition
	from, to  uint64
	latency   time.Duration
	status    int
	path      string
}

// server is what listens on a port, for all of the simulated time. It takes no notice of verdicts: with and without
// probelet the same happens to it.
type server struct{ phases []phase }

// newServer draws a server's fate until the end. paths are those that may fail alone.
func newServer(rng *rand.Rand, start, end uint64, paths []string, timeout time.Duration) *server {
	s := &server{}
	for t := start; t < end; {
		well := phase{condition: healthy, from: t, to: t + uint64(rng.ExpFloat64()*float64(40*time.Minute)) + uint64(time.Second)}
		ill := phase{condition: condition(1 + rng.IntN(int(conditions)-1)), from: well.to}
		// Blips that may fall between two probes, and failures that nobody may overlook.
		length := time.Duration(rng.ExpFloat64() * float64(20*time.Second))
		if rng.IntN(2) == 0 {
			length = time.Minute + time.Duration(rng.Int64N(int64(10*time.Minute)))
		}
		ill.to = ill.from + uint64(length) + uint64(time.Millisecond)
		switch ill.condition {
		case slow:
			ill.latency = timeout/4 + time.Duration(rng.Int64N(int64(2*timeout)))
		case erring, erringOn:
			ill.status = []int{404, 500, 503}[rng.IntN(3)]
			ill.path = paths[rng.IntN(len(paths))]
		}
		s.phases = append(s.phases, well, ill)
		t = ill.to
	}
	return s
}

// at is the index of the phase at a time.
func (s *server) at(t uint64) int {
	return min(sort.Search(len(s.phases), func(i int) bool { return s.phases[i].to > t }), len(s.phases)-1)
}

// exchange is what comes of a request.
type exchange struct {
	event  probe.Event
	status int
	end    uint64
}

// succeeded is the kubelet's verdict.
func (x exchange) succeeded() bool {
	return x.event == probe.Connected || x.event == probe.Answered && x.status >= 200 && x.status < 400
}

const refusal = 100 * time.Microsecond

// ask is what comes of a request at a time that the client gives up after its timeout. kept: on a connection that is
// there already. usual is how long a server that is well takes.
func (s *server) ask(t uint64, e probe.Endpoint, timeout time.Duration, kept bool, usual time.Duration) exchange {
	i := s.at(t)
	p := s.phases[i]
	gaveUp := exchange{event: probe.NoAnswer, end: t + uint64(timeout)}
	switch {
	case p.condition == closed && !kept, p.condition == down:
		return exchange{event: probe.Reset, end: t + uint64(refusal)}
	case e.Kind == probe.TCP:
		if p.condition == stuck {
			return gaveUp
		}
		return exchange{event: probe.Connected, end: t + uint64(refusal)} // by the pod's kernel, whatever the server does
	}
	status, done := 200, t+uint64(usual)
	switch p.condition {
	case hanging:
		done = p.to + uint64(usual)
	case stuck:
		if !kept {
			done = p.to + uint64(usual)
		}
	case slow:
		done = t + uint64(p.latency)
	case erring:
		status = p.status
	case erringOn:
		if e.Path == p.path {
			status = p.status
		}
	}
	// What comes over the server before it has answered.
	for i++; i < len(s.phases) && s.phases[i].from < done; i++ {
		switch s.phases[i].condition {
		case down:
			if s.phases[i].from < gaveUp.end {
				return exchange{event: probe.Reset, end: s.phases[i].from}
			}
		case hanging:
			done = s.phases[i].to + uint64(usual)
		}
	}
	if done >= gaveUp.end {
		return gaveUp
	}
	return exchange{event: probe.Answered, status: status, end: done}
}

// failing returns, for each phase in which every probe of the endpoint fails that begins in it, when the first and the
// last such probe may begin.
func (s *server) failing(e probe.Endpoint, timeout time.Duration) (intervals [][2]uint64) {
	for _, p := range s.phases {
		to := p.to
		switch p.condition {
		case healthy, down: // what has ended is not probed
			continue
		case stuck:
			to -= min(to, uint64(timeout))
		case hanging:
			if e.Kind == probe.TCP {
				continue
			}
			to -= min(to, uint64(timeout))
		case slow:
			if e.Kind == probe.TCP || p.latency < timeout {
				continue
			}
		case erring:
			if e.Kind == probe.TCP {
				continue
			}
		case erringOn:
			if e.Kind == probe.TCP || e.Path != p.path {
				continue
			}
		}
		if to > p.from {
			intervals = append(intervals, [2]uint64{p.from, to})
		}
	}
	return intervals
}
