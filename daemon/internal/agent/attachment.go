package agent

import (
	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/refresh"
	"github.com/probelet/probelet/daemon/internal/store"
)

// attachment is an attached interface, with what is known of the pod behind it.
type attachment struct {
	record   attach.Record
	pod      *probe.Pod // nil: the source does not have it
	settings probe.Settings
	tracker  *probe.Tracker
	several  []probe.EndpointSpec           // the observed endpoints with a successThreshold above 1
	ranged   []probe.EndpointSpec           // the observed endpoints with a longer staleness once they are steady
	events   map[probe.Endpoint][]api.Event // the last ones
	shadow   *probe.Shadow                  // nil unless in mode observe
	maps     *store.Pod                     // nil: not attached yet, or to be opened again
	device   datapath.DeviceKey             // of the last maps
	live     int                            // probe.Limits.Live of that device
	restored bool                           // the evidence of a previous daemon was taken over
	pending  bool                           // the maps are out of date
	broken   bool                           // part of it is lost, so failures of the pod may go unseen
	distrust bool                           // answers do not arrive by its device, and that was logged
	// inconclusive counts exchanges without a certain outcome; doubtedAt is when the last of them was seen.
	inconclusive map[evidence.Doubt]uint64
	doubtedAt    uint64
	// What was logged last: why the pod is not answered, by its state, the number of its endpoints or its annotations; why its maps
	// could not be written; and why it is not attached.
	notAnswered, refused, misset, problem, unattached string

	crosschecked
}

func newAttachment(checked crosschecked) *attachment {
	return &attachment{
		tracker: probe.NewTracker(), events: map[probe.Endpoint][]api.Event{}, inconclusive: map[evidence.Doubt]uint64{},
		crosschecked: checked,
	}
}

func (a *attachment) podName() string {
	if a.pod == nil {
		return ""
	}
	return a.pod.String()
}

// keepShadow keeps a shadow while the pod is in mode observe.
func (a *attachment) keepShadow(endpoints []probe.EndpointSpec, now uint64) {
	switch {
	case a.pod == nil || a.settings.Mode != probe.Observe:
		a.shadow = nil
		return
	case a.shadow == nil:
		a.shadow = probe.NewShadow()
	}
	a.shadow.SetEndpoints(endpoints, now)
}

// targets returns what the daemon asks the pod itself.
func (a *attachment) targets() []refresh.Target {
	if a.record.Error != "" || a.pod == nil || len(a.pod.IPs) == 0 {
		return nil
	}
	var targets []refresh.Target
	for _, ask := range a.tracker.Refreshing() {
		targets = append(targets, refresh.Target{
			Endpoint: ask.Endpoint, Address: a.pod.IPs[0], Request: ask.Text, Question: ask.Question,
			Timeout: ask.Timeout, Interval: ask.Refresh,
		})
	}
	return targets
}

// withdraw forgets what is known of the endpoints that are meant.
func (a *attachment) withdraw(meant func(probe.Endpoint) bool) []probe.Change {
	now := datapath.Now()
	if a.shadow != nil {
		a.shadow.Withdraw(meant, now)
	}
	return a.tracker.Withdraw(meant, now)
}

// withdrawnAt returns when the kernel last withdrew the evidence of an endpoint or its port. If there are no maps, or they cannot be
// read, it is now, so that nothing counts as fresh.
func (a *attachment) withdrawnAt(e probe.Endpoint) uint64 {
	if a.maps == nil {
		return datapath.Now()
	}
	key, _ := store.Key(e, a.tracker.Evidence()[e].Question)
	own, err := a.maps.Tally(key)
	port, portErr := a.maps.Tally(datapath.PortKey(e.Port))
	if err != nil || portErr != nil {
		return datapath.Now()
	}
	return max(own.WithdrawnAt, port.WithdrawnAt)
}

// closedAt returns when a listening socket last closed, which withdraws what is known of the port. If it cannot be read, it is now.
func (a *attachment) closedAt(port uint16) uint64 {
	if a.maps == nil {
		return 0
	}
	at, err := a.maps.ClosedAt(port)
	if err != nil {
		return datapath.Now()
	}
	return at
}

// mostAnswered returns how many TCP probes of the port may be answered in a row, as far as that is known.
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
