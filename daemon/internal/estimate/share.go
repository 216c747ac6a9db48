package estimate

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// port models a port of a healthy pod: its endpoints, and how often they are asked.
type port struct {
	endpoints []endpoint
	askers    []asker
	// decider is the index of the TCP endpoint, or -1. While its success is not fresh, no connection is taken.
	decider int
	// limit is the maximum number of connections in a row that are taken.
	limit int
}

// unlimited is the limit of ports without a TCP endpoint.
const unlimited = math.MaxInt

// endpoint models an endpoint.
type endpoint struct {
	answerable bool
	// traffic is the maximum number of consecutive probes that the pod's traffic answers; 0 if it is not evidence.
	traffic   int
	staleness time.Duration
}

// asker models a probe, or the daemon's own requests.
type asker struct {
	endpoint int
	period   time.Duration
	daemon   bool
}

const (
	// phases is the number of combinations of phases that shares are averaged over; leastPhases is enough where there are many probes.
	phases, leastPhases = 64, 8
	// counted is the number of periods of the slowest asker that count. It is a multiple of the usual cycles: one real probe in 2, 3, 4,
	// 5, 6 or 10.
	counted = 60
	// settling is the number of periods before that, longer than any success stays fresh.
	settling = 12
	// manyEvents limits the number of events of a port.
	manyEvents = 400_000
	// longestPeriod keeps times within their type.
	longestPeriod = 365 * 24 * time.Hour
)

// shares returns the share of answered probes for each asker.
func (p port) shares() []float64 {
	p = p.bounded()
	return p.average(p.draws())
}

// average runs the model. Probes keep their periods exactly, and their phases are independent, so it averages over evenly spread
// combinations of phases.
func (p port) average(draws int) []float64 {
	answered, asked := make([]int, len(p.askers)), make([]int, len(p.askers))
	for _, phase := range spread(len(p.askers)-1, draws) {
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

// events returns the number of events of a run.
func (p port) events() (events int) {
	for _, a := range p.askers {
		events += (counted + settling) * int(p.longest()/a.period)
	}
	return events
}

// draws returns the number of combinations of phases to average over. A single probe has only one.
func (p port) draws() int {
	if len(p.askers) < 2 {
		return 1
	}
	return min(max(manyEvents/max(p.events(), 1), leastPhases), phases)
}

// bounded returns a port with nearly the same shares, of which leastPhases runs take no more than manyEvents: a probe that is sent once
// in hundreds of another's has as little to do with them as one that is sent once in millions. The gaps are multiples of the usual cycles
// where that is possible, as the ratios of most long periods are.
func (p port) bounded() port {
	b := p.within(math.Inf(1))
	for gap := 960.; gap >= 1 && b.events() > manyEvents/leastPhases; gap /= 2 {
		b = p.within(gap)
	}
	return b
}

// within shortens periods, and for how long successes stay fresh, until no period is more than gap times the next shorter one. Periods
// that are closer keep their ratio.
func (p port) within(gap float64) port {
	periods := make([]time.Duration, len(p.askers))
	for i, a := range p.askers {
		periods[i] = a.period
	}
	slices.Sort(periods)
	factors, factor := map[time.Duration]float64{}, 1.
	for i, period := range periods {
		if i > 0 {
			factor *= min(gap*float64(periods[i-1])/float64(period), 1)
		}
		factors[period] = factor
	}
	all := min(float64(longestPeriod)/(float64(p.longest())*factor), 1)
	scaled := func(d, period time.Duration) time.Duration { return time.Duration(float64(d) * factors[period] * all) }

	shortest := make([]time.Duration, len(p.endpoints)) // each endpoint's shortest probe says how long it stays fresh
	p.askers, p.endpoints = slices.Clone(p.askers), slices.Clone(p.endpoints)
	for i, a := range p.askers {
		if s := &shortest[a.endpoint]; !a.daemon && (*s == 0 || a.period < *s) {
			*s = a.period
		}
		p.askers[i].period = scaled(a.period, a.period)
	}
	for i, e := range p.endpoints {
		p.endpoints[i].staleness = scaled(e.staleness, shortest[i])
	}
	return p
}

// spread returns n evenly spread points of the unit cube: multiples, modulo 1, of the powers of 1/x, where x^(dimensions+1) = x + 1
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

// run is a run of the model with given phases.
type run struct {
	port
	next  []time.Duration // of the askers
	known []belief        // of the endpoints
	// row counts the connections in a row that were taken, and rows the answered probes in a row of each endpoint.
	row  int
	rows []int
}

// belief says until when an endpoint is fresh, and until when it is from learnedAt on.
type belief struct{ until, learnedAt, thenUntil time.Duration }

func newRun(p port, phase []float64) *run {
	r := &run{port: p, next: make([]time.Duration, len(p.askers)), known: make([]belief, len(p.endpoints)), rows: make([]int, len(p.endpoints))}
	for i := range p.askers[1:] { // only differences matter
		r.next[i+1] = time.Duration(phase[i] * float64(p.askers[i+1].period))
	}
	return r
}

// advance runs the model up to a time. It counts probes unless asked is nil.
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

// ask reports whether a probe that begins now is answered, and learns from one that is not. It follows connect, taken and answerable in
// package simulate, for a healthy server.
func (r *run) ask(a asker, now time.Duration) (answered bool) {
	e := r.endpoints[a.endpoint]
	if a.daemon {
		r.row = 0
		r.learn(a.endpoint, now)
		r.learnAccepted(a.endpoint, now)
		return false
	}
	taken, byTraffic := r.taken(now)
	if taken {
		r.row++
	}
	if taken && (a.endpoint == r.decider || r.believes(a.endpoint, now) && (!byTraffic || e.traffic > 0)) {
		r.rows[a.endpoint]++
		return true
	}
	r.row, r.rows[a.endpoint] = 0, 0
	if !taken && r.decider >= 0 {
		r.rows[r.decider] = 0 // a connection that reaches the pod
	}
	if e.answerable {
		r.learn(a.endpoint, now)
	}
	r.learnAccepted(a.endpoint, now)
	return false
}

// learnAccepted learns from a request to an endpoint that its connection was accepted.
func (r *run) learnAccepted(i int, now time.Duration) {
	if r.decider >= 0 && r.limit < unlimited && i != r.decider && r.endpoints[r.decider].answerable {
		r.learn(r.decider, now)
	}
}

// taken reports whether a connection that begins now is taken, and whether only because of the pod's traffic.
func (r *run) taken(now time.Duration) (taken, byTraffic bool) {
	if r.decider >= 0 {
		traffic := r.endpoints[r.decider].traffic > 0
		if !r.believes(r.decider, now) || r.row >= r.limit && !traffic {
			return false, false
		}
		return true, r.row >= r.limit || now >= r.known[r.decider].until
	}
	for i := range r.endpoints {
		if r.believes(i, now) {
			return true, false // each endpoint checks traffic for itself
		}
	}
	return false, false
}

// believes reports whether the endpoint is fresh, or traffic stands in for that.
func (r *run) believes(i int, now time.Duration) bool {
	e, k := r.endpoints[i], &r.known[i]
	if k.learnedAt <= now {
		k.until = k.thenUntil
	}
	if !e.answerable || e.traffic > 0 && r.rows[i] >= e.traffic {
		return false
	}
	return now < k.until || e.traffic > 0 && k.until > 0
}

func (r *run) learn(i int, now time.Duration) {
	r.believes(i, now) // applies what was learned before
	r.known[i].learnedAt, r.known[i].thenUntil = now+learning, now+r.endpoints[i].staleness
}

// place is a port together with the endpoints and probes that it models.
type place struct {
	port
	names  []probe.Endpoint // parallel to endpoints
	probes []probe.Asker    // parallel to askers; zero for the daemon's requests
}

// places returns the ports of a pod that have observed endpoints, without startup probes, which end.
func places(specs []probe.EndpointSpec) []place {
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
		all[i].add(s)
	}
	return all
}

func (p *place) add(s probe.EndpointSpec) {
	n := len(p.endpoints)
	p.names = append(p.names, s.Endpoint)
	p.endpoints = append(p.endpoints, endpoint{
		answerable: s.Reason == (probe.Reason{}), traffic: s.Traffic, staleness: s.SteadyStaleness,
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

// cache keeps the shares of ports, because the pods of a Deployment are alike.
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
