package agent

import (
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/daemon/internal/agent/metrics"
	"github.com/probelet/probelet/daemon/internal/api"
)

// The level of the log is changed while the daemon runs.
func TestLogLevel(t *testing.T) {
	n := newNode(t)
	n.config.LogLevel = &slog.LevelVar{}
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.start()
	n.eventually("listens", func() bool { return api.NewClient(n.config.StateDir).SetLogLevel(t.Context(), slog.LevelDebug) == nil })
	if got := n.config.LogLevel.Level(); got != slog.LevelDebug {
		t.Errorf("the level is %s", got)
	}
}

// Profiles are for who may read the socket: root of the node. On TCP there are none.
func TestProfilesAreLocal(t *testing.T) {
	handlers := map[bool]http.Handler{true: api.Local(nil, nil, nil), false: api.Health(nil, nil)}
	for local, handler := range handlers {
		for _, path := range []string{"/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/profile?seconds=1"} {
			reply := httptest.NewRecorder()
			handler.ServeHTTP(reply, httptest.NewRequest(http.MethodGet, path, nil))
			if found := reply.Code == http.StatusOK; found != local {
				t.Errorf("%s is there: %v, on the socket: %v", path, found, local)
			}
		}
	}
}

// Who describes a pod with an annotation that cannot be used is told so, once.
func TestEventsOfBadAnnotations(t *testing.T) {
	posted := make(chan string, 10)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		text, _ := io.ReadAll(r.Body)
		posted <- r.URL.Path + " " + string(text)
		w.WriteHeader(http.StatusConflict)
	}))
	defer server.Close()
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	text := "{apiVersion: v1, kind: Config, current-context: c, contexts: [{name: c, context: {cluster: k}}], clusters: [{name: k, cluster: {server: '" + server.URL + "'}}]}"
	if err := os.WriteFile(kubeconfig, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	k := newKept(t)
	k.reporter = newReporter(Config{Source: "kubelet", Kubeconfig: kubeconfig, Events: true, NodeName: "node-1"}, k.agent.log)
	go k.reporter.Run(t.Context())
	k.adopted()
	k.pods = slices.Clone(k.pods)
	k.pods[0].Annotations = map[string]string{"probelet.dev/stalenes": "2"}
	for range 2 {
		k.update(false)
	}
	var got string
	select {
	case got = <-posted:
	case <-time.After(10 * time.Second):
	}
	if !strings.HasPrefix(got, "/api/v1/namespaces/shop/events ") || !strings.Contains(got, "probelet.dev/stalenes") {
		t.Errorf("posted %q", got)
	}
	select {
	case again := <-posted:
		t.Errorf("posted again: %q", again)
	case <-time.After(50 * time.Millisecond):
	}
}

// The metrics are passed on, and nothing else of what the daemon's socket has.
func TestMetricsProxy(t *testing.T) {
	n := newNode(t)
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	stop := n.start()
	n.eventually("listens", func() bool { _, err := api.NewClient(n.config.StateDir).Endpoints(t.Context()); return err == nil })
	proxy := httptest.NewServer(metrics.Proxy(n.config.StateDir))
	defer proxy.Close()
	ask := func(method, path string) (status int, text string) {
		t.Helper()
		request, err := http.NewRequestWithContext(t.Context(), method, proxy.URL+path, strings.NewReader(`{}`))
		if err != nil {
			t.Fatal(err)
		}
		response, err := http.DefaultClient.Do(request)
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close() //nolint:errcheck // read only
		body, _ := io.ReadAll(response.Body)
		return response.StatusCode, string(body)
	}
	if status, text := ask(http.MethodGet, "/metrics"); status != http.StatusOK || !strings.Contains(text, "probelet_build_info") {
		t.Errorf("metrics: %d, %.200s", status, text)
	}
	for _, path := range []string{"/v1/endpoints", "/v1/invalidate", "/debug/pprof/", "/metrics/../v1/endpoints", "/"} {
		for _, method := range []string{http.MethodGet, http.MethodPost, http.MethodPut} {
			if status, text := ask(method, path); status < 400 {
				t.Errorf("%s %s: %d, %.200s", method, path, status, text)
			}
		}
	}
	stop()
	if status, _ := ask(http.MethodGet, "/metrics"); status != http.StatusBadGateway {
		t.Errorf("without a daemon: %d", status)
	}
}
