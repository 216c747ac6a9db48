//go:build linux

package ctl

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/doctor"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
)

const (
	second = uint64(time.Second)
	now    = 1000 * second
)

// fakeKernel holds pods' maps and devices by container.
type fakeKernel struct {
	prober  datapath.Prober
	pods    map[string]fakeMaps
	devices map[string]datapath.Device
	// neighbours by ifindex; those of a device that has none are looked for in vain.
	neighbours    map[int][]attach.Neighbour
	neighboursErr error
	trusted       []datapath.DeviceKey
	// unwatched: listening sockets that close are not noticed.
	unwatched bool
	// blind: listening sockets are not looked at.
	blind bool
}

type fakeMaps map[datapath.EndpointKey]fakeRecord

type fakeRecord struct {
	evidence datapath.Evidence
	tally    datapath.Tally
}

func (k fakeKernel) Prober() (datapath.Prober, error) { return k.prober, nil }
func (k fakeKernel) Watched() bool                    { return !k.unwatched }
func (k fakeKernel) SeesListeners() bool              { return !k.blind }
func (k fakeKernel) Close() error                     { return nil }

func (k fakeKernel) Counters() (map[string]uint64, error) {
	return map[string]uint64{"answered_http": 12, "answered_tcp": 3, "observed": 20, "handed_over": 1}, nil
}

func (k fakeKernel) Pod(id attach.ID) (survey.PodMaps, error) {
	if maps, ok := k.pods[id.ContainerID]; ok {
		return maps, nil
	}
	return nil, os.ErrNotExist
}

func (k fakeKernel) AttachedDevice(id attach.ID) (datapath.Device, error) {
	if device, ok := k.devices[id.ContainerID]; ok {
		return device, nil
	}
	return datapath.Device{}, os.ErrNotExist
}

func (k fakeKernel) Neighbours(ifindex int) ([]attach.Neighbour, error) {
	return k.neighbours[ifindex], k.neighboursErr
}

func (k *fakeKernel) TrustAgain(key datapath.DeviceKey) error {
	k.trusted = append(k.trusted, key)
	return nil
}

func (m fakeMaps) Get(key datapath.EndpointKey) (datapath.Evidence, datapath.Tally, error) {
	r, ok := m[key]
	if !ok {
		return r.evidence, r.tally, ebpf.ErrKeyNotExist
	}
	return r.evidence, r.tally, nil
}

// success was observed so many seconds ago, and is fresh for so many more.
func success(ago, fresh uint64, status uint16) datapath.Evidence {
	return datapath.Evidence{
		Result: datapath.ResultSuccess, Status: status, ObservedAt: now - ago*second, FreshUntil: now + fresh*second,
	}
}

func failed(ago uint64, status uint16) datapath.Evidence {
	return datapath.Evidence{Result: datapath.ResultFailure, Status: status, ObservedAt: now - ago*second}
}

func hits(n uint64) datapath.Tally { return datapath.Tally{Hits: n} }

func withdrawn(ago uint64) datapath.Tally { return datapath.Tally{WithdrawnAt: now - ago*second} }

// machine is what a command of the test finds.
type machine struct {
	t        *testing.T
	kernel   *fakeKernel // nil: nothing is loaded
	stateDir string
	stderr   bytes.Buffer
	host     doctor.Host
	width    int
	openErr  error // of the kernel side
}

func newMachine(t *testing.T) *machine {
	return &machine{t: t, stateDir: t.TempDir(), kernel: &fakeKernel{
		prober: datapath.Prober{CgroupIDs: []uint64{4711}}, pods: map[string]fakeMaps{}, devices: map[string]datapath.Device{},
	}}
}

// run runs a command. That the daemon is down, which the command has shown, is no error here: see TestExitCodes.
func (m *machine) run(args ...string) (string, error) {
	m.t.Helper()
	text, err := m.execute(args...)
	var coded *status.Error
	if errors.As(err, &coded) && coded.Shown {
		err = nil
	}
	return text, err
}

func (m *machine) execute(args ...string) (string, error) {
	m.t.Helper()
	var stdout bytes.Buffer
	env := environment{
		stdout: &stdout, stderr: &m.stderr,
		now: func() uint64 { return now },
		open: func(string) (survey.Kernel, error) {
			if m.kernel == nil || m.openErr != nil {
				return nil, m.openErr
			}
			return m.kernel, nil
		},
		host: m.host, width: m.width,
	}
	err := execute(context.Background(), env, append(args, "--state-dir", m.stateDir))
	return stdout.String(), err
}

func (m *machine) status(args ...string) string {
	m.t.Helper()
	out, err := m.run(append([]string{"status"}, args...)...)
	if err != nil {
		m.t.Fatal(err)
	}
	return out
}

// daemon says that one runs.
func (m *machine) daemon() {
	m.t.Helper()
	held, err := statedir.Lock(m.stateDir)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = held.Release() })
}

func (m *machine) describe(e statedir.Endpoints) {
	m.t.Helper()
	if err := statedir.WriteEndpoints(m.stateDir, e); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) record(r attach.Record) {
	m.t.Helper()
	if err := attach.WriteRecord(m.stateDir, r); err != nil {
		m.t.Fatal(err)
	}
}

func endpoint(kind probe.Kind, port uint16, path string) statedir.Endpoint {
	return statedir.Endpoint{
		Kind: kind, Port: port, Path: path, Observed: true, Period: 10, Timeout: 1, StalenessBound: 11, Successes: 1,
		Question: questionOf(path),
		Probes: []statedir.Probe{{
			Asker:  probe.Asker{Container: "c", Type: probe.Readiness},
			Period: 10, Timeout: 1, FailureThreshold: 3, Detection: 43, DetectionPlain: 31, DetectionAnswered: 43,
		}},
	}
}

// questionOf stands for that of a probe's request.
func questionOf(path string) probe.Question { return probe.Question{Hash: uint64(len(path)), Check: 1} }

func keyOf(port uint16, path string) datapath.EndpointKey {
	return datapath.HTTPKey(port, datapath.Question(questionOf(path)))
}

// webDevice is web's.
var webDevice = datapath.DeviceKey{Ifindex: 7, Generation: 4}

// web attaches a pod with these endpoints.
func (m *machine) web(maps fakeMaps, endpoints ...statedir.Endpoint) {
	m.t.Helper()
	m.record(attach.Record{ContainerID: "c0ffee", IfName: "eth0", IfIndex: 7, HostIfName: "veth7", PodIPs: []string{"10.0.0.7"}})
	m.describe(statedir.Endpoints{Attachments: []statedir.Attachment{{
		ContainerID: "c0ffee", IfName: "eth0", Pod: "shop/web", Endpoints: endpoints,
		Settings: statedir.SettingsOf(probe.NewDefaults().Settings(nil)),
	}}})
	m.kernel.pods["c0ffee"] = maps
	m.kernel.devices["c0ffee"] = datapath.Device{Key: webDevice, Trust: datapath.TrustProven}
}

// squeeze makes of each run of blanks one.
func squeeze(s string) string { return strings.Join(strings.Fields(s), " ") }

func TestNothingLoaded(t *testing.T) {
	m := newMachine(t)
	m.kernel = nil
	m.stateDir = filepath.Join(m.stateDir, "missing")
	want := "nothing attached\n" +
		"probeletd: NOT RUNNING; nothing is answered, every probe reaches its pod\n" +
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
	tls := endpoint(probe.HTTPS, 443, "/")
	tls.Observed, tls.NotAnswered, tls.NotAnsweredCode = false, "HTTPS is never answered", probe.ReasonKind
	m.web(fakeMaps{
		datapath.PortKey(8080): {evidence: success(4, 7, 0)},
		keyOf(8080, "/ready"):  {success(4, 7, 204), hits(41)},
	}, endpoint(probe.HTTP, 8080, "/ready"), tls)
	m.record(attach.Record{ContainerID: "dead", IfName: "eth0", PodNamespace: "shop", PodName: "bad", Error: "no veth"})
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

// Every state, and every reason that is not the specs'.
func TestStates(t *testing.T) {
	http, tcp := endpoint(probe.HTTP, 80, "/x"), endpoint(probe.TCP, 80, "")
	x, port := keyOf(80, "/x"), datapath.PortKey(80)
	one, both := []statedir.Endpoint{http}, []statedir.Endpoint{http, tcp}
	startup := tcp
	startup.StartupOnly, startup.NotAnswered, startup.NotAnsweredCode = true, "startup probe", probe.ReasonStartup
	// In mode observe the kernel is told of no bound, which is then 11 s.
	withheld := http
	withheld.NotAnswered, withheld.NotAnsweredCode, withheld.Withheld = "mode observe", probe.ReasonMode, true
	threshold := http
	threshold.Successes = 3
	observing := []statedir.Endpoint{withheld}
	unbound := func(e datapath.Evidence) datapath.Evidence { e.FreshUntil = 0; return e }
	for name, test := range map[string]struct {
		maps      fakeMaps
		endpoints []statedir.Endpoint
		state     status.State
		why       string
	}{
		"answered":           {fakeMaps{x: {evidence: success(1, 5, 200)}, port: {evidence: success(1, 5, 0)}}, one, status.StateFresh, ""},
		"no record yet":      {fakeMaps{}, one, status.StateUnknown, "nothing observed yet"},
		"nothing observed":   {fakeMaps{x: {}, port: {}}, one, status.StateUnknown, "nothing observed yet"},
		"redirect":           {fakeMaps{x: {evidence: datapath.Evidence{Status: 302, ObservedAt: 1}}}, one, status.StateUnknown, "status 302: a redirect"},
		"error status":       {fakeMaps{x: {evidence: failed(2, 503)}}, one, status.StateFailed, "status 503"},
		"reset":              {fakeMaps{x: {evidence: failed(2, 0)}}, one, status.StateFailed, "refused, reset, or no complete and valid response in time"},
		"too late":           {fakeMaps{x: {evidence: failed(2, 200)}}, one, status.StateFailed, "status 200 came too late"},
		"not often enough":   {fakeMaps{x: {evidence: unbound(success(1, 0, 200))}}, []statedir.Endpoint{threshold}, status.StateStale, "3 probes in a row must succeed"},
		"expired":            {fakeMaps{x: {evidence: datapath.Evidence{Result: datapath.ResultSuccess, ObservedAt: 1, FreshUntil: now - 3*second}}}, one, status.StateStale, "expired 3s ago"},
		"withdrawn":          {fakeMaps{x: {evidence: success(4, 5, 200)}, port: {success(4, 5, 0), withdrawn(4)}}, one, status.StateStale, "withdrawn"},
		"withdrawn before":   {fakeMaps{x: {evidence: success(4, 5, 200)}, port: {success(4, 5, 0), withdrawn(5)}}, one, status.StateFresh, ""},
		"other unknown":      {fakeMaps{x: {evidence: success(1, 5, 200)}, port: {}}, both, status.StateFresh, "taking a connection would also answer TCP :80 (unknown)"},
		"another path":       {fakeMaps{x: {evidence: success(1, 5, 200)}, port: {}}, []statedir.Endpoint{http, endpoint(probe.HTTP, 80, "/y")}, status.StateFresh, "not open yet"},
		"other failed":       {fakeMaps{x: {evidence: success(1, 5, 200)}, port: {}, datapath.TCPKey(80): {evidence: failed(1, 0)}}, both, status.StateFresh, "TCP :80 (failed)"},
		"startup probe only": {fakeMaps{x: {evidence: success(1, 5, 200)}, port: {}}, []statedir.Endpoint{http, startup}, status.StateFresh, "not open yet"},
		"would be answered":  {fakeMaps{x: {evidence: unbound(success(10, 0, 200))}, port: {}}, observing, status.StateFresh, "mode observe"},
		"would have expired": {fakeMaps{x: {evidence: unbound(success(12, 0, 200))}, port: {}}, observing, status.StateStale, "mode observe"},
		"would be withdrawn": {fakeMaps{x: {evidence: unbound(success(1, 0, 200))}, port: {tally: withdrawn(1)}}, observing, status.StateStale, "mode observe"},
		"would not be":       {fakeMaps{x: {evidence: failed(1, 500)}, port: {}}, observing, status.StateFailed, "mode observe"},
		"nothing to be seen": {fakeMaps{x: {}, port: {}}, observing, status.StateUnknown, "mode observe"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.web(test.maps, test.endpoints...)
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

// In mode observe nothing is said to be answered, and all that would be.
func TestObserved(t *testing.T) {
	m := newMachine(t)
	e := endpoint(probe.HTTP, 80, "/x")
	e.NotAnswered, e.NotAnsweredCode, e.Withheld = "mode observe", probe.ReasonMode, true
	e.Probes[0].Detection = 31
	observed := success(1, 0, 200)
	observed.FreshUntil = 0
	m.web(fakeMaps{keyOf(80, "/x"): {evidence: observed}, datapath.PortKey(80): {}}, e)
	text, err := m.run("explain", "shop/web")
	for _, want := range []string{"state fresh, status 200", "next probe reaches the pod: mode observe", "bound a success would be answered for 11s",
		"a failure would be detected within 43s (31s without probelet)"} {
		if err != nil || !strings.Contains(squeeze(text), want) {
			t.Errorf("%v, does not say %q:\n%s", err, want, text)
		}
	}
	if _, err := m.run("invalidate", "shop/web"); err == nil || !strings.Contains(err.Error(), "of shop/web nothing is answered") {
		t.Errorf("without a daemon: %v", err)
	}
}

// node is a daemon that knows of a pod's endpoints.
type node struct {
	api.Node
	endpoints    []api.Endpoint
	inconclusive map[string]uint64
	source       api.SourceReply
	unready      []string
}

func (n node) Endpoints(context.Context) (api.EndpointsReply, error) {
	return api.EndpointsReply{
		Endpoints:    n.endpoints,
		Inconclusive: []api.Inconclusive{{ContainerID: "c0ffee", IfName: "eth0", Reasons: n.inconclusive}},
	}, nil
}

func (n node) Source() api.SourceReply { return n.source }

func (n node) Unready(context.Context) ([]string, error) { return n.unready, nil }

func (n node) Events(context.Context, string, string) (api.EventsReply, error) {
	return api.EventsReply{}, nil
}

// serve makes web's daemon know this of its endpoints.
func (m *machine) serve(endpoints ...api.Endpoint) {
	m.t.Helper()
	for i := range endpoints {
		endpoints[i].ContainerID, endpoints[i].IfName = "c0ffee", "eth0"
	}
	m.serveNode(node{endpoints: endpoints})
}

func (m *machine) serveNode(n node) {
	m.t.Helper()
	m.daemon()
	listener, err := api.Listen(m.stateDir)
	if err != nil {
		m.t.Fatal(err)
	}
	ctx, stop := context.WithCancel(m.t.Context())
	served := make(chan error)
	go func() {
		served <- api.Serve(ctx, listener, api.Local(n, http.NotFoundHandler(), &slog.LevelVar{}), slog.New(slog.DiscardHandler))
	}()
	m.t.Cleanup(func() { stop(); <-served })
}

// In mode observe it is said what mode answer would have made of the probes that were seen.
func TestEstimate(t *testing.T) {
	m := newMachine(t)
	e := endpoint(probe.HTTP, 80, "/x")
	e.NotAnswered, e.NotAnsweredCode, e.Withheld = "mode observe", probe.ReasonMode, true
	m.web(fakeMaps{datapath.PortKey(80): {}}, e)
	m.serve(api.Endpoint{Kind: probe.HTTP, Port: 80, Path: "/x", Result: "success", Estimate: &api.Estimate{
		Answered: 12, Hidden: 1, Passed: map[probe.Why]uint64{probe.WhyExpired: 10, probe.WhyUnknown: 2},
	}})
	if table := m.status(); !strings.Contains(table, "mode observe; 12 of 24 probes would have been answered") {
		t.Errorf("got\n%s", table)
	}
	const want = "mode answer would have answered 12 of 24 probes (of these, 1 failed); " +
		"the others reach the pod: 2 before anything was known, 10 after the bound"
	if text, err := m.run("explain", "shop/web"); err != nil || !strings.Contains(squeeze(text), want) {
		t.Errorf("%v, does not say %q:\n%s", err, want, text)
	}
	for _, why := range probe.Whys() {
		if status.WhyText(why) == string(why) {
			t.Errorf("%s has no words", why)
		}
	}
}

// Of a failure before a request was ever seen only the daemon knows.
func TestFailureWithoutRequest(t *testing.T) {
	m := newMachine(t)
	e := endpoint(probe.HTTP, 80, "/x")
	e.Question = probe.Question{}
	m.web(fakeMaps{datapath.PortKey(80): {}}, e)
	m.serve(api.Endpoint{Kind: probe.HTTP, Port: 80, Path: "/x", Result: "failure", ObservedAt: now - 3*second})
	if table := squeeze(m.status()); !strings.Contains(table, "HTTP :80/x failed 3s 11s 0 the last probe failed: refused, reset, or no complete and valid response in time") {
		t.Errorf("got\n%s", table)
	}
}

func TestRefreshOff(t *testing.T) {
	m := newMachine(t)
	e := endpoint(probe.HTTP, 80, "/x")
	e.RefreshOff = "the specs do not give the pod's address"
	m.web(fakeMaps{}, e)
	m.describe(statedir.Endpoints{Attachments: []statedir.Attachment{{
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

// Connections that had no certain outcome are counted by why, of a pod and of all.
func TestInconclusive(t *testing.T) {
	m := newMachine(t)
	m.web(fakeMaps{}, endpoint(probe.HTTP, 80, "/x"))
	m.serveNode(node{inconclusive: map[string]uint64{"unseen": 2, "no_probe": 1}})
	const want = "inconclusive: 3 (2 not seen whole, 1 not asked as a probe asks)"
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
	e := endpoint(probe.HTTP, 80, "/x")
	e.NotCompared = "agent/liveness of pod kube-system/agent may ask the same"
	m.web(fakeMaps{}, e)
	want := "kubelet's verdict not compared: agent/liveness of pod kube-system/agent may"
	if text, err := m.run("explain", "shop/web"); err != nil || !strings.Contains(squeeze(text), want) {
		t.Errorf("%v\n%s", err, text)
	}
}

// Settings are shown where somebody said something, and who it was.
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
			e := endpoint(probe.HTTP, 80, "/x")
			e.StalenessCapped = test.capped
			m.web(fakeMaps{}, e)
			m.describe(statedir.Endpoints{Attachments: []statedir.Attachment{{
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

// A pod that was there before is told from those that came after.
func TestAdopted(t *testing.T) {
	m := newMachine(t)
	m.web(fakeMaps{}, endpoint(probe.HTTP, 80, "/x"))
	m.record(attach.Record{ContainerID: "c0ffee", IfName: "eth0", IfIndex: 7, HostIfName: "veth7", Adopted: true})
	if got := squeeze(m.status("-o", "wide")); !strings.Contains(got, "c0ffee 43s/31s daemon tc proven - -") {
		t.Errorf("%s", got)
	}
	if got := m.status("-o", "json"); !strings.Contains(got, `"adopted": true`) {
		t.Errorf("%s", got)
	}
}

// What keeps a whole attachment from being answered.
func TestAttachments(t *testing.T) {
	fresh := fakeMaps{datapath.PortKey(80): {evidence: success(1, 5, 0)}, keyOf(80, "/x"): {evidence: success(1, 5, 200)}}
	for name, test := range map[string]struct {
		change func(*machine)
		why    string
	}{
		"nothing":         {func(*machine) {}, ""},
		"objects gone":    {func(m *machine) { m.kernel = nil }, "not loaded"},
		"maps gone":       {func(m *machine) { m.kernel.pods = nil }, "the programs do not know device 7"},
		"nobody probes":   {func(m *machine) { m.kernel.prober = datapath.Prober{} }, "nobody is the prober"},
		"everybody":       {func(m *machine) { m.kernel.prober = datapath.Prober{AnyLocal: true} }, ""},
		"no specs":        {func(m *machine) { m.web(fresh) }, "knows no probes"},
		"not described":   {func(m *machine) { m.describe(statedir.Endpoints{}) }, "none is running"},
		"not yet":         {func(m *machine) { m.describe(statedir.Endpoints{}); m.daemon() }, "has not seen it yet"},
		"failed to start": {func(m *machine) { m.record(attach.Record{ContainerID: "c0ffee", IfName: "eth0", Error: "busy"}) }, "not attached: busy"},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t)
			m.web(fresh, endpoint(probe.HTTP, 80, "/x"))
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
	m.describe(statedir.Endpoints{Unattached: []string{"shop/api"}})
	if got := squeeze(m.status()); !strings.Contains(got, "shop/api - - - - - - not attached") {
		t.Errorf("got\n%s", got)
	}
}

func TestSummary(t *testing.T) {
	m := newMachine(t)
	m.daemon()
	m.kernel.prober = datapath.Prober{AnyLocal: true}
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
	if err := execute(t.Context(), env, []string{"status", "--state-dir", m.stateDir}); !errors.Is(err, broken) {
		t.Errorf("opening: %v", err)
	}
}

// What cannot be read is said, and the rest is shown.
func TestUnreadableState(t *testing.T) {
	m := newMachine(t)
	m.web(fakeMaps{})
	for _, path := range []string{"endpoints.json", "attachments/beef@eth0.json"} {
		if err := os.WriteFile(filepath.Join(m.stateDir, path), []byte("{"), 0o600); err != nil {
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

// A daemon that is not ready, because it keeps the plugin out of the chain for example, says why in the first line.
func TestStatusSaysWhatIsMissing(t *testing.T) {
	m := newMachine(t)
	m.serveNode(node{unready: []string{"the plugin is kept out of the chain", "no prober was found"}})
	text, err := m.run("status")
	if want := ", NOT READY: the plugin is kept out of the chain; no prober was found\n"; err != nil || !strings.Contains(text, want) {
		t.Errorf("does not say %q: %v\n%s", want, err, text)
	}
}
