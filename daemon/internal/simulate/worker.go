package simulate

import (
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// worker is the kubelet's worker of one probe (pkg/kubelet/prober/worker.go), together with the verdicts of the probe's
// twins.
type worker struct {
	*pod
	spec     probe.Spec
	endpoint probe.Endpoint
	base     uint64 // the ticker ticks every period, starting here
	waiting  uint64 // when the next probe is due, so that obsolete plans are ignored
	instance int    // the instance that the counts are about

	with, plain verdict
	bound       probe.Delay
	row         row
	halt        halt
}

// row counts successes in a row since the last failure.
type row struct {
	successes, answered int
	since               uint64
}

// verdict counts failures, and tracks when a long failure is detected.
type verdict struct {
	failures int
	failing  bool
	// since is when the current failure began; 0 if there is none. until is the latest time for its detection.
	since, until uint64
}

// halt counts the TCP probes during a phase in which the server is stopped.
type halt struct {
	phase, probes int
	plainFailed   int // number, from 1, of the first probe that fails without probelet; 0 if none has yet
}

// newWorker starts a probe's worker.
func (p *pod) newWorker(s probe.Spec) {
	w := &worker{pod: p, spec: s, endpoint: p.endpointOf(s)}
	w.bound = p.delayOf(s)
	p.result.MaxBound = max(p.result.MaxBound, w.bound.Probelet)
	for _, interval := range p.servers[s.Port].failing(w.endpoint, s.Timeout, p.hasTraffic(w.endpoint)) {
		p.at(interval[0], func() { w.begin(interval) })
	}
	w.base = p.now + uint64(p.upTo(s.Period))
	w.plan(w.base)
}

// delayOf returns the bound stated for a probe.
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

// next returns the ticker's next tick, or now if one was missed.
func (w *worker) next(last uint64) uint64 {
	period := uint64(w.spec.Period)
	tick := w.base + ((last-w.base)/period+1)*period
	return max(tick, w.now)
}

func (w *worker) tick() {
	began := w.now
	server := w.servers[w.spec.Port]
	if w.instance != w.instances[w.spec.Port] { // a new container starts from scratch
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
	w.at(max(twin.end, w.now), func() { w.predict(began, twin) })
	switch {
	case answered:
		w.checkAnswer(w.endpoint, known)
		w.result.Answered++
	case may:
		w.violate("%s reached the pod although it could have been answered", w.endpoint)
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
		// A container that is not ready is probed at once when its status changes, which resets the ticker.
		change := w.now + uint64(w.upTo(5*w.spec.Period))
		if w.spec.Type == probe.Readiness && w.with.failures > 0 && change < w.waiting {
			w.base = change
			w.plan(change)
		}
	})
}

// predict makes the shadow judge the twin.
func (w *worker) predict(began uint64, twin exchange) {
	if !twin.seen() {
		return
	}
	o := w.outcome(w.endpoint, began, twin)
	judged, ok := w.shadow.Observe(o, w.lastClosed, w.servers[w.spec.Port].mostAnswered(w.Live))
	if ok && judged.Answered {
		w.result.Predicted++
	}
}

// checkRow checks that a success verdict rests on the pod's own successes. A probe that begins right after a failure may
// be answered before the daemon knows of the failure.
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

// checkHalt compares with plain Kubernetes how many probes succeed before the queue of a stopped server is full.
func (w *worker) checkHalt(s *server, x, twin exchange) {
	i := s.at(w.now)
	if w.spec.Kind.Keying() != probe.KeyedByPort || w.Live == 0 || w.hasTraffic(w.endpoint) || s.phases[i].condition != stopped {
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
		w.violate("%s of %s: probe %d of a stopped server succeeded; without probelet, probe %d failed",
			w.endpoint, w.spec.Asker(), w.halt.probes, w.halt.plainFailed)
	}
}

// due reports whether the kubelet probes now: a startup probe until it has succeeded, the others only after that.
func (w *worker) due() bool {
	return w.startup[w.spec.Container].due(w.spec.Type, w.instances[w.spec.Port])
}

// startup tracks a container's startup probe.
type startup struct {
	probed    bool
	succeeded int // by this instance; -1 if by none yet
}

func (s *startup) due(t probe.Type, instance int) bool {
	over := !s.probed || s.succeeded == instance
	return over != (t == probe.Startup)
}

// judge counts a probe and its twin. halted: the probe came to a stopped server, whose queue may be full for only one of
// them, because it also holds the daemon's own connections.
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
			w.violate("%s of %s: a failure verdict that plain Kubernetes does not reach", w.endpoint, w.spec.Asker())
		}
		w.found(&w.with, &w.result.WorstDelay, w.now, w.bound.Probelet, "probelet")
	}
}

// count reports whether this outcome completes a failure verdict.
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

// begin records that the endpoint fails every probe from now on.
func (w *worker) begin(interval [2]uint64) {
	for _, side := range []struct {
		who   string
		v     *verdict
		bound time.Duration
	}{{"probelet", &w.with, w.bound.Probelet}, {"plain Kubernetes", &w.plain, w.bound.Plain}} {
		v, bound := side.v, side.bound
		v.since, v.until = 0, 0
		if v.failing || !w.due() {
			continue
		}
		v.since = interval[0]
		if interval[1] < interval[0]+uint64(bound) {
			continue // it may end before it is detected
		}
		v.until = interval[0] + uint64(bound)
		since, until, instance := v.since, v.until, w.instance
		if v == &w.with {
			w.result.Detected++
		}
		w.at(until+1, func() {
			if v.since == since && instance == w.instances[w.spec.Port] {
				w.violate("%s of %s: not detected within %s by %s", w.endpoint, w.spec.Asker(), bound, side.who)
			}
		})
	}
	w.checkHang(interval)
}

// checkHang checks that a failure that begins now is detected within the bound for pods that no longer serve anyone, if it is one.
func (w *worker) checkHang(interval [2]uint64) {
	server, hang := w.servers[w.spec.Port], w.bound.Hang
	switch server.phases[server.at(interval[0])].condition {
	case hanging, stuck, stopped, filtered:
	default:
		return
	}
	since, instance := w.with.since, w.instance
	if since != interval[0] || interval[1] < since+uint64(hang) {
		return
	}
	w.result.Hangs++
	w.at(since+uint64(hang)+1, func() {
		if w.with.since == since && instance == w.instances[w.spec.Port] {
			w.violate("%s of %s: a pod that serves no one is not detected within %s", w.endpoint, w.spec.Asker(), hang)
		}
	})
}

// found records a failure verdict.
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
			w.violate("%s of %s: detected after %s by %s; the stated bound is %s", w.endpoint, w.spec.Asker(), delay, who, bound)
		}
	}
	v.since, v.until = 0, 0
}
