package estimate

import "github.com/probelet/probelet/daemon/internal/probe"

// Limits are the limits of a kernel with BTF. They repeat constants of package datapath, which does not build on every workstation.
var Limits = probe.Limits{Request: 1024, Records: 64, Live: 9, Traffic: 9}

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
		d.Staleness, d.StalenessSet = probe.StalenessRange{Short: probe.MaxStaleness, Long: probe.MaxStaleness}, true
	case Refresh:
		d.Refresh.On, d.RefreshByAnnotation = true, true
	case Traffic:
		d.Liveness = probe.LivenessByTraffic
	}
	return d.Settings(annotations)
}
