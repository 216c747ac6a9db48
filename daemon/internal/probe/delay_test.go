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
	limits := limits
	limits.Live = 9
	liveness := with(probe(10, 1, 3), func(s *Spec) { s.Type = Liveness })
	tcp := with(liveness, func(s *Spec) { s.Kind, s.Path = TCP, "" })
	for name, test := range map[string]struct {
		probes      []Spec
		annotations map[string]string
		// of the first one
		plain, probelet, hang time.Duration
	}{
		"default":          {[]Spec{probe(10, 1, 3)}, nil, 31, 42, 42},
		"one failure":      {[]Spec{probe(2, 1, 1)}, nil, 3, 6, 6},
		"half a period":    {[]Spec{probe(10, 1, 3)}, map[string]string{AnnotationStaleness: "0.5"}, 31, 37, 37},
		"five periods":     {[]Spec{probe(10, 1, 3)}, map[string]string{AnnotationStaleness: "5"}, 31, 82, 82},
		"long timeout":     {[]Spec{probe(2, 5, 2)}, nil, 15, 18, 18},
		"no threshold":     {[]Spec{probe(10, 1, 0)}, nil, 11, 22, 22},
		"observed only":    {[]Spec{probe(10, 1, 3)}, map[string]string{AnnotationMode: "observe"}, 31, 31, 31},
		"off":              {[]Spec{probe(10, 1, 3)}, map[string]string{AnnotationMode: "off"}, 31, 31, 31},
		"never answered":   {[]Spec{with(probe(10, 1, 3), func(s *Spec) { s.Kind = GRPC })}, nil, 31, 31, 31},
		"with another one": {[]Spec{probe(10, 3, 3), with(probe(5, 1, 1), func(s *Spec) { s.Type = Liveness })}, nil, 33, 33 + 6, 33 + 6},
		"TCP":              {[]Spec{tcp}, nil, 31, 31 + 101, 31 + 101},
		"TCP, traffic":     {[]Spec{tcp}, map[string]string{AnnotationLiveness: "traffic"}, 31, 31 + 111, 31 + 101},
		"traffic":          {[]Spec{liveness}, map[string]string{AnnotationLiveness: "traffic"}, 31, 31 + 111, 31 + 11},
		"traffic, its window is longest": {
			[]Spec{liveness}, map[string]string{AnnotationLiveness: "traffic", AnnotationStaleness: "0.5"}, 31, 31 + 111, 31 + 10,
		},
		"traffic, steady": {
			[]Spec{liveness}, map[string]string{AnnotationLiveness: "traffic", AnnotationStaleness: "0.5-5"}, 31, 31 + 111, 31 + 51,
		},
		"traffic, observed only": {
			[]Spec{liveness}, map[string]string{AnnotationLiveness: "traffic", AnnotationMode: "observe"}, 31, 31, 31,
		},
		"traffic is no evidence": {[]Spec{probe(10, 1, 3)}, map[string]string{AnnotationLiveness: "traffic"}, 31, 42, 42},
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
			if d := delays[0]; d.Hang != test.hang*time.Second {
				t.Errorf("of a pod that no longer serves anyone %s, want %ds", d.Hang, test.hang)
			}
			if d := delays[0]; (d.Answered != d.Probelet) != (test.annotations[AnnotationMode] == "observe") || d.Answered < d.Probelet {
				t.Errorf("with probelet %s, if answered %s", d.Probelet, d.Answered)
			}
		})
	}
}
