package probe

// Evidence is what was last observed of an endpoint, and until when it may be answered.
type Evidence struct {
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
)

// Change is of what is known of an endpoint.
type Change struct {
	Endpoint Endpoint
	Cause    Cause
	From, To Evidence
}

// Withdrawn is whether a success that might still have been answered no longer is.
func (c Change) Withdrawn(now uint64) bool { return c.From.FreshUntil > now && c.To.FreshUntil <= now }

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
// new bounds; nothing is, where it is about other containers or another request.
func (t *Tracker) SetEndpoints(specs []EndpointSpec, now uint64) []Change {
	var changes []Change
	entries := map[Endpoint]*entry{}
	for _, s := range specs {
		if !s.Observed {
			continue
		}
		e := &entry{spec: s, since: now}
		entries[s.Endpoint] = e
		old := t.entries[s.Endpoint]
		if old == nil {
			continue
		}
		change := Change{Endpoint: s.Endpoint, Cause: BySpec, From: old.evidence}
		switch {
		case old.spec.Instance != s.Instance:
			change.Cause = ByRestart
		case old.spec.Headers == s.Headers:
			e.evidence, e.since = old.evidence, old.since
			e.evidence.FreshUntil = min(e.evidence.FreshUntil, e.bound())
		}
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
	e.evidence = Evidence{Result: result, Status: o.Status, ObservedAt: observedAt}
	e.evidence.FreshUntil = e.bound()
	return true
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
		changes = append(changes, Change{s.Endpoint, ByRequest, e.evidence, Evidence{}})
		e.evidence, e.since = Evidence{}, now
	}
	return changes
}

// Refreshing are the endpoints that the daemon is to ask by itself now: those that are known to succeed. After a failure
// it is for the prober to find out that the pod has recovered.
func (t *Tracker) Refreshing() []EndpointSpec {
	var all []EndpointSpec
	for _, s := range t.specs {
		if s.Observed && s.Refresh > 0 && t.entries[s.Endpoint].evidence.Result == Success {
			all = append(all, s)
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
// probe, though, so where there is one, its evidence alone decides. A TCP endpoint that only startup probes ask would
// close the port for good once they have ended, so it has no say: fresh HTTP evidence implies that connections are
// accepted.
func (t *Tracker) gate(port uint16) Gate {
	var widest Gate
	for _, s := range t.specs {
		if !s.Observed || s.Port != port {
			continue
		}
		own := t.entries[s.Endpoint].evidence.gate()
		if s.Kind == TCP && !s.Startup {
			return own
		}
		widest = Gate{max(widest.ObservedAt, own.ObservedAt), max(widest.FreshUntil, own.FreshUntil)}
	}
	return widest
}
