// Package podspec says how the kubelet probes a pod, from the pod as the API server has it.
package podspec

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// OnNode converts a pod of the node. The pod matters unless it is left alone and none of its probes dials another host.
func OnNode(p *corev1.Pod) (pod probe.Pod, matters bool) {
	pod, err := Of(p)
	if err != nil {
		// The API server rejects such a pod today: a probe of a kind that is yet unknown may ask anything.
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

// ofOthers returns the probes that dial another host, whichever instance of their container runs.
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

// Of returns how the kubelet probes a pod. The error names fields and values that the API server would reject; the
// result includes the probes that are understood.
func Of(p *corev1.Pod) (probe.Pod, error) {
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
		own = nil // the addresses are the node's, and some of its ports may be those of other pods
	}
	for i := range pod.Hooks {
		pod.Hooks[i].Host = dialled(pod.Hooks[i].Host, own)
	}
	for i := range pod.Probes {
		pod.Probes[i].Host = dialled(pod.Probes[i].Host, own)
		pod.Probes[i].Instance = Instance(p.Status, pod.Probes[i].Container)
	}
	pod.NotAnswered, pod.Ended = ending(p), ended(p)
	if pod.Ended {
		pod.IPs = nil // another pod may have the addresses by now
	}
	return pod, err
}

// uid returns the UID by which the runtime knows the pod. For a static pod that is not the UID of its mirror pod
// (pkg/kubelet/types/pod_update.go).
func uid(p *corev1.Pod) string {
	return cmp.Or(p.Annotations[corev1.MirrorPodAnnotationKey], string(p.UID))
}

// Instance identifies a running container among its predecessors and successors; empty if it is not running.
func Instance(status corev1.PodStatus, container string) string {
	for _, c := range slices.Concat(status.ContainerStatuses, status.InitContainerStatuses) {
		if c.Name == container && c.State.Running != nil {
			return fmt.Sprintf("%s#%d", c.ContainerID, c.RestartCount)
		}
	}
	return ""
}

// addresses returns a pod's addresses, with the probed one first.
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

// dialled returns a probe's host, or nothing if it is the address that would be dialled anyway.
func dialled(host string, ips []netip.Addr) string {
	if len(ips) > 0 && host == ips[0].String() {
		return ""
	}
	return host
}

// ending explains why a pod is no longer answered: what it reports while it ends must reach the kubelet.
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
