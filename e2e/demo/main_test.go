package main

import (
	"testing"
	"time"
)

func TestVerdict(t *testing.T) {
	good := result{Entry: fresh, N: 10, Answered: 10}
	for name, test := range map[string]struct {
		change func(*result)
		bad    bool
	}{
		"as it must be":        {func(*result) {}, false},
		"absent":               {func(r *result) { *r = result{Entry: absent, N: 10, TimeWaitHost: 9, segments: 90} }, false},
		"a failure":            {func(r *result) { r.Failures = 1 }, true},
		"a failure, absent":    {func(r *result) { *r = result{Entry: absent, N: 10, Failures: 1} }, true},
		"not a hit":            {func(r *result) { r.Answered = 9 }, true},
		"a hit out of nothing": {func(r *result) { *r = result{Entry: absent, N: 10, Answered: 1} }, true},
		"most of TCP": {func(r *result) {
			*r = result{Probe: "tcp", Entry: fresh, N: 10, Answered: 5, ServerRequests: 5, segments: 20}
		}, false},
		"less than half of TCP":   {func(r *result) { *r = result{Probe: "tcp", Entry: fresh, N: 10, Answered: 4} }, true},
		"a segment to the pod":    {func(r *result) { r.segments = 1 }, true},
		"TIME_WAIT on the host":   {func(r *result) { r.TimeWaitHost = 1 }, true},
		"TIME_WAIT in the pod":    {func(r *result) { r.TimeWaitPod = 1 }, true},
		"a request to the server": {func(r *result) { r.ServerRequests = 1 }, true},
	} {
		r := good
		test.change(&r)
		if err := verdict([]result{good, r}); (err != nil) != test.bad {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPercentile(t *testing.T) {
	var sorted []time.Duration
	for i := range 101 {
		sorted = append(sorted, time.Duration(i)*time.Microsecond)
	}
	if p50, p99 := percentile(sorted, 50), percentile(sorted, 99); p50 != 50 || p99 != 99 {
		t.Errorf("p50 %v, p99 %v", p50, p99)
	}
	if one := percentile(sorted[7:8], 99); one != 7 {
		t.Errorf("p99 of one is %v", one)
	}
}
