//go:build linux

package survey

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/store"
)

func ProberOf(p datapath.Prober) *Prober {
	prober := &Prober{Host: p.AnyLocal, CgroupIDs: p.CgroupIDs}
	if p.Process != nil {
		prober.Process = p.Process.PID
	}
	return prober
}

// Source is where probelet is on this machine.
type Source struct {
	BPFDir, StateDir string
	Now              func() uint64 // ns of CLOCK_BOOTTIME
	// Open returns nil if nothing is loaded.
	Open func(bpfDir string) (Kernel, error)
	// Warn is told of what cannot be read; the rest is shown.
	Warn func(error)
}

// Read reads all but others on the devices.
func (src Source) Read() (s Status, err error) {
	s = Status{Attachments: []Attachment{}, Unattached: []string{}}
	if s.Daemon.PID, s.Daemon.Running, err = statedir.Running(src.StateDir); err != nil {
		return s, err
	}
	known := s.ask(src) // before the file is read, which the daemon then brings up to date
	records, err := attach.ReadRecords(src.StateDir)
	if err != nil {
		src.Warn(err)
	}
	described, err := statedir.ReadEndpoints(src.StateDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		src.Warn(err)
	}
	s.Unattached = append(s.Unattached, described.Unattached...)
	k, err := src.Open(src.BPFDir)
	if err != nil {
		return s, err
	}
	if k != nil {
		defer k.Close() //nolint:errcheck // read only
		if err := s.readKernel(k); err != nil {
			return s, err
		}
	}
	for _, r := range records {
		a, err := s.attachment(k, r, described, src.Now())
		if err != nil {
			return s, err
		}
		s.Attachments = append(s.Attachments, a)
	}
	s.addKnown(known, src.Now())
	slices.SortStableFunc(s.Attachments, func(a, b Attachment) int { return strings.Compare(a.Pod, b.Pod) })
	if !s.Daemon.Running {
		s.Daemon.Still = Still(s.Attachments)
	}
	return s, nil
}

// ask asks the daemon what only it knows: nothing if it does not run.
func (s *Status) ask(src Source) (reply api.EndpointsReply) {
	if !s.Daemon.Running {
		return reply
	}
	ctx, cancel := context.WithTimeout(context.Background(), daemonPatience)
	defer cancel()
	client := api.NewClient(src.StateDir)
	reply, err := client.Endpoints(ctx)
	if err == nil {
		s.Daemon.NotReady, err = client.Ready(ctx)
	}
	if err != nil && !errors.Is(err, api.ErrDown) {
		src.Warn(err)
	}
	return reply
}

func (s *Status) addKnown(reply api.EndpointsReply, now uint64) {
	type id struct {
		containerID, ifName string
		endpoint            probe.Endpoint
	}
	known := map[id]api.Endpoint{}
	for _, e := range reply.Endpoints {
		endpoint := probe.Endpoint{Port: e.Port, Kind: e.Kind, Path: e.Path, Headers: e.HeadersID}
		known[id{e.ContainerID, e.IfName, endpoint}] = e
	}
	for i := range s.Attachments {
		a := &s.Attachments[i]
		for _, x := range reply.Inconclusive {
			if x.ContainerID == a.ContainerID && x.IfName == a.IfName {
				a.Inconclusive = x.Reasons
			}
		}
		for i := range a.Endpoints {
			e := &a.Endpoints[i]
			if k, ok := known[id{a.ContainerID, a.IfName, e.Endpoint.Endpoint()}]; ok && e.Observed {
				e.add(k, now)
			}
		}
	}
}

// daemonPatience is how long the daemon is waited for.
const daemonPatience = 2 * time.Second

// add adds what the daemon knows. Of an endpoint whose request it has never seen the kernel holds nothing.
func (e *Endpoint) add(k api.Endpoint, now uint64) {
	e.Estimate = k.Estimate
	if e.Age == nil && k.ObservedAt != 0 && k.Result == probe.Failure.String() {
		known := e.decides(probe.Evidence{Result: probe.Failure, Status: k.Status, ObservedAt: k.ObservedAt}, 0)
		e.State, e.Status, e.Age = known.State(now), uint16(k.Status), Seconds(now, k.ObservedAt)
		e.explain(e.never(), known.Reason(now))
	}
	if n := e.Estimate.Probes(); e.Withheld && n > 0 {
		e.WhyNotAnswered += fmt.Sprintf("; %d of %d probes would have been answered", e.Estimate.Answered, n)
	}
}

// ReadAll is Read that also looks for others on the devices, which takes a millisecond for each.
func (src Source) ReadAll() (Status, error) {
	s, err := src.Read()
	if err != nil {
		return s, err
	}
	k, err := src.Open(src.BPFDir)
	if err != nil || k == nil {
		return s, err
	}
	defer k.Close() //nolint:errcheck // read only
	for i := range s.Attachments {
		a := &s.Attachments[i]
		if a.Trust == "" {
			continue
		}
		neighbours, err := k.Neighbours(a.IfIndex)
		var gone netlink.LinkNotFoundError
		if err != nil && !errors.As(err, &gone) {
			src.Warn(err)
		}
		for _, n := range neighbours {
			a.Neighbours = append(a.Neighbours, Neighbour(n))
		}
	}
	return s, nil
}

func (s *Status) readKernel(k Kernel) error {
	prober, err := k.Prober()
	if err != nil {
		return fmt.Errorf("prober: %w", err)
	}
	s.Prober = ProberOf(prober)
	s.Counters, err = k.Counters()
	return err
}

// attachment joins a record with what the daemon said of it and what the kernel holds.
func (s *Status) attachment(k Kernel, r attach.Record, described statedir.Endpoints, now uint64) (Attachment, error) {
	a := Attachment{
		ContainerID: r.ContainerID, IfName: r.IfName, HostIfName: r.HostIfName, IfIndex: r.IfIndex, Adopted: r.Adopted,
		Endpoints: []Endpoint{}, Neighbours: []Neighbour{},
	}
	if r.PodName != "" {
		a.Pod = r.PodNamespace + "/" + r.PodName
	}
	i := slices.IndexFunc(described.Attachments, func(d statedir.Attachment) bool {
		return d.ContainerID == r.ContainerID && d.IfName == r.IfName
	})
	if i >= 0 {
		d := described.Attachments[i]
		if d.Pod != "" {
			a.Pod = d.Pod
		}
		a.Settings = d.Settings
		for _, e := range d.Endpoints {
			a.Endpoints = append(a.Endpoints, Endpoint{Endpoint: e, State: status.StateUnknown})
		}
	}
	maps, err := openPod(k, r)
	if err != nil {
		return a, err
	}
	decides := s.decides(r, maps != nil, i >= 0, len(a.Endpoints))
	if maps == nil {
		a.explain(decides.Reason())
		for i := range a.Endpoints {
			e := &a.Endpoints[i]
			e.explain(e.never(), a.why())
		}
		return a, nil
	}
	device, err := k.AttachedDevice(r.ID())
	if err == nil {
		a.describeDevice(device, now)
		decides.Lost, decides.Loss = a.Trust == TrustLost, a.Loss
	} else if !errors.Is(err, os.ErrNotExist) { // detached just now
		return a, err
	}
	a.explain(decides.Reason())
	return a, a.readMaps(maps, now)
}

// explain sets why nothing behind the attachment is answered.
func (a *Attachment) explain(why probe.Reason) {
	a.WhyNotAnswered, a.WhyNotAnsweredCode = why.Text, why.Code
}

// why returns what explain has set.
func (a *Attachment) why() probe.Reason {
	return probe.Reason{Code: a.WhyNotAnsweredCode, Text: a.WhyNotAnswered}
}

// describeDevice fills in what the kernel says of the device.
func (a *Attachment) describeDevice(d datapath.Device, now uint64) {
	a.Hook = string(attach.HookTC)
	if d.Hook == datapath.HookXDP {
		a.Hook = string(attach.HookXDP)
	}
	a.Trust, a.Loss = trusts[d.Trust], d.Loss
	if a.Trust == TrustLost {
		a.LostAge = Seconds(now, d.LostAt)
	}
}

// TrustLost is the Trust of a device by which answers do not arrive.
const TrustLost = "lost"

var trusts = map[datapath.Trust]string{
	datapath.TrustUnproven: "unproven", datapath.TrustProven: "proven", datapath.TrustLost: TrustLost,
}

// openPod returns nil if the pod has no maps.
func openPod(k Kernel, r attach.Record) (PodMaps, error) {
	if k == nil || r.IfIndex == 0 {
		return nil, nil
	}
	maps, err := k.Pod(r.ID())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	return maps, err
}

// Name is the pod's, as namespace/name, or the container's ID where that is not known.
func (a Attachment) Name() string { return cmp.Or(a.Pod, a.ContainerID) }

// decides returns what determines whether anything behind the attachment is answered, apart from its device.
func (s *Status) decides(r attach.Record, hasMaps, described bool, endpoints int) status.Attachment {
	a := status.Attachment{
		Error: r.Error, Loaded: s.Prober != nil, IfIndex: r.IfIndex, Known: hasMaps,
		Described: described, Endpoints: endpoints, DaemonRunning: s.Daemon.Running,
	}
	if p := s.Prober; p != nil {
		a.ProberKnown, a.ProberShared = p.Host || len(p.CgroupIDs) > 0, p.Process != 0
	}
	return a
}

// port is what the kernel holds of all endpoints on a port.
type port struct {
	evidence datapath.Evidence
	tally    datapath.Tally
}

// readMaps fills in what the kernel holds.
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
			e.LastHitAge = Seconds(now, tally.AnsweredAt)
		}
		last := ports[e.Port].tally
		if tally.WithdrawnAt > last.WithdrawnAt {
			last = tally
		}
		if last.WithdrawnAt != 0 {
			e.WithdrawnAge, e.WithdrawnCause = Seconds(now, last.WithdrawnAt), datapath.WithdrawalCauses[last.WithdrawnCause]
		}
		e.Listener = a.listener(e.Port, ports[e.Port].tally)
		e.judge(evidence, last, now)
	}
	for i := range a.Endpoints {
		e := &a.Endpoints[i]
		p := ports[e.Port]
		switch {
		case e.State != status.StateFresh:
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

// get returns zeroes of an endpoint that has no record yet.
func get(maps PodMaps, key datapath.EndpointKey) (datapath.Evidence, datapath.Tally, error) {
	evidence, tally, err := maps.Get(key)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return datapath.Evidence{}, datapath.Tally{}, nil
	}
	return evidence, tally, err
}

// decides returns what the endpoint's state depends on.
func (e *Endpoint) decides(known probe.Evidence, withdrawnAt uint64) status.Endpoint {
	return status.Endpoint{
		Kind: e.Kind, Never: e.never(), Withheld: e.Withheld, Bound: time.Duration(e.StalenessBound * float64(time.Second)),
		Successes: e.Successes, Evidence: known, WithdrawnAt: withdrawnAt, Cause: e.WithdrawnCause,
	}
}

// judge sets the endpoint's state, and why its own evidence keeps it from being answered. withdrawn is the tally of the latest
// withdrawal that affects it, its own or its port's.
func (e *Endpoint) judge(record datapath.Evidence, withdrawn datapath.Tally, now uint64) {
	known := e.decides(store.Evidence(e.Question, record), withdrawn.WithdrawnAt)
	e.Status, e.State = record.Status, known.State(now)
	e.explain(known.Reason(now))
	if record.ObservedAt != 0 {
		e.Age = Seconds(now, record.ObservedAt)
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

// MayBeAnswered reports whether the endpoint is answered while it is fresh, or would be but for mode observe.
func (e Endpoint) MayBeAnswered() bool { return e.Withheld || e.never() == (probe.Reason{}) }

// explain sets why the endpoint's next probe reaches the pod to the first of the reasons that is not empty.
func (e *Endpoint) explain(reasons ...probe.Reason) {
	why := status.First(reasons...)
	e.WhyNotAnswered, e.WhyNotAnsweredCode = why.Text, why.Code
}

// why returns what explain has set.
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

// listener returns what looks at a port's listening socket came to. Where they are a veto only, nothing is counted.
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

// asksListener reports whether the port's TCP probes are answered on looks at its listening socket.
func (a *Attachment) asksListener(port uint16) bool {
	return slices.ContainsFunc(a.Endpoints, func(e Endpoint) bool { return e.Port == port && e.Observed && e.Live > 0 })
}

// realDue reports whether the next probe of a port must reach the pod, as many as may be having been answered. No connection
// is on its way that may turn out to have been accepted.
func realDue(port datapath.Tally) bool {
	return port.AnsweredMax > 0 && port.Answered >= uint32(port.AnsweredMax) && port.ConnectedAt == 0
}

// Seconds is the time from earlier to later, both in ns.
func Seconds(later, earlier uint64) *float64 {
	s := (time.Duration(later - min(later, earlier))).Seconds()
	return &s
}
