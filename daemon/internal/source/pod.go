package source

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// onNode is what a pod of the node is probed for. Skipped, if not empty, is why the pod is left alone.
func onNode(p *corev1.Pod) (pod probe.Pod, skipped string) {
	switch {
	case p.Spec.HostNetwork:
		return probe.Pod{}, "hostNetwork: it has no interface of its own"
	case len(addresses(p.Status)) == 0:
		return probe.Pod{}, "no IP yet"
	}
	pod, err := fromPod(p)
	if err != nil {
		// Not what the API server lets pass today: a probe of a kind that is not known yet may ask anything.
		pod.NotAnswered = cmp.Or(pod.NotAnswered, err.Error())
	}
	return pod, ""
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
	for i := range pod.Probes {
		pod.Probes[i].Host = dialled(pod.Probes[i].Host, pod.IPs)
		pod.Probes[i].Instance = instance(p.Status, pod.Probes[i].Container)
	}
	pod.NotAnswered = cmp.Or(ending(p), ambiguousHook(p, pod.IPs))
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

// ambiguousHook is why requests of the pod's lifecycle hooks might be taken for probes; empty if they cannot.
//
// The kubelet sends httpGet hooks itself, from the cgroup of its probes. They must reach the pod. By their request they
// are told apart: the client of hooks (net/http with its defaults: kubelet.go, pkg/kubelet/lifecycle/handlers.go) keeps
// connections alive and ends the headers with "Accept-Encoding: gzip", while only requests that end with
// "Connection: close" are answered (parse_request in bpf/parse.h). So a port stays answerable though a hook aims at it:
// the hook's connection may be taken, and is then handed to the pod byte for byte, which costs it about 0.1 ms.
//
// That holds unless the hook's own httpHeaders set Connection: with Accept-Encoding or Range beside it, its request ends
// like a probe's. Then no port of the pod is answered, because the client also follows redirects to other ports of the
// same host, with all headers.
func ambiguousHook(p *corev1.Pod, ips []netip.Addr) string {
	for _, containers := range [][]corev1.Container{p.Spec.Containers, p.Spec.InitContainers} {
		for i := range containers {
			c := &containers[i]
			if c.Lifecycle == nil {
				continue
			}
			for _, hook := range []struct {
				name    string
				handler *corev1.LifecycleHandler
			}{
				{"postStart", c.Lifecycle.PostStart}, {"preStop", c.Lifecycle.PreStop},
			} {
				if hook.handler != nil && hook.handler.HTTPGet != nil && ambiguous(hook.handler.HTTPGet, ips) {
					return fmt.Sprintf("hook %s of %s sets header Connection, and might be taken for a probe", hook.name, c.Name)
				}
			}
		}
	}
	return ""
}

func ambiguous(get *corev1.HTTPGetAction, ips []netip.Addr) bool {
	return mayBeOwn(get.Host, ips) && slices.ContainsFunc(get.HTTPHeaders, func(h corev1.HTTPHeader) bool {
		return strings.EqualFold(h.Name, "Connection")
	})
}

// mayBeOwn is whether who asks host may reach the pod. What a name stands for is not known.
func mayBeOwn(host string, ips []netip.Addr) bool {
	ip, err := netip.ParseAddr(host)
	return err != nil || slices.Contains(ips, ip.Unmap())
}
