package agent

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/crosscheck"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/refresh"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

// cleaner is implemented by tests, and by what rapid has instead.
type cleaner interface {
	Cleanup(f func())
	Fatal(args ...any)
}

// unattached returns an agent whose records have no attachments, so that it needs no kernel.
func unattached(t cleaner, stateDir string) *agent {
	d := newAgent(slog.New(slog.DiscardHandler), nil, Config{StateDir: stateDir, Defaults: probe.NewDefaults()},
		statedir.Endpoints{}, idleRefresher(t))
	return d
}

// idleRefresher returns a refresher for agents without refresh.
func idleRefresher(t cleaner) *refresh.Refresher {
	r, err := refresh.New(nil, datapath.Now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// describes returns the description that the agent writes, as JSON.
func describes(t cleaner, d *agent) string {
	d.describe()
	e, err := statedir.ReadEndpoints(d.stateDir)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(e)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// Incremental updates have the same result as starting from scratch.
func TestUpdateIsIncremental(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		old, freshDir := unattached(rt, t.TempDir()), t.TempDir()
		var pods []probe.Pod
		var records []attach.Record
		for range rapid.IntRange(1, 8).Draw(rt, "steps") {
			if rapid.Bool().Draw(rt, "pods change") {
				pods = randomPods(rt)
				old.setPods(slices.Clone(pods))
			} else {
				records = randomRecords(rt)
				old.records = slices.Clone(records)
				old.update(false)
			}
			fresh := unattached(rt, freshDir)
			fresh.records = records
			fresh.setPods(slices.Clone(pods))
			if !old.podsKnown {
				continue
			}
			if got, want := describes(rt, old), describes(rt, fresh); got != want {
				rt.Fatalf("got:\n%s\nwant:\n%s", got, want)
			}
			for _, r := range records {
				if got := old.attachments[r.ID()].record; !reflect.DeepEqual(got, r) {
					rt.Fatalf("got %+v, want %+v", got, r)
				}
			}
		}
	})
}

var podNames = rapid.SampledFrom([]string{"a", "b", "c"})

func randomPods(t *rapid.T) []probe.Pod {
	var pods []probe.Pod
	for _, name := range rapid.SliceOfNDistinct(podNames, 0, 3, rapid.ID).Draw(t, "pods") {
		pod := probe.Pod{
			Namespace: "shop", Name: name, UID: rapid.SampledFrom([]string{"", "1", "2"}).Draw(t, "UID"),
			IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, 0, name[0]})},
		}
		switch rapid.IntRange(0, 5).Draw(t, "kind of pod") {
		case 0:
			pod.NotAnswered = "the pod is being deleted"
		case 1:
			pod.IPs, pod.LeftAlone = nil, "hostNetwork"
		case 2:
			pod.Annotations = map[string]string{probe.AnnotationMode: "observe"}
		}
		for _, kind := range []probe.Type{probe.Readiness, probe.Liveness} {
			pod.Probes = append(pod.Probes, probe.Spec{
				Container: "c", Type: kind, Kind: rapid.SampledFrom([]probe.Kind{probe.HTTP, probe.TCP}).Draw(t, "kind"), Port: 80,
				Host:     rapid.SampledFrom([]string{"", "", "10.0.0.97"}).Draw(t, "host"),
				Instance: rapid.SampledFrom([]string{"", "1", "2"}).Draw(t, "instance"), Period: time.Second, Timeout: time.Second,
			})
			if p := &pod.Probes[len(pod.Probes)-1]; p.Kind == probe.HTTP {
				p.Path = rapid.SampledFrom([]string{"/", "/x"}).Draw(t, "path")
			}
		}
		pods = append(pods, pod)
	}
	return pods
}

func randomRecords(t *rapid.T) []attach.Record {
	var records []attach.Record
	for _, name := range rapid.SliceOfNDistinct(podNames, 0, 3, rapid.ID).Draw(t, "records") {
		r := attach.Record{ContainerID: "of-" + name, IfName: "eth0", CreatedAt: time.Unix(rapid.Int64Range(0, 1).Draw(t, "made"), 0)}
		if rapid.Bool().Draw(t, "named") {
			r.PodNamespace, r.PodName, r.PodUID = "shop", name, rapid.SampledFrom([]string{"", "1"}).Draw(t, "UID")
		} else {
			r.PodIPs = []string{fmt.Sprintf("10.0.0.%d", name[0])}
		}
		r.Error = rapid.SampledFrom([]string{"", "ADD is under way"}).Draw(t, "error")
		records = append(records, r)
	}
	return records
}

// Endpoints that something else may ask, in whatever pod, are not compared with the kubelet's verdicts, and not answered where that
// would answer it too.
func TestSharedEndpoints(t *testing.T) {
	own := probe.Spec{Container: "c", Type: probe.Readiness, Kind: probe.HTTP, Port: 80, Path: "/x", Period: time.Second, Timeout: time.Second}
	tcp := own
	tcp.Kind, tcp.Path = probe.TCP, ""
	with := func(s probe.Spec, change func(*probe.Spec)) probe.Spec {
		change(&s)
		return s
	}
	at := func(s probe.Spec, host string) probe.Spec { return with(s, func(s *probe.Spec) { s.Host = host }) }
	agent := func(s probe.Spec, agent string) probe.Spec {
		return with(s, func(s *probe.Spec) { s.Headers = []probe.Header{{Name: "User-Agent", Value: agent}} })
	}
	hook := func(s probe.Spec) probe.Spec { return with(s, func(s *probe.Spec) { s.Type = probe.PreStop }) }
	for name, test := range map[string]struct {
		own    probe.Spec
		others []probe.Pod // beside a pod that is asked by its own probe
		too    probe.Pod   // what that pod has in addition
		by     string      // what else may ask it
		barred bool
	}{
		"alone":                  {own: own},
		"alone, by TCP":          {own: tcp},
		"asked twice by its own": {own: own, too: probe.Pod{Probes: []probe.Spec{with(own, func(s *probe.Spec) { s.Type = probe.Liveness })}}},
		"beside other pods":      {own: own, others: []probe.Pod{{Name: "o", Probes: []probe.Spec{own, tcp}, Hooks: []probe.Spec{hook(own)}}}},
		"beside other hosts":     {own: own, others: []probe.Pod{{Name: "o", Probes: []probe.Spec{at(own, "10.0.0.8"), at(own, "127.0.0.1")}}}},
		"a pod": {own: own, others: []probe.Pod{{Name: "o", Probes: []probe.Spec{at(own, "10.0.0.7")}}},
			by: "c/readiness of pod shop/o", barred: true},
		"a pod, by TCP": {own: tcp, others: []probe.Pod{{Name: "o", Probes: []probe.Spec{at(tcp, "10.0.0.7")}}},
			by: "c/readiness of pod shop/o", barred: true},
		"a pod, by a Service": {own: tcp, others: []probe.Pod{{Name: "o", Probes: []probe.Spec{
			with(at(tcp, "10.96.0.1"), func(s *probe.Spec) { s.Port = 8080 })}}}, by: "c/readiness of pod shop/o"},
		"a pod that has ended": {own: own, others: []probe.Pod{{Name: "o", Ended: true, Probes: []probe.Spec{at(own, "10.0.0.7")}}}},
		"a pod of the host's": {own: own, others: []probe.Pod{{Name: "o", LeftAlone: "hostNetwork", Probes: []probe.Spec{at(own, "10.0.0.7")}}},
			by: "c/readiness of pod shop/o", barred: true},
		"a pod without IP": {own: own, others: []probe.Pod{{Name: "o", LeftAlone: "no IP yet", Probes: []probe.Spec{at(own, "10.0.0.7")}}},
			by: "c/readiness of pod shop/o", barred: true},
		"another pod's hook": {own: agent(own, "me"), others: []probe.Pod{{Name: "o", Hooks: []probe.Spec{hook(at(agent(own, "me"), "10.0.0.7"))}}},
			by: "c/preStop of pod shop/o", barred: true},
		"its own hook":   {own: agent(own, "me"), too: probe.Pod{Hooks: []probe.Spec{hook(agent(own, "me"))}}, by: "c/preStop of pod shop/web", barred: true},
		"an honest hook": {own: own, too: probe.Pod{Hooks: []probe.Spec{hook(agent(own, "kube-lifecycle/1.37"))}}},
		"its own probe, in other words": {own: own, too: probe.Pod{Probes: []probe.Spec{with(own, func(s *probe.Spec) {
			s.Type, s.Headers = probe.Liveness, []probe.Header{{Name: "Accept", Value: "*/*"}}
		})}}},
	} {
		t.Run(name, func(t *testing.T) {
			d := unattached(t, t.TempDir())
			pod := probe.Pod{
				Namespace: "shop", Name: "web", UID: "1", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.7")},
				Probes: append([]probe.Spec{test.own}, test.too.Probes...), Hooks: test.too.Hooks,
			}
			d.records = []attach.Record{{ContainerID: "x", IfName: "eth0", PodNamespace: "shop", PodName: "web"}}
			for i := range test.others {
				test.others[i].Namespace = "shop"
			}
			for _, others := range [][]probe.Pod{nil, test.others, nil} { // they come and go
				d.setPods(append([]probe.Pod{pod}, others...))
				described := describes(t, d)
				want := test.by != "" && (others != nil || test.others == nil)
				if strings.Contains(described, "notCompared") != want || !strings.Contains(described, test.by) && want {
					t.Fatalf("beside %d pods: %s", len(others), described)
				}
				if strings.Contains(described, "answering it would also answer "+test.by) != (want && test.barred) {
					t.Fatalf("beside %d pods, want it barred: %t: %s", len(others), want && test.barred, described)
				}
			}
		})
	}
}

// A bar is written at once, because the daemon may die.
func TestBarIsWritten(t *testing.T) {
	d := unattached(t, t.TempDir())
	own := probe.Spec{Container: "c", Type: probe.Readiness, Kind: probe.HTTP, Port: 80, Path: "/x", Period: time.Second, Timeout: time.Second}
	d.records = []attach.Record{{ContainerID: "x", IfName: "eth0", PodNamespace: "shop", PodName: "web"}}
	d.setPods([]probe.Pod{{Namespace: "shop", Name: "web", UID: "1", Probes: []probe.Spec{own}}})
	d.describe()
	d.disagree(crosscheck.Disagreement{
		ID: crosscheck.ID{Attachment: d.records[0].ID(), Endpoint: probe.Endpoint{Port: 80, Kind: probe.HTTP, Path: "/x"}}, Kind: crosscheck.Failed, Probes: 2,
	})
	e, err := statedir.ReadEndpoints(d.stateDir)
	if err != nil || e.Attachments[0].Endpoints[0].Disagreement != string(crosscheck.Failed) {
		t.Errorf("%+v, %v", e, err)
	}
}

// The description is up to date whenever a client asks, and when the daemon exits.
func TestDescribedInTime(t *testing.T) {
	n := newNode(t)
	n.attach()
	n.specs("tcpSocket: {port: 1}, " + long)
	stop := n.start()
	n.eventually("known", n.has(datapath.TCPKey(1)))
	described := func() uint16 { return n.endpoint().Port }
	for port := uint16(2); port < 6; port++ {
		n.specs(fmt.Sprintf("tcpSocket: {port: %d}, %s", port, long))
		n.eventually("known", n.has(datapath.TCPKey(port)))
		if got := described(); got != port {
			t.Fatalf("described: %d, want %d", got, port)
		}
	}
	n.specs("tcpSocket: {port: 9}, " + long)
	n.eventually("known", n.has(datapath.TCPKey(9)))
	stop()
	if got := described(); got != 9 {
		t.Fatalf("described: %d, want 9", got)
	}
}
