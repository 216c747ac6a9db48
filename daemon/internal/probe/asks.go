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

// kubeletAgent begins the User-Agent of the kubelet's probes, which ends with its version.
const kubeletAgent = "kube-probe/"

// anyAddress stands for the pod's, where that is not known.
const anyAddress = "0.0.0.0"

// question is the request of an HTTP probe as the kubelet sends it.
type question struct {
	Request
	header  http.Header // of the request, as normal returns it
	headers string      // Endpoint.Headers
	port    uint16
	anyHost bool // the pod's address is not known
	size    int  // in bytes; approximate, as the kubelet's version is part of it
	// setsHost: its Host is not the address that is asked.
	setsHost bool
}

// questionOf follows newProbeRequest in the kubelet's pkg/probe/http/request.go. The error is net/http's refusal to send
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

// requestOf returns the bytes that the kubelet sends for a probe, but for the place of "Connection: close" among its headers.
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

// refused reports whether net/http's transport does not send a header's value, although it can be written.
func refused(value string) bool {
	return strings.ContainsFunc(value, func(r rune) bool { return r < ' ' && r != '\t' || r == '\x7f' })
}

// Asks reports whether a request is the endpoint's probe as the kubelet sends it.
func (s EndpointSpec) Asks(r Request) bool {
	return s.Kind.Keying() == KeyedByRequest && s.Host == "" && r.Path == s.question.Path && s.question.hasHeaders(r)
}

// hasHeaders reports whether normal would return q's own headers. It is called for each probe and endpoint, so it copies nothing.
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

// normal returns the headers of a request, Host among them, without what does not tell the pod's probes apart: whether the
// connection is closed, as each of them says, and what is not known here: the kubelet's version, and perhaps the pod's address.
// Probes of which it cannot be told whether they ask the same count as if they did.
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

// normalValues returns the values of a header as normal does; false if it leaves the header out.
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

// differences identifies what a request's headers have instead of the ordinary ones: empty if nothing. A digest, because
// values may be secret.
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
