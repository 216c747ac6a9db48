package crosscheck

import (
	"fmt"
	"math"
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/probe"
)

var (
	id    = ID{attach.ID{ContainerID: "c", IfName: "eth0"}, probe.Endpoint{Port: 80, Kind: probe.HTTP, Path: "/"}}
	ready = Worker{"shop", "web", "1", "app", probe.Readiness}
	live  = Worker{"shop", "web", "1", "app", probe.Liveness}
)

// step is what was counted since the previous look, with the same observations before and after this look.
type step struct {
	answered, succeeded, other uint64
	kubelet                    Verdicts
	restarted                  bool
}

// looks returns the looks of steps, at an endpoint that had been probed for a while.
func looks(steps []step, discards bool) []Look {
	counts, kubelet := Counts{50, 50, 7}, Verdicts{100, 7}
	var all []Look
	for i, s := range append([]step{{}}, steps...) {
		counts = Counts{counts.Answered + s.answered, counts.Succeeded + s.succeeded, counts.Other + s.other}
		kubelet = kubelet.plus(s.kubelet)
		if s.restarted {
			kubelet = s.kubelet
		}
		observed := map[ID]Endpoint{id: {Workers: []Worker{ready}, Period: time.Second, Discards: discards, Counts: counts}}
		all = append(all, Look{
			At: time.Unix(int64(15*i), 0), Before: observed, After: observed, Kubelet: map[Worker]Verdicts{ready: kubelet},
			Restarted: i == 0 || s.restarted,
		})
	}
	return all
}

func found(looks []Look) (all []Disagreement) {
	var h History
	for _, l := range looks {
		all = append(all, h.Add(l)...)
	}
	return all
}

func TestDisagreements(t *testing.T) {
	agreed := step{answered: 5, succeeded: 5, kubelet: Verdicts{10, 0}}
	for name, test := range map[string]struct {
		steps []step
		want  string // for an endpoint whose probes may be discarded, unlike TCP's
	}{
		"agreed":                 {[]step{agreed, agreed}, ""},
		"failures, seen":         {[]step{{succeeded: 5, other: 5, kubelet: Verdicts{5, 5}}}, ""},
		"failures, more seen":    {[]step{{succeeded: 5, other: 9, kubelet: Verdicts{5, 5}}}, ""},
		"failures never sent":    {[]step{{succeeded: 5, kubelet: Verdicts{5, 5}}}, ""},
		"connect timeouts":       {[]step{{answered: 10, kubelet: Verdicts{10, 1}}, agreed, {answered: 9, kubelet: Verdicts{9, 1}}}, ""},
		"failures, records lost": {[]step{{succeeded: 2, kubelet: Verdicts{3, 5}}}, ""},
		"failures taken for successes": {
			[]step{agreed, {succeeded: 10, kubelet: Verdicts{5, 5}}}, "[failed 5]"},
		"failures of answers": {
			[]step{agreed, {answered: 10, kubelet: Verdicts{5, 5}}}, "[failed 5]"},
		"some of the failures":            {[]step{{succeeded: 10, other: 3, kubelet: Verdicts{5, 8}}}, "[failed 5]"},
		"one failure, then well":          {[]step{{succeeded: 10, kubelet: Verdicts{9, 1}}, agreed, agreed}, ""},
		"one failure, and another":        {[]step{{succeeded: 10, kubelet: Verdicts{9, 1}}, agreed, {answered: 10, kubelet: Verdicts{9, 1}}}, "[failed 2]"},
		"one failure, another much later": {slices.Concat([]step{{succeeded: 10, kubelet: Verdicts{9, 1}}}, slices.Repeat([]step{agreed}, remembered), []step{{succeeded: 10, kubelet: Verdicts{9, 1}}}), ""},
		"told once, and again":            {[]step{{succeeded: 10, kubelet: Verdicts{5, 5}}, agreed, agreed, {succeeded: 10, kubelet: Verdicts{0, 10}}}, "[failed 5 failed 10]"},
		"not counted at all":              {[]step{agreed, {succeeded: 30, kubelet: Verdicts{0, 0}}}, "[discarded 30]"},
		"some not counted":                {[]step{agreed, {succeeded: 10, answered: 5, kubelet: Verdicts{10, 0}}}, "[discarded 5]"},
		"not counted, others failed":      {[]step{{succeeded: 10, other: 5, kubelet: Verdicts{5, 5}}}, "[discarded 5]"},
		"one not counted":                 {[]step{{succeeded: 10, kubelet: Verdicts{9, 0}}}, ""},
		"another kubelet":                 {[]step{agreed, {succeeded: 10, kubelet: Verdicts{3, 1}, restarted: true}, agreed}, ""},
		"another kubelet, busy":           {[]step{agreed, {succeeded: 10, kubelet: Verdicts{111, 9}, restarted: true}, agreed}, ""},
		"another kubelet, then failures":  {[]step{agreed, {succeeded: 10, kubelet: Verdicts{3, 1}, restarted: true}, {succeeded: 10, kubelet: Verdicts{0, 10}}}, "[failed 10]"},
	} {
		t.Run(name, func(t *testing.T) {
			if got := described(found(looks(test.steps, true))); got != test.want {
				t.Errorf("HTTP: %s, want %s", got, test.want)
			}
			want := test.want
			if len(want) > 5 && want[:5] == "[disc" {
				want = ""
			}
			if got := described(found(looks(test.steps, false))); got != want {
				t.Errorf("not to be discarded: %s, want %s", got, want)
			}
		})
	}
}

func described(all []Disagreement) string {
	var texts []string
	for _, d := range all {
		texts = append(texts, fmt.Sprintf("%s %d", d.Kind, d.Probes))
	}
	if texts == nil {
		return ""
	}
	return fmt.Sprint(texts)
}

// Counts that started from 0 again, or belong to other workers, are not compared with previous ones.
func TestHistoryStartsOver(t *testing.T) {
	change := func(l *Look, f func(*Endpoint)) {
		e := l.After[id]
		f(&e)
		l.Before, l.After = map[ID]Endpoint{id: e}, map[ID]Endpoint{id: e}
	}
	for name, test := range map[string]struct {
		disturb func(second, third *Look) // each of which shows one more failure
		found   bool
	}{
		"undisturbed": {func(_, _ *Look) {}, true},
		"counts of answers": {func(second, third *Look) {
			change(second, func(e *Endpoint) { e.Answered = 0 })
			change(third, func(e *Endpoint) { e.Answered = 0 })
		}, false},
		"counts of successes": {func(second, third *Look) {
			change(second, func(e *Endpoint) { e.Succeeded = 1 })
			change(third, func(e *Endpoint) { e.Succeeded = 2 })
		}, false},
		"counts of others": {func(second, third *Look) {
			change(second, func(e *Endpoint) { e.Other = 0 })
			change(third, func(e *Endpoint) { e.Other = 0 })
		}, false},
		"another worker": {func(second, third *Look) {
			for _, l := range []*Look{second, third} {
				change(l, func(e *Endpoint) { e.Workers = []Worker{ready, live} })
			}
		}, false},
		"gone for a while": {func(second, _ *Look) { second.Before, second.After = nil, nil }, false},
		"only just known":  {func(second, _ *Look) { second.Before = nil }, false},
		"worker's counts": {func(second, third *Look) {
			second.Kubelet = map[Worker]Verdicts{ready: {0, 1}}
			third.Kubelet = map[Worker]Verdicts{ready: {0, 2}}
		}, false},
		"no worker's counts": {func(second, _ *Look) { second.Kubelet = nil }, false},
		"another's counts": {func(second, third *Look) {
			second.Kubelet[live], third.Kubelet[live] = Verdicts{9, 9}, Verdicts{1, 1}
		}, true},
	} {
		t.Run(name, func(t *testing.T) {
			all := looks([]step{{}, {succeeded: 1, kubelet: Verdicts{0, 1}}, {succeeded: 1, kubelet: Verdicts{0, 1}}}, true)
			test.disturb(&all[2], &all[3])
			if got := found(all); (len(got) != 0) != test.found {
				t.Errorf("%s", described(got))
			}
		})
	}
}

// Failures that are counted late, or early, are not a disagreement in themselves.
func TestCompare(t *testing.T) {
	from := point{before: Counts{10, 10, 10}, after: Counts{11, 11, 12}, kubelet: Verdicts{20, 11}}
	for name, test := range map[string]struct {
		to   point
		want Kind
	}{
		"failures seen before the first look": {point{before: Counts{20, 20, 12}, after: Counts{20, 20, 12}, kubelet: Verdicts{30, 13}}, Discarded},
		"failures seen after the second look": {point{before: Counts{20, 20, 12}, after: Counts{20, 20, 14}, kubelet: Verdicts{30, 15}}, Discarded},
		"more failures than seen":             {point{before: Counts{20, 20, 12}, after: Counts{20, 20, 12}, kubelet: Verdicts{30, 14}}, Failed},
		"successes counted before first look": {point{before: Counts{11, 12, 12}, after: Counts{11, 13, 12}, kubelet: Verdicts{20, 12}}, ""},
		"successes counted after second look": {point{before: Counts{11, 11, 12}, after: Counts{13, 13, 12}, kubelet: Verdicts{20, 12}}, ""},
		"successes claimed and never counted": {point{before: Counts{13, 11, 12}, after: Counts{13, 11, 12}, kubelet: Verdicts{20, 11}}, Discarded},
	} {
		if got, _ := compare(from, test.to, true); got != test.want {
			t.Errorf("%s: %q, want %q", name, got, test.want)
		}
	}
}

// Endpoints that the kubelet counts under an unknown name are not compared.
func TestNotCounted(t *testing.T) {
	all := looks([]step{{succeeded: 10}, {succeeded: 10}}, true)
	for i := range all {
		all[i].Kubelet = map[Worker]Verdicts{{Pod: "of another name"}: {100, 0}}
	}
	if got := found(all); got != nil {
		t.Error(described(got))
	}
}

// Slow probes are remembered for the same number of their periods as others.
func TestSlowProbes(t *testing.T) {
	once := step{answered: 1, kubelet: Verdicts{0, 1}}
	all := looks(slices.Concat([]step{once}, slices.Repeat([]step{{}}, 20), []step{once}), false)
	for _, l := range all {
		e := l.After[id]
		e.Period = time.Minute
		l.After[id] = e
	}
	if got := described(found(all)); got != "[failed 2]" {
		t.Error(got)
	}
}

// The counts of an endpoint's workers are added up, including those of a worker that has not counted anything yet.
func TestWorkersOfOneEndpoint(t *testing.T) {
	all := looks([]step{{answered: 10, kubelet: Verdicts{5, 5}}}, false)
	for i := range all {
		for _, observed := range []map[ID]Endpoint{all[i].Before, all[i].After} {
			e := observed[id]
			e.Workers = []Worker{ready, live}
			observed[id] = e
		}
	}
	if got := described(found(all)); got != "[failed 5]" {
		t.Error(got)
	}
	all[1].Kubelet[live] = Verdicts{5, 0}
	if got := described(found(all)); got != "" {
		t.Error(got)
	}
}

// trial is a probe, as counted by both sides.
type trial struct {
	worker   Worker
	verdict  time.Duration // when the kubelet counts it
	success  bool          // to the kubelet
	seen     time.Duration // when we count it; negative: never
	answered bool
	claimed  bool // a success, to us
}

// node counts trials as both sides do: some time after each probe has ended, in any order.
type node []trial

func (n node) look(i int, at, settle time.Duration, workers []Worker) Look {
	l := Look{At: time.Unix(0, int64(at)), Kubelet: map[Worker]Verdicts{}, Restarted: i == 0}
	observed := func(until time.Duration) map[ID]Endpoint {
		var c Counts
		for _, p := range n {
			switch {
			case p.seen < 0 || p.seen > until:
			case p.answered:
				c.Answered++
			case p.claimed:
				c.Succeeded++
			default:
				c.Other++
			}
		}
		return map[ID]Endpoint{id: {Workers: workers, Period: time.Second, Discards: true, Counts: c}}
	}
	l.Before, l.After = observed(at-settle), observed(at+settle)
	for _, p := range n {
		if p.verdict > at {
			continue
		}
		one := Verdicts{Failed: 1}
		if p.success {
			one = Verdicts{Succeeded: 1}
		}
		l.Kubelet[p.worker] = l.Kubelet[p.worker].plus(one)
	}
	return l
}

// If only successes are taken for successes, nothing is found, whatever is late, lost or never seen. If failures are taken for successes,
// they are found.
func TestHistoryOfNodes(t *testing.T) {
	const settle = time.Second
	rapid.Check(t, func(t *rapid.T) {
		workers := []Worker{ready, live}[:rapid.IntRange(1, 2).Draw(t, "workers")]
		period := rapid.SampledFrom([]time.Duration{time.Second, 3 * time.Second, 10 * time.Second}).Draw(t, "period")
		interval := rapid.SampledFrom([]time.Duration{10 * time.Second, 15 * time.Second}).Draw(t, "interval")
		wrong := rapid.Bool().Draw(t, "wrong")
		duration := 20 * interval
		lag := rapid.Custom(func(t *rapid.T) time.Duration {
			return time.Duration(rapid.IntRange(0, 900).Draw(t, "ms")) * time.Millisecond
		})
		var n node
		for _, w := range workers {
			for at := lag.Draw(t, "phase"); at < duration; at += period {
				p := trial{worker: w, verdict: at + lag.Draw(t, "kubelet"), seen: at + lag.Draw(t, "we")}
				switch rapid.SampledFrom([]string{"answered", "success", "success", "failure", "failure", "never sent", "lost"}).Draw(t, "what") {
				case "answered":
					p.answered, p.claimed, p.success, p.seen = true, true, true, at
				case "success":
					p.claimed, p.success = true, true
				case "failure":
					p.claimed = wrong && at > duration/2
				case "never sent":
					p.seen = -1
				case "lost":
					p.seen, p.success = -1, rapid.Bool().Draw(t, "success")
				}
				n = append(n, p)
			}
		}
		var h History
		var got []Disagreement
		for i := 0; time.Duration(i)*interval < duration; i++ {
			got = append(got, h.Add(n.look(i, time.Duration(i)*interval+settle, settle, workers))...)
		}
		if len(got) > 0 && !wrong {
			t.Fatalf("%+v", got)
		}
		if surely := n.surely(duration, interval, period, settle, len(workers)); wrong && surely && len(got) == 0 {
			t.Fatalf("nothing found")
		}
	})
}

// surely reports whether enough failures were taken for successes that neither lost ones, nor the successes that the kubelet counts around
// two looks, can hide them.
func (n node) surely(duration, interval, period, settle time.Duration, workers int) bool {
	var misjudged, hidden int
	from := duration - min(duration/2, remembered*max(interval, period)) + interval
	for _, p := range n {
		switch {
		case p.verdict < from || p.verdict > duration-2*interval:
		case p.success && p.seen < 0:
			hidden++
		case !p.success && p.claimed:
			misjudged++
		}
	}
	atEnds := workers * 2 * int(math.Ceil(float64(3*settle)/float64(period)))
	return misjudged >= certain+hidden+atEnds
}

func ExampleHistory() {
	var h History
	for _, l := range looks([]step{{answered: 5, succeeded: 5, kubelet: Verdicts{5, 5}}}, true) {
		for _, d := range h.Add(l) {
			fmt.Println(d.Endpoint, d.Kind, d.Probes)
		}
	}
	// Output: HTTP :80/ failed 5
}
