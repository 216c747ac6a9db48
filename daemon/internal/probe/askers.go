package probe

import "net/netip"

// BarShared bars the endpoints that cannot be answered without also answering another probe, or a hook: one of another pod that dials this
// pod, or a hook that sends what a probe does. Its timeout and its bound are not theirs. ips are the addresses of the pod; by names the
// other one. A TCP probe that dials a Service is not noticed, as it may lead to any pod.
func BarShared(specs []EndpointSpec, other Spec, by string, ips []netip.Addr) {
	asker := endpointOf(other, ips, Limits{})
	for i, s := range specs {
		shared := s.MayBeAskedBy(other, ips)
		if other.Kind.Keying() == KeyedByPort {
			shared = asker.answeredWith(s)
		}
		if shared && s.Observed && (s.Reason == Reason{} || s.Withheld) {
			Bar(specs, i, Reason{ReasonBeside, "answering it may also answer " + by})
		}
	}
}

// MayBeAskedBy reports whether another probe, or a hook, may ask the endpoint the same question as its own probes. ips
// are the addresses of the pod that p belongs to. If p dials a Host, that may be any pod, even behind a Service's address
// and port.
func (s EndpointSpec) MayBeAskedBy(p Spec, ips []netip.Addr) bool {
	switch {
	case s.Kind != p.Kind:
		return false
	case s.Kind.Keying() == KeyedByPort:
		return p.Host != "" && !isLoopback(p.Host)
	case s.Path != p.Path:
		return false
	case p.Problem != "":
		return true
	}
	q, err := questionOf(p, ips)
	return err == nil && s.Asks(q.Request)
}

// isLoopback reports whether host is the node itself, to the kubelet.
func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}
