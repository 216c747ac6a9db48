//go:build linux

package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/doctor"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/survey/surveytest"
)

// machine is a node to run commands on.
type machine struct {
	*surveytest.Machine
	stderr bytes.Buffer
	host   doctor.Host
	width  int
}

func newMachine(t *testing.T) *machine { return &machine{Machine: surveytest.NewMachine(t)} }

// run runs a command. It does not return the error that the daemon is down, which the command has shown: see TestExitCodes.
func (m *machine) run(args ...string) (string, error) {
	m.T.Helper()
	text, err := m.execute(args...)
	var coded *status.Error
	if errors.As(err, &coded) && coded.Shown {
		err = nil
	}
	return text, err
}

func (m *machine) execute(args ...string) (string, error) {
	m.T.Helper()
	var stdout bytes.Buffer
	env := environment{
		stdout: &stdout, stderr: &m.stderr, now: func() uint64 { return surveytest.Now }, open: m.Open, host: m.host, width: m.width,
	}
	err := execute(context.Background(), env, append([]string{args[0], "--state-dir", m.StateDir}, args[1:]...))
	return stdout.String(), err
}

func (m *machine) status(args ...string) string {
	m.T.Helper()
	out, err := m.run(append([]string{"status"}, args...)...)
	if err != nil {
		m.T.Fatal(err)
	}
	return out
}

// squeeze replaces each run of blanks by one.
func squeeze(s string) string { return strings.Join(strings.Fields(s), " ") }

func TestNothingLoaded(t *testing.T) {
	m := newMachine(t)
	m.Kernel = nil
	m.StateDir = filepath.Join(m.StateDir, "missing")
	want := "nothing attached\n" +
		"probeletd: NOT RUNNING; nothing is answered, so every probe reaches its pod\n" +
		"kernel: the BPF objects are not loaded\n"
	if got := m.status(); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
	var s survey.Status
	if err := json.Unmarshal([]byte(m.status("-o", "json")), &s); err != nil {
		t.Fatal(err)
	}
	if s.Prober != nil || s.Counters != nil || s.Attachments == nil || s.Daemon.Running {
		t.Errorf("%+v", s)
	}
}

func TestTable(t *testing.T) {
	m := newMachine(t)
	tls := surveytest.Endpoint(probe.HTTPS, 443, "/")
	tls.Observed, tls.NotAnswered, tls.NotAnsweredCode = false, "HTTPS is never answered", probe.ReasonKind
	m.Web(surveytest.Maps{
		datapath.PortKey(8080):           {Evidence: surveytest.Success(4, 7, 0)},
		surveytest.KeyOf(8080, "/ready"): {Evidence: surveytest.Success(4, 7, 204), Tally: surveytest.Hits(41)},
	}, surveytest.Endpoint(probe.HTTP, 8080, "/ready"), tls)
	m.Record(attach.Record{ContainerID: "dead", IfName: "eth0", PodNamespace: "shop", PodName: "bad", Error: "no veth"})
	got := m.status()
	want := `NAMESPACE/POD   HOST VETH   ENDPOINT           STATE     AGE   BOUND   HITS   WHY NOT ANSWERED
shop/bad        -           -                  -         -     -       -      not attached: no veth
shop/web        veth7       HTTP :8080/ready   fresh     4s    11s     41     -
shop/web        veth7       HTTPS :443/        unknown   -     -       0      HTTPS is never answered

prober: cgroup 4711
answered: 12 HTTP, 3 TCP; observed: 20; handed over: 1
`
	down := regexp.MustCompile(`probeletd: NOT RUNNING; 1 endpoint is still answered in the kernel, until \d\d:\d\d:\d\d \S+ \(7s from now\) at the latest; nothing renews that\n`)
	if !down.MatchString(got) {
		t.Errorf("does not say what is still answered:\n%s", got)
	}
	if got := down.ReplaceAllString(got, ""); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}

	wide := squeeze(m.status("-o", "wide"))
	for _, part := range []string{
		"HITS PROBES IFINDEX STATUS PERIOD TIMEOUT CONTAINER ID DETECTED WITHIN ATTACHED BY HOOK TRUST LISTENER SETTINGS WHY NOT ANSWERED",
		"HTTP :8080/ready fresh 4s 11s 41 c/readiness 7 204 10s 1s c0ffee 43s/31s ADD tc proven - - -",
	} {
		if !strings.Contains(wide, part) {
			t.Errorf("wide does not say %q:\n%s", part, wide)
		}
	}
}

// Every state, and every reason that does not come from the specs.
func TestStates(t *testing.T) {
	http, tcp := surveytest.Endpoint(probe.HTTP, 80, "/x"), surveytest.Endpoint(probe.TCP, 80, "")
	x, port := surveytest.KeyOf(80, "/x"), datapath.PortKey(80)
	one, both := []statedir.Endpoint{http}, []statedir.Endpoint{http, tcp}
	startup := tcp
	startup.StartupOnly, startup.NotAnswered, startup.NotAnsweredCode = true, "startup probe", probe.ReasonStartup
	// In mode observe the kernel is not given a bound; it would be 11 s.
	withheld := http
	withheld.NotAnswered, withheld.NotAnsweredCode, withheld.Withheld = "mode observe", probe.ReasonMode, true
	threshold := http
	threshold.Successes = 3
	observing := []statedir.Endpoint{withheld}
	unbound := func(e datapath.Evidence) datapath.Evidence { e.FreshUntil = 0; return e }
	for name, test := range map[string]struct {
		maps      surveytest.Maps
		endpoints []statedir.Endpoint
		state     status.State
		why       string
	}{
		"answered":                  {surveytest.Maps{x: {Evidence: surveytest.Success(1, 5, 200)}, port: {Evidence: surveytest.Success(1, 5, 0)}}, one, status.StateFresh, ""},
		"no record yet":             {surveytest.Maps{}, one, status.StateUnknown, "nothing observed yet"},
		"nothing observed":          {surveytest.Maps{x: {}, port: {}}, one, status.StateUnknown, "nothing observed yet"},
		"redirect":                  {surveytest.Maps{x: {Evidence: datapath.Evidence{Status: 302, ObservedAt: 1}}}, one, status.StateUnknown, "status 302: a redirect"},
		"error status":              {surveytest.Maps{x: {Evidence: surveytest.Failed(2, 503)}}, one, status.StateFailed, "status 503"},
		"reset":                     {surveytest.Maps{x: {Evidence: surveytest.Failed(2, 0)}}, one, status.StateFailed, "refused, reset, or no complete and valid response in time"},
		"too late":                  {surveytest.Maps{x: {Evidence: surveytest.Failed(2, 200)}}, one, status.StateFailed, "status 200 came too late"},
		"not often enough":          {surveytest.Maps{x: {Evidence: unbound(surveytest.Success(1, 0, 200))}}, []statedir.Endpoint{threshold}, status.StateStale, "3 probes in a row must succeed"},
		"expired":                   {surveytest.Maps{x: {Evidence: datapath.Evidence{Result: datapath.ResultSuccess, ObservedAt: 1, FreshUntil: surveytest.Now - 3*surveytest.Second}}}, one, status.StateStale, "expired 3s ago"},
		"withdrawn":                 {surveytest.Maps{x: {Evidence: surveytest.Success(4, 5, 200)}, port: {Evidence: surveytest.Success(4, 5, 0), Tally: surveytest.Withdrawn(4)}}, one, status.StateStale, "withdrawn"},
		"withdrawn before":          {surveytest.Maps{x: {Evidence: surveytest.Success(4, 5, 200)}, port: {Evidence: surveytest.Success(4, 5, 0), Tally: surveytest.Withdrawn(5)}}, one, status.StateFresh, ""},
		"other unknown":             {surveytest.Maps{x: {Evidence: surveytest.Success(1, 5, 200)}, port: {}}, both, status.StateFresh, "taking a connection would also answer TCP :80 (unknown)"},
		"another path":              {surveytest.Maps{x: {Evidence: surveytest.Success(1, 5, 200)}, port: {}}, []statedir.Endpoint{http, surveytest.Endpoint(probe.HTTP, 80, "/y")}, status.StateFresh, "not open for answers yet"},
		"other failed":              {surveytest.Maps{x: {Evidence: surveytest.Success(1, 5, 200)}, port: {}, datapath.TCPKey(80): {Evidence: surveytest.Failed(1, 0)}}, both, status.StateFresh, "TCP :80 (failed)"},
		"startup probe only":        {surveytest.Maps{x: {Evidence: surveytest.Success(1, 5, 200)}, port: {}}, []statedir.Endpoint{http, startup}, status.StateFresh, "not open for answers yet"},
		"would be answered":         {surveytest.Maps{x: {Evidence: unbound(surveytest.Success(10, 0, 200))}, port: {}}, observing, status.StateFresh, "mode observe"},
		"would have expired":        {surveytest.Maps{x: {Evidence: unbound(surveytest.Success(12, 0, 200))}, port: {}}, observing, status.StateStale, "mode observe"},
		"would be withdrawn":        {surveytest.Maps{x: {Evidence: unbound(surveytest.Success(1, 0, 200))}, port: {Tally: surveytest.Withdrawn(1)}}, observing, status.StateStale, "mode observe"},
		"would not be":              {surveytest.Maps{x: {Evidence: surveytest.Failed(1, 500)}, port: {}}, observing, status.StateFailed, "mode observe"},
		"nothing observed, observe": {surveytest.Maps{x: {}, port: {}}, observing, status.StateUnknown, "mode observe"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.Web(test.maps, test.endpoints...)
			var s survey.Status
			if err := json.Unmarshal([]byte(m.status("-o", "json")), &s); err != nil {
				t.Fatal(err)
			}
			e := s.Attachments[0].Endpoints[0]
			if e.State != test.state || !strings.Contains(e.WhyNotAnswered, test.why) || test.why == "" && e.WhyNotAnswered != "" {
				t.Errorf("%s: %q; want %s: %q", e.State, e.WhyNotAnswered, test.state, test.why)
			}
			if (e.WhyNotAnswered == "") != (e.WhyNotAnsweredCode == "") {
				t.Errorf("code %q for %q", e.WhyNotAnsweredCode, e.WhyNotAnswered)
			}
			if (e.FreshFor != nil) != (test.state == status.StateFresh) {
				t.Errorf("%s for %v", e.State, e.FreshFor)
			}
		})
	}
}

// In mode observe, output says "would be" instead of "is".
func TestModeObserve(t *testing.T) {
	m := newMachine(t)
	e := surveytest.Endpoint(probe.HTTP, 80, "/x")
	e.NotAnswered, e.NotAnsweredCode, e.Withheld = "mode observe", probe.ReasonMode, true
	e.Probes[0].Detection = 31
	observed := surveytest.Success(1, 0, 200)
	observed.FreshUntil = 0
	m.Web(surveytest.Maps{surveytest.KeyOf(80, "/x"): {Evidence: observed}, datapath.PortKey(80): {}}, e)
	text, err := m.run("explain", "shop/web")
	for _, want := range []string{"state fresh, status 200", "next probe reaches the pod: mode observe", "bound a success would be answered for 11s",
		"a failure would be detected within 43s (31s without probelet)"} {
		if err != nil || !strings.Contains(squeeze(text), want) {
			t.Errorf("%v, does not say %q:\n%s", err, want, text)
		}
	}
	if _, err := m.run("invalidate", "shop/web"); err == nil || !strings.Contains(err.Error(), "shop/web: nothing is answered") {
		t.Errorf("without a daemon: %v", err)
	}
}

// In mode observe, output says what mode answer would have done with the probes that were seen.
func TestWouldAnswer(t *testing.T) {
	m := newMachine(t)
	e := surveytest.Endpoint(probe.HTTP, 80, "/x")
	e.NotAnswered, e.NotAnsweredCode, e.Withheld = "mode observe", probe.ReasonMode, true
	m.Web(surveytest.Maps{datapath.PortKey(80): {}}, e)
	m.Serve(api.Endpoint{Kind: probe.HTTP, Port: 80, Path: "/x", Result: "success", WouldAnswer: &api.WouldAnswer{
		Answered: 12, Hidden: 1, Passed: map[probe.Why]uint64{probe.WhyExpired: 10, probe.WhyUnknown: 2},
	}})
	if table := m.status(); !strings.Contains(table, "mode observe; 12 of 24 probes would have been answered") {
		t.Errorf("got\n%s", table)
	}
	const want = "mode answer would have answered 12 of 24 probes (1 of which failed); " +
		"the others would have reached the pod: 2 before anything was known, 10 after the bound had passed"
	if text, err := m.run("explain", "shop/web"); err != nil || !strings.Contains(squeeze(text), want) {
		t.Errorf("%v, does not say %q:\n%s", err, want, text)
	}
	for _, why := range probe.Whys() {
		if status.WhyText(why) == string(why) {
			t.Errorf("%s has no words", why)
		}
	}
}

// Only the daemon knows of a failure before the first request was seen.
func TestFailureWithoutRequest(t *testing.T) {
	m := newMachine(t)
	e := surveytest.Endpoint(probe.HTTP, 80, "/x")
	e.Question = probe.Question{}
	m.Web(surveytest.Maps{datapath.PortKey(80): {}}, e)
	m.Serve(api.Endpoint{Kind: probe.HTTP, Port: 80, Path: "/x", Result: "failure", ObservedAt: surveytest.Now - 3*surveytest.Second})
	if table := squeeze(m.status()); !strings.Contains(table, "HTTP :80/x failed 3s 11s 0 the last probe failed: refused, reset, or no complete and valid response in time") {
		t.Errorf("got\n%s", table)
	}
}

func TestRefreshOff(t *testing.T) {
	m := newMachine(t)
	e := surveytest.Endpoint(probe.HTTP, 80, "/x")
	e.RefreshOff = "the specs do not give the pod's address"
	m.Web(surveytest.Maps{}, e)
	m.Describe(statedir.Endpoints{Attachments: []statedir.Attachment{{
		ContainerID: "c0ffee", IfName: "eth0", Pod: "shop/web", Endpoints: []statedir.Endpoint{e},
		Settings: statedir.SettingsOf(probe.NewDefaults().Settings(map[string]string{probe.AnnotationRefresh: "true"})),
	}}})
	if text, err := m.run("explain", "shop/web"); err != nil || !strings.Contains(squeeze(text), "refresh off: the specs do not") {
		t.Errorf("%v\n%s", err, text)
	}
	if wide := squeeze(m.status("-o", "wide")); !strings.Contains(wide, "refresh true (annotation), but off: the specs do not") {
		t.Errorf("the table says it is on:\n%s", wide)
	}
}

// Connections without a certain outcome are counted by reason, per pod and in total.
func TestInconclusive(t *testing.T) {
	m := newMachine(t)
	m.Web(surveytest.Maps{}, surveytest.Endpoint(probe.HTTP, 80, "/x"))
	m.ServeNode(surveytest.Node{Inconclusive: map[string]uint64{"unseen": 2, "no_probe": 1}})
	const want = "inconclusive: 3 (2 not fully observed, 1 not a probe's request)"
	if table := m.status(); !strings.HasSuffix(table, "\n"+want+"\n") {
		t.Errorf("does not end with %q:\n%s", want, table)
	}
	if text, err := m.run("explain", "shop/web"); err != nil || !strings.Contains(text, "\n"+want+"\n") {
		t.Errorf("%v, does not say %q:\n%s", err, want, text)
	}
	for _, doubt := range evidence.Doubts() {
		if status.DoubtText(string(doubt)) == string(doubt) {
			t.Errorf("%s has no words", doubt)
		}
	}
}

func TestNotCompared(t *testing.T) {
	m := newMachine(t)
	e := surveytest.Endpoint(probe.HTTP, 80, "/x")
	e.NotCompared = "agent/liveness of pod kube-system/agent may ask the same"
	m.Web(surveytest.Maps{}, e)
	want := "kubelet's verdict not compared: agent/liveness of pod kube-system/agent may"
	if text, err := m.run("explain", "shop/web"); err != nil || !strings.Contains(squeeze(text), want) {
		t.Errorf("%v\n%s", err, text)
	}
}

// Settings that differ from the defaults are shown with what set them.
func TestSettings(t *testing.T) {
	said := func(annotations map[string]string) *statedir.Settings {
		return statedir.SettingsOf(probe.NewDefaults().Settings(annotations))
	}
	for name, test := range map[string]struct {
		settings *statedir.Settings
		capped   bool
		want     string
	}{
		"unknown":   {nil, false, "c0ffee 43s/31s ADD tc proven - - nothing observed"},
		"default":   {said(nil), false, "c0ffee 43s/31s ADD tc proven - - nothing observed"},
		"staleness": {said(map[string]string{probe.AnnotationStaleness: "2"}), false, "c0ffee 43s/31s ADD tc proven - staleness 2 (annotation) nothing"},
		"both": {said(map[string]string{probe.AnnotationStaleness: "2", probe.AnnotationMode: "answer"}), true,
			"c0ffee 43s/31s ADD tc proven - mode answer (annotation), staleness 2 (annotation), lowered to the node's ceiling nothing"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			e := surveytest.Endpoint(probe.HTTP, 80, "/x")
			e.StalenessCapped = test.capped
			m.Web(surveytest.Maps{}, e)
			m.Describe(statedir.Endpoints{Attachments: []statedir.Attachment{{
				ContainerID: "c0ffee", IfName: "eth0", Settings: test.settings, Endpoints: []statedir.Endpoint{e},
			}}})
			if got := squeeze(m.status("-o", "wide")); !strings.Contains(got, test.want) {
				t.Errorf("does not say %q:\n%s", test.want, got)
			}
			if strings.Contains(m.status(), "SETTINGS") {
				t.Error("settings in the narrow table")
			}
			var s survey.Status
			if err := json.Unmarshal([]byte(m.status("-o", "json")), &s); err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(s.Attachments[0].Settings, test.settings) {
				t.Errorf("in JSON: %+v, want %+v", s.Attachments[0].Settings, test.settings)
			}
		})
	}
}

// Adopted pods are distinguished from those that the plugin attached.
func TestAdopted(t *testing.T) {
	m := newMachine(t)
	m.Web(surveytest.Maps{}, surveytest.Endpoint(probe.HTTP, 80, "/x"))
	m.Record(attach.Record{ContainerID: "c0ffee", IfName: "eth0", IfIndex: 7, HostIfName: "veth7", Adopted: true})
	if got := squeeze(m.status("-o", "wide")); !strings.Contains(got, "c0ffee 43s/31s daemon tc proven - -") {
		t.Errorf("%s", got)
	}
	if got := m.status("-o", "json"); !strings.Contains(got, `"adopted": true`) {
		t.Errorf("%s", got)
	}
}

// Reasons that keep a whole attachment from being answered.
func TestAttachments(t *testing.T) {
	fresh := surveytest.Maps{datapath.PortKey(80): {Evidence: surveytest.Success(1, 5, 0)}, surveytest.KeyOf(80, "/x"): {Evidence: surveytest.Success(1, 5, 200)}}
	for name, test := range map[string]struct {
		change func(*machine)
		why    string
	}{
		"nothing":         {func(*machine) {}, ""},
		"objects gone":    {func(m *machine) { m.Kernel = nil }, "not loaded"},
		"maps gone":       {func(m *machine) { m.Kernel.Pods = nil }, "the programs do not know device 7"},
		"no prober":       {func(m *machine) { m.Kernel.ProberSet = datapath.Prober{} }, "the prober is unknown"},
		"any process":     {func(m *machine) { m.Kernel.ProberSet = datapath.Prober{AnyLocal: true} }, ""},
		"no specs":        {func(m *machine) { m.Web(fresh) }, "knows of no probes"},
		"not described":   {func(m *machine) { m.Describe(statedir.Endpoints{}) }, "none is running"},
		"not yet":         {func(m *machine) { m.Describe(statedir.Endpoints{}); m.Daemon() }, "has not seen this pod yet"},
		"failed to start": {func(m *machine) { m.Record(attach.Record{ContainerID: "c0ffee", IfName: "eth0", Error: "busy"}) }, "not attached: busy"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.Web(fresh, surveytest.Endpoint(probe.HTTP, 80, "/x"))
			test.change(m)
			var s survey.Status
			if err := json.Unmarshal([]byte(m.status("-o", "json")), &s); err != nil {
				t.Fatal(err)
			}
			a := s.Attachments[0]
			whys := []string{a.WhyNotAnswered}
			for _, e := range a.Endpoints {
				whys = append(whys, e.WhyNotAnswered)
			}
			for _, why := range whys {
				if !strings.Contains(why, test.why) || test.why == "" && why != "" {
					t.Errorf("%q, want %q", why, test.why)
				}
			}
			if table := m.status(); test.why != "" && !strings.Contains(table, test.why) {
				t.Errorf("the table does not say %q:\n%s", test.why, table)
			}
		})
	}
}

func TestUnattached(t *testing.T) {
	m := newMachine(t)
	m.Describe(statedir.Endpoints{Unattached: []string{"shop/api"}})
	if got := squeeze(m.status()); !strings.Contains(got, "shop/api - - - - - - not attached") {
		t.Errorf("got\n%s", got)
	}
}

func TestFooter(t *testing.T) {
	m := newMachine(t)
	m.Daemon()
	m.Kernel.ProberSet = datapath.Prober{AnyLocal: true}
	got := m.status()
	for _, part := range []string{"probeletd: running, pid ", "prober: every process of the host's network namespace"} {
		if !strings.Contains(got, part) {
			t.Errorf("does not say %q:\n%s", part, got)
		}
	}
}

func TestErrors(t *testing.T) {
	m := newMachine(t)
	if _, err := m.run("status", "-o", "xml"); err == nil || !strings.Contains(err.Error(), `"xml"`) {
		t.Errorf("format: %v", err)
	}
	if _, err := m.run("status", "extra"); err == nil {
		t.Error("an argument is accepted")
	}
	broken := errors.New("broken")
	env := environment{
		stdout: &bytes.Buffer{}, stderr: &m.stderr, now: datapath.Now,
		open: func(string) (survey.Kernel, error) { return nil, broken },
	}
	if err := execute(t.Context(), env, []string{"status", "--state-dir", m.StateDir}); !errors.Is(err, broken) {
		t.Errorf("opening: %v", err)
	}
}

// Files that cannot be read cause warnings, and the rest is shown.
func TestUnreadableState(t *testing.T) {
	m := newMachine(t)
	m.Web(surveytest.Maps{})
	for _, path := range []string{"endpoints.json", "attachments/beef@eth0.json"} {
		if err := os.WriteFile(filepath.Join(m.StateDir, path), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if out := m.status(); !strings.Contains(out, "veth7") {
		t.Errorf("got\n%s", out)
	}
	for _, part := range []string{"endpoints.json", "beef@eth0.json"} {
		if !strings.Contains(m.stderr.String(), part) {
			t.Errorf("no warning names %s: %s", part, m.stderr.String())
		}
	}
}

// If the daemon is not ready, for example because it keeps the plugin out of the chain, the line about it says why.
func TestStatusShowsWhyTheDaemonIsNotReady(t *testing.T) {
	m := newMachine(t)
	m.ServeNode(surveytest.Node{Missing: []string{"the plugin is kept out of the chain", "no prober was found"}})
	text, err := m.run("status")
	if want := ", NOT READY: the plugin is kept out of the chain; no prober was found\n"; err != nil || !strings.Contains(text, want) {
		t.Errorf("does not say %q: %v\n%s", want, err, text)
	}
}
