package agent

import (
	"context"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/datapath"
)

// lifecycleHook sends what the kubelet sends for an httpGet lifecycle hook, in the same way (kubelet.go,
// pkg/kubelet/lifecycle/handlers.go): by a client with the defaults of net/http, except for TLS.
func (n *node) lifecycleHook(headers http.Header) (byKernel bool) {
	n.t.Helper()
	transport := &http.Transport{
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, //nolint:gosec // as the kubelet
		DialContext: func(_ context.Context, _, address string) (net.Conn, error) {
			return n.pod.Dial(n.t, address), nil
		},
	}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(n.t.Context(), http.MethodGet, "http://"+n.pod.IPv4.String()+":8080/healthz", nil)
	if err != nil {
		n.t.Fatal(err)
	}
	request.Header = headers
	if headers.Get("User-Agent") == "" {
		request.Header.Set("User-Agent", "kube-lifecycle/1.37")
	}
	request.Header.Set("Accept", "*/*")
	before := n.served.Load()
	response, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Do(request)
	if err != nil {
		n.t.Fatalf("hook: %v", err)
	}
	defer response.Body.Close() //nolint:errcheck // read to its end
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		n.t.Fatalf("hook: %v", err)
	}
	byKernel = response.Header.Get("Cache-Status") != ""
	if served := n.served.Load() - before; served != 0 == byKernel {
		n.t.Fatalf("answered by the kernel: %v, and the server saw %d requests", byKernel, served)
	}
	return byKernel
}

func (n *node) counter(name string) uint64 {
	n.t.Helper()
	counters, err := n.d.Counters()
	if err != nil {
		n.t.Fatal(err)
	}
	return counters[name]
}

// A hook uses a port and a path that are answered. Its connection is taken, because its SYN looks like any other, and handed over, because
// its request differs.
func TestHook(t *testing.T) {
	n := newNode(t)
	n.container(`readinessProbe: {httpGet: {path: /healthz, port: 8080}, ` + long + `},
		lifecycle: {postStart: {httpGet: {path: /healthz, port: 8080}}}`)
	n.attach()
	n.start()
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))
	n.want("/healthz", 200, false)
	n.eventually("fresh", n.open(8080))
	handed := n.counter("handed_over")
	for name, headers := range map[string]http.Header{
		"no headers":       {},
		"Accept-Encoding":  {"Accept-Encoding": {"identity"}},
		"Range":            {"Range": {"bytes=0-1"}},
		"look-alike":       {"X-Last": {"Connection: close"}, "Accept-Encoding": {"identity"}},
		"like a probe":     {"Connection": {"close"}, "Accept-Encoding": {"identity"}},
		"User-Agent":       {"User-Agent": {"kube-probe/1.37"}},
		"all of a probe's": {"User-Agent": {"kube-probe/1.37"}, "Connection": {"close"}},
	} {
		n.want("/healthz", 200, true)
		if n.lifecycleHook(headers) {
			t.Errorf("%s: the hook was answered by the kernel", name)
		}
	}
	if got := n.counter("handed_over") - handed; got != 7 {
		t.Errorf("%d connections handed over, want 7", got)
	}
	n.want("/healthz", 200, true)
}
