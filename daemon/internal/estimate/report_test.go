package estimate

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"testing"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// podText is a pod in YAML. Metadata, spec and status are further fields there.
func podText(name, metadata, spec, status, probes string) string {
	return fmt.Sprintf(`
---
apiVersion: v1
kind: Pod
metadata: {name: %s, namespace: shop, %s}
spec:
  %s
  containers:
  - name: web
    ports: [{name: http, containerPort: 8080}]
%s
status: {%s}
`, name, metadata, spec, "    "+strings.ReplaceAll(strings.TrimSpace(probes), "\n", "\n    "), status)
}

const lone = `readinessProbe: {httpGet: {path: /ready, port: http}}`

func reportOf(t *testing.T, texts ...string) Report {
	t.Helper()
	in, err := Read(strings.NewReader(strings.Join(texts, "")))
	if err != nil {
		t.Fatal(err)
	}
	return in.Estimate()
}

func TestReasons(t *testing.T) {
	for name, test := range map[string]struct {
		pod  string
		want string // codes, and their numbers of probes
	}{
		"none":             {podText("p", "", "", "", lone), ""},
		"no probes":        {podText("p", "", "", "", "image: x"), ""},
		"kinds":            {podText("p", "", "", "", "readinessProbe: {httpGet: {port: 80, scheme: HTTPS}}\nlivenessProbe: {exec: {command: [ls]}}"), "kind 2"},
		"hostNetwork":      {podText("p", "", "hostNetwork: true", "", lone), "host_network 1"},
		"host":             {podText("p", "", "", "", "readinessProbe: {tcpSocket: {port: 80, host: example.org}}"), "host 1"},
		"startup alone":    {podText("p", "", "", "", "startupProbe: {tcpSocket: {port: 80}}"), ""},
		"mode observe":     {podText("p", "annotations: {probelet.dev/mode: observe}", "", "", lone), "mode 1"},
		"mode off":         {podText("p", `annotations: {probelet.dev/mode: "off"}`, "", "", lone), "mode 1"},
		"misspelt":         {podText("p", "annotations: {probelet.dev/moed: observe}", "", "", lone), "annotation 1"},
		"deleted":          {podText("p", `deletionTimestamp: "2026-01-01T00:00:00Z"`, "", "", lone), "pod 1"},
		"not scheduled":    {podText("p", "", "", "phase: Pending", lone), ""},
		"unknown port":     {podText("p", "", "", "", "readinessProbe: {httpGet: {port: web}}"), "request 1"},
		"request too long": {podText("p", "", "", "", "readinessProbe: {httpGet: {port: 80, path: /"+strings.Repeat("x", 1100)+"}}"), "too_long 1"},
		// A pod without an address is treated like one that has one.
		"header Host": {podText("p", "", "", "", "readinessProbe: {httpGet: {port: 80, httpHeaders: [{name: Host, value: example.org}]}}"), ""},
		"header Host of a pod with two addresses": {podText("p", "", "", `phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]`,
			"readinessProbe: {httpGet: {port: 80, httpHeaders: [{name: Host, value: example.org}]}}"), "host 1"},
	} {
		t.Run(name, func(t *testing.T) {
			g := reportOf(t, test.pod).Total
			var got []string
			for _, c := range g.NotAnswerable {
				got = append(got, fmt.Sprintf("%s %d", c.Code, c.Probes))
			}
			if strings.Join(got, ", ") != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
			all := g.Answerable.Probes
			for _, c := range g.NotAnswerable {
				all += c.Probes
			}
			for _, k := range g.Probes {
				all -= k.Probes
			}
			if all != 0 {
				t.Errorf("%+v: not all probes are answerable or not", g)
			}
			if test.want == "" || g.Answerable.Probes > 0 {
				return
			}
			for _, o := range g.Policies {
				if o.Answered != 0 || o.Load.Connections != g.Without.Connections || len(o.Delays) > 0 {
					t.Errorf("%s: %+v, without probelet %+v", o.Policy, o, g.Without)
				}
			}
		})
	}
}

func TestEndedPodsDoNotCount(t *testing.T) {
	r := reportOf(t, podText("a", "", "", "phase: Succeeded", lone), podText("b", "", "", "phase: Failed", lone), podText("c", "", "", "phase: Running", lone))
	if r.NotCounted.Ended != 2 || r.Total.Pods != 1 || r.Total.Answerable.Probes != 1 {
		t.Errorf("%+v", r)
	}
}

// Startup probes end, so they add nothing to the steady load.
func TestStartupProbesAreCountedApart(t *testing.T) {
	g := reportOf(t, podText("a", "", "", "", "startupProbe: {httpGet: {path: /x, port: 80}, periodSeconds: 1}\nlivenessProbe: {httpGet: {path: /x, port: 80}}")).Total
	if g.Startup != (Count{1, 1}) || g.Answerable != (Count{1, .1}) || g.Without.Connections != .1 {
		t.Errorf("%+v", g)
	}
}

func policy(t *testing.T, g Group, p Policy) Outcome {
	t.Helper()
	i := slices.IndexFunc(g.Policies, func(o Outcome) bool { return o.Policy == p })
	if i < 0 {
		t.Fatalf("no policy %q", p)
	}
	return g.Policies[i]
}

func near(got, want float64) bool { return math.Abs(got-want) < 1e-3 }

// Every number of the estimate for one pod.
func TestLoads(t *testing.T) {
	const both = "readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 2}\nlivenessProbe: {httpGet: {path: /live, port: http}, periodSeconds: 2}"
	g := reportOf(t, podText("a", "", "nodeName: n1", "", both)).Total
	c := &constants
	want := Load{
		1, c.httpNode.Value * 60, c.httpPod.Value * 60, 120,
		CPU{c.kubelet.Value * microsecond, c.httpServer.Value * microsecond, 0},
	}
	if got := g.Without; !near(got.Connections, 1) || !near(got.TimeWaitNodes, want.TimeWaitNodes) || !near(got.TimeWaitPods, want.TimeWaitPods) ||
		!near(got.Conntrack, want.Conntrack) || !near(got.CPU.Sum(), want.CPU.Sum()) {
		t.Errorf("%+v, want %+v", got, want)
	}
	for p, test := range map[Policy]struct{ answered, connections, conntrack, refreshes, added float64 }{
		Default:   {.5, .5, 60 + 5, 0, 3},
		Staleness: {5. / 6, 1. / 6, 20 + 10*5./6, 0, 11},
		Refresh:   {1, 1, 10 + 10, 1, 3},
		Traffic:   {.7, .3, 36 + 7, 0, 23},
	} {
		o := policy(t, g, p)
		if !near(o.Answered, test.answered) || !near(o.Load.Connections, test.connections) || !near(o.Load.Conntrack, test.conntrack) || !near(o.Refreshes, test.refreshes) {
			t.Errorf("%s: %+v, want %+v", p, o, test)
		}
		if len(o.Delays) != 1 || o.Delays[0].Added != test.added || o.Delays[0].Plain != 7 {
			t.Errorf("%s: delays %+v, want %g s", p, o.Delays, test.added)
		}
	}
	if o := policy(t, g, Refresh); o.Load.TimeWaitNodes != 0 || o.Load.CPU.Sum() <= g.Without.CPU.Sum() {
		t.Errorf("the daemon's own requests end in a reset, and are not free: %+v", o.Load)
	}
}

// Sockets of a hostNetwork pod are on the node. Exec probes open no connections.
func TestLoadsOfOthers(t *testing.T) {
	g := reportOf(t, podText("a", "", "hostNetwork: true", "", lone)).Total
	if want := .1 * 60 * (constants.httpNode.Value + constants.httpPod.Value); !near(g.Without.TimeWaitNodes, want) || g.Without.TimeWaitPods != 0 {
		t.Errorf("hostNetwork: %+v", g.Without)
	}
	g = reportOf(t, podText("a", "", "", "", "livenessProbe: {exec: {command: [ls]}}")).Total
	if g.Without != (Load{}) || len(g.Probes) != 1 {
		t.Errorf("exec: %+v", g)
	}
	g = reportOf(t, podText("a", "", "", "", "livenessProbe: {grpc: {port: 80}}")).Total
	if !near(g.Without.TimeWaitNodes, 6) || g.Without.TimeWaitPods != 0 {
		t.Errorf("gRPC: %+v", g.Without)
	}
}

// Annotations override the policy.
func TestAnnotations(t *testing.T) {
	for name, test := range map[string]struct {
		annotations string
		policy      Policy
		want        float64
	}{
		"staleness":         {`probelet.dev/staleness: "2"`, Default, 2. / 3},
		"lower staleness":   {`probelet.dev/staleness: "2"`, Staleness, 2. / 3},
		"steady staleness":  {`probelet.dev/staleness: "0.5-5"`, Default, 5. / 6},
		"without refresh":   {`probelet.dev/refresh: "false"`, Refresh, .5},
		"refresh by itself": {`probelet.dev/refresh: "true"`, Default, .5}, // the node does not allow it
	} {
		g := reportOf(t, podText("a", "annotations: {"+test.annotations+"}", "", "", lone)).Total
		if got := policy(t, g, test.policy); !near(got.Answered, test.want) {
			t.Errorf("%s: %g answered, want %g", name, got.Answered, test.want)
		}
	}
}

// The report says which annotations cannot be used, and what was expected.
func TestInvalidAnnotations(t *testing.T) {
	text := podText("a", "annotations: {probelet.dev/liveness: sometimes}", "", "", lone)
	want := []string{`shop/a: annotation probelet.dev/liveness: "sometimes": must be probes or traffic`}
	if got := reportOf(t, text, podText("b", "", "", "", lone)).InvalidAnnotations; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestGroups(t *testing.T) {
	other := strings.ReplaceAll(podText("a", "", "nodeName: n2", "", lone), "shop", "bank")
	r := reportOf(t, podText("a", "", "nodeName: n1", "", lone), podText("b", "", "nodeName: n1", "", "image: x"), other,
		podText("c", "", "nodeName: n1", "", "livenessProbe: {tcpSocket: {port: 80}, periodSeconds: 5}"))
	if len(r.Namespaces) != 2 || r.Namespaces[0].Name != "bank" || r.Namespaces[1].Name != "shop" || r.Nodes != 2 || r.BusiestNode.Name != "n1" {
		t.Fatalf("%+v", r)
	}
	if s := r.Namespaces[1]; s.Pods != 3 || s.Probed != 2 || !near(s.Without.Connections, .3) {
		t.Errorf("%+v", s)
	}
	var sum float64
	for _, g := range r.Namespaces {
		sum += g.Policies[0].Load.Connections
	}
	if !near(sum, r.Total.Policies[0].Load.Connections) || r.Total.Pods != 4 {
		t.Errorf("the namespaces are %g, all of them %+v", sum, r.Total)
	}
	d := policy(t, r.Total, Default).Delays
	if len(d) != 2 || d[0].Kind != probe.HTTP || d[0].Probe != "shop/a web/readiness" && d[0].Probe != "bank/a web/readiness" || d[1].Added != 51 {
		t.Errorf("%+v", d)
	}
}

// The report says whether the pods' traffic is evidence for any of their probes.
func TestTrafficThatChangesNothing(t *testing.T) {
	const http, tcp = "httpGet: {path: /x, port: 80}, periodSeconds: 10", "tcpSocket: {port: 80}, periodSeconds: 10"
	for probes, want := range map[string]string{
		"livenessProbe: {" + http + "}":                                "is not a failure then",
		"livenessProbe: {" + http + "}\nreadinessProbe: {" + tcp + "}": "so nothing changes",
		"readinessProbe: {" + http + "}":                               "so nothing changes",
	} {
		r := reportOf(t, podText("a", "", "nodeName: n1", "", probes))
		if o := policy(t, r.Total, Traffic); !strings.Contains(o.later(), want) || (want == "so nothing changes") != (o.ByTraffic == 0) {
			t.Errorf("%s: %q, %d by traffic, want %q", probes, o.later(), o.ByTraffic, want)
		}
		if text := policy(t, r.Total, Default).later(); strings.Contains(text, "nothing changes") {
			t.Errorf("%s: by default %q", probes, text)
		}
	}
}
