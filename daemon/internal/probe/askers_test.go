package probe

import (
	"net"
	"net/netip"
	"slices"
	"strconv"
	"testing"

	"pgregory.net/rapid"
)

// A probe that dials another host may ask the endpoint if, and only if, it sends the endpoint's request.
func TestMayBeAskedBy(t *testing.T) {
	ips := []netip.Addr{netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7")}
	headers := rapid.SliceOfNDistinct(rapid.SampledFrom([]Header{
		{"Host", "h.example"}, {"host", "10.0.0.7:80"}, {"User-Agent", "me"}, {"Accept", ""}, {"accept", "*/*"}, {"X-Auth", "a"},
	}), 0, 2, func(h Header) string { return h.Name[1:] })
	paths := rapid.SampledFrom([]string{"/", "/ready?a=b"})
	asked := 0
	rapid.Check(t, func(rt *rapid.T) {
		own := Spec{Container: "c", Type: Readiness, Kind: HTTP, Port: 80, Path: paths.Draw(rt, "path"), Headers: headers.Draw(rt, "headers")}
		other := Spec{
			Kind: HTTP, Path: paths.Draw(rt, "other's path"), Headers: headers.Draw(rt, "other's headers"),
			Host: rapid.SampledFrom([]string{"", "10.0.0.7", "fd00::7", "10.96.0.1", "h.example"}).Draw(rt, "host"),
			Port: rapid.SampledFrom([]uint16{80, 8080}).Draw(rt, "port"),
		}
		all, err := Endpoints(Pod{IPs: ips, Probes: []Spec{own}}, Settings{}, Limits{Request: 1024, Records: 64})
		if err != nil {
			rt.Fatal(err)
		}
		host := other.Host
		if host == "" {
			host = ips[0].String()
		}
		sent := kubelet{
			host: net.JoinHostPort(host, strconv.Itoa(int(other.Port))), path: other.Path, agent: "kube-probe/1.38", headers: other.Headers,
		}.asks(t)
		want := all[0].Asks(sent)
		if got := all[0].MayBeAskedBy(other, ips); got != want {
			rt.Errorf("%v, want %v", got, want)
		}
		if want {
			asked++
		}
	})
	if asked == 0 && !testing.Short() { // a short run draws too few cases to be sure of one
		t.Error("no two probes asked the same")
	}
}

// A connection does not reveal which address it was made to.
func TestMayBeAskedByTCP(t *testing.T) {
	ips := []netip.Addr{netip.MustParseAddr("10.0.0.7")}
	own := Spec{Container: "c", Type: Readiness, Kind: TCP, Port: 80}
	all, err := Endpoints(Pod{IPs: ips, Probes: []Spec{own}}, Settings{}, Limits{Request: 1024, Records: 64})
	if err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		other Spec
		want  bool
	}{
		"at its address":    {Spec{Kind: TCP, Port: 80, Host: "10.0.0.7"}, true},
		"at a Service":      {Spec{Kind: TCP, Port: 8080, Host: "10.96.0.1"}, true},
		"at a name":         {Spec{Kind: TCP, Port: 8080, Host: "web.example"}, true},
		"of the pod's own":  {Spec{Kind: TCP, Port: 8080}, false},
		"with a request":    {Spec{Kind: HTTP, Port: 80, Path: "/", Host: "10.0.0.7"}, false},
		"with another kind": {Spec{Kind: GRPC, Port: 80}, false},
	} {
		if got := all[0].MayBeAskedBy(test.other, ips); got != test.want {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
}

// Answering an endpoint also answers probes of others that arrive and ask the same.
func TestAnsweredWith(t *testing.T) {
	ips := []netip.Addr{netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7")}
	tcp := Endpoint{Port: 80, Kind: TCP}
	both, none, request := []Endpoint{x, tcp}, []Endpoint(nil), []Endpoint{x}
	for name, test := range map[string]struct {
		other Spec
		ips   []netip.Addr
		want  []Endpoint
	}{
		"the same request":             {Spec{Kind: HTTP, Port: 80, Path: "/x", Host: "10.0.0.7"}, ips, request},
		"another port":                 {Spec{Kind: HTTP, Port: 81, Path: "/x", Host: "10.0.0.7"}, ips, none},
		"another address":              {Spec{Kind: HTTP, Port: 80, Path: "/x", Host: "10.0.0.8"}, ips, none},
		"another path":                 {Spec{Kind: HTTP, Port: 80, Path: "/y", Host: "10.0.0.7"}, ips, none},
		"by a Service":                 {Spec{Kind: HTTP, Port: 81, Path: "/x", Host: "10.96.0.1", Headers: []Header{{"Host", "10.0.0.7:80"}}}, ips, request},
		"by a name":                    {Spec{Kind: HTTP, Port: 81, Path: "/x", Host: "web.example", Headers: []Header{{"Host", "10.0.0.7:80"}}}, ips, request},
		"at the node":                  {Spec{Kind: HTTP, Port: 81, Path: "/x", Host: "127.0.0.1", Headers: []Header{{"Host", "10.0.0.7:80"}}}, ips, none},
		"a hook of its own":            {Spec{Kind: HTTP, Port: 80, Path: "/x"}, ips, request},
		"an unknown request":           {Spec{Kind: HTTP, Port: 80, Path: "/x", Host: "10.0.0.7", Problem: "x"}, ips, request},
		"an unknown request elsewhere": {Spec{Kind: HTTP, Port: 9999, Path: "/x", Host: "10.0.0.8", Problem: "x"}, ips, none},
		"an unknown port":              {Spec{Kind: HTTP, Path: "/x", Host: "10.0.0.7", Problem: "x"}, ips, none},
		"a connection":                 {Spec{Kind: TCP, Port: 80, Host: "10.0.0.7"}, ips, both},
		"a connection, IPv6":           {Spec{Kind: TCP, Port: 80, Host: "fd00::7%eth0"}, ips, both},
		"a connection, IPv4 in IPv6":   {Spec{Kind: TCP, Port: 80, Host: "::ffff:10.0.0.7"}, ips, both},
		"a connection to another pod":  {Spec{Kind: TCP, Port: 80, Host: "10.0.0.8"}, ips, none},
		"a connection to another port": {Spec{Kind: TCP, Port: 81, Host: "10.0.0.7"}, ips, none},
		"a connection to a name":       {Spec{Kind: TCP, Port: 80, Host: "web.example"}, ips, none},
		"a connection to the node":     {Spec{Kind: TCP, Port: 80, Host: "127.0.0.1"}, ips, none},
		"addresses unknown":            {Spec{Kind: TCP, Port: 80, Host: "10.0.0.7"}, nil, both},
		"addresses unknown, the node":  {Spec{Kind: TCP, Port: 80, Host: "::1"}, nil, none},
		"another kind":                 {Spec{Kind: GRPC, Port: 80, Host: "10.0.0.7"}, ips, none},
	} {
		specs, err := Endpoints(Pod{IPs: test.ips, Probes: []Spec{httpProbe(Readiness, "/x"), tcpProbe(Liveness)}}, NewDefaults().Settings(nil), limits)
		if err != nil {
			t.Fatal(err)
		}
		var got []Endpoint
		for _, s := range specs {
			if s.AnsweredWith(test.other, test.ips) {
				got = append(got, s.Endpoint)
			}
		}
		if !slices.Equal(got, test.want) {
			t.Errorf("%s: got %v, want %v", name, got, test.want)
		}
	}
}

// If the request is unknown, it may be any request.
func TestMayBeAskedByUnknownRequest(t *testing.T) {
	own := Spec{Container: "c", Type: Readiness, Kind: HTTP, Port: 80, Path: "/"}
	all, err := Endpoints(Pod{Probes: []Spec{own}}, Settings{}, Limits{Request: 1024, Records: 64})
	if err != nil {
		t.Fatal(err)
	}
	if !all[0].MayBeAskedBy(Spec{Kind: HTTP, Port: 80, Path: "/", Host: "web.example", Problem: "the path contains credentials"}, nil) {
		t.Error("the same path: want true")
	}
	if all[0].MayBeAskedBy(Spec{Kind: HTTP, Port: 80, Path: "/x", Host: "web.example", Problem: "the path contains credentials"}, nil) {
		t.Error("another path: want false")
	}
}
