package probe

// Evidence is what was last observed of an endpoint, and until when it may be answered.
type Evidence struct {
	Result     Result
	Status     int // HTTP, 0 if none was seen
	ObservedAt uint64
	FreshUntil uint64
}

// Gate is whether connections to a port may be taken: until FreshUntil, on evidence of which the oldest is from
// ObservedAt. Both are 0 if they may not.
type Gate struct{ ObservedAt, FreshUntil uint64 }

// Change is an outcome that changed what is known of an endpoint.
type Change struct {
	Endpoint Endpoint
	From, To Evidence
}

// Tracker is the freshness policy for one pod: outcomes in, evidence and gates out. Only an observed success arms an
// endpoint, and nothing else ever prolongs it.
type Tracker struct {
	specs   []EndpointSpec
	entries map[Endpoint]*entry
}

type entry struct {
	spec     EndpointSpec
	evidence Evidence
	// since is when this question came up. What was observed before was asked differently.
	since uint64
}

// bound is the latest time until which a success may be answered.
func (e *entry) bound() uint64 {
	if e.evidence.Result != Success || e.spec.Reason != "" {
		return 0
	}
	return e.evidence.ObservedAt + uint64(e.spec.Staleness)
}

// NewTracker returns a tracker that knows no endpoint.
func NewTracker() *Tracker { return &Tracker{entries: map[Endpoint]*entry{}} }

// SetEndpoints replaces the endpoints, as Endpoints returns them. What is known of those that stay is kept, within their
// new bounds.
func (t *Tracker) SetEndpoints(specs []EndpointSpec, now uint64) {
	entries := map[Endpoint]*entry{}
	for _, s := range specs {
		if !s.Observed {
			continue
		}
		e := &entry{spec: s, since: now}
		if old := t.entries[s.Endpoint]; old != nil && old.spec.Headers == s.Headers {
			e.evidence, e.since = old.evidence, old.since
			e.evidence.FreshUntil = min(e.evidence.FreshUntil, e.bound())
		}
		entries[s.Endpoint] = e
	}
	t.specs, t.entries = specs, entries
}

// Endpoints are those of SetEndpoints.
func (t *Tracker) Endpoints() []EndpointSpec { return t.specs }

// Restore takes over evidence that outlived an earlier tracker; the caller answers for its being about the same question.
// It is never prolonged. Evidence from the future is none.
func (t *Tracker) Restore(endpoint Endpoint, evidence Evidence, now uint64) {
	e := t.entries[endpoint]
	if e == nil || evidence.ObservedAt > now || evidence.ObservedAt <= e.evidence.ObservedAt {
		return
	}
	e.evidence, e.since = evidence, 0
	e.evidence.FreshUntil = min(evidence.FreshUntil, e.bound())
}

// Observe learns from an outcome. What is older than the last one of its endpoint is ignored.
func (t *Tracker) Observe(o Outcome) []Change {
	var changes []Change
	for _, s := range t.specs {
		e := t.entries[s.Endpoint]
		if !s.Observed || !o.concerns(s.Endpoint) {
			continue
		}
		before := e.evidence
		if e.observe(o) {
			changes = append(changes, Change{s.Endpoint, before, e.evidence})
		}
	}
	return changes
}

// observe dates a success from when it was asked for, not from when it was complete: what went wrong in between, such as
// the server's closing its listening socket while it finishes its last requests, is the later word.
func (e *entry) observe(o Outcome) bool {
	result, conclusive := e.spec.judge(o)
	askedAt := o.ObservedAt - min(o.ObservedAt, uint64(o.Duration))
	observedAt := o.ObservedAt
	if result == Success {
		observedAt = askedAt
	}
	if !conclusive || observedAt <= e.evidence.ObservedAt || askedAt < e.since {
		return false
	}
	e.evidence = Evidence{Result: result, Status: o.Status, ObservedAt: observedAt}
	e.evidence.FreshUntil = e.bound()
	return true
}

// Evidence returns what is known of the endpoints, of each that is observed.
func (t *Tracker) Evidence() map[Endpoint]Evidence {
	all := make(map[Endpoint]Evidence, len(t.entries))
	for endpoint, e := range t.entries {
		all[endpoint] = e.evidence
	}
	return all
}

// Gates returns the gate of each port on which something is observed. A SYN does not tell what it is for, so a port's
// connections are taken only while each of its endpoints is fresh.
func (t *Tracker) Gates() map[uint16]Gate {
	gates := map[uint16]Gate{}
	for _, s := range t.specs {
		if s.Observed {
			gates[s.Port] = t.gate(s.Port)
		}
	}
	return gates
}

// gate does not count endpoints that only startup probes ask. When such a probe does come while the port is taken, an
// HTTP request finds nothing to be answered with, and is handed over; a connection for its own sake is accepted, and
// fresh evidence of another endpoint on the port implies that it would be.
func (t *Tracker) gate(port uint16) Gate {
	var gate Gate
	for _, s := range t.specs {
		if s.Port != port || !s.gates() {
			continue
		}
		e := t.entries[s.Endpoint]
		if !s.Observed || e.evidence.FreshUntil == 0 {
			return Gate{}
		}
		if gate == (Gate{}) {
			gate = Gate{e.evidence.ObservedAt, e.evidence.FreshUntil}
		}
		gate.ObservedAt = min(gate.ObservedAt, e.evidence.ObservedAt)
		gate.FreshUntil = min(gate.FreshUntil, e.evidence.FreshUntil)
	}
	return gate
}
