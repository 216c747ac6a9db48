package agent

import (
	"context"
	"net/http"
	"slices"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/crosscheck"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/store"
	"github.com/probelet/probelet/internal/version"
)

// metrics are what the daemon counts itself. What the kernel side counts, and what is at the moment, is collected when
// somebody asks.
type metrics struct {
	evidence        *prometheus.CounterVec
	withdrawals     *prometheus.CounterVec
	inconclusive    *prometheus.CounterVec
	estimates       *prometheus.CounterVec
	reconcileErrors prometheus.Counter
	repairs         *prometheus.CounterVec
	own             prometheus.Counter
	disagreements   *prometheus.CounterVec
	snapshots       prometheus.Counter
	lastSnapshot    prometheus.Gauge
}

// timedOut is the cause of a withdrawal by a probe that the kernel side took for no failure.
const timedOut probe.Cause = "timeout"

func newMetrics() *metrics {
	m := &metrics{
		evidence: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_evidence_total",
			Help: "Outcomes that said something new of an endpoint, by who asked (probe, refresh) and result.",
		}, []string{"source", "result"}),
		withdrawals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_withdrawn_endpoints_total",
			Help: "Endpoints that were no longer answered before their bound, by the daemon's decision, by cause: timeout of a probe, refresh, restart, spec, request, repair, verdict (of the kubelet). What the kernel side withdraws by itself is in probelet_withdrawn_ports_total.",
		}, []string{"cause"}),
		inconclusive: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_inconclusive_probes_total",
			Help: "Connections of a prober that reached a pod, and of which it is not certain what became of them, by why.",
		}, []string{"reason"}),
		estimates: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_estimated_probes_total",
			Help: "Probes of pods in mode observe, by what mode answer would have made of them: verdict answered (by result: success, or failure, which the prober would have learned of later) or passed (by why).",
		}, []string{"verdict", "reason"}),
		reconcileErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "probelet_reconcile_errors_total",
			Help: "Failed attempts to write what is known into a pod's maps.",
		}),
		repairs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_repairs_total",
			Help: "Attachments that the daemon saw to: reattached (something of it was lost), removed (its device is gone), adopted (the pod had its network before).",
		}, []string{"what"}),
		own: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "probelet_own_connections_total",
			Help: "Connections of the daemon itself (refresh).",
		}),
		disagreements: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_disagreements_total",
			Help: "Endpoints that are no longer answered because the kubelet's own counts say of probes that were taken for successes that they failed, or do not have them at all (discarded).",
		}, []string{"kind"}),
		snapshots: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "probelet_source_snapshots_total",
			Help: "Changes of what is probed that the source told of.",
		}),
		lastSnapshot: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "probelet_source_last_snapshot_timestamp_seconds",
			Help: "When the last of them was, in Unix time; 0: never.",
		}),
	}
	for _, doubt := range evidence.Doubts() {
		m.inconclusive.WithLabelValues(string(doubt))
	}
	for _, why := range probe.Whys() {
		m.estimates.WithLabelValues("passed", string(why))
	}
	for _, result := range []probe.Result{probe.Success, probe.Failure} {
		m.estimates.WithLabelValues("answered", result.String())
	}
	for _, cause := range []probe.Cause{timedOut, probe.ByRefresh, probe.ByRestart, probe.BySpec, probe.ByRequest, probe.ByRepair, probe.ByVerdict} {
		m.withdrawals.WithLabelValues(string(cause))
	}
	for _, what := range []string{reattached, removed, adopted} {
		m.repairs.WithLabelValues(what)
	}
	for _, kind := range crosscheck.Kinds {
		m.disagreements.WithLabelValues(string(kind))
	}
	return m
}

// estimated counts a probe of a pod in mode observe.
func (m *metrics) estimated(j probe.Judged) {
	switch {
	case !j.Answered:
		m.estimates.WithLabelValues("passed", string(j.Why)).Inc()
	case j.Hidden:
		m.estimates.WithLabelValues("answered", probe.Failure.String()).Inc()
	default:
		m.estimates.WithLabelValues("answered", probe.Success.String()).Inc()
	}
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
	case outcome == nil, outcome.Event == probe.NoAnswer, c.To.Result == probe.Failure && outcome.Status/100 == 2, outcome.Event == probe.Connected:
		m.withdrawals.WithLabelValues(string(timedOut)).Inc()
	}
}

// handler serves the metrics. With perPod there is one of each pod besides.
func (l *loop) handler(perPod bool) http.Handler {
	registry := prometheus.NewRegistry()
	m := l.metrics
	registry.MustRegister(m.evidence, m.withdrawals, m.inconclusive, m.estimates, m.reconcileErrors, m.repairs, m.own, m.disagreements, m.snapshots, m.lastSnapshot,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		&collector{loop: l, perPod: perPod}, buildInfo())
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
}

func buildInfo() prometheus.Collector {
	gauge := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "probelet_build_info", Help: "1, labelled with the version of the daemon and of the layout of its maps.",
		ConstLabels: prometheus.Labels{"version": version.String(), "abi": datapath.ABI},
	})
	gauge.Set(1)
	return gauge
}

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("probelet_"+name, help, labels, nil)
}

var (
	probesDesc      = describe("probes_total", "Connections of a prober to attached pods, each counted once, by verdict (answered in the kernel, passed to the pod) and reason.", "verdict", "reason")
	handedOverDesc  = describe("handed_over_connections_total", "Connections that were taken and then handed over to the pod, because what was asked could not be answered.")
	observedDesc    = describe("observed_probes_total", "Probes that reached the pod, passed on or handed over, and were recorded to their end.")
	lostDesc        = describe("lost_records_total", "Connections of which a record did not fit into the ring.")
	foreignDesc     = describe("foreign_connections_total", "Connections to attached pods that were not a prober's.")
	expiredDesc     = describe("expired_flows_total", "Connections of a prober whose end was not seen, or whose pod went first.")
	untrustedDesc   = describe("untrusted_devices", "Devices of pods by which an answer did not arrive, so that nothing is answered by them any more, by how that was noticed.", "noticed")
	droppedDesc     = describe("dropped_packets_total", "Packets of taken connections that ended in the kernel without an answer, such as acknowledgements.")
	portsDesc       = describe("withdrawn_ports_total", "Ports that were no longer answered before their bound, by the kernel side's decision, by cause.", "cause")
	agesDesc        = describe("answer_age_seconds", "Age of the evidence that probes were answered with.")
	endpointsDesc   = describe("endpoints", "Endpoints that are probed, by their pod's mode, and by state: fresh (answered; in mode observe: would be), stale, failed, unknown, never (not answerable, or told not to).", "mode", "state")
	attachmentsDesc = describe("attachments", "Attached interfaces, by whether it is known what their pods are probed for.", "known")
	neverDesc       = describe("ineligible_endpoints", "Endpoints that are never answered, by reason: kind (HTTPS, gRPC, exec), host (another host is probed), too_long, request (it cannot be sent, or is not understood), startup (only startup probes ask), beside (answering it would answer another one of these), pod (it ends, or is not understood), mode (observe or off), annotation (one that cannot be used), room (too many endpoints), disagreement (with the kubelet's verdict).", "reason")
	unattachedDesc  = describe("unattached_pods", "Pods with an interface of their own and probes that could be answered that are not attached, so that all of their probes reach them.")
	chainDesc       = describe("chain_joined", "1 if the plugin is in the chain of the node's primary network, so that new pods are attached; otherwise 0. Absent where the daemon does not look after the chain.")
	refreshedDesc   = describe("refreshed_endpoints", "Endpoints that the daemon asks by itself at present.")
	entriesDesc     = describe("map_entries", "Entries of a BPF map: pods, and flows (connections).", "map")
	capacityDesc    = describe("map_capacity_entries", "Entries that a BPF map can hold.", "map")
	watchedDesc     = describe("listeners_watched", "1 if listening sockets of pods are watched, so that all evidence of a pod ends when one of them closes; 0 where the kernel does not describe its types (BTF): then the next probe that reaches the pod tells.")
	detectionDesc   = describe("worst_detection_seconds", "The longest time that a failure can go unnoticed by one of the probes, by its pod's mode: with probelet answering (of mode observe: as it would be) and without, as computed.", "mode", "probelet")
	proberDesc      = describe("prober_found", "1 if it is known whose connections are probes, otherwise 0: nothing is answered then.")
	sourceDesc      = describe("source_up", "1 if the source of specs can be read, otherwise 0: what it last said stays in force.")
	pushedDesc      = describe("source_pushed", "1 if the source of specs hears of each change of a container's state when it happens, otherwise 0: it is polled, or does not tell.")
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
		probesDesc, handedOverDesc, observedDesc, lostDesc, foreignDesc, expiredDesc, untrustedDesc, droppedDesc, portsDesc,
		agesDesc, endpointsDesc, neverDesc, unattachedDesc, chainDesc, attachmentsDesc, detectionDesc, refreshedDesc, entriesDesc, capacityDesc, watchedDesc, proberDesc, sourceDesc,
		pushedDesc,
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

func (s sink) seconds(d *prometheus.Desc, value time.Duration, labels ...string) {
	s <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, value.Seconds(), labels...)
}

func collectCounters(d *datapath.Datapath, to sink) error {
	counters, err := d.Counters()
	if err != nil {
		return err
	}
	for name, n := range counters {
		if verdict, reason, ok := datapath.ProbeVerdict(name); ok {
			to.counter(probesDesc, n, verdict, reason)
		}
	}
	for _, cause := range datapath.WithdrawalCauses {
		to.counter(portsDesc, counters["withdrawn_"+cause], cause)
	}
	to.counter(handedOverDesc, counters["handed_over"])
	to.counter(observedDesc, counters["observed"])
	to.counter(lostDesc, counters["records_lost"])
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
			to.gauge(endpointsDesc, m.endpoints[modeState{mode, state}], string(mode), string(state))
		}
	}
	for _, code := range probe.ReasonCodes() {
		to.gauge(neverDesc, m.never[code], string(code))
	}
	to.gauge(unattachedDesc, m.unattached)
	if m.chain != nil {
		to.gauge(chainDesc, btoi(*m.chain))
	}
	for mode, worst := range m.detection {
		to.seconds(detectionDesc, worst.Answered, string(mode), "answering")
		to.seconds(detectionDesc, worst.Plain, string(mode), "without")
	}
	to.gauge(attachmentsDesc, m.known, "true")
	to.gauge(attachmentsDesc, m.unknown, "false")
	to.gauge(refreshedDesc, m.refreshed)
	to.gauge(proberDesc, btoi(m.proberFound))
	to.gauge(sourceDesc, btoi(m.sourceUp))
	to.gauge(pushedDesc, btoi(m.sourcePushed))
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

var endpointStates = []status.State{status.StateFresh, status.StateStale, status.StateFailed, status.StateUnknown, status.StateNever}

// podName is a pod's.
type podName struct{ Namespace, Name string }

// modeState is what endpoints are counted by.
type modeState struct {
	mode  probe.Mode
	state status.State
}

// moment is what is known at a moment, in numbers.
type moment struct {
	endpoints                 map[modeState]int
	detection                 map[probe.Mode]probe.Delay // the longest, of the modes that there are
	never                     map[probe.ReasonCode]int
	known, unknown, refreshed int
	unattached                int
	chain                     *bool // the plugin is in it; nil: not looked after
	hits                      map[podName]uint64
	proberFound               bool
	sourceUp, sourcePushed    bool
}

func (l *loop) moment() moment {
	m := moment{
		endpoints: map[modeState]int{}, never: map[probe.ReasonCode]int{}, unattached: l.unattached(), detection: map[probe.Mode]probe.Delay{}, hits: map[podName]uint64{},
		proberFound: l.lost == "", sourceUp: l.failing() == "", sourcePushed: l.delivery().Pushed,
	}
	if l.chain != nil {
		state := l.chain.Load()
		joined := state != nil && state.err == nil
		m.chain = &joined
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
			if s.Reason.Code != "" {
				m.never[s.Reason.Code]++
			}
			m.worsen(a.settings.Mode, s)
			if key, ok := store.Key(s.Endpoint, evidence[s.Endpoint].Question); ok && s.Observed && a.maps != nil {
				tally, _ := a.maps.Tally(key) // an unreadable one is told of when it is written
				hits += tally.Hits
			}
		}
		m.hits[podName{a.pod.Namespace, a.pod.Name}] += hits
	}
	return m
}

// unattached counts the pods whose probes could be answered, were they attached.
func (d *daemon) unattached() (n int) {
	attached := map[string]bool{}
	for _, a := range d.attachments {
		if a.record.Error == "" {
			attached[a.podName()] = true
		}
	}
	for _, pod := range d.pods {
		if !attached[pod.String()] && d.eligible(pod) {
			n++
		}
	}
	return n
}

// eligible reports whether probes of a pod would be answered, or in mode observe could be, were it attached.
func (d *daemon) eligible(pod probe.Pod) bool {
	if len(pod.IPs) == 0 {
		return false
	}
	endpoints, err := probe.Endpoints(pod, d.defaults.Settings(pod.Annotations), store.Limits)
	return err == nil && slices.ContainsFunc(endpoints, func(s probe.EndpointSpec) bool { return s.Reason.Code == "" || s.Withheld })
}

// worsen takes the endpoint's delays into account.
func (m moment) worsen(mode probe.Mode, s probe.EndpointSpec) {
	worst := m.detection[mode]
	for _, d := range s.Delays() {
		worst.Plain, worst.Answered = max(worst.Plain, d.Plain), max(worst.Answered, d.Answered)
	}
	m.detection[mode] = worst
}

// state returns the state that an endpoint is counted under.
func (a *attachment) state(s probe.EndpointSpec, e probe.Evidence) status.State {
	return status.Endpoint{
		Kind: s.Kind, Never: s.Reason, Withheld: s.Withheld, Bound: s.Staleness, Evidence: e, WithdrawnAt: a.withdrawnAt(s.Endpoint),
	}.Counted(datapath.Now())
}

// withdrawnAt is when the kernel side last voided what was known of an endpoint, by itself or with its port.
func (a *attachment) withdrawnAt(e probe.Endpoint) uint64 {
	if a.maps == nil {
		return datapath.Now() // the kernel holds nothing that it could answer with
	}
	key, _ := store.Key(e, a.tracker.Evidence()[e].Question)
	own, err := a.maps.Tally(key)
	port, portErr := a.maps.Tally(datapath.PortKey(e.Port))
	if err != nil || portErr != nil {
		return datapath.Now() // of what cannot be read nothing is fresh
	}
	return max(own.WithdrawnAt, port.WithdrawnAt)
}

// closedAt is when a listening socket closed, so that what the port was asked before is void.
func (a *attachment) closedAt(port uint16) uint64 {
	if a.maps == nil {
		return 0
	}
	at, err := a.maps.ClosedAt(port)
	if err != nil {
		return datapath.Now() // of what cannot be read nothing is fresh
	}
	return at
}

// mostAnswered is how many TCP probes of the port may be answered in a row, as far as that is known.
func (a *attachment) mostAnswered(port uint16) int {
	if a.maps == nil || a.live == 0 {
		return a.live
	}
	tally, err := a.maps.Tally(datapath.PortKey(port))
	if err != nil {
		return a.live
	}
	return store.ListenerOf(tally).Most
}
