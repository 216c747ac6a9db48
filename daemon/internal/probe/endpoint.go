package probe

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// Endpoint is what a probe asks: probes that ask the same share what was observed.
type Endpoint struct {
	Port uint16
	Kind Kind
	Path string // as in the request line; HTTP only
}

func (e Endpoint) String() string {
	switch {
	case e.Port == 0:
		return string(e.Kind)
	case e.Path == "":
		return fmt.Sprintf("%s :%d", e.Kind, e.Port)
	}
	return fmt.Sprintf("%s :%d%s", e.Kind, e.Port, e.Path)
}

// Limits are what the kernel side can hold.
type Limits struct {
	Path    int // longest path and query, in bytes as sent
	Request int // longest request, in bytes
	Records int // of one pod: its endpoints and its ports
}

// EndpointSpec says who asks an endpoint, and how what is observed of it may be used.
type EndpointSpec struct {
	Endpoint
	Host   string // dialled instead of the pod; empty: the pod
	Askers []Asker
	// Period is the shortest, Timeout the smallest of the probes that ask.
	Period, Timeout time.Duration
	// Staleness is how long after its observation a success may be answered. Capped: the node's ceiling lowered it.
	Staleness time.Duration
	Capped    bool
	// Headers identifies the custom headers. Evidence of the same endpoint with others is not evidence.
	Headers string
	// Instance identifies the running containers that the probes are of. Evidence of others is not evidence.
	Instance string
	// Refresh is how often the daemon is to ask by itself, so that a success is always fresh; 0: never.
	Refresh time.Duration
	// Observed: what the pod answers can be told apart by the kernel, so it is recorded, answered or not.
	Observed bool
	// Startup: asked by startup probes only. They end with their success, so their evidence is never renewed.
	Startup bool
	// Reason is why the endpoint is never answered; empty if it may be.
	Reason string
	// elsewhere: what is dialled is certainly not the pod.
	elsewhere bool

	probes []Spec // of Askers
}

// onPort reports whether connections of the endpoint's probes may arrive at the pod's port.
func (s EndpointSpec) onPort() bool { return s.Port != 0 && !s.elsewhere }

// answeredWith reports whether the kernel, where it may answer e, would answer this endpoint's probes too: it does not
// tell the pod's addresses and names apart, and it answers a TCP probe by taking the connection, whichever endpoint of
// the port is fresh.
func (s EndpointSpec) answeredWith(e Endpoint) bool {
	return s.onPort() && (s.Endpoint == e || s.Kind == TCP && s.Port == e.Port)
}

// CustomHeaders are those of the probes' requests, where all of these have the same.
func (s EndpointSpec) CustomHeaders() []Header { return s.probes[0].Headers }

const reasonStartup = "startup probe"

// Endpoints returns the endpoints that the pod's probes ask, sorted. The error says that the pod has too many of them
// for the kernel side; none is answered then, and the specs say so too.
func Endpoints(pod Pod, settings Settings, limits Limits) ([]EndpointSpec, error) {
	var specs []EndpointSpec
	shared := map[Endpoint]int{}
	for _, p := range pod.Probes {
		one := endpointOf(p, pod.IPs, limits)
		if i, ok := shared[one.Endpoint]; ok && one.Observed {
			specs[i] = merge(specs[i], one)
			continue
		}
		if one.Observed {
			shared[one.Endpoint] = len(specs)
		}
		specs = append(specs, one)
	}
	for i := range specs {
		if specs[i].Startup && specs[i].Reason == "" {
			specs[i].Reason = reasonStartup
		}
		specs[i].Reason = cmp.Or(specs[i].Reason, pod.NotAnswered)
	}
	slices.SortStableFunc(specs, compare)
	closeBeside(specs)
	settings.apply(specs)
	return specs, limit(specs, limits.Records)
}

func compare(a, b EndpointSpec) int {
	return cmp.Or(cmp.Compare(a.Port, b.Port), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Path, b.Path),
		cmp.Compare(a.Host, b.Host))
}

// endpointOf is the endpoint as one probe alone asks it.
func endpointOf(p Spec, ips []netip.Addr, limits Limits) EndpointSpec {
	s := EndpointSpec{
		Endpoint: Endpoint{p.Port, p.Kind, p.Path},
		Host:     p.Host,
		Askers:   []Asker{p.Asker()},
		probes:   []Spec{p},
		Period:   p.Period,
		Timeout:  p.Timeout,
		Headers:  headersID(p.Headers),
		Instance: p.instanceID(),
		Startup:  p.Type == Startup,
		Reason:   unanswerable(p, ips, limits),

		elsewhere: elsewhere(p.Host, ips),
	}
	s.Observed = p.Problem == "" && p.Host == "" && s.onPort() &&
		(p.Kind == TCP || p.Kind == HTTP && len(p.Path) <= limits.Path)
	return s
}

// elsewhere is whether host is certainly not the pod. Its other addresses are the pod, but not what its probes ask. A
// name may be anything.
func elsewhere(host string, ips []netip.Addr) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && !slices.Contains(ips, ip.Unmap())
}

// unanswerable is why a probe can never be answered, whatever else the pod is asked.
func unanswerable(p Spec, ips []netip.Addr, limits Limits) string {
	switch {
	case p.Problem != "":
		return p.Problem
	case p.Kind != HTTP && p.Kind != TCP:
		return string(p.Kind) + " is never answered"
	case p.Host != "":
		return fmt.Sprintf("host %q is probed, not the pod", p.Host)
	case p.Kind == TCP:
		return ""
	case len(p.Path) > limits.Path:
		return fmt.Sprintf("path of %d bytes, at most %d are answered", len(p.Path), limits.Path)
	case slices.ContainsFunc(p.Headers, isConnection):
		return "header Connection is set by httpHeaders"
	}
	if size := requestSize(p, ips); size > limits.Request {
		return fmt.Sprintf("request of about %d bytes, at most %d are answered", size, limits.Request)
	}
	return ""
}

func isConnection(h Header) bool { return strings.EqualFold(h.Name, "Connection") }

// requestSize is the size of the kubelet's request, in bytes; approximate, as its User-Agent holds its version.
func requestSize(p Spec, ips []netip.Addr) int {
	const fixed = "GET  HTTP/1.1\r\nHost: []:65535\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n"
	size := len(fixed) + len(p.Path)
	longest := 0
	for _, ip := range ips {
		longest = max(longest, len(ip.String()))
	}
	for _, h := range p.Headers {
		size += len(h.Name) + len(": \r\n") + len(h.Value)
	}
	return size + longest
}

// merge makes one endpoint of two that ask the same.
func merge(a, b EndpointSpec) EndpointSpec {
	a.Askers = append(a.Askers, b.Askers...)
	a.probes = append(a.probes, b.probes...)
	a.Period = min(a.Period, b.Period)
	a.Timeout = min(a.Timeout, b.Timeout)
	a.Startup = a.Startup && b.Startup
	if !strings.Contains(a.Instance, b.Instance) {
		a.Instance += " " + b.Instance
	}
	a.Reason = cmp.Or(a.Reason, b.Reason)
	if a.Headers != b.Headers {
		a.Headers = "differ"
		a.Reason = cmp.Or(a.Reason, "probes of this path differ in httpHeaders")
	}
	return a
}

// closeBeside gives a reason to endpoints that cannot be answered without answering one that is not observed.
func closeBeside(specs []EndpointSpec) {
	for _, never := range specs {
		if never.Observed {
			continue
		}
		for i, s := range specs {
			if s.Reason == "" && never.answeredWith(s.Endpoint) {
				specs[i].Reason = fmt.Sprintf("answering it would also answer %s of %s, which is never answered: %s",
					never.Endpoint, never.Askers[0], never.Reason)
			}
		}
	}
}

// limit closes everything if the pod needs more records than there is room for.
func limit(specs []EndpointSpec, records int) error {
	endpoints, ports := 0, map[uint16]bool{}
	for _, s := range specs {
		if s.Observed {
			endpoints++
			ports[s.Port] = true
		}
	}
	if endpoints+len(ports) <= records {
		return nil
	}
	err := fmt.Errorf("%d endpoints on %d ports need %d records, a pod has room for %d",
		endpoints, len(ports), endpoints+len(ports), records)
	for i := range specs {
		specs[i].Observed, specs[i].Refresh = false, 0
		specs[i].Reason = cmp.Or(specs[i].Reason, err.Error())
	}
	return err
}
