package metrics

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/status"
)

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc("probelet_"+name, help, labels, nil)
}

var (
	probesDesc      = describe("probes_total", "Connections of a prober to attached pods, each counted once, by verdict (answered in the kernel, or passed to the pod) and reason.", "verdict", "reason")
	handedOverDesc  = describe("handed_over_connections_total", "Connections that the kernel took and then handed over to the pod, because it could not answer the request.")
	observedDesc    = describe("observed_probes_total", "Probes that reached the pod, passed or handed over, and were recorded to their end.")
	lostDesc        = describe("lost_records_total", "Connections with a record that did not fit into the ring buffer.")
	foreignDesc     = describe("foreign_connections_total", "Connections to attached pods that were not a prober's.")
	expiredDesc     = describe("expired_flows_total", "Connections of a prober that expired because their end was not seen, or their pod went first.")
	untrustedDesc   = describe("untrusted_devices", "Devices of pods that are no longer answered because an answer did not arrive, by how that was noticed.", "noticed")
	droppedDesc     = describe("dropped_packets_total", "Packets of taken connections that were dropped because they need no answer, such as acknowledgements.")
	portsDesc       = describe("withdrawn_ports_total", "Ports that the kernel stopped answering before their evidence expired, by cause.", "cause")
	agesDesc        = describe("answer_age_seconds", "Age of the evidence that probes were answered from.")
	endpointsDesc   = describe("endpoints", "Probed endpoints, by their pod's mode and by state: fresh (answered; in mode observe: would be), stale, failed, unknown, never (cannot or must not be answered).", "mode", "state")
	attachmentsDesc = describe("attachments", "Attached interfaces, by whether the probes of their pods are known.", "known")
	neverDesc       = describe("ineligible_endpoints", "Endpoints that are never answered, by reason: kind (HTTPS, gRPC, exec), host (another host is probed), too_long, request (cannot be sent, or is not understood), startup (only startup probes ask), beside (answering it would answer one of the others), pod (is ending, or not understood), mode (observe or off), annotation (is invalid), room (too many endpoints), disagreement (with the kubelet's verdict).", "reason")
	unattachedDesc  = describe("unattached_pods", "Pods with an interface of their own and answerable probes that are not attached, so that all of their probes reach them.")
	chainDesc       = describe("chain_joined", "1 if the plugin is in the chain of the node's primary network, so that new pods are attached; otherwise 0. Absent unless the daemon maintains the chain.")
	refreshedDesc   = describe("refreshed_endpoints", "Endpoints that the daemon currently refreshes.")
	entriesDesc     = describe("map_entries", "Entries in a BPF map: pods, or flows (connections).", "map")
	capacityDesc    = describe("map_capacity_entries", "Capacity of a BPF map.", "map")
	watchedDesc     = describe("listeners_watched", "1 if listening sockets of pods are watched, so that a pod's evidence is withdrawn when one of them closes; 0 on kernels without BTF, where the next probe that reaches the pod finds out.")
	detectionDesc   = describe("worst_detection_seconds", "Computed upper bound on how long a failure can go unnoticed by any of the probes, by their pod's mode: with probelet answering (in mode observe: as if it did), and without.", "mode", "probelet")
	proberDesc      = describe("prober_found", "1 if the prober has been found, otherwise 0: nothing is answered.")
	sourceDesc      = describe("source_up", "1 if the source of specs can be read, otherwise 0: the previous specs stay in force.")
	pushedDesc      = describe("source_pushed", "1 if the source of specs pushes changes of containers as they happen, otherwise 0: it is polled, or does not report them.")
	perPodDesc      = describe("pod_answered_probes_total", "Probes of a pod that were answered in the kernel.", "namespace", "pod")
)

// ModeState is what endpoints are counted by.
type ModeState struct {
	Mode  probe.Mode
	State status.State
}

// Pod names a pod.
type Pod struct{ Namespace, Name string }

// Gauges is the agent's state at the time of a scrape.
type Gauges struct {
	Endpoints map[ModeState]int
	// Detection has the worst delays of each mode in use.
	Detection map[probe.Mode]probe.Delay
	Never     map[probe.ReasonCode]int
	// Known and Unknown count attachments by whether the specs of their pods are known.
	Known, Unknown         int
	Refreshed              int   // endpoints
	Unattached             int   // pods
	ChainJoined            *bool // nil: the chain is not maintained
	Answered               map[Pod]uint64
	ProberFound            bool
	SourceUp, SourcePushed bool
}

// collector collects what is not counted as it happens: the kernel's counters and the agent's gauges.
type collector struct {
	datapath *datapath.Datapath
	gauges   func(context.Context) (Gauges, error)
	perPod   bool
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

// collectTimeout is less than the timeout of scrapers.
const collectTimeout = 5 * time.Second

// Collect implements prometheus.Collector.
func (c *collector) Collect(out chan<- prometheus.Metric) {
	d, to := c.datapath, sink(out)
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
	gauges, err := c.gauges(ctx)
	if err != nil {
		to <- prometheus.NewInvalidMetric(endpointsDesc, err)
		return
	}
	gauges.collect(to, c.perPod)
}

// sink is where a scrape sends its metrics.
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

func (g Gauges) collect(to sink, perPod bool) {
	for _, mode := range []probe.Mode{probe.Answer, probe.Observe, probe.Off} {
		for _, state := range status.States() {
			to.gauge(endpointsDesc, g.Endpoints[ModeState{mode, state}], string(mode), string(state))
		}
	}
	for _, code := range probe.ReasonCodes() {
		to.gauge(neverDesc, g.Never[code], string(code))
	}
	to.gauge(unattachedDesc, g.Unattached)
	if g.ChainJoined != nil {
		to.gauge(chainDesc, btoi(*g.ChainJoined))
	}
	for mode, worst := range g.Detection {
		to.seconds(detectionDesc, worst.Answered, string(mode), "answering")
		to.seconds(detectionDesc, worst.Plain, string(mode), "without")
	}
	to.gauge(attachmentsDesc, g.Known, "true")
	to.gauge(attachmentsDesc, g.Unknown, "false")
	to.gauge(refreshedDesc, g.Refreshed)
	to.gauge(proberDesc, btoi(g.ProberFound))
	to.gauge(sourceDesc, btoi(g.SourceUp))
	to.gauge(pushedDesc, btoi(g.SourcePushed))
	if !perPod {
		return
	}
	for pod, answered := range g.Answered {
		to.counter(perPodDesc, answered, pod.Namespace, pod.Name)
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}
