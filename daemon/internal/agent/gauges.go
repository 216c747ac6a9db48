package agent

import (
	"context"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/agent/metrics"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/store"
)

// gauges returns the state that the metrics report.
func (ag *agent) gauges(ctx context.Context) (g metrics.Gauges, err error) {
	err = ag.call(ctx, func() { g = ag.currentGauges() })
	return g, err
}

func (ag *agent) currentGauges() metrics.Gauges {
	g := metrics.Gauges{
		Endpoints: map[metrics.ModeState]int{}, Never: map[probe.ReasonCode]int{}, Unattached: ag.missing(),
		Detection: map[probe.Mode]probe.Delay{}, Answered: map[metrics.Pod]uint64{},
		ProberFound: ag.prober.lost == "", SourceUp: ag.source.Failing() == "", SourcePushed: ag.source.Delivery().Pushed,
	}
	if ag.chain != nil {
		joined := ag.chain.joined()
		g.ChainJoined = &joined
	}
	for _, a := range ag.attachments {
		if a.pod == nil {
			g.Unknown++
			continue
		}
		g.Known++
		g.Refreshed += len(a.targets())
		evidence := a.tracker.Evidence()
		var answered uint64
		for _, s := range a.tracker.Endpoints() {
			g.Endpoints[metrics.ModeState{Mode: a.settings.Mode, State: a.state(s, evidence[s.Endpoint])}]++
			if s.Reason.Code != "" {
				g.Never[s.Reason.Code]++
			}
			worsen(g.Detection, a.settings.Mode, s)
			if key, ok := store.Key(s.Endpoint, evidence[s.Endpoint].Question); ok && s.Observed && a.maps != nil {
				tally, _ := a.maps.Tally(key) // errors are reported when the maps are written
				answered += tally.Hits
			}
		}
		g.Answered[metrics.Pod{Namespace: a.pod.Namespace, Name: a.pod.Name}] += answered
	}
	return g
}

// missing counts the pods whose probes could be answered if they were attached.
func (ag *agent) missing() (n int) {
	made := func(a *attachment) bool { return a.record.Error == "" }
	for _, pod := range ag.unattached(made) {
		if ag.answerable(pod) {
			n++
		}
	}
	return n
}

// worsen raises the delays of a mode to those of an endpoint.
func worsen(detection map[probe.Mode]probe.Delay, mode probe.Mode, s probe.EndpointSpec) {
	worst := detection[mode]
	for _, d := range s.Delays() {
		worst.Plain, worst.Answered = max(worst.Plain, d.Plain), max(worst.Answered, d.Answered)
	}
	detection[mode] = worst
}

// servedAt returns when the pod was last seen serving its clients, if that is evidence for the endpoint; 0 otherwise.
func (a *attachment) servedAt(s probe.EndpointSpec) uint64 {
	if s.Traffic == 0 || a.maps == nil {
		return 0
	}
	port, _ := a.maps.Tally(datapath.PortKey(s.Port)) // errors are reported when the maps are written
	return store.ServedAt(s.Kind, port)
}

// state returns the state that an endpoint is counted under.
func (a *attachment) state(s probe.EndpointSpec, e probe.Evidence) status.State {
	return status.Endpoint{
		Kind: s.Kind, Never: s.Reason, Withheld: s.Withheld, Bound: s.Staleness, Evidence: e, WithdrawnAt: a.withdrawnAt(s.Endpoint),
		ServedAt: a.servedAt(s),
	}.Counted(datapath.Now())
}
