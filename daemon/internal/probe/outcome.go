package probe

import "time"

// Event classifies how a probe ended.
type Event uint8

// Events.
const (
	// Connected: the connection was established, and the prober closed it without sending a request.
	Connected Event = iota + 1
	// Answered: the prober received a complete and valid HTTP response, up to where it stops reading.
	Answered
	// Reset: the pod refused or reset the connection. Whatever was asked, this affects every endpoint of the port.
	Reset
	// NoAnswer: the prober closed before the pod had answered.
	NoAnswer
	// Failed: the prober failed in another way, for example because the response is truncated or is not HTTP.
	Failed
)

// Outcome reports how one probe ended.
type Outcome struct {
	Port uint16
	// Kind is HTTP or TCP, or empty if it is unknown what was asked: then the outcome affects every endpoint of the port.
	Kind Kind
	// Request is what was asked, Question identifies it, and Text holds its bytes; HTTP only.
	Request  Request
	Question Question
	Text     []byte

	Event      Event
	Status     int // if Answered
	ObservedAt uint64
	// Duration is the time from the prober's SYN to ObservedAt.
	Duration time.Duration
	// Refresh: the request was the daemon's own, not a probe's.
	Refresh bool
}

// askedAt returns when the prober asked for the connection.
func (o Outcome) askedAt() uint64 { return o.ObservedAt - min(o.ObservedAt, uint64(o.Duration)) }

// wholePort reports whether the outcome affects every endpoint of its port. A status, or a missing answer, affects only
// the endpoint that was asked: readiness and liveness on two paths each count for themselves.
func (o Outcome) wholePort() bool { return o.Kind == "" || o.Event == Reset }

// of reports whether the outcome belongs to a probe of the endpoint.
func (o Outcome) of(s EndpointSpec) bool {
	return o.Port == s.Port && o.Kind == s.Kind && (o.Kind.Keying() == KeyedByPort || s.Asks(o.Request))
}

// connects reports whether the outcome of another endpoint shows that a probe of this one would have succeeded. That
// holds only where the kernel checks the listening socket as well, so that it does not matter which of the pod's
// addresses was asked.
func (o Outcome) connects(s EndpointSpec) bool {
	return s.Live > 0 && o.Port == s.Port && o.Kind.Keying() == KeyedByRequest && o.Event == Answered
}

// Result is the result of the last conclusive outcome.
type Result uint8

// Results.
const (
	Unknown Result = iota
	Success
	Failure
)

func (r Result) String() string { return [...]string{"unknown", "success", "failure"}[r] }

// late reports whether the prober may have given up before the outcome. Its timer starts before its SYN, by as much as
// the node is busy, and it decides when it has read the answer, not when the answer is seen on its way. So the last tenth
// of the timeout is not trusted.
func (s EndpointSpec) late(o Outcome) bool { return o.Duration >= s.Timeout-s.Timeout/10 }

// judge returns the kubelet's verdict on an outcome that affects the endpoint. An outcome that is not conclusive must be
// ignored.
func (s EndpointSpec) judge(o Outcome) (result Result, conclusive bool) {
	switch o.Event {
	case Reset, Failed:
		return Failure, true
	case NoAnswer:
		// A prober that left before its timeout was stopped, or is not the kubelet.
		return Failure, s.late(o)
	case Connected:
		return successUnless(s.late(o)), s.succeedsBy(o)
	case Answered:
		result, conclusive = s.judgeStatus(o)
		return result, conclusive && s.succeedsBy(o)
	}
	return Unknown, false
}

// succeedsBy reports whether a successful probe of the endpoint ends with an outcome of this kind and event.
func (s EndpointSpec) succeedsBy(o Outcome) bool {
	return s.Kind == o.Kind && s.Kind.row().success == o.Event
}

func (s EndpointSpec) judgeStatus(o Outcome) (result Result, conclusive bool) {
	switch {
	case o.Status >= 200 && o.Status < 300:
		return successUnless(s.late(o)), true
	case o.Status >= 300 && o.Status < 400:
		// The kubelet follows the redirect, or warns. Either way its verdict does not depend on this answer, so that is
		// not repeated.
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
