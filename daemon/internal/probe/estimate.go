package probe

import "maps"

// Why explains why a probe would reach the pod in mode answer.
type Why string

// Reasons.
const (
	WhyNever     Why = "never"     // its endpoint is never answered
	WhyUnknown   Why = "unknown"   // nothing was known of its endpoint
	WhyFailed    Why = "failed"    // the last probe had failed
	WhyThreshold Why = "threshold" // too few probes in a row had succeeded
	WhyWithdrawn Why = "withdrawn" // the evidence had been withdrawn, for example because a listening socket closed
	WhyExpired   Why = "expired"   // the evidence had expired
	WhyTCP       Why = "tcp"       // taking its connection would have answered a TCP probe without fresh evidence
	WhyLimit     Why = "limit"     // as many as allowed were answered since one had reached the pod
)

// Whys returns all values of Why.
func Whys() []Why {
	return []Why{WhyNever, WhyUnknown, WhyFailed, WhyThreshold, WhyWithdrawn, WhyExpired, WhyTCP, WhyLimit}
}

// Estimate counts what would have become of an endpoint's probes in mode answer.
type Estimate struct {
	// Answered would have been answered. Hidden of them failed, which their prober would have learned later.
	Answered, Hidden uint64
	// Passed would have reached the pod.
	Passed map[Why]uint64
}

// Estimator predicts in mode observe, where all probes reach the pod, what mode answer would do. It learns only from the
// probes that would have reached the pod then.
type Estimator struct {
	tracker   *Tracker
	learnedAt map[Endpoint]uint64 // when the evidence was learned
	answered  map[uint16]int      // by port: probes answered since the last one that was not
	estimates map[Endpoint]Estimate
}

// NewEstimator returns an estimator without endpoints.
func NewEstimator() *Estimator {
	return &Estimator{
		tracker: NewTracker(), learnedAt: map[Endpoint]uint64{}, answered: map[uint16]int{}, estimates: map[Endpoint]Estimate{},
	}
}

// SetEndpoints replaces the endpoints, as Tracker.SetEndpoints does.
func (m *Estimator) SetEndpoints(specs []EndpointSpec, now uint64) {
	answering := make([]EndpointSpec, len(specs))
	for i, s := range specs {
		if s.Withheld {
			s.Reason = Reason{}
		}
		answering[i] = s
	}
	m.tracker.SetEndpoints(answering, now)
	gone := func(e Endpoint) bool { return m.tracker.entries[e] == nil }
	maps.DeleteFunc(m.learnedAt, func(e Endpoint, _ uint64) bool { return gone(e) })
	maps.DeleteFunc(m.estimates, func(e Endpoint, _ Estimate) bool { return gone(e) })
}

// Withdraw withdraws evidence, as Tracker.Withdraw does.
func (m *Estimator) Withdraw(meant func(Endpoint) bool, now uint64) { m.tracker.Withdraw(meant, now) }

// Judged is an estimator's prediction for one probe.
type Judged struct {
	Endpoint Endpoint
	Answered bool
	Hidden   bool // answered although it failed
	Why      Why  // if not answered
}

// Observe judges a probe by its outcome, and learns from it if the probe would have reached the pod. withdrawnAt is when
// a listening socket of the pod last closed; limit is how many TCP probes in a row the port's listening socket allows to
// answer. A probe of an unknown endpoint is only learned from: it did not get a connection, and the kernel side would
// have passed it on.
func (m *Estimator) Observe(o Outcome, withdrawnAt uint64, limit int) (j Judged, ok bool) {
	for _, s := range m.tracker.specs {
		if ok = s.Observed && o.of(s); ok {
			j = m.judge(s, o, withdrawnAt, limit)
			break
		}
	}
	if ok {
		m.count(j)
	}
	if j.Answered {
		m.answered[o.Port]++
		return j, ok
	}
	m.answered[o.Port] = 0
	for _, c := range m.tracker.Observe(o) {
		m.learnedAt[c.Endpoint] = o.ObservedAt
	}
	return j, ok
}

func (m *Estimator) judge(s EndpointSpec, o Outcome, withdrawnAt uint64, limit int) Judged {
	j := Judged{Endpoint: s.Endpoint, Why: m.why(s, o.askedAt(), withdrawnAt)}
	if tcp, ok := m.tracker.decider(s.Port); ok && j.Why == "" {
		switch {
		case tcp.Live > 0 && m.answered[s.Port] >= limit:
			j.Why = WhyLimit
		case tcp.Endpoint != s.Endpoint && m.why(tcp, o.askedAt(), withdrawnAt) != "":
			j.Why = WhyTCP
		}
	}
	if j.Answered = j.Why == ""; j.Answered {
		result, conclusive := s.judge(o)
		j.Hidden = conclusive && result == Failure
	}
	return j
}

// why returns why the endpoint's evidence would not have answered a probe at that time; empty if it would have.
func (m *Estimator) why(s EndpointSpec, at, withdrawnAt uint64) Why {
	e := m.tracker.entries[s.Endpoint]
	switch known := e.evidence; {
	case s.Reason != (Reason{}):
		return WhyNever
	case known.Result == Failure:
		return WhyFailed
	case known.Result != Success || m.learnedAt[s.Endpoint] > at:
		return WhyUnknown
	case !e.armed():
		return WhyThreshold
	case known.ObservedAt <= withdrawnAt:
		return WhyWithdrawn
	case known.FreshUntil <= at:
		return WhyExpired
	}
	return ""
}

func (m *Estimator) count(j Judged) {
	e := m.estimates[j.Endpoint]
	switch {
	case !j.Answered:
		if e.Passed == nil {
			e.Passed = map[Why]uint64{}
		}
		e.Passed[j.Why]++
	case j.Hidden:
		e.Hidden++
		fallthrough
	default:
		e.Answered++
	}
	m.estimates[j.Endpoint] = e
}

// Estimates returns the counts since the endpoints were set up.
func (m *Estimator) Estimates() map[Endpoint]Estimate {
	all := make(map[Endpoint]Estimate, len(m.estimates))
	for endpoint, e := range m.estimates {
		passed := make(map[Why]uint64, len(e.Passed))
		maps.Copy(passed, e.Passed)
		e.Passed = passed
		all[endpoint] = e
	}
	return all
}
