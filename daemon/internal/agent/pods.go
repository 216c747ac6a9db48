package agent

import (
	"net/netip"
	"slices"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/store"
)

// podName identifies a pod by name.
type podName struct{ Namespace, Name string }

// podIndex finds the pods of records.
type podIndex struct {
	byName map[podName][]*probe.Pod
	byIP   map[netip.Addr][]*probe.Pod
}

func index(pods []probe.Pod) podIndex {
	x := podIndex{make(map[podName][]*probe.Pod, len(pods)), make(map[netip.Addr][]*probe.Pod, len(pods))}
	for i := range pods {
		pod := &pods[i]
		name := podName{pod.Namespace, pod.Name}
		x.byName[name] = append(x.byName[name], pod)
		for _, ip := range pod.IPs {
			x.byIP[ip] = append(x.byIP[ip], pod)
		}
	}
	return x
}

// match returns the pod of a record: by name if the record has one, otherwise by address. A pod with another UID is a successor
// under the same name, or at the same address.
func (x podIndex) match(r attach.Record) *probe.Pod {
	if r.PodName != "" {
		return firstOf(r, x.byName[podName{r.PodNamespace, r.PodName}])
	}
	for _, text := range r.PodIPs {
		if ip, err := netip.ParseAddr(text); err == nil {
			if pod := firstOf(r, x.byIP[ip.Unmap()]); pod != nil {
				return pod
			}
		}
	}
	return nil
}

func firstOf(r attach.Record, pods []*probe.Pod) *probe.Pod {
	i := slices.IndexFunc(pods, func(p *probe.Pod) bool { return r.PodUID == "" || p.UID == "" || r.PodUID == p.UID })
	if i < 0 {
		return nil
	}
	return pods[i]
}

// podKey identifies one life of a pod.
type podKey struct {
	podName
	uid string
}

func keyOf(p probe.Pod) podKey { return podKey{podName{p.Namespace, p.Name}, p.UID} }

// unattached returns the pods without an attachment, or without one that counts if counts is not nil.
func (ag *agent) unattached(counts func(*attachment) bool) (pods []probe.Pod) {
	attached := make(map[podKey]bool, len(ag.attachments))
	for _, a := range ag.attachments {
		if a.pod != nil && (counts == nil || counts(a)) {
			attached[keyOf(*a.pod)] = true
		}
	}
	for _, pod := range ag.pods {
		if !attached[keyOf(pod)] {
			pods = append(pods, pod)
		}
	}
	return pods
}

// answerable reports whether probes of the pod would be answered if it were attached, or in mode observe could be.
func (ag *agent) answerable(pod probe.Pod) bool {
	if len(pod.IPs) == 0 {
		return false
	}
	endpoints, err := probe.Endpoints(pod, ag.defaults.Settings(pod.Annotations), store.Limits)
	return err == nil && slices.ContainsFunc(endpoints, func(s probe.EndpointSpec) bool { return s.Reason.Code == "" || s.Withheld })
}

func (ag *agent) knows(name string) bool {
	return slices.ContainsFunc(ag.pods, func(p probe.Pod) bool { return p.String() == name })
}

// ofPod returns the attachments of a pod.
func (ag *agent) ofPod(name string) []*attachment {
	var all []*attachment
	for _, a := range ag.attachments {
		if a.podName() == name {
			all = append(all, a)
		}
	}
	return all
}
