package probe

import "time"

// Event is what was seen of a probe that the pod answered, or did not.
type Event uint8

// Events.
const (
	// Connected: the connection came about, and the prober closed it without a request.
	Connected Event = iota + 1
	// Answered: the prober had a whole and valid HTTP response, up to where it stops reading.
	Answered
	// Reset: the pod refused or reset the connection. Whatever was asked, this concerns every endpoint of the port.
	Reset
	// NoAnswer: the prober closed before the pod had answered.
	NoAnswer
	// Failed: the prober fails in another way, such as by an answer that is cut short or is not HTTP.
	Failed
)

// Outcome is the report of one probe.
type Outcome struct {
	Port uint16
	// Kind is TCP or HTTP; empty: what was asked is not known, so the outcome concerns every endpoint of the port.
	Kind Kind
	// Request is what was asked, Question its identity, and Text its bytes; HTTP only.
	Request  Request
	Question Question
	Text     []byte

	Event      Event
	Status     int // of Answered
	ObservedAt uint64
	// Duration is the time from the prober's SYN to ObservedAt.
	Duration time.Duration
	// Refresh: it is of the daemon's own request, not of a probe.
	Refresh bool
}

// askedAt is when the prober asked for the connection.
func (o Outcome) askedAt() uint64 { return o.ObservedAt - min(o.ObservedAt, uint64(o.Duration)) }

// wholePort reports whether the outcome says something about every endpoint of its port. A status, or an answer that does
// not come, is about the one that was asked: readiness and liveness on two paths each count for themselves.
func (o Outcome) wholePort() bool { return o.Kind == "" || o.Event == Reset }

// of reports whether the outcome is that of a probe of the endpoint.
func (o Outcome) of(s EndpointSpec) bool {
	return o.Port == s.Port && o.Kind == s.Kind && (o.Kind.Keying() == KeyedByPort || s.Asks(o.Request))
}

// connects reports whether the outcome shows that a probe of the endpoint would have succeeded, though it was of another
// one. Only where the kernel looks at the listening socket as well, so that it does not matter which of the pod's addresses
// was asked.
func (o Outcome) connects(s EndpointSpec) bool {
	return s.Live > 0 && o.Port == s.Port && o.Kind.Keying() == KeyedByRequest && o.Event == Answered
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

// judge is the kubelet's verdict on an outcome that concerns the endpoint, where it can be known. Not conclusive: as if it
// had not been seen.
func (s EndpointSpec) judge(o Outcome) (result Result, conclusive bool) {
	switch o.Event {
	case Reset, Failed:
		return Failure, true
	case NoAnswer:
		// Before its timeout the prober left by itself: it was stopped, or is not the kubelet.
		return Failure, s.late(o)
	case Connected:
		return successUnless(s.late(o)), s.succeedsBy(o)
	case Answered:
		result, conclusive = s.judgeStatus(o)
		return result, conclusive && s.succeedsBy(o)
	}
	return Unknown, false
}

// succeedsBy reports whether an outcome such as this one is how a probe of the endpoint gets its answer.
func (s EndpointSpec) succeedsBy(o Outcome) bool {
	return s.Kind == o.Kind && s.Kind.row().success == o.Event
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
