package probe

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// kubeletAgent is the User-Agent of the kubelet's probes without their version.
const kubeletAgent = "kube-probe/"

// anyAddress stands for the pod's address where that is unknown.
const anyAddress = "0.0.0.0"

// question is the request of an HTTP probe, as the kubelet sends it.
type question struct {
	Request
	header  http.Header // headers of the request, as normal returns them
	headers string      // Endpoint.Headers
	port    uint16
	anyHost bool // the pod's address is unknown
	size    int  // in bytes; approximate, because it includes the kubelet's version
	// setsHost: its Host header is not the address that is dialled.
	setsHost bool
}

// questionOf follows newProbeRequest in the kubelet's pkg/probe/http/request.go. It fails where net/http refuses to send
// the request.
func questionOf(p Spec, ips []netip.Addr) (question, error) {
	q := question{port: p.Port, anyHost: p.Host == "" && len(ips) == 0}
	address := cmp.Or(p.Host, anyAddress)
	if p.Host == "" && len(ips) > 0 {
		address = ips[0].String()
	}
	host := net.JoinHostPort(address, strconv.Itoa(int(p.Port)))
	sent, err := requestOf(p, host)
	if err != nil {
		return question{}, err
	}
	if q.Request, err = ParseRequest(sent); err != nil {
		return question{}, err
	}
	q.size, q.header = len(sent), q.normal(q.Request)
	ordinary := http.Header{"Host": {q.normalHost(host)}, "User-Agent": {kubeletAgent}, "Accept": {"*/*"}}
	q.headers, q.setsHost = differences(q.header, ordinary), q.header.Get("Host") != ordinary.Get("Host")
	return q, nil
}

// requestOf returns the bytes that the kubelet sends for a probe, except for the position of "Connection: close" among
// the headers.
func requestOf(p Spec, host string) ([]byte, error) {
	header := http.Header{}
	for _, h := range p.Headers {
		header.Add(h.Name, h.Value)
	}
	if _, set := header["User-Agent"]; !set {
		header.Set("User-Agent", kubeletAgent+"1.37")
	}
	if _, set := header["Accept"]; !set {
		header.Set("Accept", "*/*")
	} else if header.Get("Accept") == "" {
		header.Del("Accept")
	}
	for name, values := range header {
		if slices.ContainsFunc(values, refused) {
			return nil, fmt.Errorf("header %s: control character in its value", name)
		}
	}
	request, err := http.NewRequest(http.MethodGet, "http://"+host+p.Path, nil)
	if err != nil {
		return nil, err
	}
	request.Header, request.Host, request.Close = header, header.Get("Host"), true
	var sent bytes.Buffer
	err = request.Write(&sent)
	return sent.Bytes(), err
}

// refused reports whether net/http's transport refuses to send a header value, although Request.Write writes it.
func refused(value string) bool {
	return strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == '\x7f' })
}

// Asks reports whether a request is one of the endpoint's probes as the kubelet sends them.
func (s EndpointSpec) Asks(r Request) bool {
	return s.Kind.Keying() == KeyedByRequest && s.Host == "" && r.Path == s.question.Path && s.question.hasHeaders(r)
}

// hasHeaders reports whether normal would return q's own headers. It avoids copying, because it runs for each probe and
// endpoint.
func (q question) hasHeaders(r Request) bool {
	if len(q.header) == 0 || q.normalHost(r.Host) != q.header["Host"][0] {
		return false
	}
	found := 1
	for name, values := range r.Header {
		values, sent := normalValues(name, values)
		if !sent {
			continue
		}
		if own, ok := q.header[name]; !ok || name == "Host" || !slices.Equal(own, values) {
			return false
		}
		found++
	}
	return found == len(q.header)
}

// normal returns the headers of a request, including Host, without those that do not tell the pod's probes apart:
// "Connection: close", which they all have, and what is unknown here, namely the kubelet's version and perhaps the pod's
// address. Probes count as asking the same where that is uncertain.
func (q question) normal(r Request) http.Header {
	header := http.Header{"Host": {q.normalHost(r.Host)}}
	for name, values := range r.Header {
		if normal, sent := normalValues(name, values); sent {
			header[name] = normal
		}
	}
	return header
}

var anyKubeletAgent = []string{kubeletAgent}

// normalValues returns the values of a header as normal does; false if normal omits the header.
func normalValues(name string, values []string) (normal []string, sent bool) {
	switch {
	case name == "User-Agent" && len(values) == 1 && strings.HasPrefix(values[0], kubeletAgent):
		return anyKubeletAgent, true
	case name == "Connection":
		others := func(v string) bool { return v != "close" }
		if !slices.ContainsFunc(values, others) {
			return nil, false
		}
		return slices.DeleteFunc(slices.Clone(values), func(v string) bool { return !others(v) }), true
	}
	return values, true
}

func (q question) normalHost(host string) string {
	if !q.anyHost {
		return host
	}
	if at, err := netip.ParseAddrPort(host); err != nil || at.Port() != q.port {
		return host
	}
	return anyAddress
}

// differences identifies how a request's headers differ from the ordinary ones; empty if they do not. It is a digest,
// because values may be secret.
func differences(header, ordinary http.Header) string {
	if maps.EqualFunc(header, ordinary, slices.Equal) {
		return ""
	}
	all := maps.Clone(ordinary)
	maps.Copy(all, header)
	digest := sha256.New()
	for _, name := range slices.Sorted(maps.Keys(all)) {
		values, sent := header[name]
		if slices.Equal(values, ordinary[name]) {
			continue
		}
		if !sent {
			_, _ = fmt.Fprintf(digest, "%q\n", name)
		}
		for _, value := range values {
			_, _ = fmt.Fprintf(digest, "%q:%q\n", name, value)
		}
	}
	return hex.EncodeToString(digest.Sum(nil)[:8])
}
