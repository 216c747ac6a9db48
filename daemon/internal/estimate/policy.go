package estimate

import (
	"slices"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// Limits describes the kernel side on a kernel with BTF. They are repeated here because package bpf does not build on every workstation.
var Limits = probe.Limits{Request: 1024, Records: 64, Live: 9}

// Policy names a configuration of the nodes. The annotations of pods override it.
type Policy string

// Policies.
const (
	Default   Policy = "default"
	Staleness Policy = "staleness 5" // a success is answered for five periods instead of one
	Refresh   Policy = "refresh"     // the daemon keeps successes fresh with requests of its own
	Traffic   Policy = "traffic"     // a pod's own traffic answers its liveness probes
)

// Policies returns all policies.
func Policies() []Policy { return []Policy{Default, Staleness, Refresh, Traffic} }

// settings returns the settings of a pod under the policy.
func (p Policy) settings(annotations map[string]string) probe.Settings {
	d := probe.NewDefaults()
	switch p {
	case Staleness:
		d.Staleness, d.StalenessSet = probe.MaxStaleness, true
	case Refresh:
		d.Refresh.On, d.RefreshByAnnotation = true, true
	}
	return d.Settings(annotations)
}

// trafficRow limits how many probes in a row are answered because of traffic: at least every tenth is real.
const trafficRow = 9

// byTraffic reports whether traffic answers the endpoint's probes: only liveness probes ask it.
func (p Policy) byTraffic(e probe.EndpointSpec) bool {
	return p == Traffic && e.Observed && e.Reason == (probe.Reason{}) &&
		!slices.ContainsFunc(e.Askers, func(a probe.Asker) bool { return a.Type != probe.Liveness })
}

// added returns by how much the policy can delay the detection of a failure by one of the endpoint's probes.
func (p Policy) added(e probe.EndpointSpec, d probe.Delay) time.Duration {
	added := d.Probelet - d.Plain
	if p.byTraffic(e) {
		added = max(added, probe.Staleness(trafficRow+1).Of(e.Period, e.Timeout))
	}
	return added
}
