package crosscheck

import (
	"maps"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// kubeletMetrics counts probes as the kubelet does, and exposes the counts with the same library
// (pkg/kubelet/prober/prober_manager.go, pkg/kubelet/server/server.go).
type kubeletMetrics struct {
	registry *prometheus.Registry
	results  *prometheus.CounterVec
	duration *prometheus.HistogramVec
}

func newKubeletMetrics() *kubeletMetrics {
	labels := []string{"probe_type", "container", "pod", "namespace"}
	m := &kubeletMetrics{
		prometheus.NewRegistry(),
		prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "prober_probe_total", Help: "Cumulative number of a liveness, readiness or startup probe for a container by result.",
		}, append(labels, "result", "pod_uid")),
		prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: "prober_probe_duration_seconds"}, labels),
	}
	m.registry.MustRegister(m.results, m.duration)
	return m
}

func (m *kubeletMetrics) count(w Worker, result string, n int) {
	labels := prometheus.Labels{
		"probe_type": map[probe.Type]string{probe.Liveness: "Liveness", probe.Readiness: "Readiness", probe.Startup: "Startup"}[w.Type],
		"container":  w.Container, "pod": w.Pod, "namespace": w.Namespace,
	}
	m.duration.With(labels).Observe(0.01)
	labels["result"], labels["pod_uid"] = result, w.UID
	m.results.With(labels).Add(float64(n))
}

func TestParse(t *testing.T) {
	m := newKubeletMetrics()
	live := Worker{"shop", "web", "1234", "app", probe.Liveness}
	ready, odd := live, live
	ready.Type, odd.Container, odd.Type = probe.Readiness, "a\"b\\c\n}", probe.Startup
	m.count(live, "successful", 1<<40)
	m.count(live, "failed", 2)
	m.count(live, "unknown", 3)
	m.count(ready, "failed", 4)
	m.count(odd, "successful", 5)
	answer := httptest.NewRecorder()
	promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}).ServeHTTP(answer, httptest.NewRequest("GET", Path, nil))
	got, err := parse(answer.Body)
	want := map[Worker]Verdicts{live: {1 << 40, 5}, ready: {0, 4}, odd: {5, 0}}
	if err != nil || !maps.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
}

func TestParseErrors(t *testing.T) {
	for text, fails := range map[string]bool{
		"": false,
		"prober_probe_total_of_another{result=\"x\"} 1\nprober_probe_total_created{result=\"x\"} 1\n": false,
		"prober_probe_total{result=\"successful\"} 1":                                                 false,
		"prober_probe_total{result=\"skipped\"} 1\n":                                                  true,
		"prober_probe_total{result=\"successful\" 1\n":                                                true,
		"prober_probe_total{result=\"successful\"} many\n":                                            true,
		"# " + strings.Repeat("x", maxLine) + "\n":                                                    true,
	} {
		if _, err := parse(strings.NewReader(text)); (err != nil) != fails {
			t.Errorf("%.60q: %v", text, err)
		}
	}
}
