//go:build linux

// Package survey collects what is known about this node from attachment records, the daemon's file, the kernel's maps and, if it is
// running, the daemon itself.
package survey

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/store"
	"github.com/probelet/probelet/internal/version"
)

// Status is everything that is known about a node: the output of probeletctl status -o json.
type Status struct {
	Daemon Daemon `json:"daemon"`
	// Prober identifies the connections that are probes; null if nothing is loaded into the kernel.
	Prober *Prober `json:"prober" jsonschema:"nullable"`
	// Counters are the kernel's counters, by the names of datapath.CounterNames; null if nothing is loaded.
	Counters    map[string]uint64 `json:"counters" jsonschema:"nullable"`
	Attachments []Attachment      `json:"attachments"`
	// Unattached lists the pods, as namespace/name, that the daemon has specs for and that are not attached.
	Unattached []string `json:"unattached"`
}

// Daemon reports whether probeletd is running on this state directory.
type Daemon struct {
	Running bool `json:"running"`
	PID     int  `json:"pid,omitempty"`
	// NotReady lists what keeps probes from being answered, or new pods from being attached.
	NotReady []string `json:"notReady,omitempty"`
	// Still describes what the kernel goes on answering while the daemon is down; null while it runs.
	Still *status.Still `json:"still" jsonschema:"nullable"`
}

// Prober identifies the processes whose connections are probes: all in the host's network namespace, or those in some cgroups.
type Prober struct {
	Host      bool     `json:"host"`
	CgroupIDs []uint64 `json:"cgroupIDs,omitempty"`
	// Process is the PID of the one process in the cgroup that counts; missing if all of them do.
	Process uint32 `json:"process,omitempty"`
}

// ProberOf converts a prober from the kernel side.
func ProberOf(p datapath.Prober) *Prober {
	prober := &Prober{Host: p.AnyLocal, CgroupIDs: p.CgroupIDs}
	if p.Process != nil {
		prober.Process = p.Process.PID
	}
	return prober
}

// Attachment is a pod's interface as the plugin or the daemon recorded it.
type Attachment struct {
	Pod         string `json:"pod,omitempty"` // namespace/name
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`     // in the pod
	HostIfName  string `json:"hostIfName"` // of the host-side veth, like ifIndex
	IfIndex     int    `json:"ifIndex"`
	// Adopted reports that the daemon attached the pod, because its network is older than probelet; otherwise the CNI plugin did, at ADD.
	Adopted bool `json:"adopted"`
	// Hook is where answers are made: tc or xdp. Trust says whether answers are known to arrive: unproven (not tried yet), proven or
	// lost. If lost, Loss says how that was noticed (syn_repeated, unacknowledged, request_repeated or unobserved), and LostAge is
	// the time since. All of these are empty or null if nothing is attached.
	Hook    string   `json:"hook,omitempty"`
	Trust   string   `json:"trust,omitempty"`
	Loss    string   `json:"loss,omitempty"`
	LostAge *float64 `json:"lostAgeSeconds" jsonschema:"nullable"`
	// Neighbours lists other agents' programs and filters at the device's hooks, in the order in which they run.
	Neighbours []Neighbour `json:"neighbours"`
	// WhyNotAnswered says why no endpoint is answered, and WhyNotAnsweredCode is the code of that reason (docs/probeletctl.md); empty
	// if the reason, if any, lies with each endpoint.
	WhyNotAnswered     string           `json:"whyNotAnswered,omitempty"`
	WhyNotAnsweredCode probe.ReasonCode `json:"whyNotAnsweredCode,omitempty"`
	// Settings are the pod's settings; null if the daemon has no specs of the pod.
	Settings  *statedir.Settings `json:"settings" jsonschema:"nullable"`
	Endpoints []Endpoint         `json:"endpoints"`
	// Inconclusive counts the probers' connections that reached the pod without a certain outcome since the daemon started, by the
	// reasons of the metric probelet_inconclusive_probes_total. Empty if there were none, or if the daemon is not running.
	Inconclusive map[string]uint64 `json:"inconclusive,omitempty"`
}

// Neighbour is another agent's program or filter.
type Neighbour struct {
	Hook string `json:"hook"` // such as "tcx ingress", "tc filter egress" or "xdp"
	What string `json:"what"`
	// Before reports that it runs before ours and so may keep packets from reaching ours.
	Before bool `json:"before"`
}

// Endpoint is what probes ask, and what is known about it.
type Endpoint struct {
	statedir.Endpoint
	// State is fresh, stale, failed or unknown.
	State status.State `json:"state"`
	// Age is the time since the last conclusive observation; null if there was none. FreshFor is how long a success will still be
	// answered (in mode observe: would be); null if the endpoint is not fresh.
	Age      *float64 `json:"ageSeconds" jsonschema:"nullable"`
	FreshFor *float64 `json:"freshForSeconds" jsonschema:"nullable"`
	Status   uint16   `json:"status,omitempty"` // the last HTTP status
	// Hits counts the probes answered in the kernel. LastHitAge is the time since the last of them; null if there was none.
	Hits       uint64   `json:"hits"`
	LastHitAge *float64 `json:"lastHitAgeSeconds" jsonschema:"nullable"`
	// WithdrawnAge is the time since the kernel last withdrew the endpoint's evidence, and WithdrawnCause says why: listener_closed,
	// reset or status. Null and empty if it never did.
	WithdrawnAge   *float64 `json:"withdrawnAgeSeconds" jsonschema:"nullable"`
	WithdrawnCause string   `json:"withdrawnCause,omitempty"`
	// WhyNotAnswered says why the next probe will reach the pod, and WhyNotAnsweredCode is the code of that reason
	// (docs/probeletctl.md); empty if the probe will be answered in the kernel.
	WhyNotAnswered     string           `json:"whyNotAnswered,omitempty"`
	WhyNotAnsweredCode probe.ReasonCode `json:"whyNotAnsweredCode,omitempty"`
	// Listener describes the checks of the port's listening socket; null if the socket is not checked, or if the port has no TCP probe
	// and no check kept its probes from being answered.
	Listener *store.Listener `json:"listener" jsonschema:"nullable"`
	// ServedAge is the time since the pod was last seen serving its clients; null if it was not, or if that is no evidence.
	ServedAge *float64 `json:"servedAgeSeconds" jsonschema:"nullable"`
	// WouldAnswer says what mode answer would have done with the probes seen in mode observe; null in other modes, if no probe was
	// seen, or if the daemon is not running.
	WouldAnswer *api.WouldAnswer `json:"estimate" jsonschema:"nullable"`
	// due reports that the endpoint is fresh, but that the maximum of probes in a row were answered.
	due bool
}

func (d Daemon) String() string {
	if len(d.NotReady) > 0 {
		return fmt.Sprintf("probeletd: running, pid %d, NOT READY: %s", d.PID, strings.Join(d.NotReady, "; "))
	}
	if d.Running {
		return fmt.Sprintf("probeletd: running, pid %d", d.PID)
	}
	return "probeletd: NOT RUNNING; " + d.Still.Words(time.Now())
}

func (p Prober) String() string {
	switch {
	case p.Host:
		return "every process of the host's network namespace (not for production)"
	case len(p.CgroupIDs) == 0:
		return "none"
	}
	ids := make([]string, 0, len(p.CgroupIDs))
	for _, id := range p.CgroupIDs {
		ids = append(ids, strconv.FormatUint(id, 10))
	}
	cgroups := "cgroup " + strings.Join(ids, ", ")
	if p.Process != 0 {
		return fmt.Sprintf("process %d of %s", p.Process, cgroups)
	}
	return cgroups
}

// Answers says whether answers through the device are known to arrive.
func (a Attachment) Answers() string {
	switch a.Trust {
	case TrustLost:
		return fmt.Sprintf("answers through %s stopped arriving %s ago: %s", a.HostIfName, status.Duration(*a.LostAge), status.LossText(a.Loss))
	case trusts[datapath.TrustProven]:
		return "answers through " + a.HostIfName + " arrive"
	}
	return "no answer through " + a.HostIfName + " has been tried yet"
}

// String formats the neighbour as text.
func (n Neighbour) String() string { return attach.Neighbour(n).String() }

// OfPod returns the attachments of a pod. Without any, the error's code is NotFound.
func (s Status) OfPod(name string) ([]Attachment, error) {
	var found []Attachment
	for _, a := range s.Attachments {
		if a.Pod == name {
			found = append(found, a)
		}
	}
	if len(found) > 0 {
		return found, nil
	}
	if slices.Contains(s.Unattached, name) {
		return nil, status.Errorf(status.NotFound, "pod %s is not attached, so all of its probes reach it", name)
	}
	if !s.Daemon.Running {
		return nil, status.Errorf(status.NotFound, "pod %s is not known on this node; probeletd, which knows the pods, is not running", name)
	}
	return nil, status.Errorf(status.NotFound, "pod %s is not known on this node", name)
}

// Node summarizes the node.
func (s Status) Node() status.Node {
	n := status.Node{Version: version.String(), Running: s.Daemon.Running, Still: s.Daemon.Still, NotReady: []string{}, Unattached: []status.Unattached{}}
	if !n.Running {
		n.NotReady = append(n.NotReady, api.ErrDown.Error())
	}
	for name, count := range s.Counters {
		switch verdict, _, _ := datapath.ProbeVerdict(name); verdict {
		case "answered":
			n.Probes.Answered += count
		case "passed":
			n.Probes.Passed += count
		}
	}
	for _, a := range s.Attachments {
		if why, detached := status.Detached(a.why()); detached {
			n.Unattached = append(n.Unattached, status.Unattached{Pod: a.Name(), Why: why})
			continue
		}
		n.Attached++
		n.Endpoints += len(a.Endpoints)
		for _, e := range a.Endpoints {
			if e.Answered() {
				n.Answered++
			}
		}
	}
	for _, pod := range s.Unattached {
		n.Unattached = append(n.Unattached, status.Unattached{Pod: pod})
	}
	status.SortUnattached(n.Unattached)
	return n
}

// Answered reports whether the next probe is answered in the kernel.
func (e Endpoint) Answered() bool { return e.State == status.StateFresh && e.WhyNotAnsweredCode == "" }

// Still returns what is answered while nothing renews it. An endpoint whose pod must accept a connection first counts too, because
// the kernel notices on its own when that has happened.
func Still(attachments []Attachment) *status.Still {
	s := &status.Still{}
	for _, a := range attachments {
		for _, e := range a.Endpoints {
			if e.Answered() || e.due {
				s.Endpoints++
				s.For = max(s.For, *e.FreshFor)
			}
		}
	}
	return s
}
