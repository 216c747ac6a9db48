//go:build linux

package survey

import (
	"errors"
	"slices"
	"time"

	"github.com/cilium/ebpf"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/store"
)

// entry has what the kernel's maps say of an endpoint, or of a port, which all of its endpoints share.
type entry struct {
	evidence datapath.Evidence
	tally    datapath.Tally
}

// readMaps fills in the contents of the pod's maps.
func (a *Attachment) readMaps(maps PodMaps, now uint64) error {
	ports, err := a.readPorts(maps)
	if err != nil {
		return err
	}
	for i := range a.Endpoints {
		e := &a.Endpoints[i]
		if !e.Observed {
			continue
		}
		var own entry
		if key, ok := store.Key(e.Endpoint.Endpoint(), e.Question); ok {
			if own, err = get(maps, key); err != nil {
				return err
			}
		}
		e.Listener = a.listener(e.Port, ports[e.Port].tally)
		e.describe(own, ports[e.Port].tally, now)
	}
	// Whether a port is open depends on the states of all its endpoints.
	for i := range a.Endpoints {
		a.explainEndpoint(&a.Endpoints[i], ports[a.Endpoints[i].Port], now)
	}
	return nil
}

// readPorts returns the entries of the ports of observed endpoints.
func (a *Attachment) readPorts(maps PodMaps) (map[uint16]entry, error) {
	all := map[uint16]entry{}
	for _, e := range a.Endpoints {
		if _, known := all[e.Port]; known || !e.Observed {
			continue
		}
		port, err := get(maps, datapath.PortKey(e.Port))
		if err != nil {
			return nil, err
		}
		all[e.Port] = port
	}
	return all, nil
}

// describe fills in what the endpoint's own entry and its port's tally say about it.
func (e *Endpoint) describe(own entry, port datapath.Tally, now uint64) {
	e.Hits = own.tally.Hits
	if own.tally.AnsweredAt != 0 {
		e.LastHitAge = seconds(now, own.tally.AnsweredAt)
	}
	last := port
	if own.tally.WithdrawnAt > last.WithdrawnAt {
		last = own.tally
	}
	if last.WithdrawnAt != 0 {
		e.WithdrawnAge, e.WithdrawnCause = seconds(now, last.WithdrawnAt), datapath.WithdrawalCauses[last.WithdrawnCause]
	}
	servedAt := e.servedAt(port)
	if servedAt != 0 {
		e.ServedAge = seconds(now, servedAt)
	}
	e.judge(own.evidence, last, servedAt, now)
	if e.State == status.StateFresh && datapath.IsRealDue(own.evidence, own.tally) {
		e.explain(status.ReasonRealDue(own.tally.Answered))
		e.due = true
	}
}

// explainEndpoint records why the endpoint's next probe reaches the pod, given the states of all endpoints.
func (a *Attachment) explainEndpoint(e *Endpoint, port entry, now uint64) {
	switch {
	case e.State != status.StateFresh:
	case e.due:
		e.due = e.never() == (probe.Reason{}) && a.WhyNotAnsweredCode == ""
	case e.Traffic > 0 && a.isServing(e.Port, port, now):
	case !datapath.PortFresh(port.evidence, port.tally, now):
		e.explain(a.heldBack(*e))
	case a.asksListener(e.Port) && realDue(port.tally):
		e.explain(status.ReasonLimit(port.tally.Answered))
		e.due = e.never() == (probe.Reason{}) && a.WhyNotAnsweredCode == ""
	}
	e.explain(e.never(), e.why(), a.why())
}

// servedAt returns when the endpoint's pod was last seen serving its clients, if that is evidence; 0 otherwise.
func (e *Endpoint) servedAt(port datapath.Tally) uint64 {
	if e.Traffic == 0 {
		return 0
	}
	return store.ServedAt(e.Kind, port)
}

// isServing reports whether connections to a port are taken because the pod serves its clients there.
func (a *Attachment) isServing(number uint16, port entry, now uint64) bool {
	kind := datapath.KindHTTP
	if slices.ContainsFunc(a.Endpoints, func(e Endpoint) bool { return e.Port == number && e.Observed && e.Kind.Keying() == probe.KeyedByPort }) {
		kind = datapath.KindTCP
	}
	return port.evidence.ObservedAt > port.tally.WithdrawnAt && datapath.IsServing(port.evidence, port.tally, kind, now)
}

// get returns the zero entry if there is none.
func get(maps PodMaps, key datapath.EndpointKey) (entry, error) {
	evidence, tally, err := maps.Get(key)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return entry{}, nil
	}
	return entry{evidence, tally}, err
}

// decides returns what the endpoint's state depends on.
func (e *Endpoint) decides(known probe.Evidence, withdrawnAt, servedAt uint64) status.Endpoint {
	return status.Endpoint{
		Kind: e.Kind, Never: e.never(), Withheld: e.Withheld, Bound: time.Duration(e.StalenessBound * float64(time.Second)),
		Successes: e.Successes, Evidence: known, WithdrawnAt: withdrawnAt, Cause: e.WithdrawnCause,
		ServedAt: servedAt,
	}
}

// judge sets the endpoint's state, and why its own evidence keeps it from being answered. withdrawn is the tally of the latest
// withdrawal that affects it, its own or its port's.
func (e *Endpoint) judge(record datapath.Evidence, withdrawn datapath.Tally, servedAt, now uint64) {
	known := e.decides(store.Evidence(e.Question, record), withdrawn.WithdrawnAt, servedAt)
	e.Status, e.State = record.Status, known.State(now)
	e.explain(known.Reason(now))
	if record.ObservedAt != 0 {
		e.Age = seconds(now, record.ObservedAt)
	}
	if e.State == status.StateFresh {
		fresh := known.FreshFor(now).Seconds()
		e.FreshFor = &fresh
	}
}

// never returns why the endpoint is never answered; empty if it may be.
func (e *Endpoint) never() probe.Reason {
	if e.NotAnswered != "" && e.NotAnsweredCode == "" { // left by an older daemon
		return probe.Reason{Code: status.Unclassified, Text: e.NotAnswered}
	}
	return probe.Reason{Code: e.NotAnsweredCode, Text: e.NotAnswered}
}

// MayBeAnswered reports whether the endpoint is answered while it is fresh, or would be if not for mode observe.
func (e Endpoint) MayBeAnswered() bool { return e.Withheld || e.never() == (probe.Reason{}) }

// explain records why the endpoint's next probe reaches the pod: the first of the reasons that is not empty.
func (e *Endpoint) explain(reasons ...probe.Reason) {
	why := status.First(reasons...)
	e.WhyNotAnswered, e.WhyNotAnsweredCode = why.Text, why.Code
}

// why returns the reason that explain recorded.
func (e *Endpoint) why() probe.Reason {
	return probe.Reason{Code: e.WhyNotAnsweredCode, Text: e.WhyNotAnswered}
}

// heldBack returns why connections to the port of a fresh endpoint are not taken.
func (a *Attachment) heldBack(e Endpoint) probe.Reason {
	for _, o := range a.Endpoints {
		if o.Port == e.Port && o.Kind.Keying() == probe.KeyedByPort && o.Observed && !o.StartupOnly && o.State != status.StateFresh {
			return status.ReasonBesideTCP(o.Endpoint.Endpoint(), o.State)
		}
	}
	return status.ReasonPortClosed()
}

// listener describes the checks of a port's listening socket. For ports without a TCP probe they can only veto an answer, so only the
// obstacle is meaningful.
func (a *Attachment) listener(port uint16, tally datapath.Tally) *store.Listener {
	l := store.ListenerOf(tally)
	switch {
	case a.asksListener(port):
		return &l
	case l.Obstacle != "":
		return &store.Listener{Obstacle: l.Obstacle}
	}
	return nil
}

// asksListener reports whether the port's TCP probes are answered on the strength of its listening socket.
func (a *Attachment) asksListener(port uint16) bool {
	return slices.ContainsFunc(a.Endpoints, func(e Endpoint) bool { return e.Port == port && e.Observed && e.Live > 0 })
}

// realDue reports whether the next probe of a port must reach the pod, because the maximum of probes in a row were answered and no
// connection is pending that may turn out to have been accepted.
func realDue(port datapath.Tally) bool {
	return port.AnsweredMax > 0 && port.Answered >= uint32(port.AnsweredMax) && port.ConnectedAt == 0
}

// seconds returns the time between two moments in ns, in seconds; 0 if later is before earlier.
func seconds(later, earlier uint64) *float64 {
	s := (time.Duration(later - min(later, earlier))).Seconds()
	return &s
}
