package cluster

import (
	"context"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/probelet/probelet/e2e/harness/kube"
)

// steady watches healthy pods: they must stay Ready and not be restarted, and none of their probes may fail.
type steady struct {
	t    *testing.T
	pods []*corev1.Pod
	then map[string]condition
}

type condition struct {
	ready    time.Time // since when; changes if the pod becomes Ready again
	restarts int
	failed   int // probes, since the kubelet's start
}

func watchSteady(t *testing.T, pods ...*corev1.Pod) *steady {
	t.Helper()
	s := &steady{t: t, pods: pods, then: map[string]condition{}}
	for _, pod := range pods {
		s.then[pod.Name] = conditionOf(t, pod)
	}
	return s
}

func conditionOf(t *testing.T, pod *corev1.Pod) (now condition) {
	t.Helper()
	pod, err := cluster.Get(context.Background(), pod)
	must(t, err)
	for _, c := range pod.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue {
			now.ready = c.LastTransitionTime.Time
		}
	}
	now.restarts, now.failed = kube.Restarts(pod), failures(t, pod)
	return now
}

// failures returns how many probes of a pod have failed according to the kubelet, for all containers including init
// containers.
func failures(t *testing.T, pod *corev1.Pod) (failed int) {
	t.Helper()
	counts, err := cluster.ProbeCounts(context.Background(), pod)
	must(t, err)
	for _, kinds := range counts {
		for _, count := range kinds {
			failed += count.Failed
		}
	}
	return failed
}

// kubeletEnds must be called before the kubelet is stopped, which resets its counts.
func (s *steady) kubeletEnds() {
	s.t.Helper()
	s.end()
	for name, then := range s.then {
		then.failed = 0
		s.then[name] = then
	}
}

// end reports what went wrong.
func (s *steady) end() {
	s.t.Helper()
	for _, pod := range s.pods {
		then, now := s.then[pod.Name], conditionOf(s.t, pod)
		if now.ready.IsZero() || !now.ready.Equal(then.ready) || now.restarts != then.restarts || now.failed != then.failed {
			s.t.Errorf("%s was %+v, is %+v\n%s\n%s", pod.Name, then, now, events(s.t, pod), daemonLog())
		}
		if !installed() {
			continue
		}
		for _, e := range readStatus(s.t).of(pod.Name).Endpoints {
			if e.Disagreement != "" {
				s.t.Errorf("%s: the kubelet's verdict on %s %d%s differs", pod.Name, e.Kind, e.Port, e.Path)
			}
		}
	}
}
