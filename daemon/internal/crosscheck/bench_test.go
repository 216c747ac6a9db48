package crosscheck

import (
	"bytes"
	"fmt"
	"net/http/httptest"
	"testing"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// BenchmarkParse parses the response of a kubelet that probes 500 containers twice.
func BenchmarkParse(b *testing.B) {
	m := newKubeletMetrics()
	for i := range 500 {
		for _, kind := range []probe.Type{probe.Liveness, probe.Readiness} {
			m.count(Worker{"default", fmt.Sprintf("web-%d", i), fmt.Sprintf("0c0ffee0-0000-0000-0000-%012d", i), "app", kind}, "successful", i+1)
		}
	}
	answer := httptest.NewRecorder()
	promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{}).ServeHTTP(answer, httptest.NewRequest("GET", Path, nil))
	text := answer.Body.Bytes()
	b.SetBytes(int64(len(text)))
	b.ReportAllocs()
	for b.Loop() {
		if all, err := parse(bytes.NewReader(text)); err != nil || len(all) != 1000 {
			b.Fatal(len(all), err)
		}
	}
}
