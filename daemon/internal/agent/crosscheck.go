package agent

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/crosscheck"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/store"
)

// startCrosscheck starts comparing the kubelet's verdicts with what is observed, unless the prober is not the kubelet.
func (ag *agent) startCrosscheck(ctx context.Context, c Config, in *inputs) error {
	if c.Crosscheck == 0 || c.sourceName() == "file" || ag.prober.who.AnyLocal {
		return nil
	}
	checker, err := crosscheck.New(c.Kubelet.Config, ag, c.Crosscheck, ag.log)
	if err != nil {
		return fmt.Errorf("--crosscheck: --kubelet-url: %w", err)
	}
	in.all.Go(func() { checker.Run(ctx) })
	return nil
}

// Observed implements crosscheck.Node.
func (ag *agent) Observed(ctx context.Context) (all map[crosscheck.ID]crosscheck.Endpoint, err error) {
	err = ag.call(ctx, func() { all = ag.counted() })
	return all, err
}

// Disagree implements crosscheck.Node.
func (ag *agent) Disagree(ctx context.Context, d crosscheck.Disagreement) error {
	return ag.call(ctx, func() { ag.disagree(d) })
}

// crosschecked has what is compared with the kubelet's verdicts on the pod of an attachment, and the consequences.
type crosschecked struct {
	counts map[probe.Endpoint]crosscheck.Counts
	barred map[probe.Endpoint]bar
	// shared has the endpoints that something other than their own probes may ask, and what. The kubelet does not count such requests
	// as the pod's, so its counts prove nothing.
	shared map[probe.Endpoint]string
}

// tally counts an outcome of a prober's probe.
func (a *attachment) tally(o probe.Outcome) {
	if o.Refresh {
		return
	}
	for endpoint, result := range a.tracker.Verdicts(o) {
		c := a.counts[endpoint]
		if result == probe.Success {
			c.Succeeded++
		} else {
			c.Other++
		}
		a.counts[endpoint] = c
	}
}

// counted returns the counts of endpoints that are observed and asked by nothing but their own probes, for pods that the kubelet's
// counts distinguish.
func (ag *agent) counted() map[crosscheck.ID]crosscheck.Endpoint {
	all := map[crosscheck.ID]crosscheck.Endpoint{}
	for id, a := range ag.attachments {
		if a.pod == nil || a.pod.UID == "" || a.maps == nil {
			continue
		}
		evidence := a.tracker.Evidence()
		for _, s := range a.tracker.Endpoints() {
			if counts, ok := a.countsOf(s, evidence[s.Endpoint].Question); ok && a.shared[s.Endpoint] == "" {
				all[crosscheck.ID{Attachment: id, Endpoint: s.Endpoint}] = crosscheck.Endpoint{
					Workers: a.workers(s), Period: s.Period, Counts: counts, Discards: s.Kind.Discarded(),
				}
			}
		}
	}
	return all
}

func (a *attachment) countsOf(s probe.EndpointSpec, q probe.Question) (counts crosscheck.Counts, ok bool) {
	key, hasRecord := store.Key(s.Endpoint, q)
	if !s.Observed || !hasRecord {
		return counts, false
	}
	tally, err := a.maps.Tally(key)
	counts = a.counts[s.Endpoint]
	counts.Answered = tally.Hits
	return counts, err == nil
}

func (a *attachment) workers(s probe.EndpointSpec) []crosscheck.Worker {
	var all []crosscheck.Worker
	for _, asker := range s.Askers {
		all = append(all, crosscheck.Worker{
			Namespace: a.pod.Namespace, Pod: a.pod.Name, UID: a.pod.UID, Container: asker.Container, Type: asker.Type,
		})
	}
	return all
}

// stranger is a probe or a hook that dials another host than its own pod, perhaps another pod of the node.
type stranger struct {
	probe.Spec
	pod string
}

func (s stranger) String() string { return s.Asker().String() + " of pod " + s.pod }

func strangersAmong(pods []probe.Pod) []stranger {
	var all []stranger
	for i := range pods {
		for _, p := range slices.Concat(pods[i].Probes, pods[i].Hooks) {
			if p.Host != "" && !pods[i].Ended {
				p.Instance = ""
				all = append(all, stranger{p, pods[i].String()})
			}
		}
	}
	return all
}

// share records what else may ask the endpoints: strangers, and the pod's own hooks. It bars those that would be answered too.
func (ag *agent) share(a *attachment, endpoints []probe.EndpointSpec) {
	a.shared = map[probe.Endpoint]string{}
	if a.pod == nil {
		return
	}
	others := slices.Clone(ag.strangers)
	for _, p := range a.pod.Hooks {
		if p.Host == "" {
			others = append(others, stranger{p, a.pod.String()})
		}
	}
	for i, s := range endpoints {
		if !s.Observed {
			continue
		}
		if j := slices.IndexFunc(others, func(o stranger) bool { return s.MayBeAskedBy(o.Spec, a.pod.IPs) }); j >= 0 {
			a.shared[s.Endpoint] = others[j].String() + " may ask the same"
		}
		if s.Reason != (probe.Reason{}) && !s.Withheld {
			continue
		}
		if j := slices.IndexFunc(others, func(o stranger) bool { return s.AnsweredWith(o.Spec, a.pod.IPs) }); j >= 0 {
			probe.Bar(endpoints, i, probe.Reason{Code: probe.ReasonBeside, Text: fmt.Sprintf("answering it would also answer %s", others[j])})
		}
	}
}

// bar keeps an endpoint from being answered until its probes change. Restarted containers do not lift it: with the same specs they
// answer like those that the verdict was on.
type bar struct {
	kind   crosscheck.Kind
	probes []statedir.Probe // at the time of the verdict
}

var barReasons = map[crosscheck.Kind]string{
	crosscheck.Failed:    "the kubelet's verdict differs: it counted probes as failures that were taken for successes",
	crosscheck.Discarded: "the kubelet's verdict differs: it discarded probes that were taken for successes",
}

func (ag *agent) disagree(x crosscheck.Disagreement) {
	a := ag.attachments[x.Attachment]
	if a == nil || a.pod == nil || a.barred[x.Endpoint].kind != "" {
		return
	}
	i := slices.IndexFunc(a.tracker.Endpoints(), func(s probe.EndpointSpec) bool { return s.Endpoint == x.Endpoint })
	if i < 0 {
		return
	}
	a.barred[x.Endpoint] = bar{x.Kind, statedir.EndpointOf(a.tracker.Endpoints()[i], probe.Question{}).Probes}
	ag.metrics.Disagreed(x.Kind)
	ag.log.Error("endpoint is no longer answered, until its specs change", "pod", a.podName(), "endpoint", x.Endpoint,
		"because", barReasons[x.Kind], "probes", x.Probes)
	for _, c := range a.withdraw(func(e probe.Endpoint) bool { return e == x.Endpoint }) {
		c.Cause = probe.ByVerdict
		ag.note(a, c, nil)
	}
	ag.ask(a)
	ag.sync(a)
	ag.describe() // at once: should this daemon die, the next one must know
}

// bar sets the reason of barred endpoints, and lifts the bars of those whose probes have changed.
func (a *attachment) bar(endpoints []probe.EndpointSpec) {
	maps.DeleteFunc(a.counts, func(e probe.Endpoint, _ crosscheck.Counts) bool {
		return !slices.ContainsFunc(endpoints, func(s probe.EndpointSpec) bool { return s.Endpoint == e })
	})
	maps.DeleteFunc(a.barred, func(e probe.Endpoint, b bar) bool {
		return !slices.ContainsFunc(endpoints, func(s probe.EndpointSpec) bool {
			return s.Endpoint == e && slices.EqualFunc(b.probes, statedir.EndpointOf(s, probe.Question{}).Probes, sameProbe)
		})
	})
	for i := range endpoints {
		if b, ok := a.barred[endpoints[i].Endpoint]; ok && endpoints[i].Observed {
			probe.Bar(endpoints, i, probe.Reason{Code: probe.ReasonVerdict, Text: barReasons[b.kind]})
		}
	}
}

func sameProbe(a, b statedir.Probe) bool {
	return a.Asker == b.Asker && a.Period == b.Period && a.Timeout == b.Timeout && a.FailureThreshold == b.FailureThreshold
}

// crosscheckedBefore returns counts that start at 0, with the bars that a previous daemon left.
func (ag *agent) crosscheckedBefore(id attach.ID) crosschecked {
	counts, barred := map[probe.Endpoint]crosscheck.Counts{}, map[probe.Endpoint]bar{}
	for _, a := range ag.previous.Attachments {
		if a.ContainerID != id.ContainerID || a.IfName != id.IfName {
			continue
		}
		for _, e := range a.Endpoints {
			if e.Disagreement != "" {
				barred[e.Endpoint()] = bar{crosscheck.Kind(e.Disagreement), e.Probes}
			}
		}
	}
	return crosschecked{counts: counts, barred: barred}
}
