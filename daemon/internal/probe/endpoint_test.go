package probe

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

var limits = Limits{Request: 1024, Records: 64}

// httpProbe returns an ordinary HTTP probe of port 80.
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

// with returns the probe with changes.
func with(s Spec, changes ...func(*Spec)) Spec {
	for _, change := range changes {
		change(&s)
	}
	return s
}

func endpoints(t testing.TB, probes ...Spec) []EndpointSpec {
	t.Helper()
	ips := []netip.Addr{netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7")}
	specs, err := Endpoints(Pod{IPs: ips, Probes: probes},
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
	if s.Reason.Text != "" || !s.Observed || s.Startup {
		t.Errorf("want an ordinary endpoint: %+v", s)
	}
	if len(s.Askers) != 3 || s.Askers[2].String() != "d/startup" {
		t.Errorf("asked by %v", s.Askers)
	}
}

// Beside each probe there are two ordinary ones of port 80, over HTTP and TCP. They are answered, unless that would also
// answer the other probe.
func TestReasons(t *testing.T) {
	header := func(name, value string) func(*Spec) {
		return func(s *Spec) { s.Headers = append(s.Headers, Header{name, value}) }
	}
	at := func(host string) func(*Spec) { return func(s *Spec) { s.Host = host } }
	get, ordinary, same := httpProbe(Liveness, "/other"), httpProbe(Readiness, "/ordinary"), httpProbe(Liveness, "/ordinary")
	for name, test := range map[string]struct {
		probe    Spec
		reason   string // of that probe; empty if it is answered
		observed bool
		closes   bool // the ordinary HTTP probe beside it is not answered either
	}{
		"HTTP":         {get, "", true, false},
		"TCP":          {tcpProbe(Liveness), "", true, false},
		"HTTPS":        {with(get, func(s *Spec) { s.Kind = HTTPS }), "HTTPS", false, false},
		"HTTP/2":       {with(get, func(s *Spec) { s.Kind = HTTP2 }), "HTTP/2", false, false},
		"gRPC":         {with(get, func(s *Spec) { s.Kind = GRPC }), "gRPC", false, false},
		"exec":         {with(get, func(s *Spec) { s.Kind, s.Port, s.Path = Exec, 0, "" }), "exec", false, false},
		"host":         {with(get, func(s *Spec) { s.Host = "10.9.9.9" }), "10.9.9.9", false, false},
		"host, a name": {with(get, func(s *Spec) { s.Host = "h.example" }), "h.example", false, false},
		"problem":      {with(get, func(s *Spec) { s.Problem = "odd" }), "odd", false, false},
		"unknown port": {with(get, func(s *Spec) { s.Problem, s.Port = "which port?", 0 }),
			"which port?", false, false},
		"long path":        {with(get, func(s *Spec) { s.Path = "/" + strings.Repeat("x", 900) }), "", true, false},
		"headers":          {with(get, header("X-A", "1")), "", true, false},
		"Connection":       {with(get, header("connection", "upgrade")), "", true, false},
		"long request":     {with(get, header("X-A", strings.Repeat("x", 1000))), "at most 1024", true, false},
		"path too long":    {with(get, func(s *Spec) { s.Path = "/" + strings.Repeat("x", 1000) }), "at most 1024", true, false},
		"never sent":       {with(get, func(s *Spec) { s.Path = "/\x7f" }), "cannot be sent", false, false},
		"startup":          {with(get, func(s *Spec) { s.Type = Startup }), "only startup probes", true, false},
		"startup by HTTPS": {with(get, func(s *Spec) { s.Type, s.Kind = Startup, HTTPS }), "HTTPS", false, false},
		"another port":     {with(get, func(s *Spec) { s.Kind, s.Port = HTTPS, 443 }), "HTTPS", false, false},
		"other headers on the same path": {with(get, func(s *Spec) {
			s.Path = "/ordinary"
			header("X-A", "1")(s)
		}), "", true, false},
		"the same path at a name":                {with(same, at("h.example")), "h.example", false, false},
		"the same path, the pod's other address": {with(same, at("fd00::7")), "fd00::7", false, false},
		"the same path elsewhere":                {with(same, at("10.9.9.9")), "10.9.9.9", false, false},
		"the same path at another port":          {with(same, at("h.example"), func(s *Spec) { s.Port = 81 }), "h.example", false, false},
		"the same path and something more":       {with(same, func(s *Spec) { s.Problem = "odd" }), "odd", false, false},
		"the same path by HTTPS":                 {with(same, func(s *Spec) { s.Kind = HTTPS }), "HTTPS", false, false},
		"TCP at a name":                          {with(tcpProbe(Liveness), at("h.example")), "h.example", false, true},
		"TCP at the pod's other address":         {with(tcpProbe(Liveness), at("fd00::7")), "fd00::7", false, true},
		"TCP elsewhere":                          {with(tcpProbe(Liveness), at("10.9.9.9")), "10.9.9.9", false, false},
		"TCP at a name, another port":            {with(tcpProbe(Liveness), at("h.example"), func(s *Spec) { s.Port = 81 }), "h.example", false, false},
		"TCP at a name, startup":                 {with(tcpProbe(Startup), at("h.example")), "h.example", false, true},
		"TCP, startup beside an ordinary one":    {tcpProbe(Startup), "", true, false},
		"HTTP, startup beside an ordinary one":   {with(same, func(s *Spec) { s.Type = Startup }), "", true, false},
	} {
		t.Run(name, func(t *testing.T) {
			specs := endpoints(t, ordinary, tcpProbe(Readiness), test.probe)
			for _, s := range specs {
				if slices.Contains(s.Askers, test.probe.Asker()) {
					if test.reason == "" && s.Reason.Text != "" || !strings.Contains(s.Reason.Text, test.reason) {
						t.Errorf("reason %q, want %q", s.Reason.Text, test.reason)
					}
					if s.Observed != test.observed {
						t.Errorf("observed: %v, want %v", s.Observed, test.observed)
					}
					continue
				}
				if s.Kind == HTTP && s.Path == "/ordinary" && s.Host == "" && s.Observed && (s.Reason.Text != "") != test.closes {
					t.Errorf("the ordinary HTTP probe beside it: %q, want a reason: %v", s.Reason.Text, test.closes)
				}
				if want := test.closes && test.probe.Kind == TCP; s.Kind == TCP && s.Observed && (s.Reason.Text != "") != want {
					t.Errorf("the ordinary TCP probe beside it: %q, want a reason: %v", s.Reason.Text, want)
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
		if want := map[Kind]string{HTTP: "the end", GRPC: "gRPC is never answered: only HTTP/1.1 is understood"}[s.Kind]; s.Reason.Text != want {
			t.Errorf("%s: reason %q, want %q", s.Endpoint, s.Reason.Text, want)
		}
	}
}

// The reason why a probe is not answered names the other probe that is responsible.
func TestReasonNamesTheOther(t *testing.T) {
	tcp := with(tcpProbe(Liveness), func(s *Spec) { s.Host, s.Container = "fd00::7", "sidecar" })
	for _, s := range endpoints(t, httpProbe(Readiness, "/x"), tcp) {
		if s.Kind != HTTP {
			continue
		}
		for _, part := range []string{"TCP :80", "sidecar/liveness", `host "fd00::7" is probed`} {
			if !strings.Contains(s.Reason.Text, part) {
				t.Errorf("reason %q does not say %q", s.Reason.Text, part)
			}
		}
	}
}

// Startup probes end with their success: their period does not matter to the probes that go on, and they add no more than
// one success to a row. Their timeout matters, as long as it is unknown which probe succeeded.
func TestStartupBesideOthers(t *testing.T) {
	every := func(probeType Type, period, timeout time.Duration, successes int) Spec {
		return with(httpProbe(probeType, "/x"), func(s *Spec) {
			s.Period, s.Timeout, s.SuccessThreshold = period*time.Second, timeout*time.Second, successes
		})
	}
	startup := every(Startup, 1, 1, 1)
	for name, test := range map[string]struct {
		probes                     []Spec
		period, timeout, staleness time.Duration // in seconds
		needed                     int
	}{
		"liveness":              {[]Spec{startup, every(Liveness, 10, 1, 1)}, 10, 1, 11, 1},
		"liveness, first":       {[]Spec{every(Liveness, 10, 1, 1), startup}, 10, 1, 11, 1},
		"liveness, more often":  {[]Spec{every(Startup, 30, 1, 1), every(Liveness, 10, 1, 1)}, 10, 1, 11, 1},
		"a short timeout":       {[]Spec{startup, every(Liveness, 10, 5, 1)}, 10, 1, 11, 1},
		"a long timeout":        {[]Spec{every(Startup, 1, 9, 1), every(Liveness, 10, 5, 1)}, 10, 5, 15, 1},
		"readiness":             {[]Spec{startup, every(Readiness, 10, 1, 3)}, 10, 1, 11, 4},
		"readiness, two others": {[]Spec{startup, startup, every(Readiness, 10, 1, 3)}, 10, 1, 11, 5},
		"readiness and liveness": {
			[]Spec{startup, every(Readiness, 10, 1, 3), every(Liveness, 5, 1, 1)}, 5, 1, 6, 3 + 1 + 1 + (3*10+1+1)/5,
		},
		"startup only": {[]Spec{every(Startup, 5, 1, 1), startup}, 1, 1, 0, 1},
	} {
		specs := endpoints(t, test.probes...)
		if len(specs) != 1 {
			t.Fatalf("%s: %d endpoints", name, len(specs))
		}
		s := specs[0]
		if s.Period != test.period*time.Second || s.Timeout != test.timeout*time.Second || s.SuccessThreshold != test.needed {
			t.Errorf("%s: period %s, timeout %s, %d successes needed; want %d s, %d s, %d",
				name, s.Period, s.Timeout, s.SuccessThreshold, test.period, test.timeout, test.needed)
		}
		if test.staleness != 0 && s.Staleness != test.staleness*time.Second {
			t.Errorf("%s: staleness %s, want %d s", name, s.Staleness, test.staleness)
		}
		// The bound stated for a startup probe includes the staleness, which depends on the other probes.
		for _, d := range s.Delays() {
			if test.staleness != 0 && d.Probelet != d.Plain+s.Staleness {
				t.Errorf("%s: %s is detected within %s; plain %s, staleness %s", name, d.Asker, d.Probelet, d.Plain, s.Staleness)
			}
		}
	}
}

func TestStartupDoesNotHastenRefresh(t *testing.T) {
	settings := NewDefaults().Settings(nil)
	settings.Refresh.On = true
	pod := Pod{IPs: []netip.Addr{netip.MustParseAddr("10.0.0.7")}, Probes: []Spec{
		with(httpProbe(Startup, "/x"), func(s *Spec) { s.Period = time.Second }), httpProbe(Liveness, "/x"),
	}}
	specs, err := Endpoints(pod, settings, limits)
	if err != nil || specs[0].Refresh != 10*time.Second {
		t.Errorf("asked every %s, %v", specs[0].Refresh, err)
	}
}

func TestTooManyEndpoints(t *testing.T) {
	pod := Pod{}
	for i := range limits.Records - 1 { // one record is for their port
		pod.Probes = append(pod.Probes, httpProbe(Liveness, "/"+strconv.Itoa(i)))
	}
	if _, err := Endpoints(pod, NewDefaults().Settings(nil), limits); err != nil {
		t.Errorf("at the limit: %v", err)
	}
	pod.Probes = append(pod.Probes, httpProbe(Liveness, "/more"))
	specs, err := Endpoints(pod, NewDefaults().Settings(nil), limits)
	if err == nil || !strings.Contains(err.Error(), "65") || !strings.Contains(err.Error(), "64") {
		t.Errorf("error %v does not name the numbers", err)
	}
	for _, s := range specs {
		if s.Observed || s.Reason.Text == "" {
			t.Errorf("still answered: %+v", s)
		}
	}
	pod.Probes[0].Kind, pod.Probes[0].Path = Exec, "" // needs no record
	pod.Probes[0].Port = 0
	if _, err := Endpoints(pod, NewDefaults().Settings(nil), limits); err != nil {
		t.Errorf("with one that needs no record: %v", err)
	}
}
