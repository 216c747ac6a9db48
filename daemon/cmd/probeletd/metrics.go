package main

import (
	"context"
	"net/http"
	"runtime/debug"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/store"
)

// metrics are what the daemon counts itself. What the kernel side counts, and what is at the moment, is collected when
// somebody asks.
type metrics struct {
	evidence        *prometheus.CounterVec
	withdrawals     *prometheus.CounterVec
	reconcileErrors prometheus.Counter
	repairs         *prometheus.CounterVec
	snapshots       prometheus.Counter
	lastSnapshot    prometheus.Gauge
}

func newMetrics() *metrics {
	m := &metrics{
		evidence: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_evidence_total",
			Help: "Outcomes that said something new of an endpoint, by who asked (probe, refresh) and result.",
		}, []string{"source", "result"}),
		withdrawals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_withdrawn_endpoints_total",
			Help: "Endpoints that were no longer answered before their bound, by the daemon's decision, by cause: timeout of a probe, refresh, restart, spec, request, repair. What the kernel side withdraws by itself is in probelet_withdrawn_ports_total.",
		}, []string{"cause"}),
		reconcileErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "probelet_reconcile_errors_total",
			Help: "Failed attempts to write what is known into a pod's maps.",
		}),
		repairs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_repairs_total",
			Help: "Attachments that the daemon saw to: reattached (something of it was lost), removed (its device is gone), adopted (the pod had its network before).",
		}, []string{"what"}),
		snapshots: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "probelet_source_snapshots_total",
			Help: "Changes of what is probed that the source told of.",
		}),
		lastSnapshot: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "probelet_source_last_snapshot_timestamp_seconds",
			Help: "When the last of them was, in Unix time; 0: never.",
		}),
	}
	for _, what := range []string{reattached, removed, adopted} {
		m.repairs.WithLabelValues(what)
	}
	return m
}

// changed counts a change of what is known. outcome is what it was learned from; nil: from something else.
func (m *metrics) changed(c probe.Change, outcome *probe.Outcome) {
	if outcome != nil {
		m.evidence.WithLabelValues(string(c.Cause), c.To.Result.String()).Inc()
	}
	if !c.Withdrawn(datapath.Now()) {
		return
	}
	switch {
	case c.Cause != probe.ByProbe:
		m.withdrawals.WithLabelValues(string(c.Cause)).Inc()
	case outcome.Event == probe.NoAnswer, c.To.Result == probe.Failure && outcome.Status/100 == 2, outcome.Event == probe.Connected:
		m.withdrawals.WithLabelValues("timeout").Inc()
	}
}

// handler serves the metrics. With perPod there is one of each pod besides.
func (l *loop) handler(perPod bool) http.Handler {
	registry := prometheus.NewRegistry()
	m := l.metrics
	registry.MustRegister(m.evidence, m.withdrawals, m.reconcileErrors, m.repairs, m.snapshots, m.lastSnapshot,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		&collector{loop: l, perPod: perPod}, buildInfo())
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
}

func buildInfo() prometheus.Collector {
	version := "unknown"
	if info, ok := debug.ReadBuildInfo(); ok {
		version = info.Main.Version
	}
	gauge := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "probelet_build_info", Help: "1, labelled with the version of the daemon and of the layout of its maps.",
		ConstLabels: prometheus.Labels{"version": version, "abi": datapath.ABI},
	})
	gauge.Set(1)
	return gauge
}

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("probelet_"+name, help, labels, nil)
}

var (
	probesDesc      = describe("probes_total", "Connections of a prober to attached pods, by verdict (answered in the kernel, passed to the pod) and reason.", "verdict", "reason")
	handedOverDesc  = describe("handed_over_connections_total", "Connections that were taken and then handed over to the pod, because what was asked could not be answered.")
	observedDesc    = describe("observed_probes_total", "Probes that reached the pod, passed on or handed over, and whose outcome was reported.")
	lostDesc        = describe("lost_outcomes_total", "Outcomes that did not fit the ring buffer.")
	ownDesc         = describe("own_connections_total", "Connections of the daemon itself (refresh).")
	foreignDesc     = describe("foreign_connections_total", "Connections to attached pods that were not a prober's.")
	expiredDesc     = describe("expired_flows_total", "Connections of a prober whose end was not seen, or whose pod went first.")
	untrustedDesc   = describe("untrusted_devices", "Devices of pods by which an answer did not arrive, so that nothing is answered by them any more, by how that was noticed.", "noticed")
	droppedDesc     = describe("dropped_packets_total", "Packets of taken connections that ended in the kernel without an answer, such as acknowledgements.")
	portsDesc       = describe("withdrawn_ports_total", "Ports that were no longer answered before their bound, by the kernel side's decision, by cause.", "cause")
	agesDesc        = describe("answer_age_seconds", "Age of the evidence that probes were answered with.")
	endpointsDesc   = describe("endpoints", "Endpoints that are probed, by their pod's mode, and by state: fresh (answered; in mode observe: would be), stale, failed, unknown, never (not answerable, or told not to).", "mode", "state")
	attachmentsDesc = describe("attachments", "Attached interfaces, by whether it is known what their pods are probed for.", "known")
	refreshedDesc   = describe("refreshed_endpoints", "Endpoints that the daemon asks by itself at present.")
	entriesDesc     = describe("map_entries", "Entries of a BPF map: pods, and flows (connections).", "map")
	capacityDesc    = describe("map_capacity_entries", "Entries that a BPF map can hold.", "map")
	watchedDesc     = describe("listeners_watched", "1 if listening sockets of pods are watched, so that a port's evidence ends when its server does; 0 where the kernel does not describe its types (BTF): then the next probe that reaches the pod tells.")
	proberDesc      = describe("prober_found", "1 if it is known whose connections are probes, otherwise 0: nothing is answered then.")
	sourceDesc      = describe("source_up", "1 if the source of specs can be read, otherwise 0: what it last said stays in force.")
	perPodDesc      = describe("pod_answered_probes_total", "Probes of a pod that were answered in the kernel.", "namespace", "pod")
)

// collector tells what is at the moment, and what the kernel side has counted.
type collector struct {
	loop   *loop
	perPod bool
}

// Describe implements prometheus.Collector.
func (c *collector) Describe(descs chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{
		probesDesc, handedOverDesc, observedDesc, lostDesc, ownDesc, foreignDesc, expiredDesc, untrustedDesc, droppedDesc, portsDesc,
		agesDesc, endpointsDesc, attachmentsDesc, refreshedDesc, entriesDesc, capacityDesc, watchedDesc, proberDesc, sourceDesc,
	} {
		descs <- d
	}
	if c.perPod {
		descs <- perPodDesc
	}
}

// collectTimeout is shorter than what scrapers wait for.
const collectTimeout = 5 * time.Second

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	d, to := c.loop.datapath, sink(out)
	for desc, collect := range map[*prometheus.Desc]func(*datapath.Datapath, sink) error{
		probesDesc: collectCounters, untrustedDesc: collectDevices, agesDesc: collectAges, entriesDesc: collectFills,
	} {
		if err := collect(d, to); err != nil {
			to <- prometheus.NewInvalidMetric(desc, err)
		}
	}
	to.gauge(watchedDesc, btoi(d.Watched()))

	ctx, cancel := context.WithTimeout(context.Background(), collectTimeout)
	defer cancel()
	var now moment
	if err := c.loop.call(ctx, func() { now = c.loop.moment() }); err != nil {
		to <- prometheus.NewInvalidMetric(endpointsDesc, err)
		return
	}
	now.collect(to, c.perPod)
}

// sink takes metrics.
type sink chan<- prometheus.Metric

func (s sink) counter(d *prometheus.Desc, value uint64, labels ...string) {
	s <- prometheus.MustNewConstMetric(d, prometheus.CounterValue, float64(value), labels...)
}

func (s sink) gauge(d *prometheus.Desc, value int, labels ...string) {
	s <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, float64(value), labels...)
}

func collectCounters(d *datapath.Datapath, to sink) error {
	counters, err := d.Counters()
	if err != nil {
		return err
	}
	for _, protocol := range []string{"http", "tcp"} {
		to.counter(probesDesc, counters["answered_"+protocol], "answered", protocol)
	}
	for _, reason := range []string{"not_fresh", "not_probed", "not_parsable", "untrusted", "full"} {
		to.counter(probesDesc, counters["passed_"+reason], "passed", reason)
	}
	for _, cause := range datapath.WithdrawalCauses {
		to.counter(portsDesc, counters["withdrawn_"+cause], cause)
	}
	to.counter(handedOverDesc, counters["handed_over"])
	to.counter(observedDesc, counters["observed"])
	to.counter(lostDesc, counters["outcomes_lost"])
	to.counter(ownDesc, counters["passed_own"])
	to.counter(foreignDesc, counters["passed_not_prober"])
	to.counter(expiredDesc, counters["flows_expired"])
	to.counter(droppedDesc, counters["dropped"])
	return nil
}

func collectDevices(d *datapath.Datapath, to sink) error {
	devices, err := d.Devices()
	if err != nil {
		return err
	}
	untrusted := map[string]int{}
	for _, device := range devices {
		untrusted[device.Loss]++
	}
	for _, loss := range datapath.Losses() {
		to.gauge(untrustedDesc, untrusted[loss], loss)
	}
	return nil
}

func collectAges(d *datapath.Datapath, to sink) error {
	ages, err := d.AnswerAges()
	if err != nil {
		return err
	}
	var count uint64
	buckets := map[float64]uint64{}
	for i, n := range ages.Buckets {
		count += n
		if i < len(datapath.AnswerAgeBounds) {
			buckets[datapath.AnswerAgeBounds[i]] = count
		}
	}
	to <- prometheus.MustNewConstHistogram(agesDesc, count, ages.Sum.Seconds(), buckets)
	return nil
}

func collectFills(d *datapath.Datapath, to sink) error {
	fills, err := d.Fills()
	if err != nil {
		return err
	}
	for name, fill := range fills {
		to.gauge(entriesDesc, fill.Entries, name)
		to.gauge(capacityDesc, fill.Max, name)
	}
	return nil
}

func (m moment) collect(to sink, perPod bool) {
	for _, mode := range []probe.Mode{probe.Answer, probe.Observe, probe.Off} {
		for _, state := range endpointStates {
			to.gauge(endpointsDesc, m.endpoints[modeState{mode, state}], string(mode), state)
		}
	}
	to.gauge(attachmentsDesc, m.known, "true")
	to.gauge(attachmentsDesc, m.unknown, "false")
	to.gauge(refreshedDesc, m.refreshed)
	to.gauge(proberDesc, btoi(m.proberFound))
	to.gauge(sourceDesc, btoi(m.sourceUp))
	if !perPod {
		return
	}
	for pod, hits := range m.hits {
		to.counter(perPodDesc, hits, pod.Namespace, pod.Name)
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

var endpointStates = []string{"fresh", "stale", "failed", "unknown", "never"}

// podName is a pod's.
type podName struct{ Namespace, Name string }

// modeState is what endpoints are counted by.
type modeState struct {
	mode  probe.Mode
	state string
}

// moment is what is known at a moment, in numbers.
type moment struct {
	endpoints                 map[modeState]int
	known, unknown, refreshed int
	hits                      map[podName]uint64
	proberFound, sourceUp     bool
}

func (l *loop) moment() moment {
	m := moment{
		endpoints: map[modeState]int{}, hits: map[podName]uint64{},
		proberFound: !l.lost, sourceUp: l.failing() == "",
	}
	for _, a := range l.attachments {
		if a.pod == nil {
			m.unknown++
			continue
		}
		m.known++
		m.refreshed += len(a.targets())
		evidence := a.tracker.Evidence()
		var hits uint64
		for _, s := range a.tracker.Endpoints() {
			m.endpoints[modeState{a.settings.Mode, a.state(s, evidence[s.Endpoint])}]++
			if key, ok := store.Key(s.Endpoint); ok && s.Observed && a.maps != nil {
				tally, _ := a.maps.Tally(key) // an unreadable one is told of when it is written
				hits += tally.Hits
			}
		}
		m.hits[podName{a.pod.Namespace, a.pod.Name}] += hits
	}
	return m
}

// state is the endpoint's, as probeletctl status has it, but for those that are never answered. In mode observe it is what it
// would be: the kernel side is never told of it.
func (a *attachment) state(s probe.EndpointSpec, e probe.Evidence) string {
	withheld := s.Observed && probe.Withheld(s.Reason)
	if withheld {
		e.FreshUntil = e.ObservedAt + uint64(s.Staleness)
	}
	switch {
	case s.Reason != "" && !withheld:
		return "never"
	case e.Result == probe.Failure:
		return "failed"
	case e.Result != probe.Success:
		return "unknown"
	case a.maps == nil:
		return "stale"
	}
	if e.FreshUntil <= datapath.Now() || e.ObservedAt <= a.withdrawnAt(s.Endpoint) {
		return "stale"
	}
	return "fresh"
}

// withdrawnAt is when the kernel side last voided what was known of an endpoint, by itself or with its port.
func (a *attachment) withdrawnAt(e probe.Endpoint) uint64 {
	key, _ := store.Key(e)
	own, err := a.maps.Tally(key)
	port, portErr := a.maps.Tally(datapath.PortKey(e.Port))
	if err != nil || portErr != nil {
		return datapath.Now() // of what cannot be read nothing is fresh
	}
	return max(own.WithdrawnAt, port.WithdrawnAt)
}
