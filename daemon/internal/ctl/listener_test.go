//go:build linux

package ctl

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/survey/surveytest"
)

// The checks of the listening socket are shown for TCP endpoints.
func TestListener(t *testing.T) {
	m := newMachine(t)
	tcp := surveytest.Endpoint(probe.TCP, 80, "")
	tcp.Live, tcp.StalenessBound = 9, 101
	m.Web(surveytest.Maps{
		datapath.PortKey(80): {Evidence: surveytest.Success(1, 100, 0), Tally: datapath.Tally{Answered: 3, AnsweredMax: 4, Obstacle: 2}},
		datapath.TCPKey(80):  {Evidence: surveytest.Success(1, 100, 0)},
	}, tcp)
	text, err := m.run("explain", "shop/web")
	for _, want := range []string{
		"while the listening socket accepts, and at most 9 times in a row",
		"listening socket 3 of at most 4 probes were answered since a connection was last known to be accepted; the last one passed on: the queue was more than half full",
	} {
		if err != nil || !strings.Contains(squeeze(text), want) {
			t.Errorf("%v, does not say %q:\n%s", err, want, text)
		}
	}
	if wide := squeeze(m.status("-o", "wide")); !strings.Contains(wide, "tc proven 3/4 queue_long - -") {
		t.Errorf("the table does not say it:\n%s", wide)
	}
	for _, obstacle := range datapath.Obstacles {
		if status.ObstacleText(obstacle) == obstacle {
			t.Errorf("%s has no words", obstacle)
		}
	}
}

// After the maximum of answers in a row the next probe reaches the pod, whichever of the port's endpoints it asks, unless a pending
// connection may turn out to have been accepted.
func TestRealDue(t *testing.T) {
	tcp, http := surveytest.Endpoint(probe.TCP, 80, ""), surveytest.Endpoint(probe.HTTP, 80, "/x")
	tcp.Live = 9
	const due = "the maximum of 4 probes in a row were answered, so the pod must accept one"
	for name, test := range map[string]struct {
		tally datapath.Tally
		live  int
		why   string
	}{
		"due":               {datapath.Tally{Answered: 4, AnsweredMax: 4}, 9, due},
		"not yet":           {datapath.Tally{Answered: 3, AnsweredMax: 4}, 9, ""},
		"one pending":       {datapath.Tally{Answered: 4, AnsweredMax: 4, ConnectedAt: 1}, 9, ""},
		"not checked":       {datapath.Tally{}, 9, ""},
		"cannot be checked": {datapath.Tally{Answered: 4, AnsweredMax: 4}, 0, ""},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			tcp.Live = test.live
			m.Web(surveytest.Maps{
				datapath.PortKey(80):       {Evidence: surveytest.Success(1, 5, 0), Tally: test.tally},
				datapath.TCPKey(80):        {Evidence: surveytest.Success(1, 5, 0)},
				surveytest.KeyOf(80, "/x"): {Evidence: surveytest.Success(1, 5, 200)},
			}, tcp, http)
			var s survey.Status
			if err := json.Unmarshal([]byte(m.status("-o", "json")), &s); err != nil {
				t.Fatal(err)
			}
			for _, e := range s.Attachments[0].Endpoints {
				if e.WhyNotAnswered != test.why {
					t.Errorf("%s: %q, want %q", e.Kind, e.WhyNotAnswered, test.why)
				}
			}
		})
	}
}

// The obstacle is shown for every endpoint of the port, HTTP included; the count only where the port has a TCP probe.
func TestListenerOfHTTP(t *testing.T) {
	tcp, http := surveytest.Endpoint(probe.TCP, 80, ""), surveytest.Endpoint(probe.HTTP, 80, "/x")
	tcp.Live = 9
	for name, test := range map[string]struct {
		tally   datapath.Tally
		beside  []statedir.Endpoint
		explain string
		wide    string
	}{
		"alone, nothing":       {datapath.Tally{AnsweredMax: 9}, nil, "", "tc proven - - -"},
		"alone, vetoed":        {datapath.Tally{AnsweredMax: 9, Obstacle: 3}, nil, "listening socket the last probe passed on because of it: a connection had been waiting", "tc proven head_old - -"},
		"beside TCP":           {datapath.Tally{Answered: 1, AnsweredMax: 2, Obstacle: 5}, []statedir.Endpoint{tcp}, "listening socket 1 of at most 2 probes", "tc proven 1/2 real_due - -"},
		"beside TCP, accepted": {datapath.Tally{Answered: 2, AnsweredMax: 2, ConnectedAt: 1}, []statedir.Endpoint{tcp}, "since a connection was last known to be accepted, and another has reached the pod since", "tc proven 2/2 - -"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.Web(surveytest.Maps{
				datapath.PortKey(80):       {Evidence: surveytest.Success(1, 5, 0), Tally: test.tally},
				datapath.TCPKey(80):        {Evidence: surveytest.Success(1, 5, 0)},
				surveytest.KeyOf(80, "/x"): {Evidence: surveytest.Success(1, 5, 200)},
			}, append([]statedir.Endpoint{http}, test.beside...)...)
			text, err := m.run("explain", "shop/web")
			about, _, _ := strings.Cut(text[strings.Index(text, "HTTP :80/x"):], "\n\n")
			if about = squeeze(about); err != nil || !strings.Contains(about, test.explain) || (test.explain == "") == strings.Contains(about, "listening") {
				t.Errorf("%v, not %q:\n%s", err, test.explain, about)
			}
			if wide := squeeze(m.status("-o", "wide")); !strings.Contains(wide, test.wide) {
				t.Errorf("not %q:\n%s", test.wide, wide)
			}
		})
	}
}
