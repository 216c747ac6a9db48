package probe

import (
	"fmt"
	"time"
)

// LivenessEvidence says what may answer probes of endpoints that only liveness probes ask.
type LivenessEvidence string

// Kinds of evidence for liveness probes.
const (
	LivenessByProbes LivenessEvidence = "probes" // the outcomes of probes, as for all other probes
	// LivenessByTraffic: also that the pod serves its clients. A timeout is the absence of evidence, and traffic makes up
	// for it; an error is evidence, and ends the answers.
	LivenessByTraffic LivenessEvidence = "traffic"
)

// UnmarshalText implements encoding.TextUnmarshaler.
func (l *LivenessEvidence) UnmarshalText(text []byte) error {
	switch evidence := LivenessEvidence(text); evidence {
	case LivenessByProbes, LivenessByTraffic:
		*l = evidence
		return nil
	}
	return fmt.Errorf("%q: must be %s or %s", shorten(string(text)), LivenessByProbes, LivenessByTraffic)
}

// MarshalText implements encoding.TextMarshaler.
func (l LivenessEvidence) MarshalText() ([]byte, error) { return []byte(l), nil }

// setTraffic decides whether the pod's traffic may vouch for the endpoint.
func (s *EndpointSpec) setTraffic(settings Settings, limits Limits) {
	if settings.Liveness != LivenessByTraffic || limits.Traffic == 0 {
		return
	}
	liveness := false
	for _, a := range s.Askers {
		liveness = liveness || a.Type == Liveness
		// A startup probe ends with its first success, and without a success traffic shows nothing.
		if a.Type != Liveness && a.Type != Startup {
			s.TrafficOff = fmt.Sprintf("%s asks it too", a)
			return
		}
	}
	switch {
	case !liveness: // the setting does not apply
	case s.Reason != (Reason{}):
		s.TrafficOff = reasonNotAnswered
	default:
		s.Traffic = limits.Traffic
	}
}

// deferToDecider keeps traffic from vouching for requests where it does not vouch for the TCP endpoint of their port: a connection that
// is taken already answers a TCP probe, so that endpoint decides (Tracker.decider).
func deferToDecider(specs []EndpointSpec) {
	for _, tcp := range specs {
		if !tcp.decides() || tcp.Traffic > 0 {
			continue
		}
		for i, s := range specs {
			if s.Port == tcp.Port && s.Traffic > 0 {
				specs[i].Traffic, specs[i].TrafficOff = 0, fmt.Sprintf("%s decides for this port, and %s", tcp.Endpoint, tcp.TrafficOff)
			}
		}
	}
}

// TrafficBound returns how long after a real probe began traffic may vouch for the endpoint. The kernel makes every tenth probe
// real, whatever the traffic. If that one times out, the next may begin before the daemon knows, and must still be vouched for:
// otherwise, with a failureThreshold of 2, the busy container would be restarted.
func (s EndpointSpec) TrafficBound() time.Duration {
	if s.Traffic == 0 {
		return 0
	}
	return sum(times(s.Traffic+1, s.Period), max(s.Period, s.Timeout), slack(s.Period, s.Timeout))
}

// TrafficWindow returns how recently the pod must have served for its traffic to vouch for the endpoint.
func (s EndpointSpec) TrafficWindow() time.Duration {
	if s.Traffic == 0 {
		return 0
	}
	return s.Period
}

// timedOut reports whether the prober gave up on the outcome's probe, or may have, although the pod sent nothing wrong.
func (s EndpointSpec) timedOut(o Outcome) bool {
	switch o.Event {
	case NoAnswer:
		return true
	case Connected, Answered:
		return s.late(o) && (o.Event == Connected || o.Status >= 200 && o.Status < 300)
	}
	return false
}

// trafficUntil returns until when traffic may vouch for the endpoint after a real probe that began then.
func (e *entry) trafficUntil(asked uint64) uint64 {
	if e.spec.Traffic == 0 || e.spec.Reason != (Reason{}) {
		return 0
	}
	return asked + uint64(e.spec.TrafficBound())
}

// setTrafficUntil lets traffic vouch for the endpoint until then; 0 if it may not.
func (e *entry) setTrafficUntil(until uint64) {
	e.evidence.TrafficUntil, e.evidence.TrafficWindow = until, 0
	if until != 0 {
		e.evidence.TrafficWindow = e.spec.TrafficWindow()
	}
}

// timeOut learns that a probe has timed out, and reports whether traffic makes up for that. It does if the endpoint's last
// probe with an outcome was a success, in this container. After two bounds without an outcome, for example because no daemon
// was running, it does not: an error may have gone unseen.
func (e *entry) timeOut(asked uint64) bool {
	if e.spec.Traffic == 0 || e.evidence.Result != Success || e.evidence.TrafficUntil == 0 ||
		asked > e.evidence.TrafficUntil+uint64(e.spec.TrafficBound()) {
		return false
	}
	e.successes, e.wellSince = 0, 0
	e.evidence.FreshUntil = 0
	e.setTrafficUntil(max(e.evidence.TrafficUntil, e.trafficUntil(asked)))
	return true
}
