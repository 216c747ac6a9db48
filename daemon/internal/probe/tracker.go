package probe

import (
	"cmp"
	"slices"
)

// Evidence is what was last observed of an endpoint, and until when it may be answered.
type Evidence struct {
	// Question identifies the bytes of the request that the endpoint was last asked; HTTP only.
	Question   Question
	Result     Result
	Status     int // HTTP, 0 if none was seen
	ObservedAt uint64
	FreshUntil uint64
}

// Gate says until when connections to a port may be taken, and when the newest evidence for that was observed. Both are
// 0 if none may be taken.
type Gate struct{ ObservedAt, FreshUntil uint64 }

// gate is the gate that this evidence alone would open.
func (e Evidence) gate() Gate {
	if e.FreshUntil == 0 {
		return Gate{}
	}
	return Gate{e.ObservedAt, e.FreshUntil}
}

// Cause is why what is known of an endpoint changed.
type Cause string

// Causes.
const (
	ByProbe   Cause = "probe"   // the outcome of a probe
	ByRefresh Cause = "refresh" // the outcome of the daemon's own request
	ByRestart Cause = "restart" // a container began, ended or was replaced
	BySpec    Cause = "spec"    // other probes, or other settings
	ByRequest Cause = "request" // somebody asked for it
	ByRepair  Cause = "repair"  // the attachment was not whole, so what happened meanwhile is not known
	ByVerdict Cause = "verdict" // the kubelet's own verdict on its probes is another one
)

// Change is a change of what is known of an endpoint.
type Change struct {
	Endpoint Endpoint
	Cause    Cause
	From, To Evidence
}

// Withdrawn reports whether a success that might still have been answered no longer is.
func (c Change) Withdrawn(now uint64) bool { return c.From.FreshUntil > now && c.To.FreshUntil <= now }

// Tracker is the freshness policy for one pod: outcomes in, evidence and gates out. Only an observed success arms an
// endpoint; only another one, or of a TCP endpoint an answer on its port, prolongs it.
type Tracker struct {
	specs   []EndpointSpec
	entries map[Endpoint]*entry
}

type entry struct {
	spec     EndpointSpec
	evidence Evidence
	// text is the request of the evidence's question, if it is known.
	text []byte
	// since is when the endpoint came up, or was withdrawn. What was asked for before says nothing of it.
	since uint64
	// successes is how many probes in a row succeeded.
	successes int
	// asking is the last question that was found to be the spec's, because to compare requests costs more than all the rest.
	asking Question
}

// of is Outcome.of, for the entry's endpoint.
func (e *entry) of(o Outcome) bool {
	if o.Kind.Keying() != KeyedByRequest || o.Question == (Question{}) {
		return o.of(e.spec)
	}
	if o.Question != e.asking {
		if !o.of(e.spec) {
			return false
		}
		e.asking = o.Question
	}
	return o.Port == e.spec.Port && o.Kind == e.spec.Kind
}

// concerned reports whether the outcome says something about the endpoint.
func (e *entry) concerned(o Outcome) bool {
	return o.Port == e.spec.Port && (o.wholePort() || e.of(o))
}

// bound is the latest time until which a success may be answered.
func (e *entry) bound() uint64 {
	if e.spec.Reason != (Reason{}) || e.evidence.Result != Success {
		return 0
	}
	return e.evidence.ObservedAt + uint64(e.spec.Staleness)
}

// armed reports whether a success arms the endpoint, as far as its past goes.
func (e *entry) armed() bool {
	return e.evidence.Result == Success && e.successes >= e.spec.SuccessThreshold
}

// forget keeps the question only.
func (e *entry) forget(now uint64) {
	e.evidence, e.successes, e.since = Evidence{Question: e.evidence.Question}, 0, now
}

// NewTracker returns a tracker that knows no endpoint.
func NewTracker() *Tracker { return &Tracker{entries: map[Endpoint]*entry{}} }

// SetEndpoints replaces the endpoints, as Endpoints returns them. What is known of those that stay is kept, within their
// new bounds; nothing is, where it is about other containers.
func (t *Tracker) SetEndpoints(specs []EndpointSpec, now uint64) []Change {
	var changes []Change
	entries := map[Endpoint]*entry{}
	for _, s := range specs {
		if !s.Observed {
			continue
		}
		old := t.entries[s.Endpoint]
		if old == nil {
			entries[s.Endpoint] = &entry{spec: s, since: now}
			continue
		}
		e := *old
		e.spec, e.asking = s, Question{}
		entries[s.Endpoint] = &e
		change := Change{Endpoint: s.Endpoint, Cause: BySpec, From: old.evidence}
		if old.spec.Instance != s.Instance {
			change.Cause = ByRestart
			e.forget(now)
		}
		e.evidence.FreshUntil = min(e.evidence.FreshUntil, e.bound())
		if change.To = e.evidence; change.To != change.From {
			changes = append(changes, change)
		}
	}
	t.specs, t.entries = specs, entries
	return changes
}

// Endpoints are those of SetEndpoints.
func (t *Tracker) Endpoints() []EndpointSpec { return t.specs }

// Restore takes over evidence that outlived an earlier tracker; the caller answers for its being about the same question.
// It is never prolonged. Evidence from the future is none.
func (t *Tracker) Restore(endpoint Endpoint, evidence Evidence, now uint64) {
	e := t.entries[endpoint]
	if e == nil {
		return
	}
	e.evidence.Question = cmp.Or(e.evidence.Question, evidence.Question)
	if evidence.ObservedAt > now || evidence.ObservedAt <= e.evidence.ObservedAt {
		return
	}
	e.evidence, e.since = evidence, 0
	if evidence.FreshUntil != 0 && e.spec.SuccessThreshold == 1 {
		e.successes = 1 // where more are needed, what happened meanwhile may have gone unseen
	}
	e.evidence.FreshUntil = min(evidence.FreshUntil, e.bound())
}

// Void tells that the endpoints that are meant may have failed then, of which there is no outcome: they are not answered until
// their successes have been counted again.
func (t *Tracker) Void(meant func(Endpoint) bool, at uint64) []Change {
	return t.change(func(s EndpointSpec, e *entry) {
		if e.evidence.ObservedAt <= at && meant(s.Endpoint) {
			e.successes, e.evidence.FreshUntil = 0, 0
		}
	})
}

// Unanswered tells that a connection to a port that began then has not been answered until now. If that has taken as long as
// the timeout of a probe, it failed.
func (t *Tracker) Unanswered(port uint16, began, now uint64) []Change {
	return t.change(func(s EndpointSpec, e *entry) {
		failed := min(now, began+uint64(s.longestTimeout()))
		if s.Port == port && now >= began+uint64(s.Timeout) && e.evidence.ObservedAt <= failed {
			e.successes = 0
			e.evidence = Evidence{Question: e.evidence.Question, Result: Failure, ObservedAt: failed}
		}
	})
}

// change applies a function to what is known of the endpoints, and returns what it changed.
func (t *Tracker) change(f func(EndpointSpec, *entry)) []Change {
	var changes []Change
	for _, s := range t.specs {
		if !s.Observed {
			continue
		}
		e := t.entries[s.Endpoint]
		before := e.evidence
		if f(s, e); e.evidence != before {
			changes = append(changes, Change{s.Endpoint, ByProbe, before, e.evidence})
		}
	}
	return changes
}

// Observe learns from an outcome. What is older than the last one of its endpoint is ignored.
func (t *Tracker) Observe(o Outcome) []Change {
	var changes []Change
	for _, s := range t.specs {
		if !s.Observed {
			continue
		}
		e := t.entries[s.Endpoint]
		before := e.evidence
		if e.concerned(o) && e.observe(o) || o.connects(s) && e.renew(o) {
			changes = append(changes, Change{s.Endpoint, o.cause(), before, e.evidence})
		}
	}
	return changes
}

func (o Outcome) cause() Cause {
	if o.Refresh {
		return ByRefresh
	}
	return ByProbe
}

// observe dates a success from when it was asked for, not from when it was complete: what went wrong in between, such as
// the server's closing its listening socket while it finishes its last requests, is the later word.
func (e *entry) observe(o Outcome) bool {
	result, conclusive := e.spec.judge(o)
	observedAt := o.ObservedAt
	if result == Success {
		observedAt = o.askedAt()
	}
	if !conclusive || observedAt <= e.evidence.ObservedAt || o.askedAt() < e.since {
		return false
	}
	e.count(result, o.Refresh)
	known := e.evidence.Question
	e.evidence = Evidence{Question: known, Result: result, Status: o.Status, ObservedAt: observedAt}
	if o.Question != (Question{}) && e.of(o) {
		e.evidence.Question, e.text = o.Question, o.Text
	}
	if e.armed() {
		e.evidence.FreshUntil = e.bound()
	}
	return true
}

// renew prolongs the success of a TCP endpoint: a request was answered, so its connection was accepted. The prober of the
// endpoint knows nothing of that, so it is no success of its own.
func (e *entry) renew(o Outcome) bool {
	asked := o.askedAt()
	if !e.armed() || e.spec.late(o) || asked <= e.evidence.ObservedAt || asked < e.since {
		return false
	}
	e.evidence.ObservedAt = asked
	e.evidence.FreshUntil = e.bound()
	return true
}

// count counts what the prober counts.
func (e *entry) count(result Result, refresh bool) {
	switch {
	case result != Success:
		e.successes = 0
	case !refresh:
		e.successes++
	}
}

// Withdraw forgets what is known of the endpoints that are meant, and does not believe answers that were asked for
// before now.
func (t *Tracker) Withdraw(meant func(Endpoint) bool, now uint64) []Change {
	var changes []Change
	for _, s := range t.specs {
		e := t.entries[s.Endpoint]
		if !s.Observed || !meant(s.Endpoint) {
			continue
		}
		before := e.evidence
		e.forget(now)
		changes = append(changes, Change{s.Endpoint, ByRequest, before, e.evidence})
	}
	return changes
}

// Ask is an endpoint with the request of a probe that succeeded; HTTP only.
type Ask struct {
	EndpointSpec
	Question Question
	Text     []byte
}

// Refreshing returns what the daemon is to ask by itself now: what is known to succeed, and with which bytes. After a
// failure it is for the prober to find out that the pod has recovered.
func (t *Tracker) Refreshing() []Ask {
	var all []Ask
	for _, s := range t.specs {
		if e := t.entries[s.Endpoint]; s.Observed && s.Refresh > 0 && e.armed() && (s.Kind.Keying() == KeyedByPort || e.text != nil) {
			all = append(all, Ask{s, e.evidence.Question, e.text})
		}
	}
	return all
}

// Evidence returns what is known of the endpoints, of each that is observed.
func (t *Tracker) Evidence() map[Endpoint]Evidence {
	all := make(map[Endpoint]Evidence, len(t.entries))
	for endpoint, e := range t.entries {
		all[endpoint] = e.evidence
	}
	return all
}

// Gates returns the gate of each port on which something is observed.
func (t *Tracker) Gates() map[uint16]Gate {
	gates := map[uint16]Gate{}
	for _, s := range t.specs {
		if s.Observed {
			gates[s.Port] = t.gate(s.Port)
		}
	}
	return gates
}

// gate is open while at least one endpoint of the port is fresh. A SYN does not say what will be asked; a request that
// cannot be answered after all is handed over to the pod and observed there. Taking the connection does answer a TCP
// probe, though, so where there is one, its evidence alone decides.
func (t *Tracker) gate(port uint16) Gate {
	if tcp, ok := t.decider(port); ok {
		return t.entries[tcp.Endpoint].evidence.gate()
	}
	var widest Gate
	for _, s := range t.specs {
		if s.Observed && s.Port == port {
			own := t.entries[s.Endpoint].evidence.gate()
			widest = Gate{max(widest.ObservedAt, own.ObservedAt), max(widest.FreshUntil, own.FreshUntil)}
		}
	}
	return widest
}

// decider returns the port's TCP endpoint. One that only startup probes ask would close the port for good once they have
// ended, so it has no say: fresh HTTP evidence implies that connections are accepted.
func (t *Tracker) decider(port uint16) (EndpointSpec, bool) {
	i := slices.IndexFunc(t.specs, func(s EndpointSpec) bool {
		return s.Observed && s.Port == port && s.Kind.Keying() == KeyedByPort && !s.Startup
	})
	if i < 0 {
		return EndpointSpec{}, false
	}
	return t.specs[i], true
}
