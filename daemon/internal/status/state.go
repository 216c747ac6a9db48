package status

import (
	"cmp"
	"fmt"
	"math"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// State classifies what is known about an endpoint.
type State string

// States of an endpoint.
const (
	StateFresh   State = "fresh"   // a success was observed and may be answered
	StateStale   State = "stale"   // a success was observed; it has expired, was withdrawn or is never answered
	StateFailed  State = "failed"  // the last probe failed
	StateUnknown State = "unknown" // nothing conclusive was observed
	// StateNever is used by metrics only: the endpoint is never answered, whatever is observed.
	StateNever State = "never"
)

// States returns all states.
func States() []State { return []State{StateFresh, StateStale, StateFailed, StateUnknown, StateNever} }

// Endpoint describes an endpoint as far as its state depends on it.
type Endpoint struct {
	Kind probe.Kind
	// Never is why the endpoint is never answered; empty if it may be. Withheld reports that mode observe is the only reason.
	Never    probe.Reason
	Withheld bool
	// Bound is how long after its observation a success may be answered.
	Bound time.Duration
	// ServedAt is when the pod was last seen serving its clients; 0: never.
	ServedAt uint64
	// Successes is how many probes in a row must succeed before one is answered.
	Successes int

	Evidence probe.Evidence
	// WithdrawnAt is when the kernel last withdrew the evidence, alone or with that of the whole port; 0: never. Cause names why,
	// as in datapath.WithdrawalCauses.
	WithdrawnAt uint64
	Cause       string
}

// evidence returns what is known as mode answer would have it: in mode observe nothing is given a bound.
func (e Endpoint) evidence() probe.Evidence {
	known := e.Evidence
	if e.Withheld {
		known.FreshUntil = known.ObservedAt + uint64(e.Bound)
	}
	return known
}

// State returns the endpoint's state at now, in ns of CLOCK_BOOTTIME. In mode observe it is the state that it would have in mode
// answer.
func (e Endpoint) State(now uint64) State {
	known := e.evidence()
	switch {
	case known.ObservedAt == 0:
		return StateUnknown
	case known.Result == probe.Failure:
		return StateFailed
	case known.Result != probe.Success:
		return StateUnknown
	case now < e.until() && known.ObservedAt > e.WithdrawnAt:
		return StateFresh
	}
	return StateStale
}

// until returns until when a success may be answered, as far as is known now.
func (e Endpoint) until() uint64 {
	known := e.evidence()
	if e.ServedAt == 0 {
		return known.FreshUntil
	}
	return max(known.FreshUntil, min(known.TrafficUntil, e.ServedAt+uint64(known.TrafficWindow)))
}

// Counted returns the state that metrics count the endpoint under: StateNever if it is never answered, State otherwise.
func (e Endpoint) Counted(now uint64) State {
	if e.Never != (probe.Reason{}) && !e.Withheld {
		return StateNever
	}
	return e.State(now)
}

// FreshFor returns for how long a fresh endpoint will be answered.
func (e Endpoint) FreshFor(now uint64) time.Duration {
	until := e.until()
	return time.Duration(until - min(until, now))
}

// Reason returns why the endpoint's next probe reaches the pod, as far as its own evidence decides that; empty if it is fresh.
func (e Endpoint) Reason(now uint64) probe.Reason {
	known := e.evidence()
	switch state := e.State(now); {
	case state == StateFresh:
		return probe.Reason{}
	case known.ObservedAt == 0:
		return probe.Reason{Code: Unobserved, Text: "nothing observed yet"}
	case state == StateUnknown:
		return probe.Reason{Code: Redirect, Text: fmt.Sprintf("status %d: a redirect is never answered", known.Status)}
	case state == StateFailed:
		return e.Failure()
	case known.ObservedAt <= e.WithdrawnAt:
		return probe.Reason{Code: Withdrawn, Text: "withdrawn: " + WithdrawalText(e.Cause)}
	case known.FreshUntil == 0 && e.Never == (probe.Reason{}) && e.Successes > 1:
		return probe.Reason{Code: Threshold, Text: fmt.Sprintf("%d probes in a row must succeed first (successThreshold)", e.Successes)}
	case known.TrafficUntil > now:
		return probe.Reason{Code: NoTraffic, Text: "the last probe timed out or expired, and the pod has not served a client since"}
	case known.FreshUntil == 0:
		return probe.Reason{Code: Expired, Text: "expired"}
	}
	ago := Duration((time.Duration(now - min(now, known.FreshUntil))).Seconds())
	return probe.Reason{Code: Expired, Text: fmt.Sprintf("expired %s ago", ago)}
}

// Failure returns the reason of an endpoint whose last probe failed.
func (e Endpoint) Failure() probe.Reason {
	text := fmt.Sprintf("status %d", e.Evidence.Status)
	switch {
	case e.Evidence.Status == 0 && e.Kind.Keying() == probe.KeyedByPort:
		text = "refused, or not accepted in time"
	case e.Evidence.Status == 0:
		text = "refused, reset, or no complete and valid response in time"
	case e.Evidence.Status < 300:
		text += " came too late"
	}
	return probe.Reason{Code: LastFailed, Text: "the last probe failed: " + text}
}

// Attachment describes an attachment as far as it decides whether anything behind it is answered.
type Attachment struct {
	Error   string // why attaching failed
	Loaded  bool   // the BPF objects are loaded
	IfIndex int
	Known   bool // the BPF programs know the device
	// Described reports whether the daemon, or the previous one, has described the pod. Endpoints counts what it described.
	Described     bool
	Endpoints     int
	DaemonRunning bool
	// ProberKnown reports whether a prober is set, and ProberShared whether its cgroup has other processes too, which only a running
	// daemon can tell apart.
	ProberKnown, ProberShared bool
	// Lost reports whether answers through the device were lost. Loss names how that was noticed, as in datapath.Losses.
	Lost bool
	Loss string
}

// notAttached is the prefix of reasons why an attachment does not work.
const notAttached = "not attached: "

// Reason returns why nothing behind the attachment is answered; empty if something may be.
func (a Attachment) Reason() probe.Reason {
	switch {
	case a.Error != "":
		return probe.Reason{Code: AttachFailed, Text: notAttached + a.Error}
	case !a.Loaded:
		return probe.Reason{Code: NotLoaded, Text: notAttached + "the BPF objects are not loaded"}
	case !a.Known:
		return probe.Reason{Code: UnknownDevice, Text: fmt.Sprintf(notAttached+"the programs do not know device %d", a.IfIndex)}
	case !a.Described && a.DaemonRunning:
		return probe.Reason{Code: NotSeen, Text: "the daemon has not seen this pod yet"}
	case !a.Described:
		return probe.Reason{Code: NoDaemon, Text: "no daemon has described this pod, and none is running"}
	case a.Endpoints == 0:
		return probe.Reason{Code: NoProbes, Text: "the daemon knows of no probes of this pod"}
	case !a.ProberKnown:
		return probe.Reason{Code: NoProber, Text: "the prober is unknown"}
	case a.ProberShared && !a.DaemonRunning:
		return probe.Reason{Code: ProberShared, Text: "the prober shares its cgroup with other processes, and only a running daemon can tell them apart"}
	case a.Lost:
		return probe.Reason{Code: AnswersLost, Text: "answers through its device do not arrive: " + LossText(a.Loss)}
	}
	return probe.Reason{}
}

// First returns the first of the reasons that is not empty.
func First(reasons ...probe.Reason) probe.Reason { return cmp.Or(reasons...) }

// Duration rounds a time in seconds for people.
func Duration(seconds float64) time.Duration {
	d := time.Duration(math.Round(seconds * float64(time.Second)))
	if d < 10*time.Second {
		return d.Round(100 * time.Millisecond)
	}
	return d.Round(time.Second)
}
