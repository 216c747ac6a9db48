package probe

import (
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"
)

var limits = Limits{Path: 255, Request: 1024, Records: 64}

// httpProbe is an ordinary HTTP probe of port 80.
func httpProbe(probeType Type, path string) Spec {
	return Spec{
		Container: "c", Type: probeType, Kind: HTTP, Port: 80, Path: path,
		Period: 10 * time.Second, Timeout: time.Second,
	}
}

func tcpProbe(probeType Type) Spec {
	s := httpProbe(probeType, "")
	s.Kind = TCP
	return s
}

// with returns the probe, changed.
func with(s Spec, change func(*Spec)) Spec {
	change(&s)
	return s
}

func endpoints(t testing.TB, probes ...Spec) []EndpointSpec {
	t.Helper()
	specs, err := Endpoints(Pod{IPs: []netip.Addr{netip.MustParseAddr("10.0.0.7")}, Probes: probes},
		NewDefaults().Settings(nil), limits)
	if err != nil {
		t.Fatal(err)
	}
	return specs
}

func TestSharedEndpoint(t *testing.T) {
	specs := endpoints(t,
		httpProbe(Readiness, "/x"),
		with(httpProbe(Liveness, "/x"), func(s *Spec) { s.Period, s.Timeout = 5*time.Second, 3*time.Second }),
		with(httpProbe(Startup, "/x"), func(s *Spec) { s.Container = "d" }),
	)
	if len(specs) != 1 {
		t.Fatalf("%d endpoints, want 1: %+v", len(specs), specs)
	}
	s := specs[0]
	if s.Period != 5*time.Second || s.Timeout != time.Second || s.Staleness != 6*time.Second {
		t.Errorf("period %s, timeout %s, staleness %s; want 5s, 1s, 6s", s.Period, s.Timeout, s.Staleness)
	}
	if s.Reason != "" || !s.Observed || s.Startup {
		t.Errorf("want an ordinary endpoint: %+v", s)
	}
	if len(s.Askers) != 3 || s.Askers[2].String() != "d/startup" {
		t.Errorf("asked by %v", s.Askers)
	}
}

// Each probe but the last is an ordinary one on port 80: whether it is answered depends on what it shares its port with.
func TestReasons(t *testing.T) {
	header := func(name, value string) func(*Spec) {
		return func(s *Spec) { s.Headers = append(s.Headers, Header{name, value}) }
	}
	get := httpProbe(Liveness, "/other")
	for name, test := range map[string]struct {
		probe    Spec
		reason   string // of that probe; empty: it is answered
		observed bool
		closes   bool // the ordinary one beside it is not answered either
	}{
		"HTTP":         {get, "", true, false},
		"TCP":          {tcpProbe(Liveness), "", true, false},
		"HTTPS":        {with(get, func(s *Spec) { s.Kind = HTTPS }), "HTTPS", false, true},
		"HTTP/2":       {with(get, func(s *Spec) { s.Kind = HTTP2 }), "HTTP/2", false, true},
		"gRPC":         {with(get, func(s *Spec) { s.Kind = GRPC }), "gRPC", false, true},
		"exec":         {with(get, func(s *Spec) { s.Kind, s.Port, s.Path = Exec, 0, "" }), "exec", false, false},
		"host":         {with(get, func(s *Spec) { s.Host = "10.9.9.9" }), "10.9.9.9", false, false},
		"host, a name": {with(get, func(s *Spec) { s.Host = "h.example" }), "h.example", false, true},
		"problem":      {with(get, func(s *Spec) { s.Problem = "odd" }), "odd", false, true},
		"unknown port": {with(get, func(s *Spec) { s.Problem, s.Port = "which port?", 0 }),
			"which port?", false, false},
		"longest path":     {with(get, func(s *Spec) { s.Path = "/" + strings.Repeat("x", 254) }), "", true, false},
		"too long a path":  {with(get, func(s *Spec) { s.Path = "/" + strings.Repeat("x", 255) }), "256", false, true},
		"headers":          {with(get, header("X-A", "1")), "", true, false},
		"Connection":       {with(get, header("connection", "upgrade")), "Connection", true, true},
		"long request":     {with(get, header("X-A", strings.Repeat("x", 1000))), "at most 1024", true, true},
		"startup":          {with(get, func(s *Spec) { s.Type = Startup }), "startup probe", true, false},
		"startup by HTTPS": {with(get, func(s *Spec) { s.Type, s.Kind = Startup, HTTPS }), "HTTPS", false, false},
		"another port":     {with(get, func(s *Spec) { s.Kind, s.Port = HTTPS, 443 }), "HTTPS", false, false},
		"other headers on the same path": {with(get, func(s *Spec) {
			s.Path = "/ordinary"
			header("X-A", "1")(s)
		}), "differ in httpHeaders", true, true},
	} {
		t.Run(name, func(t *testing.T) {
			specs := endpoints(t, httpProbe(Readiness, "/ordinary"), test.probe)
			want := Endpoint{test.probe.Port, test.probe.Kind, test.probe.Path}
			for _, s := range specs {
				if s.Endpoint == want && s.Host == test.probe.Host {
					if test.reason == "" && s.Reason != "" || !strings.Contains(s.Reason, test.reason) {
						t.Errorf("reason %q, want %q", s.Reason, test.reason)
					}
					if s.Observed != test.observed {
						t.Errorf("observed: %v, want %v", s.Observed, test.observed)
					}
				}
				if s.Path == "/ordinary" && (s.Reason != "") != test.closes {
					t.Errorf("the ordinary probe beside it: %q, want a reason: %v", s.Reason, test.closes)
				}
			}
		})
	}
}

func TestPodNotAnswered(t *testing.T) {
	specs, err := Endpoints(Pod{
		Probes:      []Spec{httpProbe(Readiness, "/x"), with(tcpProbe(Liveness), func(s *Spec) { s.Kind = GRPC })},
		NotAnswered: "the end",
	}, NewDefaults().Settings(nil), limits)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range specs {
		if want := map[Kind]string{HTTP: "the end", GRPC: "gRPC is never answered"}[s.Kind]; s.Reason != want {
			t.Errorf("%s: reason %q, want %q", s.Endpoint, s.Reason, want)
		}
	}
}

// Whoever reads why a probe is not answered is to learn which other one is to blame.
func TestReasonNamesTheOther(t *testing.T) {
	https := with(httpProbe(Liveness, "/tls"), func(s *Spec) { s.Kind, s.Container = HTTPS, "sidecar" })
	for _, s := range endpoints(t, httpProbe(Readiness, "/x"), https) {
		if s.Kind != HTTP {
			continue
		}
		for _, part := range []string{"HTTPS :80/tls", "sidecar/liveness", "HTTPS is never answered"} {
			if !strings.Contains(s.Reason, part) {
				t.Errorf("reason %q does not say %q", s.Reason, part)
			}
		}
	}
}

func TestHeadersID(t *testing.T) {
	id := func(headers ...Header) string { return headersID(headers) }
	if id() != "" {
		t.Errorf("no headers: %q", id())
	}
	if id(Header{"a", "1"}, Header{"B", "2"}) != id(Header{"b", "2"}, Header{"A", "1"}) {
		t.Error("order and case of names are not sent, and must not matter")
	}
	for name, other := range map[string]string{
		"value":           id(Header{"A", "2"}),
		"name":            id(Header{"B", "1"}),
		"one more":        id(Header{"A", "1"}, Header{"A", "1"}),
		"order of values": id(Header{"A", "2"}, Header{"A", "1"}),
	} {
		if other == id(Header{"A", "1"}) || other == id(Header{"A", "1"}, Header{"A", "2"}) {
			t.Errorf("%s does not matter, and should", name)
		}
	}
}

func TestTooManyEndpoints(t *testing.T) {
	pod := Pod{}
	for i := range limits.Records - 1 { // and one for their port
		pod.Probes = append(pod.Probes, httpProbe(Liveness, "/"+strconv.Itoa(i)))
	}
	if _, err := Endpoints(pod, NewDefaults().Settings(nil), limits); err != nil {
		t.Errorf("as many as fit: %v", err)
	}
	pod.Probes = append(pod.Probes, httpProbe(Liveness, "/more"))
	specs, err := Endpoints(pod, NewDefaults().Settings(nil), limits)
	if err == nil || !strings.Contains(err.Error(), "65") || !strings.Contains(err.Error(), "64") {
		t.Errorf("error %v does not name the numbers", err)
	}
	for _, s := range specs {
		if s.Observed || s.Reason == "" {
			t.Errorf("answered all the same: %+v", s)
		}
	}
	pod.Probes[0].Kind, pod.Probes[0].Path = Exec, "" // needs no record
	pod.Probes[0].Port = 0
	if _, err := Endpoints(pod, NewDefaults().Settings(nil), limits); err != nil {
		t.Errorf("with one that needs no record: %v", err)
	}
}
