package estimate

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// port is a port of a healthy pod, as the model has it: what is asked there, and how often.
type port struct {
	endpoints []endpoint
	askers    []asker
	// decider is the index of the TCP endpoint, without whose success no connection is taken; -1: there is none.
	decider int
	// limit is how many connections in a row are taken at most.
	limit int
}

// unlimited is the limit of ports without a TCP endpoint.
const unlimited = math.MaxInt

// endpoint is what probes ask.
type endpoint struct {
	answerable bool
	// traffic: the pod's traffic answers, up to trafficRow probes in a row.
	traffic   bool
	staleness time.Duration
}

// asker is a probe, or the daemon's own requests.
type asker struct {
	endpoint int
	period   time.Duration
	daemon   bool
}

const (
	// phases is how many combinations of phases the shares are averaged over, at least leastPhases where there are many probes.
	phases, leastPhases = 64, 8
	// counted is how many periods of the slowest asker are counted, a multiple of most cycles: 1 real probe of 2, 3, 4, 5, 6 or 10.
	counted = 60
	// settling is how many pass before, more than any success is believed for.
	settling = 12
	// manyEvents is how many events a port is given, beyond leastPhases.
	manyEvents = 400_000
)

// shares returns, for each asker, the share of its probes that is answered. Probes keep their periods exactly. Their phases are
// independent of each other, so the shares are the means over all of them, taken at evenly spread points.
func (p port) shares() []float64 {
	answered, asked := make([]int, len(p.askers)), make([]int, len(p.askers))
	for _, phase := range spread(len(p.askers)-1, p.draws()) {
		r := newRun(p, phase)
		r.advance(settling*p.longest(), nil, nil)
		r.advance((settling+counted)*p.longest(), answered, asked)
	}
	shares := make([]float64, len(p.askers))
	for i := range shares {
		shares[i] = float64(answered[i]) / float64(max(asked[i], 1))
	}
	return shares
}

func (p port) longest() (longest time.Duration) {
	for _, a := range p.askers {
		longest = max(longest, a.period)
	}
	return longest
}

// draws returns how many combinations of phases to average over: one probe alone has but one.
func (p port) draws() int {
	if len(p.askers) < 2 {
		return 1
	}
	events := 0
	for _, a := range p.askers {
		events += (counted + settling) * int(p.longest()/a.period)
	}
	return min(max(manyEvents/max(events, 1), leastPhases), phases)
}

// spread returns n points of a cube, evenly spread: multiples, modulo 1, of the powers of 1/x where x^(dimensions+1) = x + 1, which
// generalizes the golden ratio.
func spread(dimensions, n int) [][]float64 {
	x := 2.
	for range 40 {
		x = math.Pow(1+x, 1/float64(dimensions+1))
	}
	points := make([][]float64, n)
	for i := range points {
		points[i] = make([]float64, dimensions)
		for d := range points[i] {
			_, points[i][d] = math.Modf(0.5 + float64(i)/math.Pow(x, float64(d+1)))
		}
	}
	return points
}

// run is the model of a port with given phases.
type run struct {
	port
	next  []time.Duration // of the askers
	known []belief        // of the endpoints
	// row counts connections in a row that were taken, and rows answered probes by endpoint.
	row  int
	rows []int
}

// belief is until when an endpoint's success is believed, and from learnedAt on, until when it will be.
type belief struct{ until, learnedAt, thenUntil time.Duration }

func newRun(p port, phase []float64) *run {
	r := &run{port: p, next: make([]time.Duration, len(p.askers)), known: make([]belief, len(p.endpoints)), rows: make([]int, len(p.endpoints))}
	for i := range p.askers[1:] { // only differences matter
		r.next[i+1] = time.Duration(phase[i] * float64(p.askers[i+1].period))
	}
	return r
}

// advance runs the model up to a time, and counts if asked is not nil.
func (r *run) advance(to time.Duration, answered, asked []int) {
	for {
		i := 0
		for j := range r.next {
			if r.next[j] < r.next[i] {
				i = j
			}
		}
		now := r.next[i]
		if now >= to {
			return
		}
		r.next[i] += r.askers[i].period
		hit := r.ask(r.askers[i], now)
		if asked != nil {
			asked[i]++
			if hit {
				answered[i]++
			}
		}
	}
}

// ask reports whether a probe is answered that begins now. It is the kernel side's decision, and what the daemon learns: see
// connect, taken and answerable in package simulate, for a server that is well.
func (r *run) ask(a asker, now time.Duration) (answered bool) {
	e := r.endpoints[a.endpoint]
	if a.daemon {
		r.learn(a.endpoint, now)
		return false
	}
	taken := r.taken(now)
	if taken {
		r.row++
	}
	if taken && (a.endpoint == r.decider || r.believes(a.endpoint, now)) {
		r.rows[a.endpoint]++
		return true
	}
	r.row, r.rows[a.endpoint] = 0, 0
	if e.answerable {
		r.learn(a.endpoint, now)
	}
	if r.decider >= 0 && r.limit < unlimited && a.endpoint != r.decider && r.endpoints[r.decider].answerable {
		r.learn(r.decider, now) // its connection was accepted
	}
	return false
}

// taken reports whether a connection that comes now is taken.
func (r *run) taken(now time.Duration) bool {
	if r.row >= r.limit {
		return false
	}
	if r.decider >= 0 {
		return r.believes(r.decider, now)
	}
	for i := range r.endpoints {
		if r.believes(i, now) {
			return true
		}
	}
	return false
}

// believes reports whether the endpoint's own success may be answered now, or traffic instead of it.
func (r *run) believes(i int, now time.Duration) bool {
	e, k := r.endpoints[i], &r.known[i]
	if k.learnedAt <= now {
		k.until = k.thenUntil
	}
	if !e.answerable {
		return false
	}
	return now < k.until || e.traffic && k.until > 0 && r.rows[i] < trafficRow
}

func (r *run) learn(i int, now time.Duration) {
	r.believes(i, now) // what was learned before counts until then
	r.known[i].learnedAt, r.known[i].thenUntil = now+learning, now+r.endpoints[i].staleness
}

// place is a port of a pod, with the probes of which its askers are.
type place struct {
	port
	names  []probe.Endpoint // by endpoint
	probes []probe.Asker    // by asker; those of the daemon are none
}

// places returns the ports of a pod of which something is observed, with what asks there for as long as its containers run.
func places(specs []probe.EndpointSpec, policy Policy) []place {
	var all []place
	at := map[uint16]int{}
	for _, s := range specs {
		if !s.Observed || s.Startup {
			continue
		}
		i, ok := at[s.Port]
		if !ok {
			i = len(all)
			at[s.Port], all = i, append(all, place{port: port{decider: -1, limit: unlimited}})
		}
		all[i].add(s, policy)
	}
	return all
}

func (p *place) add(s probe.EndpointSpec, policy Policy) {
	n := len(p.endpoints)
	p.names = append(p.names, s.Endpoint)
	p.endpoints = append(p.endpoints, endpoint{
		answerable: s.Reason == (probe.Reason{}), traffic: policy.byTraffic(s), staleness: s.Staleness,
	})
	if s.Kind.Keying() == probe.KeyedByPort {
		p.decider = n
		if s.Live > 0 {
			p.limit = s.Live
		}
	}
	for _, d := range s.Delays() {
		if d.Type == probe.Startup {
			continue
		}
		p.askers, p.probes = append(p.askers, asker{endpoint: n, period: d.Period}), append(p.probes, d.Asker)
	}
	if s.Refresh > 0 {
		p.askers, p.probes = append(p.askers, asker{endpoint: n, period: s.Refresh, daemon: true}), append(p.probes, probe.Asker{})
	}
}

// cache keeps the shares of ports that are alike, as those of a Deployment's pods are.
type cache map[string][]float64

func (c cache) shares(p port) []float64 {
	var key strings.Builder
	fmt.Fprint(&key, p.decider, p.limit, p.endpoints, p.askers)
	shares, ok := c[key.String()]
	if !ok {
		shares = p.shares()
		c[key.String()] = shares
	}
	return slices.Clone(shares)
}
