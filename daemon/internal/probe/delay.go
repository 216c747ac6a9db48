package probe

import "time"

// Delay is the bound on how long a failure can go unnoticed by one probe: from the moment at which its endpoint begins
// to fail every request, to the prober's verdict, which takes failureThreshold failed probes in a row. It is about a
// container that runs; the time that the kubelet takes for what follows is not in it.
type Delay struct {
	Asker
	Period, Timeout  time.Duration
	FailureThreshold int
	// Plain is that of plain Kubernetes, Probelet the one with probelet. They are equal if the endpoint is not answered.
	Plain, Probelet time.Duration
	// Answered is what Probelet is, or in mode observe would be, if the endpoint is answered.
	Answered time.Duration
}

// plainDelay is
//
//	failureThreshold × max(period, timeout) + timeout
//
// The worst moment for a failure is just after a probe has begun that still succeeds. The prober begins the next one a
// period later, or when one that took longer than that has ended: so after max(period, timeout) at the latest. Off-period
// probes only come earlier, and put nothing off by more than a period. The last of failureThreshold failures may take
// all of its timeout.
func plainDelay(p Spec) time.Duration {
	return time.Duration(max(p.FailureThreshold, 1))*max(p.Period, p.Timeout) + p.Timeout
}

// delay with probelet is
//
//	plain + staleness
//
// The last success was asked for before the failure began, and is answered with for the staleness from then on, even if
// the pod took until later to complete it. So the last answered probe begins before failure + staleness; and from its
// beginning on all is as in plain Kubernetes after its last success, because an observed failure re-arms nothing and the
// probes after it all reach the pod.
//
// None of this depends on whose period the staleness is of. So it holds for a startup probe, too, whose own may be shorter.
//
// The second for which a taken connection may be answered after the bound (ARCHITECTURE.md) adds nothing: it is about
// the end of a probe that began before, and the next one is due a period after the beginning.
func (s EndpointSpec) delay(p Spec) Delay {
	d := Delay{
		Asker: p.Asker(), Period: p.Period, Timeout: p.Timeout, FailureThreshold: p.FailureThreshold,
		Plain: plainDelay(p),
	}
	d.Probelet, d.Answered = d.Plain, d.Plain
	if s.Reason == (Reason{}) || s.Withheld {
		d.Answered += s.Staleness
	}
	if s.Reason == (Reason{}) {
		d.Probelet = d.Answered
	}
	return d
}

// Delays are the bounds for each of the probes that ask, in the order of Askers.
func (s EndpointSpec) Delays() []Delay {
	delays := make([]Delay, len(s.probes))
	for i, p := range s.probes {
		delays[i] = s.delay(p)
	}
	return delays
}
