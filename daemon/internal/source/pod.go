package source

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// onNode is what a pod of the node is probed for. It matters unless it is left alone and asks nothing of others.
func onNode(p *corev1.Pod) (pod probe.Pod, matters bool) {
	pod, err := fromPod(p)
	if err != nil {
		// Not what the API server lets pass today: a probe of a kind that is not known yet may ask anything.
		pod.NotAnswered = cmp.Or(pod.NotAnswered, err.Error())
	}
	why := leftAlone(p)
	if why == "" {
		return pod, true
	}
	pod = probe.Pod{
		Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, LeftAlone: why,
		Probes: ofOthers(pod.Probes), Hooks: ofOthers(pod.Hooks),
	}
	return pod, len(pod.Probes)+len(pod.Hooks) > 0
}

func leftAlone(p *corev1.Pod) string {
	switch {
	case p.Spec.HostNetwork:
		return "hostNetwork: the pod has no interface of its own"
	case len(addresses(p.Status)) == 0:
		return "no IP yet"
	}
	return ""
}

// ofOthers are the probes that dial another host, whatever container runs.
func ofOthers(all []probe.Spec) []probe.Spec {
	var kept []probe.Spec
	for _, p := range all {
		if p.Host != "" {
			p.Instance = ""
			kept = append(kept, p)
		}
	}
	return kept
}

// fromPod is what a pod is probed for by the kubelet. The error names the fields and values that the API server would
// refuse; the probes are those that are understood.
func fromPod(p *corev1.Pod) (probe.Pod, error) {
	pod := probe.Pod{
		Namespace: p.Namespace, Name: p.Name, UID: uid(p),
		IPs: addresses(p.Status), Annotations: probe.OwnAnnotations(p.Annotations),
	}
	var err error
	if pod.Probes, err = probes(p.Spec.Containers, p.Spec.InitContainers); err != nil {
		err = fmt.Errorf("not understood: %w", err)
	}
	pod.Hooks = hooks(p.Spec.Containers, p.Spec.InitContainers)
	own := pod.IPs
	if p.Spec.HostNetwork {
		own = nil // they are the node's, some of whose ports may be other pods'
	}
	for i := range pod.Hooks {
		pod.Hooks[i].Host = dialled(pod.Hooks[i].Host, own)
	}
	for i := range pod.Probes {
		pod.Probes[i].Host = dialled(pod.Probes[i].Host, own)
		pod.Probes[i].Instance = instance(p.Status, pod.Probes[i].Container)
	}
	pod.NotAnswered = ending(p)
	if ended(p) {
		pod.IPs = nil // another pod may have them by now
	}
	return pod, err
}

// uid is the UID by which the runtime knows the pod: of a static pod not that of its mirror at the API server
// (pkg/kubelet/types/pod_update.go).
func uid(p *corev1.Pod) string {
	return cmp.Or(p.Annotations[corev1.MirrorPodAnnotationKey], string(p.UID))
}

// instance tells a running container from those before and after it; empty if it does not run.
func instance(status corev1.PodStatus, container string) string {
	for _, c := range slices.Concat(status.ContainerStatuses, status.InitContainerStatuses) {
		if c.Name == container && c.State.Running != nil {
			return fmt.Sprintf("%s#%d", c.ContainerID, c.RestartCount)
		}
	}
	return ""
}

// addresses are a pod's, the one that is probed first.
func addresses(status corev1.PodStatus) []netip.Addr {
	var ips []netip.Addr
	add := func(text string) {
		if ip, err := netip.ParseAddr(text); err == nil && !slices.Contains(ips, ip.Unmap()) {
			ips = append(ips, ip.Unmap())
		}
	}
	add(status.PodIP)
	for _, ip := range status.PodIPs {
		add(ip.IP)
	}
	return ips
}

// dialled is a probe's host, or nothing if naming it makes no difference.
func dialled(host string, ips []netip.Addr) string {
	if len(ips) > 0 && host == ips[0].String() {
		return ""
	}
	return host
}

// ending is why a pod is not answered any more: what it says at its end must be heard.
func ending(p *corev1.Pod) string {
	switch {
	case p.DeletionTimestamp != nil:
		return "the pod is being deleted"
	case ended(p):
		return "the pod has ended: " + string(p.Status.Phase)
	}
	return ""
}

func ended(p *corev1.Pod) bool {
	return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
}
