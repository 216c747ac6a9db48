package crosscheck

import (
	"bytes"
	"context"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/probelet/probelet/daemon/internal/kubelet"
	"github.com/probelet/probelet/internal/polltest"
)

// scene is a kubelet and a node with made-up probes.
type scene struct {
	*httptest.Server
	metrics *kubeletMetrics
	refuse  atomic.Bool
	asked   atomic.Int32

	mutex  sync.Mutex
	counts Counts
	busy   time.Duration
	told   []Disagreement
	logged bytes.Buffer
}

func newScene(t *testing.T) *scene {
	t.Helper()
	s := &scene{metrics: newKubeletMetrics()}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.serve(t, listener)
	return s
}

func (s *scene) serve(t *testing.T, listener net.Listener) {
	t.Helper()
	handler := promhttp.HandlerFor(s.metrics.registry, promhttp.HandlerOpts{})
	s.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.asked.Add(1)
		if s.refuse.Load() || r.URL.Path != Path {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		handler.ServeHTTP(w, r)
	}))
	_ = s.Listener.Close()
	s.Listener = listener
	s.Start()
	t.Cleanup(s.Close)
}

func (s *scene) Observed(context.Context) (map[ID]Endpoint, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	time.Sleep(s.busy)
	return map[ID]Endpoint{id: {Workers: []Worker{ready}, Period: time.Millisecond, Discards: true, Counts: s.counts}}, nil
}

func (s *scene) Disagree(_ context.Context, d Disagreement) error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.told = append(s.told, d)
	return nil
}

func (s *scene) Write(p []byte) (int, error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.logged.Write(p)
}

func (s *scene) log() string {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.logged.String()
}

func (s *scene) disagreements() []Disagreement {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.told
}

// probe counts probes on both sides.
func (s *scene) probe(seen Counts, counted Verdicts) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.counts = Counts{s.counts.Answered + seen.Answered, s.counts.Succeeded + seen.Succeeded, s.counts.Other + seen.Other}
	s.metrics.count(ready, "successful", int(counted.Succeeded))
	s.metrics.count(ready, "failed", int(counted.Failed))
}

// run runs a checker.
func (s *scene) run(t *testing.T) {
	t.Helper()
	c, err := New(kubelet.Config{URL: s.URL + "/pods"}, s, 5*time.Millisecond, slog.New(slog.NewTextHandler(s, nil)))
	if err != nil {
		t.Fatal(err)
	}
	c.settle = 10 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); c.Run(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	s.looks(t, 2)
}

// looks waits for a number of further looks.
func (s *scene) looks(t *testing.T, n int32) {
	t.Helper()
	before := s.asked.Load()
	polltest.Eventually(t, "looked", func() bool { return s.asked.Load() > before+n })
}

func TestChecker(t *testing.T) {
	s := newScene(t)
	s.probe(Counts{5, 5, 2}, Verdicts{10, 2})
	s.run(t)
	s.probe(Counts{Answered: 5, Succeeded: 5, Other: 2}, Verdicts{10, 2})
	s.looks(t, 3)
	if told := s.disagreements(); told != nil {
		t.Fatal(described(told))
	}
	s.probe(Counts{Answered: 5, Succeeded: 5}, Verdicts{5, 5})
	polltest.Eventually(t, "told", func() bool { return s.disagreements() != nil })
	s.looks(t, 3)
	if got := described(s.disagreements()); got != "[failed 5]" {
		t.Error(got)
	}
}

// A restarted kubelet counts from 0, and may have counted more than its predecessor by the first look.
func TestCheckerOfRestartedKubelet(t *testing.T) {
	s := newScene(t)
	s.probe(Counts{Succeeded: 5}, Verdicts{5, 0})
	s.run(t)
	address := s.Listener.Addr().String()
	s.CloseClientConnections()
	s.Close()
	s.metrics = newKubeletMetrics()
	s.probe(Counts{Succeeded: 50}, Verdicts{7, 3})
	listener, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	s.serve(t, listener)
	s.looks(t, 4)
	if told := s.disagreements(); told != nil {
		t.Error(described(told))
	}
	if log := s.log(); strings.Count(log, "level=WARN") > 1 {
		t.Errorf("logged:\n%s", log)
	}
}

// The verdicts becoming unavailable is logged once, and so is their return.
func TestCheckerRefused(t *testing.T) {
	s := newScene(t)
	s.probe(Counts{Succeeded: 5}, Verdicts{5, 0})
	s.refuse.Store(true)
	s.run(t)
	s.refuse.Store(false)
	polltest.Eventually(t, "logged", func() bool { return strings.Contains(s.log(), "are available again") })
	if log := s.log(); strings.Count(log, "level=WARN") != 1 || !strings.Contains(log, "403 Forbidden") {
		t.Errorf("logged:\n%s", log)
	}
}

// A daemon that is slow to report its observations may not have all of them yet.
func TestCheckerOfABusyDaemon(t *testing.T) {
	s := newScene(t)
	s.probe(Counts{Succeeded: 5}, Verdicts{5, 0})
	c, err := New(kubelet.Config{URL: s.URL + "/pods"}, s, time.Millisecond, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	c.settle = 10 * time.Millisecond
	s.busy = c.settle
	if _, err := c.look(t.Context()); err != errBusy {
		t.Error(err)
	}
}
