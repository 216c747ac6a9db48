package probe

import (
	"net/netip"
	"slices"
)

// AnsweredWith reports whether the kernel, if it may answer the endpoint, would also answer another probe, or a hook: one of another pod
// that dials this one, or a hook of its own that sends what a probe does. ips are the pod's addresses. Whether a connection to a name or to
// another address arrives at the pod, perhaps through a Service, is not known: only a request tells.
func (s EndpointSpec) AnsweredWith(other Spec, ips []netip.Addr) bool {
	here := other.Port == s.Port && (other.Host == "" || dials(other.Host, ips))
	switch {
	case other.Kind.Keying() == KeyedByPort:
		return here
	case other.Problem != "": // the request is unknown
		return here && s.Kind == other.Kind && s.Path == other.Path
	}
	return s.MayBeAskedBy(other, ips) && (here || !isLoopback(other.Host))
}

// dials reports whether host is one of a pod's addresses. If they are not known, any address may be.
func dials(host string, ips []netip.Addr) bool {
	ip, err := netip.ParseAddr(host)
	ip = ip.Unmap().WithZone("")
	return err == nil && (slices.Contains(ips, ip) || len(ips) == 0 && !ip.IsLoopback())
}

// isLoopback reports whether host is the node itself, to the kubelet.
func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.Unmap().IsLoopback()
}

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
