//go:build linux

package ctl

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/store"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/survey/surveytest"
)

// What traffic shows decides whether the next probe of an endpoint that it may vouch for is answered, and status says the same.
func TestTraffic(t *testing.T) {
	const ago = surveytest.Second
	stale := surveytest.Success(20, 0, 200)
	stale.FreshUntil = surveytest.Now - 9*ago
	stale.TrafficUntil, stale.TrafficWindowMs = surveytest.Now+60*ago, 10_000
	served, closed := datapath.Tally{ServedAt: surveytest.Now - 3*ago}, datapath.Tally{ClosedAt: surveytest.Now - 3*ago}
	for name, test := range map[string]struct {
		kind     probe.Kind
		port     datapath.Tally
		endpoint datapath.Tally
		change   func(*datapath.Evidence)
		state    status.State
		code     probe.ReasonCode
	}{
		"served":             {probe.HTTP, served, datapath.Tally{}, nil, status.StateFresh, ""},
		"closed only":        {probe.HTTP, closed, datapath.Tally{}, nil, status.StateStale, status.NoTraffic},
		"never seen":         {probe.HTTP, datapath.Tally{}, datapath.Tally{}, nil, status.StateStale, status.NoTraffic},
		"served long ago":    {probe.HTTP, datapath.Tally{ServedAt: surveytest.Now - 11*ago}, datapath.Tally{}, nil, status.StateStale, status.NoTraffic},
		"TCP, served":        {probe.TCP, served, datapath.Tally{}, nil, status.StateFresh, ""},
		"TCP, closed":        {probe.TCP, closed, datapath.Tally{}, nil, status.StateFresh, ""},
		"a real one is due":  {probe.HTTP, served, datapath.Tally{Answered: datapath.MaxTrafficAnswers}, nil, status.StateFresh, status.Limit},
		"not due yet":        {probe.HTTP, served, datapath.Tally{Answered: datapath.MaxTrafficAnswers - 1}, nil, status.StateFresh, ""},
		"past the bound":     {probe.HTTP, served, datapath.Tally{}, func(e *datapath.Evidence) { e.TrafficUntil = surveytest.Now }, status.StateStale, status.Expired},
		"failed":             {probe.HTTP, served, datapath.Tally{}, func(e *datapath.Evidence) { *e = surveytest.Failed(1, 500) }, status.StateFailed, status.LastFailed},
		"withdrawn":          {probe.HTTP, served, surveytest.Withdrawn(1), nil, status.StateStale, status.Withdrawn},
		"port was withdrawn": {probe.HTTP, datapath.Tally{ServedAt: served.ServedAt, WithdrawnAt: surveytest.Now - ago}, datapath.Tally{}, nil, status.StateStale, status.Withdrawn},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			e, path, key := surveytest.Endpoint(test.kind, 80, "/x"), "/x", surveytest.KeyOf(80, "/x")
			if test.kind == probe.TCP {
				e, path, key = surveytest.Endpoint(test.kind, 80, ""), "", datapath.TCPKey(80)
			}
			e.Traffic, e.TrafficBound, e.TrafficWindow = datapath.MaxTrafficAnswers, 111, 10
			evidence := stale
			if path == "" {
				evidence.Status = 0
			}
			if test.change != nil {
				test.change(&evidence)
			}
			gate := stale
			gate.TrafficUntil = evidence.TrafficUntil
			m.Web(surveytest.Maps{datapath.PortKey(80): {Evidence: gate, Tally: test.port}, key: {Evidence: evidence, Tally: test.endpoint}}, e)
			var s survey.Status
			if err := json.Unmarshal([]byte(m.status("-o", "json")), &s); err != nil {
				t.Fatal(err)
			}
			got := s.Attachments[0].Endpoints[0]
			if got.State != test.state || got.WhyNotAnsweredCode != test.code {
				t.Errorf("%s, %q (%s); want %s, %q", got.State, got.WhyNotAnsweredCode, got.WhyNotAnswered, test.state, test.code)
			}
			last := store.ServedAt(test.kind, test.port)
			if (got.ServedAge != nil) != (last != 0) || last != 0 && *got.ServedAge != time.Duration(surveytest.Now-last).Seconds() {
				t.Errorf("served %v s ago, want %s", got.ServedAge, time.Duration(surveytest.Now-last))
			}
		})
	}
}

// explain states what traffic means for an endpoint, and the bounds of each kind of failure; or why traffic means nothing.
func TestTrafficIsExplained(t *testing.T) {
	e := surveytest.Endpoint(probe.HTTP, 80, "/x")
	e.Traffic, e.TrafficBound, e.TrafficWindow = datapath.MaxTrafficAnswers, 111, 10
	e.Probes[0].DetectionPlain, e.Probes[0].DetectionAnswered, e.Probes[0].DetectionHang = 31, 142, 42
	off := surveytest.Endpoint(probe.HTTP, 80, "/y")
	off.TrafficOff = "web/readiness asks it too"
	m := newMachine(t)
	m.Web(surveytest.Maps{datapath.PortKey(80): {Tally: datapath.Tally{ServedAt: surveytest.Now - 3*surveytest.Second}}}, e, off)
	text, err := m.run("explain", "shop/web")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"3s ago", "at most 9 in a row", "1m51s", "2m22s", "42s", "web/readiness asks it too"} {
		if !strings.Contains(squeeze(text), want) {
			t.Errorf("does not say %q:\n%s", want, text)
		}
	}
}
