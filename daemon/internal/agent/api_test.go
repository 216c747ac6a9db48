package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/prober"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

// local returns a client of the daemon's socket.
func (n *node) local() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", statedir.SocketPath(n.config.StateDir))
		},
	}}
}

func do(t *testing.T, c *http.Client, method, url, body string) (int, string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	response, err := c.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close() //nolint:errcheck // read only
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(text)
}

// started runs a daemon with a pod default/web, whose /healthz on port 8080 is probed, and waits until it listens.
func started(t *testing.T) *node {
	t.Helper()
	n := newNode(t)
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.attach()
	n.start()
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))
	return n
}

func TestInvalidate(t *testing.T) {
	n := started(t)
	client := api.NewClient(n.config.StateDir)
	for name, request := range map[string]api.InvalidateRequest{
		"the pod":      {Namespace: "default", Pod: "web"},
		"a port":       {Namespace: "default", Pod: "web", Port: 8080},
		"a path":       {Namespace: "default", Pod: "web", Path: "/healthz"},
		"one endpoint": {Namespace: "default", Pod: "web", Port: 8080, Path: "/healthz"},
	} {
		t.Run(name, func(t *testing.T) {
			n.t = t
			n.want("/healthz", 200, false)
			n.eventually("fresh", n.open(8080))
			n.want("/healthz", 200, true)
			reply, err := client.Invalidate(t.Context(), request)
			if err != nil || reply.Pod != "default/web" || !slices.Equal(reply.Withdrawn, []string{"HTTP :8080/healthz"}) {
				t.Fatalf("%+v, %v", reply, err)
			}
			if n.open(8080)() {
				t.Fatal("still fresh after invalidation was confirmed")
			}
		})
	}
	n.t = t
	n.want("/healthz", 200, false)
	n.eventually("fresh", n.open(8080))
	for want, request := range map[string]api.InvalidateRequest{
		"pod default/other is not known on this node":                      {Namespace: "default", Pod: "other"},
		"pod web/default is not known on this node":                        {Namespace: "web", Pod: "default"},
		"pod default/web has no such endpoint; it has: HTTP :8080/healthz": {Namespace: "default", Pod: "web", Path: "/ready"},
	} {
		if _, err := client.Invalidate(t.Context(), request); !errors.Is(err, api.ErrNotFound) || err.Error() != want {
			t.Errorf("%+v: %v", request, err)
		}
	}
	n.want("/healthz", 200, true)
}

func TestInvalidateMalformed(t *testing.T) {
	n := started(t)
	for body, want := range map[string]string{
		``:                                     "EOF",
		`{`:                                    "unexpected EOF",
		`[]`:                                   "array",
		`{}`:                                   "namespace: must be set",
		`{"namespace":"a"}`:                    "pod: must be set",
		`{"namespace":"","pod":"b"}`:           "namespace: must be set",
		`{"namespace":1,"pod":"b"}`:            "namespace: number: must be of type string",
		`{"namespace":"a","pod":"b","port":0}`: "port: 0: must be between 1 and 65535",
		`{"namespace":"a","pod":"b","port":65536}`:     "port: 65536",
		`{"namespace":"a","pod":"b","port":"http"}`:    "port: string: must be of type integer",
		`{"namespace":"a","pod":"b","port":1.5}`:       "port: number 1.5: must be of type integer",
		`{"namespace":"a","pod":"b","path":"x"}`:       `path: "x": must begin with /`,
		`{"namespace":"a","pod":"b","ports":80}`:       `unknown field "ports"`,
		`{"namespace":"a","pod":"b"}{}`:                "more than one JSON value",
		`{"pod":"` + strings.Repeat("x", 1<<20) + `"}`: "more than 65536 bytes",
	} {
		status, reply := do(t, n.local(), http.MethodPost, "http://probeletd/v1/invalidate", body)
		if status != http.StatusBadRequest || !strings.Contains(strings.ReplaceAll(reply, `\"`, `"`), want) {
			t.Errorf("%.60s: %d %s, want %q", body, status, reply, want)
		}
	}
	if status, _ := do(t, n.local(), http.MethodGet, "http://probeletd/v1/invalidate", ""); status != http.StatusMethodNotAllowed {
		t.Errorf("GET: %d", status)
	}
}

// Only the owner may connect, and the socket of a killed daemon is replaced.
func TestSocket(t *testing.T) {
	n := newNode(t)
	n.specs("exec: {}")
	if err := os.MkdirAll(n.config.StateDir, 0o755); err != nil {
		t.Fatal(err)
	}
	path := statedir.SocketPath(n.config.StateDir)
	if err := os.WriteFile(path, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	n.start()
	n.eventually("a socket", func() bool {
		info, err := os.Stat(path)
		return err == nil && info.Mode()&os.ModeSocket != 0
	})
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if status, reply := do(t, n.local(), http.MethodGet, "http://probeletd/healthz", ""); status != 200 || reply != "ok\n" {
		t.Errorf("%d %s", status, reply)
	}
	if left, _ := filepath.Glob(filepath.Join(n.config.StateDir, "api*")); len(left) > 0 {
		t.Errorf("left over: %s", left)
	}
}

func TestReadiness(t *testing.T) {
	n := newNode(t)
	n.config.Prober = "kubelet"
	n.specs("exec: {}")
	if who, err := (&prober.Finder{Kubelet: true}).Find(); err == nil {
		t.Skipf("there is a kubelet on this machine: %+v", who)
	}
	n.start()
	n.eventually("the socket", func() bool { _, err := os.Stat(statedir.SocketPath(n.config.StateDir)); return err == nil })
	n.eventually("missing parts reported", func() bool {
		status, reply := do(t, n.local(), http.MethodGet, "http://probeletd/readyz", "")
		return status == http.StatusServiceUnavailable && strings.HasPrefix(reply, "no prober was found, so nothing is answered: --prober kubelet: no root process")
	})
}

func TestEvents(t *testing.T) {
	n := started(t)
	client := api.NewClient(n.config.StateDir)
	events := func() []api.Event {
		t.Helper()
		reply, err := client.Events(t.Context(), "default", "web")
		if err != nil || reply.Pod != "default/web" {
			t.Fatalf("%+v, %v", reply, err)
		}
		return reply.Events
	}
	if got := events(); len(got) != 0 {
		t.Errorf("before any probe: %+v", got)
	}
	n.want("/healthz", 200, false)
	n.eventually("seen", func() bool { return len(events()) == 1 })
	if _, err := client.Invalidate(t.Context(), api.InvalidateRequest{Namespace: "default", Pod: "web"}); err != nil {
		t.Fatal(err)
	}
	n.status.Store(http.StatusServiceUnavailable)
	for range 3 {
		n.want("/healthz", 503, false)
	}
	n.eventually("seen", func() bool { return len(events()) == 3 && events()[2].Count == 3 })
	got := events()
	for i, want := range []api.Event{
		{Count: 1, Result: "success", Status: 200, Cause: probe.ByProbe},
		{Count: 1, Result: "unknown", Cause: probe.ByRequest},
		{Count: 3, Result: "failure", Status: 503, Cause: probe.ByProbe},
	} {
		e := got[i]
		if (e.Took != nil) != (e.Cause == probe.ByProbe) || time.Since(e.Time) > time.Minute {
			t.Errorf("event %d: %+v", i, e)
		}
		want.Time, want.Took, want.Kind, want.Port, want.Path = e.Time, e.Took, probe.HTTP, 8080, "/healthz"
		if e != want {
			t.Errorf("event %d: %+v, want %+v", i, e, want)
		}
	}
	if _, err := client.Events(t.Context(), "default", "other"); !errors.Is(err, api.ErrNotFound) {
		t.Errorf("of an unknown pod: %v", err)
	}
	// Only the last ones are kept.
	for i := range 3 * eventsKept {
		n.status.Store(int32(500 + i%2))
		n.want("/healthz", 500+i%2, false)
	}
	n.eventually("the last", func() bool { return len(events()) == eventsKept })
}

// metricsOf returns the samples, by name and labels.
func (n *node) metricsOf() (map[string]string, string) {
	n.t.Helper()
	status, text := do(n.t, n.local(), http.MethodGet, "http://probeletd/metrics", "")
	if status != http.StatusOK {
		n.t.Fatalf("%d %s", status, text)
	}
	samples := map[string]string{}
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok && name != "#" {
			samples[name] = value
		}
	}
	return samples, text
}

func (n *node) wantMetrics(want map[string]string) {
	n.t.Helper()
	got, _ := n.metricsOf()
	for name, value := range want {
		if got[name] != value {
			n.t.Errorf("%s is %q, want %s", name, got[name], value)
		}
	}
}

func TestMetrics(t *testing.T) {
	n := newNode(t)
	n.config.MetricsPerPod = true
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.attach()
	n.start()
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))
	n.wantMetrics(map[string]string{
		`probelet_endpoints{mode="answer",state="unknown"}`: "1",
		`probelet_attachments{known="true"}`:                "1",
		`probelet_prober_found`:                             "1",
		`probelet_listeners_watched`:                        map[bool]string{false: "0", true: "1"}[n.d.Watched()],
		`probelet_source_up`:                                "1",
		`probelet_source_pushed`:                            "0",
		`probelet_source_snapshots_total`:                   "1",
		`probelet_map_entries{map="pods"}`:                  "1",
		`probelet_map_capacity_entries{map="flows"}`:        "4096",
	})
	if err := os.RemoveAll(filepath.Join(n.d.Dir(), "watch")); err != nil {
		t.Fatal(err)
	}
	n.want("/healthz", 200, false)
	n.eventually("fresh", n.open(8080))
	for range 3 {
		n.want("/healthz", 200, true)
	}
	n.want("/other", 200, false)
	n.wantMetrics(map[string]string{`probelet_listeners_watched`: "0"})
	n.wantMetrics(map[string]string{
		`probelet_probes_total{reason="http",verdict="answered"}`:           "3",
		`probelet_probes_total{reason="not_fresh",verdict="passed"}`:        "1",
		`probelet_handed_over_connections_total`:                            "1",
		`probelet_observed_probes_total`:                                    "2",
		`probelet_answer_age_seconds_count`:                                 "3",
		`probelet_evidence_total{result="success",source="probe"}`:          "1",
		`probelet_endpoints{mode="answer",state="fresh"}`:                   "1",
		`probelet_endpoints{mode="answer",state="unknown"}`:                 "0",
		`probelet_pod_answered_probes_total{namespace="default",pod="web"}`: "3",
		`probelet_withdrawn_ports_total{cause="status"}`:                    "0",
		`probelet_reconcile_errors_total`:                                   "0",
		`probelet_lost_records_total`:                                       "0",
	})
	if status, reply := do(t, n.local(), http.MethodPost, "http://probeletd/v1/invalidate", `{"namespace":"default","pod":"web"}`); status != 200 {
		t.Fatal(status, reply)
	}
	n.wantMetrics(map[string]string{
		`probelet_withdrawn_endpoints_total{cause="request"}`: "1",
		`probelet_endpoints{mode="answer",state="unknown"}`:   "1",
	})
}

// Requests of a prober that are not probes are counted as such, also for their pod. The reason why states are not pushed is reported.
func TestInconclusive(t *testing.T) {
	n := started(t)
	conn := n.pod.Dial(t, n.pod.IPv4.String()+":8080")
	if _, err := io.WriteString(conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
	n.want("/healthz", 200, false) // the end of a probe wakes the daemon
	n.eventually("counted", func() bool {
		got, _ := n.metricsOf()
		return got[`probelet_inconclusive_probes_total{reason="no_probe"}`] == "1"
	})
	n.wantMetrics(map[string]string{`probelet_inconclusive_probes_total{reason="unseen"}`: "0"})
	client := api.NewClient(n.config.StateDir)
	reply, err := client.Endpoints(t.Context())
	want := api.Inconclusive{ContainerID: n.idOf(n.pod).ContainerID, IfName: "eth0", Reasons: map[string]uint64{"no_probe": 1}}
	if err != nil || len(reply.Inconclusive) != 1 || !reflect.DeepEqual(reply.Inconclusive[0], want) {
		t.Errorf("%+v, %v; want %+v", reply.Inconclusive, err, want)
	}
	if source, err := client.Source(t.Context()); err != nil || source.Pushed || source.Why == "" {
		t.Errorf("%+v, %v", source, err)
	}
}

// In mode observe, metrics show what would be answered. Nothing is answered: the kernel is not told.
func TestObserveShowsWhatWouldBeAnswered(t *testing.T) {
	n := newNode(t)
	n.config.Defaults.Mode = probe.Observe
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.attach()
	n.start()
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))
	state := func(want string) func() bool {
		return func() bool {
			got, _ := n.metricsOf()
			return got[`probelet_endpoints{mode="observe",state="`+want+`"}`] == "1" && got[`probelet_endpoints{mode="observe",state="never"}`] == "0"
		}
	}
	n.want("/healthz", 200, false)
	n.eventually("would be answered", state("fresh"))
	for _, key := range []datapath.EndpointKey{n.key("/healthz"), datapath.PortKey(8080)} {
		if evidence := n.records()[key]; evidence.FreshUntil != 0 {
			t.Errorf("the kernel was told to answer: %+v", evidence)
		}
	}
	n.want("/healthz", 200, false)
	n.status.Store(http.StatusServiceUnavailable)
	n.want("/healthz", 503, false)
	n.eventually("would not be answered", state("failed"))

	n.wantMetrics(map[string]string{
		`probelet_estimated_probes_total{reason="unknown",verdict="passed"}`:    "1",
		`probelet_estimated_probes_total{reason="success",verdict="answered"}`:  "1",
		`probelet_estimated_probes_total{reason="failure",verdict="answered"}`:  "1",
		`probelet_worst_detection_seconds{mode="observe",probelet="without"}`:   "930",
		`probelet_worst_detection_seconds{mode="observe",probelet="answering"}`: "1260",
	})
	reply, err := api.NewClient(n.config.StateDir).Endpoints(t.Context())
	if err != nil || len(reply.Endpoints) != 1 || reply.Endpoints[0].WouldAnswer == nil {
		t.Fatalf("%+v, %v", reply, err)
	}
	if e := reply.Endpoints[0].WouldAnswer; e.Answered != 2 || e.Hidden != 1 || e.Probes() != 3 || e.Passed[probe.WhyUnknown] != 1 {
		t.Errorf("would answer: %+v", e)
	}
}

// Names and units follow Prometheus' conventions, all metrics are documented, and all documented ones exist.
func TestMetricsAreDocumented(t *testing.T) {
	n := newNode(t)
	n.config.MetricsPerPod = true
	n.config.FollowChain = func(ctx context.Context, looked func(error)) error {
		looked(nil)
		<-ctx.Done()
		return nil
	}
	n.config.Defaults.Refresh = probe.Refresh{On: true, Interval: 100 * time.Millisecond}
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.attach()
	n.start()
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))
	n.want("/healthz", 200, false)
	n.eventually("renewed", func() bool {
		got, _ := n.metricsOf()
		return got[`probelet_evidence_total{result="success",source="refresh"}`] != ""
	})
	if got, _ := n.metricsOf(); got["probelet_own_connections_total"] == "0" {
		t.Error("the daemon's own connections are not counted")
	}
	n.status.Store(500)
	n.eventually("withdrawn", func() bool {
		got, _ := n.metricsOf()
		return got[`probelet_withdrawn_endpoints_total{cause="refresh"}`] != ""
	})
	_, text := n.metricsOf()
	problems, err := promlint.New(bytes.NewBufferString(text)).Lint()
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if strings.HasPrefix(p.Metric, "probelet_") {
			t.Errorf("%s: %s", p.Metric, p.Text)
		}
	}
	doc, err := os.ReadFile("../../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	exposed := map[string]bool{}
	for _, match := range regexp.MustCompile(`(?m)^# TYPE (probelet_\w+) `).FindAllStringSubmatch(text, -1) {
		exposed[match[1]] = true
	}
	documented := map[string]bool{}
	for _, match := range regexp.MustCompile("(?m)^\\| `(probelet_\\w+)` \\|").FindAllStringSubmatch(string(doc), -1) {
		documented[match[1]] = true
		if !exposed[match[1]] {
			t.Errorf("%s is documented, but does not exist", match[1])
		}
	}
	for name := range exposed {
		if !documented[name] {
			t.Errorf("%s is not documented in docs/metrics.md", name)
		}
	}
	labels := map[string]bool{}
	for _, sample := range regexp.MustCompile(`(?m)^(probelet_\w+?)(?:_bucket|_sum|_count)?({.*})? `).FindAllStringSubmatch(text, -1) {
		for _, label := range regexp.MustCompile(`(\w+)="`).FindAllStringSubmatch(sample[2], -1) {
			labels[sample[1]+" "+label[1]] = label[1] != "le"
		}
	}
	for _, row := range regexp.MustCompile("(?m)^\\| `(probelet_\\w+)` \\|([^|]*)\\|").FindAllStringSubmatch(string(doc), -1) {
		for _, label := range regexp.MustCompile("`(\\w+)`").FindAllStringSubmatch(row[2], -1) {
			if !labels[row[1]+" "+label[1]] {
				t.Errorf("%s has no label %s", row[1], label[1])
			}
			delete(labels, row[1]+" "+label[1])
		}
	}
	for label, unknown := range labels {
		if unknown {
			t.Errorf("not documented: label %s", label)
		}
	}
	for _, sample := range regexp.MustCompile(`(?m)^(probelet_\w+){.*\b(?:reason|cause|kind|noticed)="(\w+)"`).FindAllStringSubmatch(text, -1) {
		if row := regexp.MustCompile("(?m)^\\| `" + sample[1] + "`.*$").FindString(string(doc)); !strings.Contains(row, "`"+sample[2]+"`") {
			t.Errorf("%s: %s is not documented", sample[1], sample[2])
		}
	}
	for _, obstacle := range datapath.Obstacles {
		if !strings.Contains(text, `probelet_probes_total{reason="`+obstacle+`",verdict="passed"}`) {
			t.Errorf("probes that are passed because of %s are not counted", obstacle)
		}
	}
	dashboard, err := os.ReadFile("../../../cni-conf/grafana/probelet.json")
	if err != nil {
		t.Fatal(err)
	}
	if !json.Valid(dashboard) {
		t.Error("the dashboard is not JSON")
	}
	shown := regexp.MustCompile(`\bprobelet_\w+`).FindAllString(string(dashboard), -1)
	if len(shown) < 15 {
		t.Errorf("the dashboard shows only %q", shown)
	}
	for _, name := range shown {
		if !exposed[name] && !exposed[strings.TrimSuffix(name, "_bucket")] {
			t.Errorf("the dashboard shows %s, which does not exist", name)
		}
	}
}

// certificates of a CA of their own, as files.
func certificates(t *testing.T, dir string, names ...string) {
	t.Helper()
	authorityKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := func(serial int64, name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{CommonName: name},
			NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
			IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		}
	}
	authority := template(1, "authority")
	authority.IsCA, authority.BasicConstraintsValid, authority.KeyUsage = true, true, x509.KeyUsageCertSign
	write := func(name, kind string, der []byte) {
		text := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
		if err := os.WriteFile(filepath.Join(dir, name), text, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, authority, authority, &authorityKey.PublicKey, authorityKey)
	if err != nil {
		t.Fatal(err)
	}
	write("ca.crt", "CERTIFICATE", der)
	for i, name := range names {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificate(rand.Reader, template(int64(i+2), name), authority, &key.PublicKey, authorityKey)
		if err != nil {
			t.Fatal(err)
		}
		write(name+".crt", "CERTIFICATE", der)
		if der, err = x509.MarshalECPrivateKey(key); err != nil {
			t.Fatal(err)
		}
		write(name+".key", "EC PRIVATE KEY", der)
	}
}

// The certificate of a controller admits it to invalidation, and to nothing else.
func TestControllers(t *testing.T) {
	ours, theirs := t.TempDir(), t.TempDir()
	certificates(t, ours, "server", "client")
	certificates(t, theirs, "client")
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	_ = free.Close()

	n := newNode(t)
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.config.API = APIConfig{Listen: address, CertFile: filepath.Join(ours, "server.crt")}
	if err := n.runOnce(); err == nil || !strings.Contains(err.Error(), "--api-client-ca-file") {
		t.Fatalf("with half of the flags: %v", err)
	}
	n.config.API.KeyFile, n.config.API.ClientCAFile = filepath.Join(ours, "server.key"), filepath.Join(theirs, "missing.crt")
	if err := n.runOnce(); err == nil || !strings.Contains(err.Error(), "missing.crt") {
		t.Fatalf("without a CA: %v", err)
	}
	n.config.API.ClientCAFile = filepath.Join(ours, "ca.crt")
	n.attach()
	n.start()
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))

	pool := x509.NewCertPool()
	authority, err := os.ReadFile(n.config.API.ClientCAFile)
	if err != nil || !pool.AppendCertsFromPEM(authority) {
		t.Fatal(err)
	}
	client := func(dir string) *http.Client {
		config := &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
		if dir != "" {
			certificate, err := tls.LoadX509KeyPair(filepath.Join(dir, "client.crt"), filepath.Join(dir, "client.key"))
			if err != nil {
				t.Fatal(err)
			}
			config.Certificates = []tls.Certificate{certificate}
		}
		return &http.Client{Transport: &http.Transport{TLSClientConfig: config, DisableKeepAlives: true}}
	}
	const body = `{"namespace":"default","pod":"web"}`
	if status, reply := do(t, client(ours), http.MethodPost, "https://"+address+"/v1/invalidate", body); status != 200 {
		t.Errorf("%d %s", status, reply)
	}
	for _, path := range []string{"/metrics", "/v1/pods/default/web/events"} {
		if status, _ := do(t, client(ours), http.MethodGet, "https://"+address+path, ""); status != http.StatusNotFound {
			t.Errorf("%s: %d", path, status)
		}
	}
	for name, stranger := range map[string]*http.Client{"no": client(""), "another CA's": client(theirs)} {
		response, err := stranger.Post("https://"+address+"/v1/invalidate", "application/json", strings.NewReader(body))
		if err == nil {
			_ = response.Body.Close()
			t.Errorf("%s client certificate is accepted: %s", name, response.Status)
		}
	}
}

// runOnce runs a daemon that must fail to start.
func (n *node) runOnce() error {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), 20*time.Second)
	defer cancel()
	err := Run(ctx, n.config, n.logger())
	if _, running, _ := statedir.Running(n.config.StateDir); running {
		return fmt.Errorf("the daemon is running")
	}
	return err
}
