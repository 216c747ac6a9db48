//go:build linux

package survey

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
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
		e.State, e.Status, e.Age = Failed, uint16(k.Status), Seconds(now, k.ObservedAt)
		e.WhyNotAnswered = cmp.Or(e.NotAnswered, "the last probe failed: "+e.failure())
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
			a.Endpoints = append(a.Endpoints, Endpoint{Endpoint: e, State: Unknown})
		}
	}
	maps, err := openPod(k, r)
	if err != nil {
		return a, err
	}
	a.WhyNotAnswered = s.whyNone(r, maps != nil, i >= 0, len(a.Endpoints))
	if maps == nil {
		for i := range a.Endpoints {
			a.Endpoints[i].WhyNotAnswered = cmp.Or(a.Endpoints[i].NotAnswered, a.WhyNotAnswered)
		}
		return a, nil
	}
	device, err := k.AttachedDevice(r.ID())
	if err == nil {
		a.describeDevice(device, now)
	} else if !errors.Is(err, os.ErrNotExist) { // detached just now
		return a, err
	}
	return a, a.readMaps(maps, now)
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
		a.WhyNotAnswered = cmp.Or(a.WhyNotAnswered, "answers do not arrive by its device: "+LossInWords[d.Loss])
	}
}

const TrustLost = "lost"

var trusts = map[datapath.Trust]string{
	datapath.TrustUnproven: "unproven", datapath.TrustProven: "proven", datapath.TrustLost: TrustLost,
}

// LossInWords has the values of datapath.Losses.
var LossInWords = map[string]string{
	"syn_repeated":     "a prober sent its SYN again although it had been answered",
	"unacknowledged":   "a prober did not acknowledge the answer to its SYN",
	"request_repeated": "a prober sent its request again although it had been answered",
	"unobserved":       "another program at tc ingress keeps the pod's packets from ours",
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

// notAttached begins the reason of an attachment that is none.
const notAttached = "not attached"

// Name is the pod's, as namespace/name, or the container's ID where that is not known.
func (a Attachment) Name() string { return cmp.Or(a.Pod, a.ContainerID) }

// whyNone is why nothing of an attachment is answered.
func (s *Status) whyNone(r attach.Record, hasMaps, described bool, endpoints int) string {
	switch {
	case r.Error != "":
		return notAttached + ": " + r.Error
	case s.Prober == nil:
		return notAttached + ": the BPF objects are not loaded"
	case !hasMaps:
		return fmt.Sprintf(notAttached+": the programs do not know device %d", r.IfIndex)
	case !described && s.Daemon.Running:
		return "the daemon has not seen it yet"
	case !described:
		return "not known to a daemon, and none is running"
	case endpoints == 0:
		return "the daemon knows no probes of it"
	case !s.Prober.Host && len(s.Prober.CgroupIDs) == 0:
		return "nobody is the prober"
	case s.Prober.Process != 0 && !s.Daemon.Running:
		return "the prober shares its cgroup with others, and only a daemon that runs tells them apart"
	}
	return ""
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
		case e.State != Fresh:
		case !datapath.PortFresh(p.evidence, p.tally, now):
			e.WhyNotAnswered = a.heldBack(*e)
		case a.asksListener(e.Port) && realDue(p.tally):
			e.WhyNotAnswered = fmt.Sprintf("as many probes as may be were answered in a row (%d), so the pod must accept one", p.tally.Answered)
			e.due = e.NotAnswered == "" && a.WhyNotAnswered == ""
		}
		e.WhyNotAnswered = cmp.Or(e.NotAnswered, e.WhyNotAnswered, a.WhyNotAnswered)
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

// judge sets the endpoint's state, and why it is not answered on its own account. In mode observe it is what it would be.
// withdrawn is the tally of the last withdrawal that concerns it, its own or its port's.
func (e *Endpoint) judge(evidence datapath.Evidence, withdrawn datapath.Tally, now uint64) {
	e.Status = evidence.Status
	if e.Withheld {
		evidence.FreshUntil = evidence.ObservedAt + uint64(e.StalenessBound*float64(time.Second))
	}
	if evidence.ObservedAt == 0 {
		e.WhyNotAnswered = "nothing observed yet"
		return
	}
	e.Age = Seconds(now, evidence.ObservedAt)
	switch {
	case datapath.MayAnswer(evidence, withdrawn, withdrawn, now, now):
		e.State = Fresh
		e.FreshFor = Seconds(evidence.FreshUntil, now)
	case evidence.Result == datapath.ResultSuccess && evidence.ObservedAt <= withdrawn.WithdrawnAt:
		e.State = Stale
		e.WhyNotAnswered = "withdrawn: " + Withdrawal(e.WithdrawnCause)
	case evidence.Result == datapath.ResultSuccess && evidence.FreshUntil == 0 && e.NotAnswered == "" && e.Successes > 1:
		e.State = Stale
		e.WhyNotAnswered = fmt.Sprintf("%d probes in a row must succeed first (successThreshold)", e.Successes)
	case evidence.Result == datapath.ResultSuccess:
		e.State = Stale
		e.WhyNotAnswered = "expired"
		if evidence.FreshUntil != 0 {
			e.WhyNotAnswered = fmt.Sprintf("expired %s ago", Duration(*Seconds(now, evidence.FreshUntil)))
		}
	case evidence.Result == datapath.ResultFailure:
		e.State = Failed
		e.WhyNotAnswered = "the last probe failed: " + e.failure()
	default:
		e.WhyNotAnswered = fmt.Sprintf("status %d: a redirect is never answered", evidence.Status)
	}
}

// Withdrawal is a cause in words.
func Withdrawal(cause string) string {
	switch cause {
	case "listener_closed":
		return "a listening socket of the pod was closed"
	case "reset":
		return "a probe of the port was refused or reset"
	case "status":
		return "a probe of the port got a status other than 2xx"
	}
	return cause
}

// failure is how the last probe failed.
func (e *Endpoint) failure() string {
	switch {
	case e.Status == 0 && e.Kind == probe.TCP:
		return "refused, or not accepted in time"
	case e.Status == 0:
		return "refused, reset, or no complete and valid response in time"
	case e.Status < 300:
		return fmt.Sprintf("status %d came too late", e.Status)
	}
	return fmt.Sprintf("status %d", e.Status)
}

// heldBack says why connections to the port of a fresh endpoint are not taken.
func (a *Attachment) heldBack(e Endpoint) string {
	for _, o := range a.Endpoints {
		if o.Port == e.Port && o.Kind == probe.TCP && o.Observed && !o.StartupOnly && o.State != Fresh {
			return fmt.Sprintf("taking a connection would also answer %s (%s)", o.Endpoint.Endpoint(), o.State)
		}
	}
	return "the port is not open yet"
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

// Duration is a time in seconds as a person likes to read it.
func Duration(seconds float64) time.Duration {
	d := time.Duration(math.Round(seconds * float64(time.Second)))
	if d < 10*time.Second {
		return d.Round(100 * time.Millisecond)
	}
	return d.Round(time.Second)
}
