// Package probe is the domain of probes: what the kubelet asks of a pod, what was observed of the pod's answers, and for
// how long a success may be answered. It depends on neither Kubernetes' API nor the kernel side, and reads no clock and
// no file.
//
// Times are nanoseconds of a clock that keeps running while the machine is suspended (CLOCK_BOOTTIME); 0 means never.
package probe

import (
	"net/netip"
	"time"
)

// Type names the purpose of a probe or a hook.
type Type string

// Types of a container's probes.
const (
	Startup   Type = "startup"
	Readiness Type = "readiness"
	Liveness  Type = "liveness"
)

// Types of a container's hooks.
const (
	PostStart Type = "postStart"
	PreStop   Type = "preStop"
)

// Header is a custom header of an HTTP probe.
type Header struct{ Name, Value string }

// Spec describes one probe of a container.
type Spec struct {
	Container string
	// Instance distinguishes successive containers of the same name; empty if none is running, or if it is unknown.
	Instance string
	Type     Type
	Kind     Kind
	// Host is the host to dial instead of the pod; empty for the pod itself.
	Host string
	// Port is 0 if the probe has none, or if it is unknown.
	Port uint16
	// Path is the path and query as in the request line; HTTP only.
	Path    string
	Headers []Header
	Period  time.Duration
	Timeout time.Duration
	// FailureThreshold and SuccessThreshold count the failures and successes in a row that make the prober's verdict; 0
	// counts as 1.
	FailureThreshold, SuccessThreshold int
	// Problem explains why it is unknown what the prober will send; empty if it is known.
	Problem string
}

// Asker names a probe within its pod.
type Asker struct {
	Container string `json:"container"`
	Type      Type   `json:"type"`
}

func (a Asker) String() string { return a.Container + "/" + string(a.Type) }

// Asker returns the name of the probe.
func (s Spec) Asker() Asker { return Asker{s.Container, s.Type} }

func (s Spec) instanceID() string {
	if s.Instance == "" {
		return ""
	}
	return s.Container + "=" + s.Instance
}

// Pod describes a pod and the probes sent to it.
type Pod struct {
	Namespace, Name string
	UID             string       // empty if unknown
	IPs             []netip.Addr // the first one is probed
	// Annotations holds only the annotations with AnnotationPrefix.
	Annotations map[string]string
	Probes      []Spec
	// Hooks holds the requests of lifecycle hooks, with all headers that the kubelet adds. HTTP only.
	Hooks []Spec
	// LeftAlone explains why there is nothing to attach to; empty if there is. Of such a pod, Probes and Hooks hold only
	// those that dial another host.
	LeftAlone string
	// NotAnswered explains why none of the pod's probes is answered; empty if that depends on the probe.
	NotAnswered string
	// Ended: none of its containers will run again, so nothing probes it.
	Ended bool
}

func (p Pod) String() string { return p.Namespace + "/" + p.Name }
