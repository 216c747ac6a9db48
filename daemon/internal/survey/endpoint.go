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

// port has the kernel's records of a port, which all of its endpoints share.
type port struct {
	evidence datapath.Evidence
	tally    datapath.Tally
}

// readMaps fills in the contents of the pod's maps.
func (a *Attachment) readMaps(maps PodMaps, now uint64) error {
	ports := map[uint16]port{}
	for i := range a.Endpoints {
		e := &a.Endpoints[i]
		if !e.Observed {
			continue
		}
		if _, known := ports[e.Port]; !known {
			evidence, tally, err := get(maps, datapath.PortKey(e.Port))
			if err != nil {
				return err
			}
			ports[e.Port] = port{evidence, tally}
		}
		var evidence datapath.Evidence
		var tally datapath.Tally
		if key, ok := store.Key(e.Endpoint.Endpoint(), e.Question); ok {
			var err error
			if evidence, tally, err = get(maps, key); err != nil {
				return err
			}
		}
		e.Hits = tally.Hits
		if tally.AnsweredAt != 0 {
			e.LastHitAge = seconds(now, tally.AnsweredAt)
		}
		last := ports[e.Port].tally
		if tally.WithdrawnAt > last.WithdrawnAt {
			last = tally
		}
		if last.WithdrawnAt != 0 {
			e.WithdrawnAge, e.WithdrawnCause = seconds(now, last.WithdrawnAt), datapath.WithdrawalCauses[last.WithdrawnCause]
		}
		e.Listener = a.listener(e.Port, ports[e.Port].tally)
		servedAt := e.servedAt(ports[e.Port].tally)
		if servedAt != 0 {
			e.ServedAge = seconds(now, servedAt)
		}
		e.judge(evidence, last, servedAt, now)
		if e.State == status.StateFresh && datapath.IsRealDue(evidence, tally) {
			e.explain(status.ReasonRealDue(tally.Answered))
			e.due = true
		}
	}
	for i := range a.Endpoints {
		e := &a.Endpoints[i]
		p := ports[e.Port]
		switch {
		case e.State != status.StateFresh:
		case e.due:
			e.due = e.never() == (probe.Reason{}) && a.WhyNotAnsweredCode == ""
		case e.Traffic > 0 && a.isServing(e.Port, p, now):
		case !datapath.PortFresh(p.evidence, p.tally, now):
			e.explain(a.heldBack(*e))
		case a.asksListener(e.Port) && realDue(p.tally):
			e.explain(status.ReasonLimit(p.tally.Answered))
			e.due = e.never() == (probe.Reason{}) && a.WhyNotAnsweredCode == ""
		}
		e.explain(e.never(), e.why(), a.why())
	}
	return nil
}

// servedAt returns when the endpoint's pod was last seen serving its clients, if that is evidence; 0 otherwise.
func (e *Endpoint) servedAt(port datapath.Tally) uint64 {
	if e.Traffic == 0 {
		return 0
	}
	return store.ServedAt(e.Kind, port)
}

// isServing reports whether connections to a port are taken because the pod serves its clients there.
func (a *Attachment) isServing(number uint16, p port, now uint64) bool {
	kind := datapath.KindHTTP
	if slices.ContainsFunc(a.Endpoints, func(e Endpoint) bool { return e.Port == number && e.Observed && e.Kind.Keying() == probe.KeyedByPort }) {
		kind = datapath.KindTCP
	}
	return p.evidence.ObservedAt > p.tally.WithdrawnAt && datapath.IsServing(p.evidence, p.tally, kind, now)
}

// get returns zero values for an endpoint without a record.
func get(maps PodMaps, key datapath.EndpointKey) (datapath.Evidence, datapath.Tally, error) {
	evidence, tally, err := maps.Get(key)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return datapath.Evidence{}, datapath.Tally{}, nil
	}
	return evidence, tally, err
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
