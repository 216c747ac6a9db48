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

// ShadowCounts counts what would have become of an endpoint's probes in mode answer.
type ShadowCounts struct {
	// Answered would have been answered. Hidden of them failed, which their prober would have learned later.
	Answered, Hidden uint64
	// Passed would have reached the pod.
	Passed map[Why]uint64
}

// Shadow runs mode answer as a shadow of mode observe: all probes reach the pod, and it predicts which of them would have been
// answered. It learns only from the others.
type Shadow struct {
	tracker   *Tracker
	learnedAt map[Endpoint]uint64 // when the evidence was learned
	answered  map[uint16]int      // by port: probes answered since the last one that was not
	counts    map[Endpoint]ShadowCounts
}

// NewShadow returns a shadow without endpoints.
func NewShadow() *Shadow {
	return &Shadow{
		tracker: NewTracker(), learnedAt: map[Endpoint]uint64{}, answered: map[uint16]int{}, counts: map[Endpoint]ShadowCounts{},
	}
}

// SetEndpoints replaces the endpoints, as Tracker.SetEndpoints does.
func (sh *Shadow) SetEndpoints(specs []EndpointSpec, now uint64) {
	answering := make([]EndpointSpec, len(specs))
	for i, s := range specs {
		if s.Withheld {
			s.Reason = Reason{}
		}
		answering[i] = s
	}
	sh.tracker.SetEndpoints(answering, now)
	gone := func(e Endpoint) bool { return sh.tracker.entries[e] == nil }
	maps.DeleteFunc(sh.learnedAt, func(e Endpoint, _ uint64) bool { return gone(e) })
	maps.DeleteFunc(sh.counts, func(e Endpoint, _ ShadowCounts) bool { return gone(e) })
}

// Withdraw withdraws evidence, as Tracker.Withdraw does.
func (sh *Shadow) Withdraw(meant func(Endpoint) bool, now uint64) { sh.tracker.Withdraw(meant, now) }

// Judged is a shadow's prediction for one probe.
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
func (sh *Shadow) Observe(o Outcome, withdrawnAt uint64, limit int) (j Judged, ok bool) {
	for _, s := range sh.tracker.specs {
		if s.Port == o.Port {
			sh.tracker.Falter(s.Endpoint, withdrawnAt)
		}
	}
	for _, s := range sh.tracker.specs {
		if ok = s.Observed && o.of(s); ok {
			j = sh.judge(s, o, withdrawnAt, limit)
			break
		}
	}
	if ok {
		sh.count(j)
	}
	if j.Answered {
		sh.answered[o.Port]++
		return j, ok
	}
	sh.answered[o.Port] = 0
	for _, c := range sh.tracker.Observe(o) {
		sh.learnedAt[c.Endpoint] = o.ObservedAt
	}
	return j, ok
}

func (sh *Shadow) judge(s EndpointSpec, o Outcome, withdrawnAt uint64, limit int) Judged {
	j := Judged{Endpoint: s.Endpoint, Why: sh.why(s, o.askedAt(), withdrawnAt)}
	if tcp, ok := sh.tracker.decider(s.Port); ok && j.Why == "" {
		switch {
		case tcp.Live > 0 && sh.answered[s.Port] >= limit:
			j.Why = WhyLimit
		case tcp.Endpoint != s.Endpoint && sh.why(tcp, o.askedAt(), withdrawnAt) != "":
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
func (sh *Shadow) why(s EndpointSpec, at, withdrawnAt uint64) Why {
	e := sh.tracker.entries[s.Endpoint]
	switch known := e.evidence; {
	case s.Reason != (Reason{}):
		return WhyNever
	case known.Result == Failure:
		return WhyFailed
	case known.Result != Success || sh.learnedAt[s.Endpoint] > at:
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

func (sh *Shadow) count(j Judged) {
	e := sh.counts[j.Endpoint]
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
	sh.counts[j.Endpoint] = e
}

// Counts returns the counts since the endpoints were set up.
func (sh *Shadow) Counts() map[Endpoint]ShadowCounts {
	all := make(map[Endpoint]ShadowCounts, len(sh.counts))
	for endpoint, e := range sh.counts {
		passed := make(map[Why]uint64, len(e.Passed))
		maps.Copy(passed, e.Passed)
		e.Passed = passed
		all[endpoint] = e
	}
	return all
}
