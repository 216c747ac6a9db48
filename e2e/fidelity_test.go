package e2e

import (
	"net/http"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/e2e/harness/node"
	"github.com/probelet/probelet/e2e/harness/role"
)

// The kubelet's prober detects a failing pod, however it fails, within the documented bound, counted in probes: at most as
// many probes are still answered as the staleness covers, then all fail. The next probe sees the recovery.
func TestFailuresAreDetectedWithinTheBound(t *testing.T) {
	needBTF(t)
	for name, test := range map[string]struct {
		fail, recover func(*pod) error
	}{
		"hangs":   {(*pod).freeze, (*pod).thaw},
		"errors":  {func(p *pod) error { return p.SetStatus(http.StatusInternalServerError) }, func(p *pod) error { return p.SetStatus(http.StatusOK) }},
		"closes":  {func(p *pod) error { return p.Close(httpPort) }, func(p *pod) error { return p.Listen(httpPort) }},
		"crashes": {func(p *pod) error { p.Stop(); return nil }, (*pod).restart},
	} {
		for mode, flags := range map[string][]string{"alone": nil, "with refresh": {"--refresh", "200ms"}} {
			t.Run(name+" "+mode, func(t *testing.T) {
				t.Parallel()
				s := newScene(t, node.PTP, flags...)
				every := node.Probe{Port: httpPort, Path: healthz, PeriodSeconds: 1, TimeoutSeconds: 1}
				p := s.newFreshPod(every)
				w := &worker{t: t, p: p, probe: every}
				for range 2 {
					w.healthy(4)
					must(t, test.fail(p))
					w.detects()
					must(t, test.recover(p))
				}
				w.healthy(2)
				if p.hits(every) == 0 {
					t.Error("no probe was answered")
				}
			})
		}
	}
}

// worker probes once per second, as the kubelet's worker does.
type worker struct {
	t     *testing.T
	p     *pod
	probe node.Probe
}

// once sends one probe and reports whether it succeeded, one period after it began.
func (w *worker) once() bool {
	w.t.Helper()
	probes := probesOf(w.probe, w.p.IPv4, 1)
	probes.Every = time.Second
	result, err := w.p.s.prober.Probe(probes)
	must(w.t, err)
	return result.Failures == 0
}

func (w *worker) healthy(probes int) {
	w.t.Helper()
	for i := range probes {
		if !w.once() {
			w.t.Fatalf("probe %d of a healthy pod failed", i+1)
		}
	}
}

const (
	threshold = 3
	// answeredAtMost is how many probes, one second apart, the default staleness covers: one and a half periods from the last
	// success, which may come from a request of the daemon after the last probe.
	answeredAtMost = 2
)

// detects checks the verdict after a failure. Time is counted in probes: on a slow machine, fewer of them are answered.
func (w *worker) detects() {
	w.t.Helper()
	successes, failures := 0, 0
	for failures < threshold {
		switch {
		case !w.once():
			failures++
		case failures > 0:
			w.t.Fatalf("a success after %d failures of a failing pod", failures)
		default:
			if successes++; successes > answeredAtMost {
				w.t.Fatalf("%d probes of a failing pod succeeded", successes)
			}
		}
	}
}

func (p *pod) freeze() error { return unix.Kill(p.Pid(), unix.SIGSTOP) }
func (p *pod) thaw() error   { return unix.Kill(p.Pid(), unix.SIGCONT) }

// restart starts a new server in the pod.
func (p *pod) restart() error {
	server, err := role.StartServer(p.Netns)
	if err != nil {
		return err
	}
	p.s.t.Cleanup(server.Stop)
	p.Server = server
	return server.Listen(httpPort, tcpPort)
}

// Killing and restarting the daemon over and over fails no probe and loses no evidence.
func TestDaemonRestartsUnderProbes(t *testing.T) {
	s := newScene(t, node.PTP)
	p := s.newFreshPod(longHTTP)
	probing := make(chan error, 1)
	var failures int
	go func() {
		probes := probesOf(longHTTP, p.IPv4, 300)
		probes.Every = 10 * time.Millisecond
		result, err := s.prober.Probe(probes)
		failures = result.Failures
		probing <- err
	}()
	requests := p.seen(httpPort).Requests
	for range 5 {
		s.daemon.Kill()
		time.Sleep(100 * time.Millisecond)
		s.startDaemon()
		must(t, s.AwaitState(p.Pod, longHTTP.Port, longHTTP.Path, node.Fresh))
		time.Sleep(100 * time.Millisecond)
	}
	must(t, <-probing)
	if got := p.seen(httpPort).Requests - requests; failures > 0 || got > 0 {
		t.Errorf("%d probes failed; %d reached the pod in spite of fresh evidence", failures, got)
	}
}
