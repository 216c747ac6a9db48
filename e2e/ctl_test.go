package e2e

import (
	"regexp"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/probelet/probelet/e2e/harness/node"
)

func (s *scene) ctl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := s.Ctl(args...)
	must(t, err)
	return out
}

func expectText(t *testing.T, text string, patterns ...string) {
	t.Helper()
	for _, pattern := range patterns {
		if !regexp.MustCompile(pattern).MatchString(text) {
			t.Errorf("no %q in\n%s", pattern, text)
		}
	}
}

// The answers to a user's questions about a pod, with and without the daemon.
func TestExplainAndInvalidate(t *testing.T) {
	s := newScene(t, node.PTP)
	p := s.newFreshPod(longHTTP, longTCP)
	name := node.Namespace + "/" + p.Name
	p.probe(longHTTP, p.IPv4, 3)
	p.probe(longTCP, p.IPv4, 3)
	expectText(t, s.ctl(t, "explain", name),
		`probeletd: running`,
		`default/pod1  device \w+, container `,
		`mode answer \(default\), staleness 1 \(default\), refresh false \(default\)`,
		`(?s)HTTP :8080/healthz\n +state +fresh, status 200, observed .* ago\n +next probe +answered in the kernel, for another (10m|9m5\d)`,
		`bound +a success is answered for 10m1s`,
		`container0/readiness +every 10m0s, timeout 1s, threshold 3: a failure is detected within 40m2s \(30m1s without probelet\)`,
		`ago +observed by probe: success 200, took `,
		`ago +answered in the kernel \(3 so far\)`,
		`(?s)TCP :9090\n +state +fresh, observed`,
		`listening socket +3 of at most 9 probes were answered since a connection was last known to be accepted\n`,
	)
	expectText(t, s.ctl(t, "status", "-o", "wide"), `TCP :9090 +fresh .* proven +3/9 `)
	p.probe(longTCP, p.IPv4, 6)
	expectText(t, s.ctl(t, "explain", name), `reaches the pod: the maximum of 9 probes in a row were answered, so the pod must accept one`)
	p.probe(longTCP, p.IPv4, 1)
	expectText(t, s.ctl(t, "explain", name),
		`9 of at most 9 probes were answered since a connection was last known to be accepted, and another has reached the pod since; the last one passed on: the maximum of probes in a row had been answered`)
	schema, err := jsonschema.NewCompiler().Compile("../docs/status.schema.json")
	must(t, err)
	status, err := jsonschema.UnmarshalJSON(strings.NewReader(s.ctl(t, "status", "-o", "json")))
	must(t, err)
	if err := schema.Validate(status); err != nil {
		t.Error(err)
	}
	expectText(t, s.ctl(t, "top", "--iterations", "1", "-d", "100ms"),
		`answered/s: 0.0 HTTP`, `default/pod1 +HTTP :8080/healthz +fresh +\S+ +0\.0 +3\n`)

	expectText(t, s.ctl(t, "invalidate", name, "--path", healthz), `withdrawn for default/pod1:\n  HTTP :8080/healthz\n$`)
	requests := p.seen(httpPort).Requests
	p.probe(longHTTP, p.IPv4, 1)
	if got := p.seen(httpPort).Requests - requests; got != 1 {
		t.Errorf("%d of 1 probes reached the pod", got)
	}
	must(t, s.AwaitState(p.Pod, longHTTP.Port, longHTTP.Path, node.Fresh))
	expectText(t, s.ctl(t, "explain", name),
		`(?s)withdrawn on request.*observed by probe: success 200`)
	if err := p.Close(tcpPort); err != nil {
		t.Fatal(err)
	}
	expectText(t, s.ctl(t, "explain", name),
		`(?s)TCP :9090\n +state +stale, observed .*reaches the pod: withdrawn: a listening socket of the pod was closed`,
		`ago +withdrawn by the kernel: a listening socket of the pod was closed`)

	p.probe(longHTTP, p.IPv4, 1) // closing the socket withdrew this evidence, too
	must(t, s.AwaitState(p.Pod, longHTTP.Port, longHTTP.Path, node.Fresh))
	s.daemon.Kill()
	text := s.ctl(t, "explain", name)
	expectText(t, text, `probeletd: NOT RUNNING; [12] endpoints? (is|are) still answered in the kernel, until \d\d:\d\d:\d\d \S+ \(\d+m.* from now\)`, `next probe +answered in the kernel`, `answered in the kernel \(3 so far\)`)
	if strings.Contains(text, "observed by probe") {
		t.Errorf("shows what only the daemon knows:\n%s", text)
	}
	for want, args := range map[string][]string{
		`probeletd is not running, and only it can withdraw evidence; default/pod1: 1 endpoint is still answered in the kernel, until `: {"invalidate", name},
		`"pod1": must be NAMESPACE/POD, or POD with --namespace`:                                                                        {"invalidate", "pod1"},
		`pod default/pod7 is not known on this node`:                                                                                    {"explain", "default/pod7"},
		`--interval 1ms: must be at least 100ms`:                                                                                        {"top", "-d", "1ms"},
	} {
		if _, err := s.Ctl(args...); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", args, err)
		}
	}
	s.startDaemon()
	must(t, s.AwaitState(p.Pod, longHTTP.Port, longHTTP.Path, node.Fresh))
	if _, err := s.Ctl("invalidate", "default/pod7"); err == nil || !strings.Contains(err.Error(), "default/pod7") {
		t.Errorf("unknown pod: %v", err)
	}
}
