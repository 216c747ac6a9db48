//go:build linux

// Package survey reads everything that is known about this node, whether or not the daemon runs: attachment records, the file that
// the daemon leaves, and the kernel's maps.
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

// Status is what probeletctl status shows.
type Status struct {
	Daemon Daemon `json:"daemon"`
	// Prober is whose connections are probes; null if nothing is loaded into the kernel.
	Prober *Prober `json:"prober" jsonschema:"nullable"`
	// Counters are the kernel's, by the names of datapath.CounterNames; null if nothing is loaded.
	Counters    map[string]uint64 `json:"counters" jsonschema:"nullable"`
	Attachments []Attachment      `json:"attachments"`
	// Unattached are pods that the daemon has specs of and that are not attached, as namespace/name.
	Unattached []string `json:"unattached"`
}

// Daemon says whether probeletd runs on this state directory.
type Daemon struct {
	Running bool `json:"running"`
	PID     int  `json:"pid,omitempty"`
	// NotReady is what keeps probes from being answered, or new pods from being attached.
	NotReady []string `json:"notReady,omitempty"`
	// Still is what the kernel goes on answering while the daemon is down; null while it runs.
	Still *status.Still `json:"still" jsonschema:"nullable"`
}

// Prober says whose connections are probes: of every process of the host's network namespace, or of those in cgroups.
type Prober struct {
	Host      bool     `json:"host"`
	CgroupIDs []uint64 `json:"cgroupIDs,omitempty"`
	// Process is the number of the only process of the cgroup that is meant; missing: all are.
	Process uint32 `json:"process,omitempty"`
}

// Attachment is the interface of a pod, as recorded by whoever attached it.
type Attachment struct {
	Pod         string `json:"pod,omitempty"` // namespace/name
	ContainerID string `json:"containerID"`
	IfName      string `json:"ifName"`     // in the pod
	HostIfName  string `json:"hostIfName"` // of the host-side veth, and so IfIndex
	IfIndex     int    `json:"ifIndex"`
	// Adopted: attached by the daemon, because the pod had its network before probelet; otherwise by the CNI plugin at ADD.
	Adopted bool `json:"adopted"`
	// Hook is where answers are made: tc or xdp. Trust says whether they are known to arrive: unproven (not tried yet), proven or
	// lost. After lost, Loss says how that was noticed: syn_repeated, unacknowledged, request_repeated or unobserved, and LostAge
	// is the time since. All of them are empty, or null, if nothing is attached.
	Hook    string   `json:"hook,omitempty"`
	Trust   string   `json:"trust,omitempty"`
	Loss    string   `json:"loss,omitempty"`
	LostAge *float64 `json:"lostAgeSeconds" jsonschema:"nullable"`
	// Neighbours are programs and filters of others at the device's hooks, in the order in which they run.
	Neighbours []Neighbour `json:"neighbours"`
	// WhyNotAnswered is why no endpoint is answered, and WhyNotAnsweredCode the code of that reason (docs/probeletctl.md); empty if
	// nothing keeps the whole attachment from being answered.
	WhyNotAnswered     string           `json:"whyNotAnswered,omitempty"`
	WhyNotAnsweredCode probe.ReasonCode `json:"whyNotAnsweredCode,omitempty"`
	// Settings are mode and staleness of the pod; null if the daemon has no specs of it.
	Settings  *statedir.Settings `json:"settings" jsonschema:"nullable"`
	Endpoints []Endpoint         `json:"endpoints"`
	// Inconclusive are how many connections of probers reached the pod and had no certain outcome since the daemon started, by
	// why: the reasons of the metric probelet_inconclusive_probes_total. Empty if there were none, or the daemon does not run.
	Inconclusive map[string]uint64 `json:"inconclusive,omitempty"`
}

// Neighbour is a program or filter of another agent.
type Neighbour struct {
	Hook string `json:"hook"` // such as "tcx ingress", "tc filter egress" or "xdp"
	What string `json:"what"`
	// Before: it runs before ours, and so may keep packets from them.
	Before bool `json:"before"`
}

// Endpoint is what probes ask, and what is known of it.
type Endpoint struct {
	statedir.Endpoint
	// State is fresh, stale, failed or unknown.
	State status.State `json:"state"`
	// Age is the time since the last conclusive observation, and FreshFor how long it will be answered (in mode observe:
	// would be); null if there is none, and if it is not fresh.
	Age      *float64 `json:"ageSeconds" jsonschema:"nullable"`
	FreshFor *float64 `json:"freshForSeconds" jsonschema:"nullable"`
	Status   uint16   `json:"status,omitempty"` // the last HTTP status
	// Hits are how many probes were answered in the kernel, and LastHitAge the time since the last; null if there is none.
	Hits       uint64   `json:"hits"`
	LastHitAge *float64 `json:"lastHitAgeSeconds" jsonschema:"nullable"`
	// WithdrawnAge is the time since the kernel last withdrew what was known of the port, and WithdrawnCause why:
	// listener_closed, reset or status; null and empty if it never did.
	WithdrawnAge   *float64 `json:"withdrawnAgeSeconds" jsonschema:"nullable"`
	WithdrawnCause string   `json:"withdrawnCause,omitempty"`
	// WhyNotAnswered is why the next probe will reach the pod, and WhyNotAnsweredCode the code of that reason (docs/probeletctl.md);
	// empty if it is answered in the kernel.
	WhyNotAnswered     string           `json:"whyNotAnswered,omitempty"`
	WhyNotAnsweredCode probe.ReasonCode `json:"whyNotAnsweredCode,omitempty"`
	// Listener is what looks at the port's listening socket came to; null if it is not looked at, or if the port has no TCP
	// probe and nothing kept its probes from being answered.
	Listener *store.Listener `json:"listener" jsonschema:"nullable"`
	// Estimate is what mode answer would have made of the probes that were seen in mode observe; null in other modes, if none
	// was seen, and if the daemon does not run.
	Estimate *api.Estimate `json:"estimate" jsonschema:"nullable"`
	// due: it is fresh, but as many probes as may be were answered in a row.
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
		return "nobody"
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

// Answers says whether answers are known to arrive.
func (a Attachment) Answers() string {
	switch a.Trust {
	case TrustLost:
		return fmt.Sprintf("since %s ago answers do not arrive by %s: %s", status.Duration(*a.LostAge), a.HostIfName, status.LossText(a.Loss))
	case trusts[datapath.TrustProven]:
		return "answers by " + a.HostIfName + " arrive"
	}
	return "no answer by " + a.HostIfName + " has been tried yet"
}

// String is for people.
func (n Neighbour) String() string { return attach.Neighbour(n).String() }

// OfPod returns the attachments of a pod, at least one.
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
	return nil, status.Errorf(status.NotFound, "pod %s is not known on this node", name)
}

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

// Still returns what is answered while nothing renews it. An endpoint whose pod must first accept a connection counts: the kernel
// notices by itself when it has.
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
