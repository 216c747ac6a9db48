package simulate

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

func TestNothingIsViolated(t *testing.T) {
	for _, s := range Scenarios() {
		t.Run(s.Name, func(t *testing.T) {
			t.Parallel()
			r := s.Run(4, 12*time.Hour, 1, nil)
			if len(r.Violations) > 0 {
				t.Errorf("%s", strings.Join(r.Violations, "\n"))
			}
			if r.Detected == 0 || r.Hangs == 0 || r.Verdicts == 0 || r.Answered == 0 {
				t.Errorf("nothing happened: %+v", r)
			}
			// Mode observe predicts mode answer. It leaves out refresh, strangers and traffic.
			predicted, answered := float64(r.Predicted)/float64(r.Probes), r.TotalHitRate()
			off := .01
			if s.config.Defaults.Staleness.Short != s.config.Defaults.Staleness.Long {
				off = .03 // a daemon that restarts does not know since when an endpoint has been well
			}
			if !s.config.Defaults.Refresh.On && s.config.Strangers == nil && s.config.Clients == 0 && math.Abs(predicted-answered) > off {
				t.Errorf("predicted %.3f, answered %.3f", predicted, answered)
			}
		})
	}
}

func TestSameSeedGivesSamePod(t *testing.T) {
	s := Scenarios()[0]
	a, b := s.Run(2, 6*time.Hour, 7, nil), s.Run(2, 6*time.Hour, 7, nil)
	if a.Probes != b.Probes || a.Answered != b.Answered || a.WorstDelay != b.WorstDelay || a.Refreshes != b.Refreshes {
		t.Errorf("%+v, then %+v", a, b)
	}
	if c := s.Run(2, 6*time.Hour, 8, nil); c.Probes == a.Probes && c.Answered == a.Answered {
		t.Errorf("another seed gives the same: %+v", c)
	}
}

// Broken rules are noticed. So if no violation is found, no rule is broken.
func TestBrokenRulesAreNoticed(t *testing.T) {
	byName, unbroken := map[string]Scenario{}, map[string]Result{}
	for _, s := range Scenarios() {
		byName[s.Name] = s
	}
	run := func(name string, rule Rule) Result {
		s, ok := byName[name]
		if !ok {
			t.Fatalf("no scenario %q", name)
		}
		s.config.Broken = rule
		return s.Run(4, 48*time.Hour, 1, nil)
	}
	for _, test := range []struct {
		rule           Rule
		scenario, want string
	}{
		{Bound, "one probe", "after its bound"},
		{Withdrawal, "one probe", "after its listener had closed"},
		{Failures, "one probe, refresh", "after a failure that the daemon knew"},
		{Gate, "HTTP readiness + TCP liveness, one port", "TCP :80 answered"},
		{Status, "readiness + liveness, two paths", "although it could have been answered"},
		{Instance, "one probe, staleness 5", "after its listener had closed"},
		{Malformed, "one probe", "not detected within"},
		{Question, "one probe, plus another pod's with host: and headers", "not observed"},
		{Question, "one probe with headers, plus another pod's with host: only", "not observed"},
		{Threshold, "one probe, successThreshold 3", "of 3 successes"},
		{Unanswered, "one probe, successThreshold 3", "of 3 successes"},
		{WholePod, "one probe, a sidecar owns the listening socket", "after its listener had closed"},
		{Queue, "one TCP probe", "of a stopped server"},
		{Limit, "one TCP probe", "of a stopped server"},
		{Traffic, "liveness, traffic, a client each second", "after its bound"},
		{Traffic, "liveness, traffic, a client each second", "serves no one is not detected"},
		{Due, "liveness, traffic, a client each second", "after its bound"},
		{Withdrawal, "liveness, traffic, a client each second", "after its listener had closed"},
		{Failures, "liveness, traffic, a client each second", "after a failure that the daemon knew"},
	} {
		rule := test.rule
		if _, ran := unbroken[test.scenario]; !ran {
			unbroken[test.scenario] = run(test.scenario, None)
		}
		if good := unbroken[test.scenario]; len(good.Violations) > 0 {
			t.Errorf("rule %d: violated although it holds: %s", rule, good.Violations[0])
		}
		broken := run(test.scenario, rule)
		if !strings.Contains(strings.Join(broken.Violations, "\n"), test.want) {
			t.Errorf("rule %d is broken, but no violation says %q: %+v", rule, test.want, broken)
		}
	}

	// This rule breaks no promise except the share of answered probes.
	const paths = "readiness + liveness, two paths"
	good, broken := unbroken[paths], run(paths, Handover)
	if least := byName[paths].Demanded; good.HandedOver == 0 || good.HitRate() < least || broken.HitRate() >= least {
		t.Errorf("%d handed over; %.3f answered, %.3f if these are not observed; want at least %.2f",
			good.HandedOver, good.HitRate(), broken.HitRate(), least)
	}
}

// The world alone: requests to a server in different conditions.
func TestServer(t *testing.T) {
	const second = uint64(time.Second)
	s := &server{limit: 1, phases: []phase{
		{condition: healthy, from: 0, to: 10 * second},
		{condition: hanging, from: 10 * second, to: 20 * second},
		{condition: healthy, from: 20 * second, to: 30 * second},
		{condition: stuck, from: 30 * second, to: 40 * second},
		{condition: closed, from: 40 * second, to: 50 * second},
		{condition: erringOn, from: 50 * second, to: 60 * second, status: 503, path: "/x"},
		{condition: slow, from: 60 * second, to: 70 * second, latency: 2 * time.Second},
		{condition: down, from: 70 * second, to: 80 * second},
		{condition: filtered, from: 80 * second, to: 90 * second},
		{condition: unauthorized, from: 90 * second, to: 100 * second, status: 403},
		{condition: malformed, from: 100 * second, to: 110 * second},
	}}
	x, y, tcp := probe.Endpoint{Kind: probe.HTTP, Path: "/x"}, probe.Endpoint{Kind: probe.HTTP, Path: "/y"}, probe.Endpoint{Kind: probe.TCP}
	authorized := probe.Endpoint{Kind: probe.HTTP, Path: "/x", Headers: "some"}
	for name, test := range map[string]struct {
		at   float64
		e    probe.Endpoint
		want probe.Event
		ok   bool
	}{
		"healthy":             {1, x, probe.Answered, true},
		"overtaken by a hang": {9.999, x, probe.NoAnswer, false},
		"hanging":             {15, x, probe.NoAnswer, false},
		"hanging, TCP":        {15, tcp, probe.Connected, true},
		"until the hang ends": {19.5, x, probe.Answered, true},
		"stuck":               {35, x, probe.NoAnswer, false},
		"stuck, TCP":          {35, tcp, probe.NoAnswer, false},
		"closed":              {45, x, probe.Reset, false},
		"erring":              {55, x, probe.Answered, false},
		"the other path":      {55, y, probe.Answered, true},
		"slow":                {65, x, probe.NoAnswer, false},
		"down":                {75, x, probe.Reset, false},
		"filtered, TCP":       {85, tcp, probe.NoAnswer, false},
		"unauthorized":        {95, x, probe.Answered, false},
		"authorized":          {95, authorized, probe.Answered, true},
		"malformed":           {105, x, probe.Failed, false},
		"malformed, TCP":      {105, tcp, probe.Connected, true},
	} {
		q := inquiry{uint64(test.at * float64(second)), test.e, time.Second, 10 * time.Millisecond}
		got := s.ask(q, &backlog{})
		if got.event != test.want || got.succeeded() != test.ok {
			t.Errorf("%s: %+v", name, got)
		}
	}
	s.sidecar = true
	for at, want := range map[float64]int{45: 503, 75: 503, 5: 200} {
		if got := s.ask(inquiry{uint64(at * float64(second)), x, time.Second, time.Millisecond}, &backlog{}); got.status != want {
			t.Errorf("at %gs a sidecar responds with %d, want %d", at, got.status, want)
		}
	}
}

// The queue of a stopped server takes one connection more than its limit (tcp_v4_conn_request in net/ipv4/tcp_ipv4.c
// drops the SYN of any further one). Answers are allowed while at most half of it is used and no connection has waited
// for long.
func TestStopped(t *testing.T) {
	for limit, want := range map[int]struct{ accepted, most int }{0: {1, 0}, 1: {2, 1}, 5: {6, 1}, 16: {17, 2}, 128: {129, 9}, 4096: {4097, 9}} {
		const begun = uint64(time.Hour)
		s := &server{limit: limit, phases: []phase{{condition: healthy, to: begun}, {condition: stopped, from: begun, to: 9 * begun}}}
		var b backlog
		accepted := 0
		for at := begun; ; at += uint64(time.Second) {
			if looks := s.accepting(at, &b); looks != (accepted == 0) {
				t.Fatalf("limit %d: after %d, an answer is allowed: %v", limit, accepted, looks)
			}
			q := inquiry{at, probe.Endpoint{Kind: probe.TCP}, time.Second, time.Millisecond}
			if !s.ask(q, &b).succeeded() {
				break
			}
			accepted++
		}
		if accepted != want.accepted || s.mostAnswered(live) != want.most {
			t.Errorf("limit %d: %d accepted, %d answered at most; want %+v", limit, accepted, s.mostAnswered(live), want)
		}
	}
}
