package agent

import (
	"net/http"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// With refresh, one probe is enough: from then on the daemon asks the pod itself, although the pod is fresh and every local process is a
// prober, and all further probes are answered.
func TestRefresh(t *testing.T) {
	n := newNode(t)
	n.config.Defaults.Refresh = probe.Refresh{On: true, Interval: 100 * time.Millisecond}
	n.specs("httpGet: {path: /healthz, port: 8080}, " + short)
	n.attach()
	n.start()
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))
	if got := n.served.Load(); got != 0 {
		t.Fatalf("asked %d times before any probe", got)
	}
	n.want("/healthz", 200, false)
	n.eventually("fresh", n.open(8080))
	healthz := n.key("/healthz")
	first := n.records()[healthz].ObservedAt
	n.eventually("renewed, over more than one bound", func() bool {
		return n.records()[healthz].ObservedAt > first+uint64(5*time.Second)
	})
	if !n.open(8080)() {
		t.Error("not fresh")
	}
	counters, err := n.d.Counters()
	if err != nil {
		t.Fatal(err)
	}
	if counters["answered_http"] != 0 || n.served.Load() < 20 {
		t.Errorf("the kernel answered %d of the daemon's own requests, the pod %d", counters["answered_http"], n.served.Load()-1)
	}

	// The failure is noticed without a probe.
	n.status.Store(http.StatusServiceUnavailable)
	n.eventually("withdrawn", not(n.open(8080)))
	n.eventually("failed", func() bool { return n.records()[healthz].Result == datapath.ResultFailure })
	n.status.Store(http.StatusOK)
	served := n.served.Load()
	time.Sleep(500 * time.Millisecond)
	if got := n.served.Load() - served; got != 0 {
		t.Errorf("asked %d times after a failure, before a probe has succeeded", got)
	}
	n.want("/healthz", 200, false)
	n.eventually("fresh again", n.open(8080))
	n.eventually("asked again", func() bool { return n.served.Load() > served+5 })
}

// A TCP endpoint is refreshed by connecting.
func TestRefreshTCP(t *testing.T) {
	n := newNode(t)
	n.config.Defaults.Refresh = probe.Refresh{On: true, Interval: 100 * time.Millisecond}
	n.specs("tcpSocket: {port: 9090}, " + short)
	n.attach()
	n.start()
	key := datapath.TCPKey(9090)
	n.eventually("the probe's endpoint is known", n.has(key))
	listener := n.pod.Listen(t, 9090)
	_ = n.pod.Dial(t, n.pod.IPv4.String()+":9090").Close()
	n.eventually("known", func() bool { return n.records()[key].ObservedAt != 0 })
	if e := n.endpoint(); e.Live > 0 {
		if e.Refresh != 0 || e.RefreshOff == "" {
			t.Errorf("the listening socket is inspected, but refresh is every %g s, off: %q", e.Refresh, e.RefreshOff)
		}
		return
	}
	first := n.records()[key].ObservedAt
	n.eventually("renewed", func() bool { return n.records()[key].ObservedAt > first+uint64(3*time.Second) })
	_ = listener.Close()
	n.eventually("withdrawn", not(n.open(9090)))
	n.eventually("refused", func() bool { return n.records()[key].Result == datapath.ResultFailure })
}
