package simulate

import (
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
			if r.Detected == 0 || r.Verdicts == 0 || r.Answered == 0 {
				t.Errorf("nothing happened: %+v", r)
			}
		})
	}
}

func TestTheSameSeedIsTheSamePod(t *testing.T) {
	s := Scenarios()[0]
	a, b := s.Run(2, 6*time.Hour, 7, nil), s.Run(2, 6*time.Hour, 7, nil)
	if a.Probes != b.Probes || a.Answered != b.Answered || a.WorstDelay != b.WorstDelay || a.Refreshes != b.Refreshes {
		t.Errorf("%+v, then %+v", a, b)
	}
	if c := s.Run(2, 6*time.Hour, 8, nil); c.Probes == a.Probes && c.Answered == a.Answered {
		t.Errorf("another seed gives the same: %+v", c)
	}
}

// A rule that is broken is noticed. So that nothing is noticed means that none is.
func TestBrokenRulesAreNoticed(t *testing.T) {
	byName := map[string]Scenario{}
	for _, s := range Scenarios() {
		byName[s.Name] = s
	}
	for rule, test := range map[Rule]struct{ scenario, want string }{
		Bound:      {"one probe", "after its bound"},
		Withdrawal: {"one probe", "after its listener had closed"},
		Failures:   {"one probe, refresh", "after a failure that the daemon knew"},
		Gate:       {"readiness by HTTP, liveness by TCP, one port", "TCP :80 answered"},
		Status:     {"readiness + liveness, two paths", "though it could have been answered"},
		Instance:   {"one probe, staleness 5", "after its listener had closed"},
		Connection: {"one probe, refresh, staleness 5", "not detected within"},
	} {
		good, broken := runBoth(t, byName, test.scenario, rule)
		if len(good.Violations) > 0 {
			t.Errorf("rule %d: violated though it holds: %s", rule, good.Violations[0])
		}
		if !strings.Contains(strings.Join(broken.Violations, "\n"), test.want) {
			t.Errorf("rule %d is broken, and nothing is %q: %+v", rule, test.want, broken)
		}
	}

	// This one breaks no promise but that of the share that is answered.
	const paths = "readiness + liveness, two paths"
	good, broken := runBoth(t, byName, paths, Handover)
	if least := byName[paths].Demanded; good.HandedOver == 0 || good.HitRate() < least || broken.HitRate() >= least {
		t.Errorf("%d handed over; %.3f answered, %.3f if these are not observed; demanded are %.2f",
			good.HandedOver, good.HitRate(), broken.HitRate(), least)
	}
}

// runBoth runs a scenario with the rule, and with the rule broken.
func runBoth(t *testing.T, byName map[string]Scenario, name string, rule Rule) (good, broken Result) {
	t.Helper()
	s, ok := byName[name]
	if !ok {
		t.Fatalf("no scenario %q", name)
	}
	good = s.Run(4, 48*time.Hour, 1, nil)
	s.config.Broken = rule
	return good, s.Run(4, 48*time.Hour, 1, nil)
}

// The world by itself: a request that comes to a server in some condition.
func TestServer(t *testing.T) {
	const second = uint64(time.Second)
	s := &server{phases: []phase{
		{condition: healthy, from: 0, to: 10 * second},
		{condition: hanging, from: 10 * second, to: 20 * second},
		{condition: healthy, from: 20 * second, to: 30 * second},
		{condition: stuck, from: 30 * second, to: 40 * second},
		{condition: closed, from: 40 * second, to: 50 * second},
		{condition: erringOn, from: 50 * second, to: 60 * second, status: 503, path: "/x"},
		{condition: slow, from: 60 * second, to: 70 * second, latency: 2 * time.Second},
		{condition: down, from: 70 * second, to: 80 * second},
	}}
	x, y, tcp := probe.Endpoint{Kind: probe.HTTP, Path: "/x"}, probe.Endpoint{Kind: probe.HTTP, Path: "/y"}, probe.Endpoint{Kind: probe.TCP}
	for name, test := range map[string]struct {
		at   float64
		e    probe.Endpoint
		kept bool
		want probe.Event
		ok   bool
	}{
		"healthy":             {1, x, false, probe.Answered, true},
		"overtaken by a hang": {9.999, x, false, probe.NoAnswer, false},
		"hanging":             {15, x, false, probe.NoAnswer, false},
		"hanging, TCP":        {15, tcp, false, probe.Connected, true},
		"to the hang's end":   {19.5, x, false, probe.Answered, true},
		"stuck":               {35, x, false, probe.NoAnswer, false},
		"stuck, TCP":          {35, tcp, false, probe.NoAnswer, false},
		"stuck, but kept":     {35, x, true, probe.Answered, true},
		"closed":              {45, x, false, probe.Reset, false},
		"closed, but kept":    {45, x, true, probe.Answered, true},
		"erring":              {55, x, false, probe.Answered, false},
		"the other path":      {55, y, false, probe.Answered, true},
		"slow":                {65, x, false, probe.NoAnswer, false},
		"down":                {75, x, false, probe.Reset, false},
		"down, kept":          {75, x, true, probe.Reset, false},
	} {
		got := s.ask(uint64(test.at*float64(second)), test.e, time.Second, test.kept, 10*time.Millisecond)
		if got.event != test.want || got.succeeded() != test.ok {
			t.Errorf("%s: %+v", name, got)
		}
	}
}
