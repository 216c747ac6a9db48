// Package estimate computes what probelet would save a cluster, from nothing but the specs of its pods.
//
// What may be answered, and until when, is decided by the daemon's own code: package podspec converts the pods, package probe forms
// their endpoints. How many probes are answered then is computed by a model of a healthy pod, which the simulation confirms.
package estimate

import (
	"cmp"
	"maps"
	"math"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/probelet/probelet/daemon/internal/podspec"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/table"
)

// Report is the output of estimate -o json.
type Report struct {
	Total Group `json:"total"`
	// Namespaces are sorted by name.
	Namespaces []Group `json:"namespaces"`
	// Nodes counts the nodes that the pods are on, and BusiestNode is the one with the most connections; absent if no pod names a node.
	Nodes       int    `json:"nodes"`
	BusiestNode *Group `json:"busiestNode,omitempty"`
	// NotCounted counts objects that are not part of the estimate.
	NotCounted NotCounted `json:"notCounted"`
	// InvalidAnnotations has, for each pod with an annotation that cannot be used, its name and what is wrong.
	InvalidAnnotations []string `json:"invalidAnnotations"`
	// Assumptions are sentences for humans.
	Assumptions []string   `json:"assumptions"`
	Constants   []Constant `json:"constants"`
}

// NotCounted counts objects that are not part of an estimate.
type NotCounted struct {
	// Ended is the number of pods that have succeeded or failed.
	Ended int `json:"ended"`
	// Others counts the objects in a file that are not pods, by kind.
	Others map[string]int `json:"others"`
}

// Group is the estimate for the pods of a namespace or node, or for all pods.
type Group struct {
	// Name is the name of the namespace or node; empty for all pods.
	Name string `json:"name,omitempty"`
	// Pods counts pods that have not ended, and Probed those of them that have probes.
	Pods   int `json:"pods"`
	Probed int `json:"probed"`
	// Probes counts the probes by kind, without startup probes. Kinds that have none are left out.
	Probes []KindCount `json:"probes"`
	// Startup counts startup probes, which end with their first success.
	Startup Count `json:"startup"`
	// Answerable counts the probes that the default policy may answer, and NotAnswerable the others by reason. Neither includes startup
	// probes.
	Answerable    Count         `json:"answerable"`
	NotAnswerable []ReasonCount `json:"notAnswerable"`
	// Without is the load without probelet, and Policies has the load under each policy.
	Without  Load      `json:"without"`
	Policies []Outcome `json:"policies"`
}

// Count counts probes.
type Count struct {
	Probes    int     `json:"probes"`
	PerSecond float64 `json:"perSecond"`
}

// KindCount counts probes of a kind.
type KindCount struct {
	Kind probe.Kind `json:"kind"`
	Count
}

// ReasonCount counts probes that are never answered for a reason.
type ReasonCount struct {
	// Code is one of the codes in docs/probeletctl.md, or host_network.
	Code probe.ReasonCode `json:"code"`
	Count
}

// HostNetwork is the code for pods with hostNetwork, which have no device of their own to attach to.
const HostNetwork probe.ReasonCode = "host_network"

// Outcome is the estimate for a policy.
type Outcome struct {
	Policy Policy `json:"policy"`
	// Answered is the share of probes that are answered in the kernel, from 0 to 1. AnsweredByKind has the shares of HTTP and TCP.
	Answered       float64                `json:"answered"`
	AnsweredByKind map[probe.Kind]float64 `json:"answeredByKind"`
	// Refreshes is the number of the daemon's own requests per second.
	Refreshes float64 `json:"refreshesPerSecond"`
	// ByTraffic counts the endpoints that the pods' traffic may vouch for.
	ByTraffic int  `json:"endpointsByTraffic"`
	Load      Load `json:"load"`
	// Delays has the longest delay of detection for each kind that is answered.
	Delays []Delay `json:"delays"`
}

// Delay is the longest delay in detecting a failure that nothing but a probe shows.
type Delay struct {
	Kind probe.Kind `json:"kind"`
	// Added is added to Plain, the bound without probelet. Both are in seconds.
	Added float64 `json:"addedSeconds"`
	Plain float64 `json:"plainSeconds"`
	// Probe is a probe with this delay, as namespace/pod container/type.
	Probe string `json:"probe"`
}

// Load is the steady load that probes cause.
type Load struct {
	// Connections is the number of new connections to pods per second, including the daemon's own.
	Connections float64 `json:"connectionsPerSecond"`
	// TimeWaitNodes and TimeWaitPods are the numbers of sockets in TIME_WAIT on the nodes and in the pods.
	TimeWaitNodes float64 `json:"timeWaitNodes"`
	TimeWaitPods  float64 `json:"timeWaitPods"`
	// Conntrack is the number of conntrack entries on the nodes.
	Conntrack float64 `json:"conntrack"`
	CPU       CPU     `json:"cpuCores"`
}

// CPU is CPU time in cores.
type CPU struct {
	Kubelets float64 `json:"kubelets"`
	Servers  float64 `json:"servers"`
	Daemons  float64 `json:"daemons"`
}

// Sum returns the total.
func (c CPU) Sum() float64 { return c.Kubelets + c.Servers + c.Daemons }

// plus adds n times another load.
func (l *Load) plus(n float64, o Load) {
	l.Connections += n * o.Connections
	l.TimeWaitNodes += n * o.TimeWaitNodes
	l.TimeWaitPods += n * o.TimeWaitPods
	l.Conntrack += n * o.Conntrack
	l.CPU.Kubelets += n * o.CPU.Kubelets
	l.CPU.Servers += n * o.CPU.Servers
	l.CPU.Daemons += n * o.CPU.Daemons
}

// Pods returns the estimate for pods.
func Pods(pods []Replicated) Report {
	r := Report{Namespaces: []Group{}, NotCounted: NotCounted{Others: map[string]int{}}, InvalidAnnotations: []string{}, Assumptions: assumptions(), Constants: Constants()}
	all, namespaces, nodes := newSum(""), map[string]*sum{}, map[string]*sum{}
	shares := cache{}
	for i := range pods {
		p := &pods[i]
		if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			r.NotCounted.Ended += p.Replicas
			continue
		}
		sums := []*sum{all, of(namespaces, p.Namespace)}
		if p.Spec.NodeName != "" {
			sums = append(sums, of(nodes, p.Spec.NodeName))
		}
		one := newPod(p)
		if problem := Default.settings(p.Annotations).Problem; problem != "" {
			r.InvalidAnnotations = append(r.InvalidAnnotations, table.Printable(p.Namespace+"/"+p.Name+": "+problem))
		}
		for _, s := range sums {
			s.Pods += p.Replicas
			if len(one.Probes) > 0 {
				s.Probed += p.Replicas
			}
		}
		one.estimate(shares, sums)
	}
	r.Total = all.group()
	for _, name := range slices.Sorted(maps.Keys(namespaces)) {
		r.Namespaces = append(r.Namespaces, namespaces[name].group())
	}
	r.Nodes = len(nodes)
	for _, name := range slices.Sorted(maps.Keys(nodes)) {
		if g := nodes[name].group(); r.BusiestNode == nil || g.Without.Connections > r.BusiestNode.Without.Connections {
			r.BusiestNode = &g
		}
	}
	return r
}

func of(sums map[string]*sum, name string) *sum {
	if sums[name] == nil {
		sums[name] = newSum(name)
	}
	return sums[name]
}

// pod is a pod, converted, and how many there are of it.
type pod struct {
	probe.Pod
	hostNetwork bool
	replicas    int
}

// placeholder stands for the address of a pod that has none yet.
var placeholder = netip.MustParseAddr("192.0.2.1")

// newPod converts a pod. One that is not running yet counts as if it were.
func newPod(p *Replicated) pod {
	converted, err := podspec.Of(&p.Pod)
	if err != nil {
		converted.NotAnswered = cmp.Or(converted.NotAnswered, err.Error())
	}
	if len(converted.IPs) == 0 {
		converted.IPs = []netip.Addr{placeholder}
	}
	return pod{converted, p.Spec.HostNetwork, p.Replicas}
}

// estimate adds the pod's estimate to sums.
func (p pod) estimate(shares cache, sums []*sum) {
	for i, policy := range Policies() {
		// If there are too many endpoints, the specs say so too.
		specs, _ := probe.Endpoints(p.Pod, policy.settings(p.Annotations), Limits)
		if p.hostNetwork {
			for j := range specs {
				probe.Bar(specs, j, probe.Reason{Code: HostNetwork, Text: "hostNetwork"})
			}
		}
		answered, refreshes := answers(specs, shares)
		for _, s := range sums {
			if policy == Default {
				s.count(specs, p.replicas)
			}
			if len(specs) > 0 && !p.hostNetwork {
				s.policies[i].Load.CPU.Daemons += float64(p.replicas) * constants.daemonPod.Value * microsecond
			}
			for _, spec := range specs {
				s.add(i, p, spec, answered[spec.Endpoint], refreshes[spec.Endpoint])
			}
		}
	}
}

// answers returns the share of answered probes by endpoint and asker, and the daemon's own requests per second by endpoint.
func answers(specs []probe.EndpointSpec, shares cache) (map[probe.Endpoint]map[probe.Asker]float64, map[probe.Endpoint]float64) {
	answered, refreshes := map[probe.Endpoint]map[probe.Asker]float64{}, map[probe.Endpoint]float64{}
	for _, place := range places(specs) {
		for i, share := range shares.shares(place.port) {
			a := place.askers[i]
			e := place.names[a.endpoint]
			if a.daemon {
				refreshes[e] += 1 / a.period.Seconds()
				continue
			}
			if answered[e] == nil {
				answered[e] = map[probe.Asker]float64{}
			}
			answered[e][place.probes[i]] = share
		}
	}
	return answered, refreshes
}

// sum accumulates a group.
type sum struct {
	Group
	kinds    map[probe.Kind]Count
	reasons  map[probe.ReasonCode]Count
	answered []map[probe.Kind]float64 // per second, by policy
	policies []Outcome
}

func newSum(name string) *sum {
	s := &sum{Group: Group{Name: name}, kinds: map[probe.Kind]Count{}, reasons: map[probe.ReasonCode]Count{}}
	for _, p := range Policies() {
		s.policies = append(s.policies, Outcome{Policy: p, AnsweredByKind: map[probe.Kind]float64{}, Delays: []Delay{}})
		s.answered = append(s.answered, map[probe.Kind]float64{})
	}
	return s
}

func (c Count) plus(n int, perSecond float64) Count {
	return Count{c.Probes + n, c.PerSecond + float64(n)*perSecond}
}

// lasting returns the endpoint's probes except startup probes, which end.
func lasting(s probe.EndpointSpec) []probe.Delay {
	return slices.DeleteFunc(s.Delays(), func(d probe.Delay) bool { return d.Type == probe.Startup })
}

func rate(d probe.Delay) float64 { return 1 / d.Period.Seconds() }

// count counts the probes of n pods.
func (s *sum) count(specs []probe.EndpointSpec, n int) {
	for _, spec := range specs {
		for _, d := range spec.Delays() {
			switch {
			case d.Type == probe.Startup:
				s.Startup = s.Startup.plus(n, rate(d))
				continue
			case spec.Reason == (probe.Reason{}):
				s.Answerable = s.Answerable.plus(n, rate(d))
			default:
				s.reasons[spec.Reason.Code] = s.reasons[spec.Reason.Code].plus(n, rate(d))
			}
			s.kinds[spec.Kind] = s.kinds[spec.Kind].plus(n, rate(d))
		}
	}
}

// add adds the load of an endpoint's probes under a policy, and once without probelet.
func (s *sum) add(policy int, p pod, spec probe.EndpointSpec, answered map[probe.Asker]float64, refreshes float64) {
	o := &s.policies[policy]
	c := costs(spec.Kind)
	real := passed(c, p.hostNetwork)
	n := float64(p.replicas)
	for _, d := range lasting(spec) {
		share, rate := answered[d.Asker], n*rate(d)
		if policy == 0 {
			s.Without.plus(rate, real)
		}
		o.Load.plus(rate*(1-share), real)
		o.Load.plus(rate*share, hit)
		if spec.Observed && !p.hostNetwork {
			o.Load.CPU.Daemons += rate * constants.daemonProbe.Value * microsecond
		}
		s.answered[policy][spec.Kind] += rate * share
		if share > 0 {
			o.delay(p, spec, d)
		}
	}
	if spec.Traffic > 0 {
		o.ByTraffic += p.replicas
	}
	o.Refreshes += n * refreshes
	o.Load.plus(n*refreshes, refreshed(c))
}

// passed returns the load of one real probe per second.
func passed(c cost, hostNetwork bool) Load {
	l := Load{CPU: CPU{Kubelets: c.kubelet, Servers: c.server}}
	if !c.connects {
		return l
	}
	l.Connections = 1
	l.TimeWaitNodes, l.TimeWaitPods = c.node*constants.timeWait.Value, c.pod*constants.timeWait.Value
	if hostNetwork {
		l.TimeWaitNodes, l.TimeWaitPods = l.TimeWaitNodes+l.TimeWaitPods, 0
	}
	l.Conntrack = constants.trackedClosed.Value
	return l
}

// hit is the load of one answered probe per second.
var hit = Load{Conntrack: constants.trackedReset.Value, CPU: CPU{Kubelets: constants.kubeletAnswered.Value * microsecond}}

// refreshed returns the load of one of the daemon's own requests per second. The daemon ends it with a reset, so no TIME_WAIT is left.
func refreshed(c cost) Load {
	return Load{
		Connections: 1, Conntrack: constants.trackedReset.Value,
		CPU: CPU{Servers: c.server, Daemons: constants.daemonRefresh.Value * microsecond},
	}
}

// delay keeps the longest delay for each kind.
func (o *Outcome) delay(p pod, spec probe.EndpointSpec, d probe.Delay) {
	found := Delay{
		Kind: spec.Kind, Added: (d.Probelet - d.Plain).Seconds(), Plain: d.Plain.Seconds(), Probe: p.String() + " " + d.String(),
	}
	i := slices.IndexFunc(o.Delays, func(other Delay) bool { return other.Kind == spec.Kind })
	switch {
	case i < 0:
		o.Delays = append(o.Delays, found)
	case o.Delays[i].Added < found.Added:
		o.Delays[i] = found
	}
}

// round removes digits that depend on the order of additions. It keeps six decimals, and three digits of what is smaller.
func round(x float64) float64 {
	decimals := 6.
	if x > 0 {
		decimals = max(decimals, 2-math.Floor(math.Log10(x)))
	}
	unit := math.Pow(10, decimals)
	return math.Round(x*unit) / unit
}

func (l Load) rounded() Load {
	return Load{
		round(l.Connections), round(l.TimeWaitNodes), round(l.TimeWaitPods), round(l.Conntrack),
		CPU{round(l.CPU.Kubelets), round(l.CPU.Servers), round(l.CPU.Daemons)},
	}
}

// group returns the accumulated group.
func (s *sum) group() Group {
	g := s.Group
	g.Probes, g.NotAnswerable = []KindCount{}, []ReasonCount{}
	all := 0.
	for _, k := range probe.Kinds() {
		if c := s.kinds[k]; c.Probes > 0 {
			g.Probes = append(g.Probes, KindCount{k, c})
			all += c.PerSecond
		}
	}
	for code, c := range s.reasons {
		g.NotAnswerable = append(g.NotAnswerable, ReasonCount{code, c})
	}
	slices.SortFunc(g.NotAnswerable, func(a, b ReasonCount) int {
		return cmp.Or(cmp.Compare(b.Probes, a.Probes), cmp.Compare(a.Code, b.Code))
	})
	for i := range g.Probes {
		g.Probes[i].PerSecond = round(g.Probes[i].PerSecond)
	}
	for i := range g.NotAnswerable {
		g.NotAnswerable[i].PerSecond = round(g.NotAnswerable[i].PerSecond)
	}
	g.Answerable.PerSecond, g.Startup.PerSecond, g.Without = round(g.Answerable.PerSecond), round(g.Startup.PerSecond), g.Without.rounded()
	for i, o := range s.policies {
		o.Load, o.Refreshes = o.Load.rounded(), round(o.Refreshes)
		for _, k := range g.Probes {
			if k.Kind.Observable() {
				o.Answered += s.answered[i][k.Kind] / all
				o.AnsweredByKind[k.Kind] = round(s.answered[i][k.Kind] / s.kinds[k.Kind].PerSecond)
			}
		}
		o.Answered = round(o.Answered)
		slices.SortFunc(o.Delays, func(a, b Delay) int { return cmp.Compare(a.Kind, b.Kind) })
		g.Policies = append(g.Policies, o)
	}
	return g
}

// assumptions returns what every estimate assumes.
func assumptions() []string {
	return []string{
		"All pods have started and are healthy. All nodes are in mode answer, and their kernels have BTF. Annotations of pods apply.",
		"Probes of a pod have independent phases. Listening sockets have queues of 72 or more, so nine TCP probes in a row may be answered; " +
			"a queue of five, as in Python's http.server, allows one.",
		"Policy traffic: every pod has probelet.dev/liveness: traffic, and clients. It counts for endpoints that only liveness probes ask.",
		"Nodes track connections, as they do where kube-proxy runs.",
	}
}
