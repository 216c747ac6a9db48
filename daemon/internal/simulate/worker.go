package simulate

import (
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// worker is the kubelet's for one probe (pkg/kubelet/prober/worker.go), with the verdicts of its twins beside.
type worker struct {
	*pod
	spec     probe.Spec
	endpoint probe.Endpoint
	base     uint64 // the ticker ticks every period from here
	waiting  uint64 // when it probes next, lest an earlier plan is followed
	instance int    // that the counts are about

	with, plain verdict
	bound       probe.Delay
}

// verdict is a count of failures, and of each long failure when it was found out.
type verdict struct {
	failures int
	failing  bool
	// since is when what fails now began to; 0: nothing does. until is the latest that it is to be found out.
	since, until uint64
}

// newWorker starts a probe's worker.
func (p *pod) newWorker(s probe.Spec) {
	w := &worker{pod: p, spec: s, endpoint: endpointOf(s)}
	w.bound = p.delayOf(s)
	p.result.MaxBound = max(p.result.MaxBound, w.bound.Probelet)
	for _, interval := range p.servers[s.Port].failing(w.endpoint, s.Timeout) {
		p.at(interval[0], func() { w.begin(interval) })
	}
	w.base = p.now + uint64(p.upTo(s.Period))
	w.plan(w.base)
}

// delayOf is the bound that is stated for a probe.
func (p *pod) delayOf(s probe.Spec) probe.Delay {
	for _, e := range p.tracker.Endpoints() {
		for _, d := range e.Delays() {
			if e.Endpoint == endpointOf(s) && d.Asker == s.Asker() {
				return d
			}
		}
	}
	panic("a probe without an endpoint")
}

func (w *worker) plan(t uint64) {
	w.waiting = t
	w.at(t, func() {
		if w.waiting == t {
			w.tick()
		}
	})
}

// next is the ticker's next tick; one that was missed comes at once.
func (w *worker) next(last uint64) uint64 {
	period := uint64(w.spec.Period)
	tick := w.base + ((last-w.base)/period+1)*period
	return max(tick, w.now)
}

func (w *worker) tick() {
	began := w.now
	server := w.servers[w.spec.Port]
	if w.instance != w.instances[w.spec.Port] { // a new container is judged anew
		w.instance, w.with, w.plain = w.instances[w.spec.Port], verdict{}, verdict{}
	}
	if server.phases[server.at(began)].condition == down || !w.due() {
		w.plan(w.next(began))
		return
	}
	healthy := server.phases[server.at(began)].condition == healthy
	twin := server.ask(began, w.endpoint, w.spec.Timeout, false, w.usual())
	x, answered := twin, false
	w.result.Probes++
	taken := w.taken(w.endpoint.Port)
	switch {
	case taken && (w.spec.Kind == probe.TCP || w.answerable(w.endpoint)):
		answered = true
		w.checkAnswer(w.endpoint)
		x = exchange{event: probe.Answered, status: 200, end: began + uint64(refusal)}
		w.result.Answered++
	case taken: // and handed over, which takes no time to speak of
		w.result.HandedOver++
		fallthrough
	default:
		w.checkReached(w.endpoint)
	}
	if healthy {
		w.result.HealthyProbes++
		if answered {
			w.result.HealthyAnswered++
		}
	}
	observed := !answered && (!taken || w.Broken != Handover)
	w.at(max(x.end, w.now), func() {
		if observed {
			if x.succeeded() {
				w.succeeded(w.endpoint, began)
			}
			w.report(w.endpoint, began, x)
		}
		w.judge(x, twin)
		w.plan(w.next(began))
		// A container that is not ready is probed at once when its status changes, and the ticker begins anew.
		change := w.now + uint64(w.upTo(5*w.spec.Period))
		if w.spec.Type == probe.Readiness && w.with.failures > 0 && change < w.waiting {
			w.base = change
			w.plan(change)
		}
	})
}

// due is whether the kubelet probes now: startup first and until it has succeeded, the others after it.
func (w *worker) due() bool {
	return w.startup[w.spec.Container].due(w.spec.Type, w.instances[w.spec.Port])
}

// startup is that of a container: none, or its probe has succeeded for an instance.
type startup struct {
	probed    bool
	succeeded int // for this instance; -1: for none yet
}

func (s *startup) due(t probe.Type, instance int) bool {
	over := !s.probed || s.succeeded == instance
	return over != (t == probe.Startup)
}

// judge counts a probe, and its twin.
func (w *worker) judge(x, twin exchange) {
	if w.instance != w.instances[w.spec.Port] {
		return
	}
	if w.spec.Type == probe.Startup && x.succeeded() {
		w.startup[w.spec.Container].succeeded = w.instance
	}
	plainVerdict := w.plain.count(twin.succeeded(), w.spec.FailureThreshold)
	if plainVerdict {
		w.result.PlainVerdicts++
		w.found(&w.plain, &w.result.WorstPlain, max(twin.end, w.now), w.bound.Plain, "plain Kubernetes")
	}
	if w.with.count(x.succeeded(), w.spec.FailureThreshold) {
		w.result.Verdicts++
		if !w.plain.failing {
			w.violate("%s of %s: a failure verdict that plain Kubernetes does not give", w.endpoint, w.spec.Asker())
		}
		w.found(&w.with, &w.result.WorstDelay, w.now, w.bound.Probelet, "probelet")
	}
}

// count returns whether this one makes it a verdict.
func (v *verdict) count(success bool, threshold int) bool {
	if success {
		v.failures, v.failing = 0, false
		return false
	}
	v.failures++
	if v.failing || v.failures < threshold {
		return false
	}
	v.failing = true
	return true
}

// begin notes that the endpoint fails every probe from now on.
func (w *worker) begin(interval [2]uint64) {
	for _, who := range []string{"probelet", "plain Kubernetes"} {
		v, bound := &w.with, w.bound.Probelet
		if who == "plain Kubernetes" {
			v, bound = &w.plain, w.bound.Plain
		}
		v.since, v.until = 0, 0
		if v.failing || !w.due() {
			continue
		}
		v.since = interval[0]
		if interval[1] < interval[0]+uint64(bound) {
			continue // it may end before it is found out
		}
		v.until = interval[0] + uint64(bound)
		since, until, instance := v.since, v.until, w.instance
		if v == &w.with {
			w.result.Detected++
		}
		w.at(until+1, func() {
			if v.since == since && instance == w.instances[w.spec.Port] {
				w.violate("%s of %s: not detected within %s by %s", w.endpoint, w.spec.Asker(), bound, who)
			}
		})
	}
}

// found notes that a verdict was given.
func (w *worker) found(v *verdict, worst *time.Duration, at uint64, bound time.Duration, who string) {
	if v.since == 0 || at < v.since {
		return
	}
	delay := time.Duration(at - v.since)
	if v.until != 0 {
		*worst = max(*worst, delay)
		if v == &w.with {
			w.result.WorstShare = max(w.result.WorstShare, float64(delay)/float64(bound))
		}
		if at > v.until {
			w.violate("%s of %s: detected after %s by %s, stated are %s", w.endpoint, w.spec.Asker(), delay, who, bound)
		}
	}
	v.since, v.until = 0, 0
}
