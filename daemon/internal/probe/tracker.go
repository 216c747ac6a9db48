package probe

import (
	"cmp"
	"slices"
	"time"
)

// Evidence is the last observation of an endpoint, and until when it may be answered.
type Evidence struct {
	// Question identifies the last request to the endpoint; HTTP only.
	Question   Question
	Result     Result
	Status     int // HTTP only; 0 if none was seen
	ObservedAt uint64
	FreshUntil uint64
	// TrafficUntil: until then a success may be answered while the pod has served its clients within TrafficWindow; 0 if
	// traffic is not evidence.
	TrafficUntil  uint64
	TrafficWindow time.Duration
}

// Gate says until when connections to a port may be taken, and when the newest evidence for that was observed. All fields are
// 0 if none may be taken.
type Gate struct {
	ObservedAt, FreshUntil uint64
	TrafficUntil           uint64 // as in Evidence
	TrafficWindow          time.Duration
}

// gate returns the gate that this evidence alone would open.
func (e Evidence) gate() Gate {
	if e.FreshUntil == 0 && e.TrafficUntil == 0 {
		return Gate{}
	}
	return Gate{e.ObservedAt, e.FreshUntil, e.TrafficUntil, e.TrafficWindow}
}

// Cause says why the evidence of an endpoint changed.
type Cause string

// Causes.
const (
	ByProbe   Cause = "probe"   // the outcome of a probe
	ByRefresh Cause = "refresh" // the outcome of the daemon's own request
	ByRestart Cause = "restart" // a container started, ended or was replaced
	BySpec    Cause = "spec"    // the probes or the settings changed
	ByRequest Cause = "request" // a user requested it
	ByRepair  Cause = "repair"  // the attachment was broken, so what happened meanwhile is unknown
	ByVerdict Cause = "verdict" // the kubelet's verdict contradicts the evidence
)

// Change is a change of an endpoint's evidence.
type Change struct {
	Endpoint Endpoint
	Cause    Cause
	From, To Evidence
}

// Withdrawn reports whether a success that might still have been answered no longer may be.
func (c Change) Withdrawn(now uint64) bool { return c.From.FreshUntil > now && c.To.FreshUntil <= now }

// Tracker implements the freshness policy for one pod: outcomes in, evidence and gates out. Only an observed success arms
// an endpoint. Only another success prolongs that, or, for a TCP endpoint, an answered request on its port.
type Tracker struct {
	specs   []EndpointSpec
	entries map[Endpoint]*entry
}

type entry struct {
	spec     EndpointSpec
	evidence Evidence
	// text holds the request that the evidence's question identifies, if known.
	text []byte
	// since is when the endpoint was set up or withdrawn. Outcomes of earlier requests are ignored.
	since uint64
	// probedAt dates the last outcome of a prober, as the evidence would. What the daemon's own requests and other endpoints'
	// probes find may be newer, but the prober does not know of it, so it makes no failure of the prober's obsolete.
	probedAt uint64
	// restoredAt dates evidence that outlived an earlier tracker. Connections known to be unanswered before it were known then too.
	restoredAt uint64
	// successes counts the probes in a row that succeeded.
	successes int
	// wellSince is when the first of them was asked; 0 if there is none.
	wellSince uint64
	// asking caches the last question that matched the spec, because comparing requests costs more than everything else.
	asking Question
}

// of is Outcome.of for the entry's endpoint.
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

// concerned reports whether the outcome affects the endpoint.
func (e *entry) concerned(o Outcome) bool {
	return o.Port == e.spec.Port && (o.wholePort() || e.of(o))
}

// bound returns the latest time until which a success may be answered.
func (e *entry) bound() uint64 {
	if e.spec.Reason != (Reason{}) || e.evidence.Result != Success {
		return 0
	}
	staleness := e.spec.Staleness
	if e.wellSince != 0 && e.evidence.ObservedAt-e.wellSince >= uint64(SteadyAfter) {
		staleness = e.spec.SteadyStaleness
	}
	return e.evidence.ObservedAt + uint64(staleness)
}

// armed reports whether enough successes in a row arm the endpoint.
func (e *entry) armed() bool {
	return e.evidence.Result == Success && e.successes >= e.spec.SuccessThreshold
}

// forget drops everything but the question.
func (e *entry) forget(now uint64) {
	e.evidence, e.since = Evidence{Question: e.evidence.Question}, now
	e.successes, e.wellSince, e.probedAt, e.restoredAt = 0, 0, 0, 0
}

// NewTracker returns a tracker without endpoints.
func NewTracker() *Tracker { return &Tracker{entries: map[Endpoint]*entry{}} }

// SetEndpoints replaces the endpoints, as returned by Endpoints. It keeps the evidence of endpoints that stay, within
// their new bounds, unless their containers were replaced.
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
		if old.spec.Reason != (Reason{}) && !old.spec.Withheld { // meanwhile others may have asked it too
			e.successes, e.wellSince = 0, 0
		}
		e.spec, e.asking = s, Question{}
		entries[s.Endpoint] = &e
		change := Change{Endpoint: s.Endpoint, Cause: BySpec, From: old.evidence}
		if old.spec.Instance != s.Instance {
			change.Cause = ByRestart
			e.forget(now)
		}
		e.evidence.FreshUntil = min(e.evidence.FreshUntil, e.bound())
		e.setTrafficUntil(min(e.evidence.TrafficUntil, e.trafficUntil(now)))
		if change.To = e.evidence; change.To != change.From {
			changes = append(changes, change)
		}
	}
	t.specs, t.entries = specs, entries
	return changes
}

// Endpoints returns the endpoints set by SetEndpoints.
func (t *Tracker) Endpoints() []EndpointSpec { return t.specs }

// Restore takes over evidence that outlived an earlier tracker; the caller must ensure that it is for the same question.
// It never prolongs evidence, and ignores evidence from the future.
func (t *Tracker) Restore(endpoint Endpoint, evidence Evidence, now uint64) {
	e := t.entries[endpoint]
	if e == nil {
		return
	}
	e.evidence.Question = cmp.Or(e.evidence.Question, evidence.Question)
	if evidence.ObservedAt > now || evidence.ObservedAt <= e.evidence.ObservedAt {
		return
	}
	e.evidence, e.since, e.restoredAt = evidence, 0, evidence.ObservedAt
	if evidence.FreshUntil != 0 && e.spec.SuccessThreshold == 1 {
		e.successes = 1 // a higher threshold is not restored: failures may have gone unseen meanwhile
	}
	e.evidence.FreshUntil = min(evidence.FreshUntil, e.bound())
	e.setTrafficUntil(min(evidence.TrafficUntil, e.trafficUntil(now)))
}

// Void records that the matching endpoints may have failed at that time, although no outcome says so. They are not
// answered until they have succeeded often enough again.
func (t *Tracker) Void(meant func(Endpoint) bool, at uint64) []Change {
	return t.change(func(s EndpointSpec, e *entry) {
		if e.probedAt <= at && meant(s.Endpoint) {
			e.successes, e.wellSince, e.evidence.FreshUntil = 0, 0, 0
			e.setTrafficUntil(0)
		}
	})
}

// Falter records that a failure at that time may have gone unseen by the prober. It does not change the evidence, but from
// then on the endpoint has to become steady again.
func (t *Tracker) Falter(endpoint Endpoint, at uint64) {
	if e := t.entries[endpoint]; e != nil && e.wellSince <= at {
		e.wellSince = 0
	}
}

// Unanswered records that a connection to a port, begun at that time, has not been answered yet. It counts as a failure
// once it has taken as long as the timeout of a probe.
func (t *Tracker) Unanswered(port uint16, began, now uint64) []Change {
	return t.change(func(s EndpointSpec, e *entry) {
		failed := min(now, began+uint64(s.longestTimeout()))
		if s.Port == port && now >= began+uint64(s.Timeout) && max(e.probedAt, e.restoredAt) <= failed && !e.timeOut(began) {
			e.successes, e.wellSince = 0, 0
			e.evidence = Evidence{Question: e.evidence.Question, Result: Failure, ObservedAt: max(failed, e.evidence.ObservedAt)}
		}
	})
}

// change applies a function to the entries of all endpoints, and returns the resulting changes.
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

// Observe learns from an outcome. It ignores outcomes older than the last one of the same endpoint, but not a prober's failures
// because of what the daemon's own requests found later.
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

// observe dates a success by when it was requested, not by when it completed: if something failed in between, such as a
// server that closed its listening socket while finishing its last requests, the failure must count as the later event.
func (e *entry) observe(o Outcome) bool {
	result, conclusive := e.spec.judge(o)
	observedAt := o.ObservedAt
	if result == Success {
		observedAt = o.askedAt()
	}
	last := e.evidence.ObservedAt
	if result != Success && !o.Refresh {
		last = e.probedAt
	}
	if !conclusive || observedAt <= last || o.askedAt() < e.since {
		return false
	}
	if !o.Refresh {
		e.probedAt = observedAt
	}
	if e.spec.timedOut(o) && result == Failure && e.timeOut(o.askedAt()) {
		return true
	}
	e.count(result, o)
	before := e.evidence
	e.evidence = Evidence{Question: before.Question, Result: result, Status: o.Status, ObservedAt: max(observedAt, before.ObservedAt)}
	if o.Question != (Question{}) && e.of(o) {
		e.evidence.Question, e.text = o.Question, o.Text
	}
	switch {
	case e.armed():
		e.evidence.FreshUntil = e.bound()
		e.setTrafficUntil(e.trafficUntil(observedAt))
	case result == Success && before.Result == Success: // of the daemon's own, after a timeout: it neither prolongs nor ends what traffic may do
		e.setTrafficUntil(before.TrafficUntil)
	}
	return true
}

// renew prolongs the success of a TCP endpoint because a request on its port was answered, so its connection was
// accepted. The endpoint's prober does not know of that, so it does not count as another success.
func (e *entry) renew(o Outcome) bool {
	asked := o.askedAt()
	if !e.armed() || e.spec.late(o) || asked <= e.evidence.ObservedAt || asked < e.since {
		return false
	}
	e.evidence.ObservedAt = asked
	e.evidence.FreshUntil = e.bound()
	e.setTrafficUntil(e.trafficUntil(asked))
	return true
}

// count counts successes as the prober does.
func (e *entry) count(result Result, o Outcome) {
	if result != Success {
		e.successes, e.wellSince = 0, 0
		return
	}
	if e.wellSince == 0 {
		e.wellSince = o.askedAt()
	}
	if !o.Refresh {
		e.successes++
	}
}

// Withdraw drops the evidence of the matching endpoints, and makes the tracker ignore outcomes of requests sent before
// now.
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

// Ask is an endpoint with the request of a successful probe; HTTP only.
type Ask struct {
	EndpointSpec
	Question Question
	Text     []byte
}

// Refreshing returns the requests that the daemon should send now: those known to succeed. After a failure only the
// prober may find out that the pod has recovered.
func (t *Tracker) Refreshing() []Ask {
	var all []Ask
	for _, s := range t.specs {
		if e := t.entries[s.Endpoint]; s.Observed && s.Refresh > 0 && e.armed() && (s.Kind.Keying() == KeyedByPort || e.text != nil) {
			all = append(all, Ask{s, e.evidence.Question, e.text})
		}
	}
	return all
}

// Evidence returns the evidence of all observed endpoints.
func (t *Tracker) Evidence() map[Endpoint]Evidence {
	all := make(map[Endpoint]Evidence, len(t.entries))
	for endpoint, e := range t.entries {
		all[endpoint] = e.evidence
	}
	return all
}

// Gates returns the gate of each port with an observed endpoint.
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
// turns out not to be answerable is handed over to the pod and observed there. But taking the connection already answers
// a TCP probe, so on a port with one, its evidence alone decides.
func (t *Tracker) gate(port uint16) Gate {
	if tcp, ok := t.decider(port); ok {
		return t.entries[tcp.Endpoint].evidence.gate()
	}
	var widest Gate
	for _, s := range t.specs {
		if s.Observed && s.Port == port {
			own := t.entries[s.Endpoint].evidence.gate()
			widest = Gate{
				max(widest.ObservedAt, own.ObservedAt), max(widest.FreshUntil, own.FreshUntil),
				max(widest.TrafficUntil, own.TrafficUntil), max(widest.TrafficWindow, own.TrafficWindow),
			}
		}
	}
	return widest
}

// decider returns the port's TCP endpoint. An endpoint asked only by startup probes does not count: it would close the
// port for good once they have ended, and fresh HTTP evidence already implies that connections are accepted.
func (t *Tracker) decider(port uint16) (EndpointSpec, bool) {
	i := slices.IndexFunc(t.specs, func(s EndpointSpec) bool { return s.Port == port && s.decides() })
	if i < 0 {
		return EndpointSpec{}, false
	}
	return t.specs[i], true
}

// decides reports whether the endpoint is the decider of its port.
func (s EndpointSpec) decides() bool {
	return s.Observed && s.Kind.Keying() == KeyedByPort && !s.Startup
}
