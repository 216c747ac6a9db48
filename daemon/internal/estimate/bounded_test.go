package estimate

import (
	"encoding/json"
	"fmt"
	"math"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"pgregory.net/rapid"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// anySeconds draws what the API server accepts, of every order of magnitude.
func anySeconds(rt *rapid.T, label string) int32 {
	most := int64(1) << rapid.IntRange(0, 31).Draw(rt, label+" up to 2^")
	return int32(rapid.Int64Range(1, min(most, math.MaxInt32)).Draw(rt, label))
}

func anyProbe(rt *rapid.T) *corev1.Probe {
	port := intstr.FromInt32(rapid.Int32Range(80, 81).Draw(rt, "port"))
	p := &corev1.Probe{
		PeriodSeconds: anySeconds(rt, "period"), TimeoutSeconds: anySeconds(rt, "timeout"), FailureThreshold: anySeconds(rt, "failures"),
	}
	switch rapid.IntRange(0, 3).Draw(rt, "kind") {
	case 0:
		p.TCPSocket = &corev1.TCPSocketAction{Port: port}
	case 1:
		p.Exec = &corev1.ExecAction{}
	default:
		p.HTTPGet = &corev1.HTTPGetAction{Port: port, Path: rapid.SampledFrom([]string{"/a", "/b"}).Draw(rt, "path")}
	}
	return p
}

func anyPod(rt *rapid.T) Replicated {
	pod := Replicated{Replicas: 1}
	pod.Name, pod.Namespace, pod.Annotations = "p", "n", map[string]string{}
	for name, values := range map[string][]string{
		probe.AnnotationStaleness: {"", "0.5", "2", "5"}, probe.AnnotationRefresh: {"", "true", "100ms", "1000h"},
	} {
		if value := rapid.SampledFrom(values).Draw(rt, name); value != "" {
			pod.Annotations[name] = value
		}
	}
	for i := range rapid.IntRange(1, 5).Draw(rt, "containers") {
		c := corev1.Container{Name: fmt.Sprintf("c%d", i), LivenessProbe: anyProbe(rt)}
		if rapid.Bool().Draw(rt, "ready") {
			c.ReadinessProbe = anyProbe(rt)
		}
		if rapid.Bool().Draw(rt, "starts") {
			c.StartupProbe = anyProbe(rt)
		}
		pod.Spec.Containers = append(pod.Spec.Containers, c)
	}
	return pod
}

// Whatever the periods are, the model takes few steps, and every number is one.
func TestAnyPeriods(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		pod := anyPod(rt)
		for _, policy := range Policies() {
			specs, err := probe.Endpoints(newPod(&pod).Pod, policy.settings(pod.Annotations), Limits)
			if err != nil {
				rt.Fatal(err)
			}
			for _, place := range places(specs) {
				b := place.bounded()
				if n := b.events() * b.draws(); n > manyEvents {
					rt.Fatalf("%s: %d events: %+v", policy, n, place)
				}
				for _, share := range b.average(b.draws()) {
					if !(share >= 0 && share <= 1) {
						rt.Fatalf("%s: share %g: %+v", policy, share, place)
					}
				}
			}
		}
		r := Pods([]Replicated{pod})
		text, err := json.Marshal(r)
		if err != nil {
			rt.Fatal(err)
		}
		var out strings.Builder
		if err := r.print(&out, 0, true); err != nil {
			rt.Fatal(err)
		}
		if strings.Contains(out.String(), "NaN") || strings.Contains(out.String(), "Inf") {
			rt.Fatalf("%s\n%s", out.String(), text)
		}
		for _, k := range r.Total.Probes {
			if k.PerSecond <= 0 {
				rt.Fatalf("%s", text)
			}
		}
		for _, o := range r.Total.Policies {
			for kind, share := range o.AnsweredByKind {
				if share < 0 || share > 1 {
					rt.Fatalf("%s: %s: %g answered", o.Policy, kind, share)
				}
			}
		}
	})
}

// Shorter periods in the place of very long ones leave the shares as they are.
func TestBoundedPortsHaveTheSameShares(t *testing.T) {
	const long = time.Hour
	for name, test := range map[string]struct {
		defaults probe.Defaults
		probes   []probe.Spec
	}{
		"two paths":           {defaults(1, false), []probe.Spec{get(probe.Readiness, "/a", time.Second), get(probe.Liveness, "/b", long)}},
		"one path":            {defaults(1, false), []probe.Spec{get(probe.Readiness, "/a", time.Second), get(probe.Liveness, "/a", long)}},
		"HTTP and TCP":        {defaults(1, false), []probe.Spec{get(probe.Readiness, "/a", time.Second), tcp(probe.Liveness, long)}},
		"TCP and HTTP":        {defaults(1, false), []probe.Spec{tcp(probe.Readiness, time.Second), get(probe.Liveness, "/a", long)}},
		"staleness 5":         {defaults(5, false), []probe.Spec{get(probe.Readiness, "/a", time.Second), get(probe.Liveness, "/b", long)}},
		"refresh":             {defaults(1, true), []probe.Spec{get(probe.Readiness, "/a", time.Second), get(probe.Liveness, "/b", long)}},
		"two long, one path":  {defaults(2, false), []probe.Spec{get(probe.Readiness, "/a", time.Second), get(probe.Liveness, "/b", long), get(probe.Readiness, "/b", 2*long)}},
		"two long, two paths": {defaults(1, false), []probe.Spec{get(probe.Readiness, "/a", time.Second), get(probe.Liveness, "/b", long), get(probe.Readiness, "/c", 2*long)}},
	} {
		for i := range test.probes {
			test.probes[i].Container = fmt.Sprint(i)
		}
		for _, place := range places(endpoints(t, test.defaults, 9, test.probes...)) {
			if place.bounded().events() == place.events() {
				t.Errorf("%s: not bounded", name)
			}
			got, want := place.bounded().average(phases), place.average(phases)
			for i := range want {
				if math.Abs(got[i]-want[i]) > .05 {
					t.Errorf("%s: %.4f, want %.4f: %+v", name, got, want, place.askers)
					break
				}
			}
		}
	}
}

// A lone probe is answered every second time, however long its period.
func TestLongestPeriod(t *testing.T) {
	for _, period := range []int{1, 10, 31536000, math.MaxInt32} {
		g := reportOf(t, podText("a", "", "", "", fmt.Sprintf("livenessProbe: {httpGet: {port: 80}, periodSeconds: %d}", period))).Total
		if got := policy(t, g, Default).Answered; !near(got, .5) || g.Answerable.Probes != 1 {
			t.Errorf("period %d: %g answered", period, got)
		}
	}
}
