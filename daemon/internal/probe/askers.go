package probe

import "net/netip"

// MayBeAskedBy reports whether another probe, or a hook, may ask the endpoint the same question as its own probes. ips
// are the addresses of the pod that p belongs to. If p dials a Host, that may be any pod, even behind a Service's address
// and port.
func (s EndpointSpec) MayBeAskedBy(p Spec, ips []netip.Addr) bool {
	switch {
	case s.Kind != p.Kind:
		return false
	case s.Kind.Keying() == KeyedByPort:
		return p.Host != ""
	case s.Path != p.Path:
		return false
	case p.Problem != "":
		return true
	}
	q, err := questionOf(p, ips)
	return err == nil && s.Asks(q.Request)
}
