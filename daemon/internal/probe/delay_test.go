package probe

import (
	"testing"
	"time"
)

func TestDelays(t *testing.T) {
	probe := func(period, timeout time.Duration, threshold int) Spec {
		return with(httpProbe(Readiness, "/x"), func(s *Spec) {
			s.Period, s.Timeout, s.FailureThreshold = period*time.Second, timeout*time.Second, threshold
		})
	}
	for name, test := range map[string]struct {
		probes          []Spec
		annotations     map[string]string
		plain, probelet time.Duration // of the first one
	}{
		"default":          {[]Spec{probe(10, 1, 3)}, nil, 31, 42},
		"one failure":      {[]Spec{probe(2, 1, 1)}, nil, 3, 6},
		"half a period":    {[]Spec{probe(10, 1, 3)}, map[string]string{AnnotationStaleness: "0.5"}, 31, 37},
		"five periods":     {[]Spec{probe(10, 1, 3)}, map[string]string{AnnotationStaleness: "5"}, 31, 82},
		"long timeout":     {[]Spec{probe(2, 5, 2)}, nil, 15, 18},
		"no threshold":     {[]Spec{probe(10, 1, 0)}, nil, 11, 22},
		"observed only":    {[]Spec{probe(10, 1, 3)}, map[string]string{AnnotationMode: "observe"}, 31, 31},
		"off":              {[]Spec{probe(10, 1, 3)}, map[string]string{AnnotationMode: "off"}, 31, 31},
		"never answered":   {[]Spec{with(probe(10, 1, 3), func(s *Spec) { s.Kind = GRPC })}, nil, 31, 31},
		"with another one": {[]Spec{probe(10, 3, 3), with(probe(5, 1, 1), func(s *Spec) { s.Type = Liveness })}, nil, 33, 33 + 6},
	} {
		t.Run(name, func(t *testing.T) {
			specs, err := Endpoints(Pod{Probes: test.probes}, NewDefaults().Settings(test.annotations), limits)
			if err != nil || len(specs) != 1 {
				t.Fatal(specs, err)
			}
			delays := specs[0].Delays()
			if len(delays) != len(test.probes) {
				t.Fatalf("%d delays", len(delays))
			}
			for i, d := range delays {
				if d.Asker != specs[0].Askers[i] {
					t.Errorf("%s, want %s", d.Asker, specs[0].Askers[i])
				}
			}
			if d := delays[0]; d.Plain != test.plain*time.Second || d.Probelet != test.probelet*time.Second {
				t.Errorf("plain %s, with probelet %s; want %ds, %ds", d.Plain, d.Probelet, test.plain, test.probelet)
			}
			if d := delays[0]; (d.Answered != d.Probelet) != (name == "observed only") || d.Answered < d.Probelet {
				t.Errorf("with probelet %s, if answered %s", d.Probelet, d.Answered)
			}
		})
	}
}
