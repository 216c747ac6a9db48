package agent

import (
	"context"
	"slices"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/agent/metrics"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/store"
)

// gauges returns the state that the metrics report.
func (l *loop) gauges(ctx context.Context) (g metrics.Gauges, err error) {
	err = l.call(ctx, func() { g = l.currentGauges() })
	return g, err
}

func (l *loop) currentGauges() metrics.Gauges {
	g := metrics.Gauges{
		Endpoints: map[metrics.ModeState]int{}, Never: map[probe.ReasonCode]int{}, Unattached: l.unattached(),
		Detection: map[probe.Mode]probe.Delay{}, Answered: map[metrics.Pod]uint64{},
		ProberFound: l.lost == "", SourceUp: l.failing() == "", SourcePushed: l.delivery().Pushed,
	}
	if l.chain != nil {
		state := l.chain.Load()
		joined := state != nil && state.err == nil
		g.ChainJoined = &joined
	}
	for _, a := range l.attachments {
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

// worsen raises the delays of a mode to those of an endpoint.
func worsen(detection map[probe.Mode]probe.Delay, mode probe.Mode, s probe.EndpointSpec) {
	worst := detection[mode]
	for _, d := range s.Delays() {
		worst.Plain, worst.Answered = max(worst.Plain, d.Plain), max(worst.Answered, d.Answered)
	}
	detection[mode] = worst
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
