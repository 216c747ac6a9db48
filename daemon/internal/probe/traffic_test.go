package probe

import (
	"slices"
	"testing"
	"time"
)

// byTraffic returns a tracker of the probes of a pod that asks for traffic as evidence, at 1000 s.
func byTraffic(t *testing.T, probes ...Spec) *Tracker {
	t.Helper()
	specs, err := Endpoints(Pod{Probes: probes}, NewDefaults().Settings(map[string]string{AnnotationLiveness: "traffic"}), limits)
	if err != nil {
		t.Fatal(err)
	}
	tracker := NewTracker()
	tracker.SetEndpoints(specs, 1000*second)
	return tracker
}

// Traffic vouches for endpoints that liveness probes ask, and no others but startup probes, which have ended by then.
func TestWhatTrafficVouchesFor(t *testing.T) {
	const both = "c/readiness asks it too"
	for name, test := range map[string]struct {
		probes  []Spec
		traffic int
		off     string
	}{
		"liveness":               {[]Spec{httpProbe(Liveness, "/x")}, 9, ""},
		"liveness by TCP":        {[]Spec{tcpProbe(Liveness)}, 9, ""},
		"startup, too":           {[]Spec{httpProbe(Startup, "/x"), httpProbe(Liveness, "/x")}, 9, ""},
		"readiness":              {[]Spec{httpProbe(Readiness, "/x")}, 0, both},
		"readiness, too":         {[]Spec{httpProbe(Liveness, "/x"), httpProbe(Readiness, "/x")}, 0, both},
		"startup alone":          {[]Spec{httpProbe(Startup, "/x")}, 0, ""},
		"what is never answered": {[]Spec{with(httpProbe(Liveness, "/x"), func(s *Spec) { s.Kind = HTTPS })}, 0, reasonNotAnswered},
	} {
		s := byTraffic(t, test.probes...).Endpoints()[0]
		if s.Traffic != test.traffic || s.TrafficOff != test.off {
			t.Errorf("%s: %d %q, want %d %q", name, s.Traffic, s.TrafficOff, test.traffic, test.off)
		}
		if tracker := track(t, test.probes...); tracker.Endpoints()[0].Traffic != 0 || tracker.Endpoints()[0].TrafficOff != "" {
			t.Errorf("%s: traffic vouches for it unasked", name)
		}
	}
}

// A TCP endpoint decides whether connections to its port are taken, so traffic speaks for requests only where it speaks for it.
func TestTrafficBesideATCPProbe(t *testing.T) {
	elsewhere := func(s Spec) Spec {
		s.Port++
		return s
	}
	for name, test := range map[string]struct {
		tcp     Spec
		barred  bool
		traffic int
		off     string
	}{
		"liveness":              {tcpProbe(Liveness), false, 9, ""},
		"readiness":             {tcpProbe(Readiness), false, 0, "TCP :80 decides for this port, and c/readiness asks it too"},
		"startup":               {tcpProbe(Startup), false, 9, ""},
		"readiness, other port": {elsewhere(tcpProbe(Readiness)), false, 9, ""},
		"barred":                {tcpProbe(Liveness), true, 0, "TCP :80 decides for this port, and it is not answered"},
		"barred, other port":    {elsewhere(tcpProbe(Liveness)), true, 9, ""},
	} {
		specs := byTraffic(t, httpProbe(Liveness, "/x"), test.tcp).Endpoints()
		if test.barred {
			Bar(specs, slices.IndexFunc(specs, func(s EndpointSpec) bool { return s.Kind == TCP }), Reason{ReasonVerdict, "x"})
		}
		for _, s := range specs {
			if s.Kind == HTTP && (s.Traffic != test.traffic || s.TrafficOff != test.off) {
				t.Errorf("%s: %d %q, want %d %q", name, s.Traffic, s.TrafficOff, test.traffic, test.off)
			}
		}
	}
}

// After a timeout the last success stands, and traffic may vouch for it. An error ends both.
func TestTimeoutsAreNoEvidenceAndErrorsAre(t *testing.T) {
	const period, slack = 10 * second, second
	late := 950 * time.Millisecond
	for _, probe := range []Spec{httpProbe(Liveness, "/x"), tcpProbe(Liveness)} {
		e := endpoints(t, probe)[0].Endpoint
		ok := after(20, e, probe.Kind.row().success, 200)
		for name, test := range map[string]struct {
			outcomes []Outcome
			result   Result
			until    uint64 // 0: it may not
			fresh    bool
		}{
			"nothing known":            {nil, Unknown, 0, false},
			"a timeout alone":          {[]Outcome{took(time.Second, after(20, e, NoAnswer, 0))}, Failure, 0, false},
			"a success":                {[]Outcome{ok}, Success, 1020*second + 11*period + slack, true},
			"a timeout after it":       {[]Outcome{ok, took(time.Second, after(31, e, NoAnswer, 0))}, Success, 1030*second + 11*period + slack, false},
			"a late success after it":  {[]Outcome{ok, took(late, about(e, Outcome{Event: ok.Event, Status: 200, ObservedAt: 1030*second + uint64(late)}))}, Success, 1030*second + 11*period + slack, false},
			"two timeouts":             {[]Outcome{ok, took(time.Second, after(31, e, NoAnswer, 0)), took(time.Second, after(41, e, NoAnswer, 0))}, Success, 1040*second + 11*period + slack, false},
			"a reset":                  {[]Outcome{ok, after(31, e, Reset, 0)}, Failure, 0, false},
			"a malformed answer":       {[]Outcome{ok, after(31, e, Failed, 0)}, Failure, 0, false},
			"an error after a timeout": {[]Outcome{ok, took(time.Second, after(31, e, NoAnswer, 0)), after(41, e, Reset, 0)}, Failure, 0, false},
			"a timeout after an error": {[]Outcome{ok, after(31, e, Reset, 0), took(time.Second, after(41, e, NoAnswer, 0))}, Failure, 0, false},
			"a success after an error": {[]Outcome{after(10, e, Reset, 0), ok}, Success, 1020*second + 11*period + slack, true},
			"a prober that left early": {[]Outcome{ok, took(time.Second/2, after(31, e, NoAnswer, 0))}, Success, 1020*second + 11*period + slack, true},
		} {
			tracker := byTraffic(t, probe)
			for _, o := range test.outcomes {
				tracker.Observe(o)
			}
			got, gate := tracker.Evidence()[e], tracker.Gates()[80]
			if got.Result != test.result || got.TrafficUntil != test.until || (got.FreshUntil > 0) != test.fresh {
				t.Errorf("%s, %s: %+v, want %s until %d", probe.Kind, name, got, test.result, test.until)
			}
			if gate.TrafficUntil != test.until || test.until != 0 && gate.TrafficWindow != 10*time.Second {
				t.Errorf("%s, %s: the gate is %+v", probe.Kind, name, gate)
			}
		}
	}
	errorStatus := byTraffic(t, httpProbe(Liveness, "/x"))
	x := errorStatus.Endpoints()[0].Endpoint
	for _, status := range []int{200, 500} {
		errorStatus.Observe(after(uint64(status), x, Answered, status))
	}
	if got := errorStatus.Evidence()[x]; got.TrafficUntil != 0 || got.Result != Failure {
		t.Errorf("after an error status: %+v", got)
	}
}

// Whatever ends a success also ends what traffic may vouch for, and does not bring it back.
func TestTrafficEndsWithWhatIsKnown(t *testing.T) {
	all := func(Endpoint) bool { return true }
	live := httpProbe(Liveness, "/x")
	set := func(tracker *Tracker, annotations map[string]string, change func(*Spec)) {
		specs, err := Endpoints(Pod{Probes: []Spec{with(live, change)}}, NewDefaults().Settings(annotations), limits)
		if err != nil {
			t.Fatal(err)
		}
		tracker.SetEndpoints(specs, 1030*second)
	}
	on := map[string]string{AnnotationLiveness: "traffic"}
	for name, end := range map[string]func(*Tracker){
		"withdrawn":             func(tracker *Tracker) { tracker.Withdraw(all, 1030*second) },
		"void":                  func(tracker *Tracker) { tracker.Void(all, 1030*second) },
		"another container":     func(tracker *Tracker) { set(tracker, on, func(s *Spec) { s.Instance = "b" }) },
		"turned off":            func(tracker *Tracker) { set(tracker, nil, func(*Spec) {}) },
		"turned off and on":     func(tracker *Tracker) { set(tracker, nil, func(*Spec) {}); set(tracker, on, func(*Spec) {}) },
		"readiness asks it too": func(tracker *Tracker) { set(tracker, on, func(s *Spec) { s.Type = Readiness }) },
		"mode observe": func(tracker *Tracker) {
			set(tracker, map[string]string{AnnotationLiveness: "traffic", AnnotationMode: "observe"}, func(*Spec) {})
		},
	} {
		tracker := byTraffic(t, live)
		e := tracker.Endpoints()[0].Endpoint
		tracker.Observe(after(20, e, Answered, 200))
		if tracker.Evidence()[e].TrafficUntil == 0 {
			t.Fatal("traffic does not vouch for it to begin with")
		}
		if end(tracker); tracker.Evidence()[e].TrafficUntil != 0 {
			t.Errorf("%s: %+v", name, tracker.Evidence()[e])
		}
	}
}

// A connection that the pod does not accept in time is a timeout as well.
func TestUnansweredConnectionsAreTimeouts(t *testing.T) {
	tracker := byTraffic(t, tcpProbe(Liveness))
	e := tracker.Endpoints()[0].Endpoint
	tracker.Observe(after(20, e, Connected, 0))
	tracker.Unanswered(80, 1030*second, 1031*second)
	got := tracker.Evidence()[e]
	if got.Result != Success || got.FreshUntil != 0 || got.TrafficUntil != 1030*second+11*10*second+second {
		t.Errorf("%+v", got)
	}
}

// Evidence that outlived a daemon keeps its traffic bound, unless the pod no longer asks for traffic as evidence.
func TestTrafficIsRestored(t *testing.T) {
	live := httpProbe(Liveness, "/x")
	old := Evidence{Result: Success, Status: 200, ObservedAt: 1000 * second, TrafficUntil: 1050 * second, TrafficWindow: 10 * time.Second}
	for name, test := range map[string]struct {
		tracker *Tracker
		want    uint64
	}{"asked for": {byTraffic(t, live), 1050 * second}, "not asked for": {track(t, live), 0}} {
		e := test.tracker.Endpoints()[0].Endpoint
		test.tracker.Restore(e, old, 1010*second)
		if got := test.tracker.Evidence()[e].TrafficUntil; got != test.want {
			t.Errorf("%s: %d, want %d", name, got, test.want)
		}
	}
}

// A steady endpoint is answered for longer, until its next failure.
func TestSteadyEndpoints(t *testing.T) {
	specs, err := Endpoints(Pod{Probes: []Spec{httpProbe(Readiness, "/x")}}, NewDefaults().Settings(map[string]string{AnnotationStaleness: "0.5-5"}), limits)
	if err != nil {
		t.Fatal(err)
	}
	tracker := NewTracker()
	tracker.SetEndpoints(specs, 1000*second)
	e := specs[0].Endpoint
	steady := uint64(SteadyAfter / time.Second)
	for _, step := range []struct {
		at     uint64
		status int
		want   uint64 // in seconds from then
	}{
		{10, 200, 6}, {20, 200, 6}, {10 + steady - 1, 200, 6}, {10 + steady, 200, 51}, {20 + steady, 200, 51},
		{30 + steady, 500, 0}, {40 + steady, 200, 6}, {40 + 2*steady - 1, 200, 6}, {40 + 2*steady, 200, 51},
	} {
		tracker.Observe(after(step.at, e, Answered, step.status))
		got := tracker.Evidence()[e].FreshUntil
		if want := (1000 + step.at + step.want) * second; step.want != 0 && got != want || step.want == 0 && got != 0 {
			t.Errorf("after %d s, status %d: fresh until %d, want %d", step.at, step.status, got, want)
		}
	}
	// A server that was restarted between two probes has failed too.
	tracker.Falter(e, (1000+40+2*steady)*second+1)
	for _, step := range []struct{ at, want uint64 }{{50 + 2*steady, 6}, {50 + 3*steady, 51}} {
		tracker.Observe(after(step.at, e, Answered, 200))
		if got := tracker.Evidence()[e].FreshUntil; got != (1000+step.at+step.want)*second {
			t.Errorf("after %d s, with a restart: fresh until %d, want %d s from then", step.at, got, step.want)
		}
		tracker.Falter(e, (1000+40+2*steady)*second+1) // old news
	}
	if d := specs[0].Delays()[0]; d.Probelet != d.Plain+51*time.Second {
		t.Errorf("%+v: the bound must hold for the longer staleness", d)
	}
}

// After a long time without any outcome, as while no daemon ran, traffic does not make up for a timeout: an error may have gone
// unseen.
func TestTimeoutAfterAGap(t *testing.T) {
	for _, test := range []struct {
		at     uint64
		result Result
	}{{20 + 10*10, Success}, {20 + 2*(11*10+1) - 1, Success}, {20 + 2*(11*10+1) + 1, Failure}} {
		tracker := byTraffic(t, httpProbe(Liveness, "/x"))
		e := tracker.Endpoints()[0].Endpoint
		tracker.Observe(after(20, e, Answered, 200))
		tracker.Observe(took(time.Second, after(test.at+1, e, NoAnswer, 0)))
		if got := tracker.Evidence()[e]; got.Result != test.result || (got.TrafficUntil != 0) != (test.result == Success) {
			t.Errorf("a timeout at %d s: %+v, want %s", test.at, got, test.result)
		}
	}
}

// If a real probe times out, traffic still vouches for the next one, which may begin immediately.
func TestTheProbeAfterATimeoutFindsTraffic(t *testing.T) {
	for _, timeout := range []time.Duration{time.Second, 10 * time.Second, 25 * time.Second} {
		tracker := byTraffic(t, with(httpProbe(Liveness, "/x"), func(s *Spec) { s.Timeout = timeout }))
		e := tracker.Endpoints()[0].Endpoint
		tracker.Observe(after(20, e, Answered, 200))
		tenth := 1020*second + uint64(limits.Traffic+1)*10*second
		next := tenth + max(10*second, uint64(timeout))
		if until := tracker.Evidence()[e].TrafficUntil; until <= next {
			t.Errorf("timeout %s: until %d, and the probe after the tenth begins at %d", timeout, until, next)
		}
	}
}
