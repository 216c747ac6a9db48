package probe

import (
	"maps"
	"testing"
	"time"
)

// shadow returns a shadow for the probes, in mode observe.
func shadow(t *testing.T, limits Limits, probes ...Spec) *Shadow {
	t.Helper()
	settings := NewDefaults().Settings(map[string]string{AnnotationMode: "observe"})
	specs, err := Endpoints(Pod{Probes: probes}, settings, limits)
	if err != nil {
		t.Fatal(err)
	}
	sh := NewShadow()
	sh.SetEndpoints(specs, 1000*second)
	return sh
}

func TestShadow(t *testing.T) {
	live := limits
	live.Live = 2
	tcp := Endpoint{Port: 80, Kind: TCP}
	ok, bad := after(0, x, Answered, 200), after(0, x, Answered, 503)
	slow, connected := took(800*time.Millisecond, ok), after(0, tcp, Connected, 0)
	every := func(period uint64, outcomes ...Outcome) []Outcome {
		for i := range outcomes {
			outcomes[i].ObservedAt = (1010 + uint64(i)*period) * second
		}
		return outcomes
	}
	three := with(httpProbe(Readiness, "/x"), func(s *Spec) { s.SuccessThreshold = 3 })
	for name, test := range map[string]struct {
		limits    Limits
		probes    []Spec
		outcomes  []Outcome
		withdrawn uint64 // in seconds
		of        Endpoint
		want      ShadowCounts
	}{
		"a lone probe": {limits, []Spec{httpProbe(Readiness, "/x")}, every(10, ok, ok, ok, ok), 0, x,
			ShadowCounts{2, 0, map[Why]uint64{WhyUnknown: 1, WhyExpired: 1}}},
		"one that fails": {limits, []Spec{httpProbe(Readiness, "/x")}, every(10, ok, bad, bad, bad, ok), 0, x,
			ShadowCounts{1, 1, map[Why]uint64{WhyUnknown: 1, WhyExpired: 1, WhyFailed: 2}}},
		"seldom": {limits, []Spec{httpProbe(Readiness, "/x")}, every(12, ok, ok, ok), 0, x,
			ShadowCounts{0, 0, map[Why]uint64{WhyUnknown: 1, WhyExpired: 2}}},
		"before it was known": {limits, []Spec{httpProbe(Readiness, "/x")}, []Outcome{
			took(500*time.Millisecond, after(10, x, Answered, 200)),
			took(800*time.Millisecond, about(x, Outcome{Event: Answered, Status: 200, ObservedAt: 1010*second + second/2})),
		}, 0, x, ShadowCounts{0, 0, map[Why]uint64{WhyUnknown: 2}}},
		"threshold": {limits, []Spec{three}, every(10, ok, ok, ok, ok), 0, x,
			ShadowCounts{1, 0, map[Why]uint64{WhyUnknown: 1, WhyThreshold: 2}}},
		"withdrawn": {limits, []Spec{httpProbe(Readiness, "/x")}, every(10, ok, ok), 1015, x,
			ShadowCounts{0, 0, map[Why]uint64{WhyUnknown: 1, WhyWithdrawn: 1}}},
		"TCP": {live, []Spec{tcpProbe(Liveness)}, every(10, connected, connected, connected, connected, connected), 0, tcp,
			ShadowCounts{3, 0, map[Why]uint64{WhyUnknown: 1, WhyLimit: 1}}},
		"HTTP beside TCP": {live, []Spec{httpProbe(Readiness, "/x"), tcpProbe(Liveness)}, every(5, ok, ok, connected, ok, ok, ok), 0, x,
			ShadowCounts{2, 0, map[Why]uint64{WhyUnknown: 1, WhyTCP: 1, WhyExpired: 1}}},
		"never": {limits, []Spec{with(httpProbe(Startup, "/x"), func(*Spec) {})}, every(5, slow, ok), 0, x,
			ShadowCounts{0, 0, map[Why]uint64{WhyNever: 2}}},
	} {
		t.Run(name, func(t *testing.T) {
			sh := shadow(t, test.limits, test.probes...)
			var judged ShadowCounts
			for _, o := range test.outcomes {
				withdrawn := test.withdrawn * second
				if o.ObservedAt < withdrawn {
					withdrawn = 0
				}
				j, ok := sh.Observe(o, withdrawn, live.Live)
				if ok && j.Endpoint == test.of && j.Answered {
					judged.Answered++
				}
			}
			got := sh.Counts()[test.of]
			if got.Answered != test.want.Answered || got.Hidden != test.want.Hidden || !maps.Equal(got.Passed, test.want.Passed) {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
			if judged.Answered != got.Answered {
				t.Errorf("judged %d as answered, counted %d", judged.Answered, got.Answered)
			}
		})
	}
}

// A listening socket that closes ends the steadiness of a shadow's endpoints, too.
func TestShadowFalters(t *testing.T) {
	settings := NewDefaults().Settings(map[string]string{AnnotationMode: "observe", AnnotationStaleness: "1-5"})
	specs, err := Endpoints(Pod{Probes: []Spec{httpProbe(Readiness, "/x")}}, settings, limits)
	if err != nil {
		t.Fatal(err)
	}
	for _, closed := range []uint64{0, 1645} {
		sh := NewShadow()
		sh.SetEndpoints(specs, 1000*second)
		var last Judged
		for at := uint64(1010); at <= 1700; at += 30 {
			o, withdrawn := after(0, x, Answered, 200), uint64(0)
			o.ObservedAt = at * second
			if at > closed {
				withdrawn = closed * second
			}
			last, _ = sh.Observe(o, withdrawn, 0)
		}
		if want := closed == 0; last.Answered != want {
			t.Errorf("closed at %d: answered: %v, want %v: %+v", closed, last.Answered, want, last)
		}
	}
}

func TestShadowCountsEndWithTheirEndpoints(t *testing.T) {
	sh := shadow(t, limits, httpProbe(Readiness, "/x"))
	sh.Observe(after(10, x, Answered, 200), 0, 0)
	if got := sh.Counts()[x].Passed[WhyUnknown]; got != 1 {
		t.Fatalf("%d probes", got)
	}
	sh.SetEndpoints(nil, 1020*second)
	if got := sh.Counts(); len(got) != 0 {
		t.Errorf("still there: %+v", got)
	}
}
