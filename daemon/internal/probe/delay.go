package probe

import "time"

// Delay bounds how long a failure can go unnoticed by one probe: from the moment its endpoint begins to fail every
// request until the prober's verdict, which takes failureThreshold failed probes in a row. It applies to a running
// container, and does not include the time that the kubelet needs to act on the verdict.
type Delay struct {
	Asker
	Period, Timeout  time.Duration
	FailureThreshold int
	// Plain is the bound of plain Kubernetes, Probelet the bound with probelet. They are equal if the endpoint is not
	// answered.
	Plain, Probelet time.Duration
	// Hang is Probelet for a pod that no longer serves anyone. They differ only where traffic may vouch for the endpoint.
	Hang time.Duration
	// Answered is the bound if the endpoint is answered: Probelet, or in mode observe what Probelet would be.
	Answered time.Duration
}

// plainDelay returns
//
//	failureThreshold × max(period, timeout) + timeout
//
// The worst moment for a failure is just after the start of a probe that still succeeds. The prober starts the next one a
// period later, or when a probe that took longer has ended: after max(period, timeout) at the latest. Off-period probes
// only come earlier, and delay nothing by more than a period. The last of failureThreshold failures may take its whole
// timeout.
func plainDelay(p Spec) time.Duration {
	return sum(times(max(p.FailureThreshold, 1), max(p.Period, p.Timeout)), p.Timeout)
}

// delay returns, for the bound with probelet,
//
//	plain + max(staleness, traffic bound)
//
// The last success was requested before the failure began, and is answered for the staleness from then on, even if the
// pod took longer to complete it. So the last answered probe starts before failure + staleness. From its start on,
// everything is as in plain Kubernetes after its last success, because an observed failure re-arms nothing and all later
// probes reach the pod. Where the pod's traffic may vouch for the endpoint, answers may continue until the traffic bound,
// which also counts from the start of the last real probe.
//
// A pod that no longer serves anyone last served before the failure, and traffic vouches for the endpoint only within its
// window after that. So the answers end at failure + window, or with the staleness, and the bound is
//
//	plain + max(staleness, traffic window)
//
// None of this depends on whose period the staleness is derived from. So it also holds for a startup probe, whose own
// period may be shorter.
//
// The second for which a taken connection may still be answered after the bound (ARCHITECTURE.md) adds nothing: it
// concerns the end of a probe that started earlier, and the next one is due a period after that start.
func (s EndpointSpec) delay(p Spec) Delay {
	d := Delay{
		Asker: p.Asker(), Period: p.Period, Timeout: p.Timeout, FailureThreshold: p.FailureThreshold,
		Plain: plainDelay(p),
	}
	d.Probelet, d.Answered, d.Hang = d.Plain, d.Plain, d.Plain
	if s.Reason == (Reason{}) || s.Withheld {
		d.Answered = sum(d.Plain, max(s.SteadyStaleness, s.TrafficBound()))
	}
	if s.Reason == (Reason{}) {
		d.Probelet = d.Answered
		d.Hang = sum(d.Plain, max(s.SteadyStaleness, s.TrafficWindow()))
	}
	return d
}

// Delays returns the bounds for each asker, in the order of Askers.
func (s EndpointSpec) Delays() []Delay {
	delays := make([]Delay, len(s.probes))
	for i, p := range s.probes {
		delays[i] = s.delay(p)
	}
	return delays
}
