// Package probe is what probelet knows of probes by itself: what is asked of a pod, what was observed of it, and for
// how long that may be answered. It knows neither Kubernetes' API nor the kernel side, reads no clock and no file.
//
// Times are nanoseconds of one clock that goes on while the machine sleeps (CLOCK_BOOTTIME); 0 means never.
package probe

import (
	"net/netip"
	"time"
)

// Type is what a probe is for.
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

// Header is one custom header of an HTTP probe.
type Header struct{ Name, Value string }

// Spec is one probe of a container.
type Spec struct {
	Container string
	// Instance tells the containers apart that come and go under one name; empty: none runs, or it is not known.
	Instance string
	Type     Type
	Kind     Kind
	// Host is dialled instead of the pod; empty: the pod.
	Host string
	// Port is 0 if the probe has none, or if it is not known.
	Port uint16
	// Path is path and query as in the request line; HTTP only.
	Path    string
	Headers []Header
	Period  time.Duration
	Timeout time.Duration
	// FailureThreshold and SuccessThreshold are how many failures and successes in a row make the prober's verdict; 0 is 1.
	FailureThreshold, SuccessThreshold int
	// Problem is why it is not known what the prober will send; empty if it is.
	Problem string
}

// Asker is the name of a probe within its pod.
type Asker struct {
	Container string `json:"container"`
	Type      Type   `json:"type"`
}

func (a Asker) String() string { return a.Container + "/" + string(a.Type) }

// Asker is the name of the probe.
func (s Spec) Asker() Asker { return Asker{s.Container, s.Type} }

func (s Spec) instanceID() string {
	if s.Instance == "" {
		return ""
	}
	return s.Container + "=" + s.Instance
}

// Pod is a pod with the probes that it is asked.
type Pod struct {
	Namespace, Name string
	UID             string       // empty: not known
	IPs             []netip.Addr // the first is the one that is probed
	// Annotations are those for probelet (AnnotationPrefix); what a source has besides is not kept.
	Annotations map[string]string
	Probes      []Spec
	// Hooks are the requests of lifecycle hooks, with all that the kubelet adds to their headers. HTTP only.
	Hooks []Spec
	// LeftAlone is why there is nothing to attach to; empty if there is. Of such a pod only those probes and hooks are here
	// that dial another host.
	LeftAlone string
	// NotAnswered is why nothing that the pod is asked is answered; empty if that depends on the probes.
	NotAnswered string
}

func (p Pod) String() string { return p.Namespace + "/" + p.Name }
