package probe

import (
	"math"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// Whatever periods, timeouts and thresholds the API server admits, bounds are not shorter than what they are made of.
func TestBoundsDoNotOverflow(t *testing.T) {
	number := rapid.OneOf(rapid.IntRange(1, 1000), rapid.IntRange(1, math.MaxInt32), rapid.Just(math.MaxInt32))
	rapid.Check(t, func(t *rapid.T) {
		var probes []Spec
		for range rapid.IntRange(1, 3).Draw(t, "probes") {
			p := rapid.SampledFrom([]Spec{httpProbe(Liveness, "/x"), httpProbe(Readiness, "/x"), tcpProbe(Liveness)}).Draw(t, "probe")
			p.Period = time.Duration(number.Draw(t, "period")) * time.Second
			p.Timeout = time.Duration(number.Draw(t, "timeout")) * time.Second
			p.FailureThreshold = number.Draw(t, "failureThreshold")
			if p.Type == Readiness {
				p.SuccessThreshold = number.Draw(t, "successThreshold")
			}
			probes = append(probes, p)
		}
		live := limits
		live.Live = rapid.SampledFrom([]int{0, 9}).Draw(t, "live")
		specs, err := Endpoints(Pod{Probes: probes}, drawSettings(t), live)
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range specs {
			if s.Staleness < s.Period/2 || s.SteadyStaleness < s.Staleness || s.Traffic > 0 && s.TrafficBound() < s.Period {
				t.Errorf("%+v: traffic bound %s", s, s.TrafficBound())
			}
			for i, d := range s.Delays() {
				p := s.probes[i]
				if d.Plain < max(p.Period, p.Timeout) || d.Probelet < d.Plain || d.Hang < d.Plain || d.Answered < d.Probelet {
					t.Errorf("%+v: %+v", p, d)
				}
				if s.SuccessThreshold < p.SuccessThreshold {
					t.Errorf("%d successes in a row suffice for %+v", s.SuccessThreshold, p)
				}
			}
		}
	})
}
