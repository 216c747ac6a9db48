package probe

import "time"

// Event is what was seen of a probe that the pod answered, or did not.
type Event uint8

// Events.
const (
	// Connected: the connection came about, and the prober closed it without a request.
	Connected Event = iota + 1
	// Answered: an HTTP status was seen. A 2xx counts when the prober has closed, so that its duration covers all.
	Answered
	// Reset: the pod refused or reset the connection. Whatever was asked, this concerns every endpoint of the port.
	Reset
	// NoAnswer: the prober closed before the pod had answered.
	NoAnswer
	// Failed: what was asked failed in another way, such as an answer that is cut short or is not HTTP.
	Failed
)

// Outcome is the report of one probe.
type Outcome struct {
	// Endpoint is what was asked. Kind empty: not known, so the outcome concerns every endpoint of the port.
	Endpoint   Endpoint
	Event      Event
	Status     int // of Answered
	ObservedAt uint64
	// Duration is the time from the prober's SYN to ObservedAt.
	Duration time.Duration
	// Refresh: it is of the daemon's own request, not of a probe.
	Refresh bool
	// ConnectedAt is when the connection was asked for, if that was before the request; otherwise 0.
	ConnectedAt uint64
}

// askedAt is when all was asked for that the outcome says something of. A probe asks for a connection too, so an answer
// on one that was kept is no newer than that: a pod that accepts none any more may go on answering on those it has.
func (o Outcome) askedAt() uint64 {
	asked := o.ObservedAt - min(o.ObservedAt, uint64(o.Duration))
	if o.ConnectedAt != 0 {
		asked = min(asked, o.ConnectedAt)
	}
	return asked
}

// concerns reports whether the outcome says something about the endpoint. A status, or an answer that does not come, is
// about the one that was asked: readiness and liveness on two paths each count for themselves.
func (o Outcome) concerns(e Endpoint) bool {
	wholePort := o.Endpoint.Kind == "" || o.Event == Reset
	return o.Endpoint == e || wholePort && o.Endpoint.Port == e.Port
}

// Result is what the last conclusive outcome says.
type Result uint8

// Results.
const (
	Unknown Result = iota
	Success
	Failure
)

func (r Result) String() string { return [...]string{"unknown", "success", "failure"}[r] }

// late is whether the prober may have given up before the outcome. Its timer starts before its SYN, by as much as the
// node is busy, and it decides when it has read the answer, not when the answer is seen on the way. So the last tenth
// of the timeout is not trusted.
func (s EndpointSpec) late(o Outcome) bool { return o.Duration >= s.Timeout-s.Timeout/10 }

// judge is the kubelet's verdict on an outcome, where it can be known. Not conclusive: as if it had not been seen.
func (s EndpointSpec) judge(o Outcome) (result Result, conclusive bool) {
	switch o.Event {
	case Reset, Failed:
		return Failure, true
	case NoAnswer:
		// Before its timeout the prober left by itself: it was stopped, or is not the kubelet.
		return Failure, s.late(o)
	case Connected:
		return successUnless(s.late(o)), s.Kind == TCP && o.Endpoint == s.Endpoint
	case Answered:
		result, conclusive = s.judgeStatus(o)
		return result, conclusive && s.Kind == HTTP && o.Endpoint == s.Endpoint
	}
	return Unknown, false
}

func (s EndpointSpec) judgeStatus(o Outcome) (result Result, conclusive bool) {
	switch {
	case o.Status >= 200 && o.Status < 300:
		return successUnless(s.late(o)), true
	case o.Status >= 300 && o.Status < 400:
		// The kubelet follows it, or warns; either way the verdict is not about this answer, which is not repeated.
		return Unknown, true
	case o.Status >= 400:
		return Failure, true
	}
	return Unknown, false
}

func successUnless(late bool) Result {
	if late {
		return Failure
	}
	return Success
}
