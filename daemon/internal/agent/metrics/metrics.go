// Package metrics exposes what the agent does to Prometheus. It counts events as the agent reports them, and collects
// everything else at each scrape: the agent's state as Gauges, the kernel's counters from the datapath.
package metrics

import (
	"context"
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/crosscheck"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/repair"
	"github.com/probelet/probelet/internal/version"
)

// Metrics counts what the agent does. Its methods are safe for concurrent use.
type Metrics struct {
	evidence        *prometheus.CounterVec
	withdrawals     *prometheus.CounterVec
	inconclusive    *prometheus.CounterVec
	judged          *prometheus.CounterVec
	reconcileErrors prometheus.Counter
	repairs         *prometheus.CounterVec
	own             prometheus.Counter
	disagreements   *prometheus.CounterVec
	snapshots       prometheus.Counter
	lastSnapshot    prometheus.Gauge
}

// timedOut is the cause of withdrawals by probes that failed without the kernel noticing.
const timedOut probe.Cause = "timeout"

// New returns metrics whose counters all start at 0, with every label value present.
func New() *Metrics {
	m := &Metrics{
		evidence: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_evidence_total",
			Help: "Outcomes that changed what is known of an endpoint, by source (probe, refresh) and result.",
		}, []string{"source", "result"}),
		withdrawals: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_withdrawn_endpoints_total",
			Help: "Endpoints that the daemon stopped answering before their evidence expired, by cause: timeout (of a probe), refresh, restart, spec, request, repair, verdict (of the kubelet). Withdrawals by the kernel are counted in probelet_withdrawn_ports_total.",
		}, []string{"cause"}),
		inconclusive: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_inconclusive_probes_total",
			Help: "Connections of a prober that reached a pod but whose outcome is uncertain, by reason.",
		}, []string{"reason"}),
		judged: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_estimated_probes_total",
			Help: "Probes of pods in mode observe, by what mode answer would have done: verdict answered (reason: success, or failure if the pod failed the probe and its prober would have learned of it later) or passed (reason: why).",
		}, []string{"verdict", "reason"}),
		reconcileErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "probelet_reconcile_errors_total",
			Help: "Failed attempts to write evidence into a pod's maps.",
		}),
		repairs: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_repairs_total",
			Help: "Attachments that the daemon repaired: reattached (part of it was lost), removed (its device is gone), adopted (the pod was started before probelet).",
		}, []string{"what"}),
		own: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "probelet_own_connections_total",
			Help: "Connections opened by the daemon itself, for refresh.",
		}),
		disagreements: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "probelet_disagreements_total",
			Help: "Endpoints that are no longer answered because the kubelet counted probes that were taken for successes as failures (failed), or did not count them at all (discarded).",
		}, []string{"kind"}),
		snapshots: prometheus.NewCounter(prometheus.CounterOpts{
			Name: "probelet_source_snapshots_total",
			Help: "Lists of pods received from the source.",
		}),
		lastSnapshot: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "probelet_source_last_snapshot_timestamp_seconds",
			Help: "Unix time at which the last list of pods was received from the source; 0 if none was.",
		}),
	}
	m.presetLabels()
	return m
}

// presetLabels makes counters start at 0 for each value of their labels, instead of appearing when they are first counted.
func (m *Metrics) presetLabels() {
	for _, doubt := range evidence.Doubts() {
		m.inconclusive.WithLabelValues(string(doubt))
	}
	for _, why := range probe.Whys() {
		m.judged.WithLabelValues("passed", string(why))
	}
	for _, result := range []probe.Result{probe.Success, probe.Failure} {
		m.judged.WithLabelValues("answered", result.String())
	}
	for _, cause := range []probe.Cause{timedOut, probe.ByRefresh, probe.ByRestart, probe.BySpec, probe.ByRequest, probe.ByRepair, probe.ByVerdict} {
		m.withdrawals.WithLabelValues(string(cause))
	}
	for _, action := range repair.Actions {
		m.repairs.WithLabelValues(string(action))
	}
	for _, kind := range crosscheck.Kinds {
		m.disagreements.WithLabelValues(string(kind))
	}
}

// SnapshotReceived counts a list of pods from the source.
func (m *Metrics) SnapshotReceived() {
	m.snapshots.Inc()
	m.lastSnapshot.SetToCurrentTime()
}

// ReconcileFailed counts a failure to write a pod's maps.
func (m *Metrics) ReconcileFailed() { m.reconcileErrors.Inc() }

// OwnConnection counts a connection of the daemon itself.
func (m *Metrics) OwnConnection() { m.own.Inc() }

// Repaired counts a repair.
func (m *Metrics) Repaired(action repair.Action) { m.repairs.WithLabelValues(string(action)).Inc() }

// Disagreed counts an endpoint that the kubelet judges differently.
func (m *Metrics) Disagreed(kind crosscheck.Kind) {
	m.disagreements.WithLabelValues(string(kind)).Inc()
}

// Inconclusive counts exchanges without a certain outcome.
func (m *Metrics) Inconclusive(doubt evidence.Doubt, n uint64) {
	m.inconclusive.WithLabelValues(string(doubt)).Add(float64(n))
}

// Judged counts a probe of a pod in mode observe.
func (m *Metrics) Judged(j probe.Judged) {
	switch {
	case !j.Answered:
		m.judged.WithLabelValues("passed", string(j.Why)).Inc()
	case j.Hidden:
		m.judged.WithLabelValues("answered", probe.Failure.String()).Inc()
	default:
		m.judged.WithLabelValues("answered", probe.Success.String()).Inc()
	}
}

// Changed counts a change of what is known of an endpoint. outcome is what it was learned from; nil if it was no outcome.
func (m *Metrics) Changed(c probe.Change, outcome *probe.Outcome) {
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

// Handler serves the metrics. gauges returns the agent's current state. With perPod, pods get a time series each.
func (m *Metrics) Handler(d *datapath.Datapath, gauges func(context.Context) (Gauges, error), perPod bool) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(m.evidence, m.withdrawals, m.inconclusive, m.judged, m.reconcileErrors, m.repairs, m.own, m.disagreements, m.snapshots, m.lastSnapshot,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
		&collector{d, gauges, perPod}, buildInfo())
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{})
}

func buildInfo() prometheus.Collector {
	gauge := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "probelet_build_info", Help: "Always 1, labelled with the version of the daemon and the ABI of its maps.",
		ConstLabels: prometheus.Labels{"version": version.String(), "abi": datapath.ABI},
	})
	gauge.Set(1)
	return gauge
}
