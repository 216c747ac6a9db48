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
	row         row
	halt        halt
}

// row is successes in a row, since a failure.
type row struct {
	successes, answered int
	since               uint64
}

// verdict is a count of failures, and of each long failure when it was found out.
type verdict struct {
	failures int
	failing  bool
	// since is when what fails now began to; 0: nothing does. until is the latest that it is to be found out.
	since, until uint64
}

// halt is a phase in which the server is stopped, as TCP probes find it.
type halt struct {
	phase, probes int
	plainFailed   int // number of the first probe that fails without probelet, from 1; 0: none did yet
}

// newWorker starts a probe's worker.
func (p *pod) newWorker(s probe.Spec) {
	w := &worker{pod: p, spec: s, endpoint: p.endpointOf(s)}
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
			if d.Asker == s.Asker() {
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
		w.instance, w.with, w.plain, w.row = w.instances[w.spec.Port], verdict{}, verdict{}, row{since: w.now}
	}
	if server.phases[server.at(began)].condition == down || !w.due() {
		w.plan(w.next(began))
		return
	}
	condition := server.phases[server.at(began)].condition
	usual := w.usual()
	twin := server.ask(inquiry{began, w.endpoint, w.spec.Timeout, usual}, &server.plain)
	known, may := w.evidence[w.endpoint], w.mayBeAnswered(w.endpoint)
	answered, x := w.connect(w.endpoint, w.spec.Timeout, usual)
	w.result.Probes++
	w.at(max(twin.end, w.now), func() { w.estimate(began, twin) })
	switch {
	case answered:
		w.checkAnswer(w.endpoint, known)
		w.result.Answered++
	case may:
		w.violate("%s reached the pod though it could have been answered", w.endpoint)
	}
	w.checkHalt(server, x, twin)
	if condition == healthy {
		w.result.HealthyProbes++
		if answered {
			w.result.HealthyAnswered++
		}
	}
	w.at(max(x.end, w.now), func() {
		if !answered {
			w.learn(w.endpoint, began, x)
		}
		w.checkRow(x, answered, began)
		w.judge(x, twin, condition == stopped)
		w.plan(w.next(began))
		// A container that is not ready is probed at once when its status changes, and the ticker begins anew.
		change := w.now + uint64(w.upTo(5*w.spec.Period))
		if w.spec.Type == probe.Readiness && w.with.failures > 0 && change < w.waiting {
			w.base = change
			w.plan(change)
		}
	})
}

// estimate has the daemon estimate what it would do with the twin.
func (w *worker) estimate(began uint64, twin exchange) {
	if !twin.seen() {
		return
	}
	o := w.outcome(w.endpoint, began, twin)
	judged, ok := w.estimator.Observe(o, w.lastClosed, w.servers[w.spec.Port].mostAnswered(w.Live))
	if ok && judged.Answered {
		w.result.Estimated++
	}
}

// checkRow holds a success verdict against the successes that the pod itself had. A probe that begins as soon as one has
// failed may be answered before the daemon knows of that.
func (w *worker) checkRow(x exchange, answered bool, began uint64) {
	if !x.succeeded() {
		w.row = row{since: w.now}
		return
	}
	if w.row.successes++; answered && began > w.row.since+2*gather {
		w.row.answered++
	}
	if need := w.spec.SuccessThreshold; need > 1 && w.row.successes == need {
		w.result.Readied++
		if w.row.answered > 0 {
			w.violate("%s of %s: a success verdict after %d of %d successes", w.endpoint, w.spec.Asker(), need-w.row.answered, need)
		}
	}
}

// checkHalt compares with plain Kubernetes how many probes succeed before a stopped server's queue is full.
func (w *worker) checkHalt(s *server, x, twin exchange) {
	i := s.at(w.now)
	if w.spec.Kind.Keying() != probe.KeyedByPort || w.Live == 0 || s.phases[i].condition != stopped {
		return
	}
	if w.halt.phase != i {
		w.halt = halt{phase: i}
	}
	w.halt.probes++
	if !twin.connected && w.halt.plainFailed == 0 {
		w.halt.plainFailed = w.halt.probes
		w.result.Stopped++
	}
	if x.connected && w.halt.plainFailed != 0 && w.halt.probes >= w.halt.plainFailed+s.mostAnswered(w.Live) {
		w.violate("%s of %s: probe %d of a stopped server succeeded, without probelet probe %d failed",
			w.endpoint, w.spec.Asker(), w.halt.probes, w.halt.plainFailed)
	}
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

// judge counts a probe, and its twin. halted: it came to a stopped server, whose queue may be full for the one and not for
// the other, because the daemon's own connections are in it, too.
func (w *worker) judge(x, twin exchange, halted bool) {
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
		if !w.plain.failing && !halted {
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
