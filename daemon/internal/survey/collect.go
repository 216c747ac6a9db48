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

	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
)

// Source says where to find probelet's state on this machine.
type Source struct {
	BPFDir, StateDir string
	Now              func() uint64 // ns of CLOCK_BOOTTIME
	// Open opens the BPF objects; it returns nil if nothing is loaded.
	Open func(bpfDir string) (Kernel, error)
	// Warn is called with errors that do not keep the rest from being read.
	Warn func(error)
}

// Read collects everything except neighbours.
func (src Source) Read() (s Status, err error) {
	s = Status{Attachments: []Attachment{}, Unattached: []string{}}
	if s.Daemon.PID, s.Daemon.Running, err = statedir.Running(src.StateDir); err != nil {
		return s, err
	}
	known := s.ask(src) // first, because it makes the daemon update the file that is read below
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

// ask gets from the daemon what only it knows. The reply is empty if the daemon is not running.
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

// daemonPatience bounds the wait for the daemon.
const daemonPatience = 2 * time.Second

// add adds what the daemon knows. The kernel has no entry for an endpoint until its request was seen once, so only the daemon knows
// of earlier failures.
func (e *Endpoint) add(k api.Endpoint, now uint64) {
	e.WouldAnswer = k.WouldAnswer
	if e.Age == nil && k.ObservedAt != 0 && k.Result == probe.Failure.String() {
		known := e.decides(probe.Evidence{Result: probe.Failure, Status: k.Status, ObservedAt: k.ObservedAt}, 0, 0)
		e.State, e.Status, e.Age = known.State(now), uint16(k.Status), seconds(now, k.ObservedAt)
		e.explain(e.never(), known.Reason(now))
	}
	if n := e.WouldAnswer.Probes(); e.Withheld && n > 0 {
		e.WhyNotAnswered += fmt.Sprintf("; %d of %d probes would have been answered", e.WouldAnswer.Answered, n)
	}
}

// ReadWithNeighbours is like Read and also collects neighbours, which takes about a millisecond per device.
func (src Source) ReadWithNeighbours() (Status, error) {
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

// attachment joins a record with the daemon's description of it and the contents of the kernel's maps.
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

// explain records why nothing behind the attachment is answered.
func (a *Attachment) explain(why probe.Reason) {
	a.WhyNotAnswered, a.WhyNotAnsweredCode = why.Text, why.Code
}

// why returns the reason that explain recorded.
func (a *Attachment) why() probe.Reason {
	return probe.Reason{Code: a.WhyNotAnsweredCode, Text: a.WhyNotAnswered}
}

// describeDevice fills in the state of the device.
func (a *Attachment) describeDevice(d datapath.Device, now uint64) {
	a.Hook = string(attach.HookTC)
	if d.Hook == datapath.HookXDP {
		a.Hook = string(attach.HookXDP)
	}
	a.Trust, a.Loss = trusts[d.Trust], d.Loss
	if a.Trust == TrustLost {
		a.LostAge = seconds(now, d.LostAt)
	}
}

// TrustLost is the Trust of a device through which answers did not arrive.
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

// Name returns the pod as namespace/name, or the container ID if the pod is unknown.
func (a Attachment) Name() string { return cmp.Or(a.Pod, a.ContainerID) }

// decides returns what determines whether anything behind the attachment is answered, apart from the trust in its device.
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
