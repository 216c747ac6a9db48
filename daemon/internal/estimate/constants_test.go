package estimate

import (
	"encoding/json"
	"fmt"
	"math"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// dense is a row of the table in docs/density.md. CPU is in cores.
type dense struct {
	perSecond, answered, http, tcp float64
	kubelet, daemon, servers       float64
	timeWait, conntrack            float64
}

func densityRow(t *testing.T, name string) dense {
	t.Helper()
	for line := range strings.Lines(read(t, "../../../docs/density.md")) {
		rest, ok := strings.CutPrefix(line, name+" ")
		if !ok {
			continue
		}
		var n []float64
		for _, text := range regexp.MustCompile(`[\d.]+`).FindAllString(rest, -1) {
			value, err := strconv.ParseFloat(text, 64)
			if err != nil {
				t.Fatal(err)
			}
			n = append(n, value)
		}
		if len(n) != 11 {
			t.Fatalf("%q: %d numbers", line, len(n))
		}
		return dense{n[0], n[1] / 100, n[2] / 100, n[3] / 100, n[5] / 100, n[6] / 100, n[7] / 100, n[9], n[10]}
	}
	t.Fatalf("docs/density.md has no row %q", name)
	return dense{}
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func about(got, want, tolerance float64) bool { return math.Abs(got-want) <= tolerance*math.Abs(want) }

// The constants follow from the tables that they name as their sources.
func TestConstantsAreMeasured(t *testing.T) {
	off, on := densityRow(t, "Go, mode off"), densityRow(t, "Go, mode answer")
	realHTTP, realTCP := on.perSecond/2*(1-on.http), on.perSecond/2*(1-on.tcp)
	// servers = http × httpServer + tcp × tcpServer, in both rows.
	both := off.servers / (off.perSecond / 2)
	httpServer := (on.servers - realTCP*both) / (realHTTP - realTCP)
	kubelet := off.kubelet / off.perSecond
	real := realHTTP + realTCP
	c := &constants
	for _, test := range []struct {
		Constant
		want float64 // in seconds
	}{
		{c.httpServer, httpServer},
		{c.tcpServer, both - httpServer},
		{c.kubelet, kubelet},
		{c.kubeletAnswered, (on.kubelet - real*kubelet) / (on.perSecond - real)},
		{c.daemonPod, off.daemon / 100},
		{c.daemonProbe, (on.daemon - off.daemon) / on.perSecond},
		{c.daemonRefresh, (0.12 - 0.0013 - 0.0022) / 1000}, // with refresh, minus no probes and watching (docs/density.md)
	} {
		if !about(test.Value*microsecond, test.want, .02) {
			t.Errorf("%s: %g %s, want %.1f", test.Name, test.Value, test.Unit, test.want/microsecond)
		}
	}
	if page := read(t, "../../../docs/density.md"); !regexp.MustCompile(`with refresh: 1,000 requests a second.* \| 12 %`).MatchString(page) ||
		!strings.Contains(page, "| no probes | 0.13 %, and 0.22 %") {
		t.Error("docs/density.md: what the daemon takes has changed")
	}

	readme := read(t, "../../../README.md")
	left := func(kind string, column int) (mean float64) {
		for _, family := range []string{"ipv4", "ipv6"} {
			row := regexp.MustCompile(`(?m)^ +` + kind + ` +` + family + ` +absent .*$`).FindString(readme)
			fields := strings.Fields(row)
			if len(fields) != 11 {
				t.Fatalf("README.md: %s, %s: %q", kind, family, row)
			}
			n, err := strconv.ParseFloat(fields[column], 64)
			if err != nil {
				t.Fatal(err)
			}
			mean += n / 10000 / 2
		}
		return mean
	}
	for _, test := range []struct {
		Constant
		want float64
	}{{c.httpNode, left("http", 7)}, {c.httpPod, left("http", 8)}, {c.tcpNode, left("tcp", 7)}} {
		if !about(test.Value, test.want, .01) {
			t.Errorf("%s: %g, want %.3f", test.Name, test.Value, test.want)
		}
	}
	if in := left("tcp", 8); in != 0 {
		t.Errorf("TCP probes leave a TIME_WAIT in the pod: %g", in)
	}
}

// densePods are the pods that docs/density.md was measured with.
func densePods(t *testing.T) []Replicated {
	t.Helper()
	var text strings.Builder
	for i := range 100 {
		fmt.Fprintf(&text, `
---
kind: Pod
metadata: {name: dense-%d}
spec:
  containers:
  - name: web
    readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
    livenessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}
`, i)
	}
	in, err := Read(strings.NewReader(text.String()))
	if err != nil {
		t.Fatal(err)
	}
	return in.Pods
}

// An estimate for the measured pods agrees with the measurement.
func TestEstimateIsAsMeasured(t *testing.T) {
	r := Pods(densePods(t))
	perSecond := r.Total.Answerable.PerSecond
	if perSecond != 200 {
		t.Fatalf("%g probes per second", perSecond)
	}
	const measured = 30. // seconds; conntrack's time-out for TIME_WAIT was as long
	for _, server := range []string{"Go", "Python"} {
		for mode, o := range map[string]Outcome{"off": {Load: r.Total.Without}, "answer": r.Total.Policies[0]} {
			row := densityRow(t, server+", mode "+mode)
			scale := row.perSecond / perSecond
			answered := o.Answered * perSecond
			check := func(what string, got, want, tolerance float64) {
				if !about(got, want, tolerance) {
					t.Errorf("%s, mode %s: %s: %.3g estimated, %.3g measured", server, mode, what, got, want)
				}
			}
			if mode == "answer" {
				check("answered", o.Answered, row.answered, .03)
				check("answered by HTTP", o.AnsweredByKind[probe.HTTP], row.http, .03)
				check("answered by TCP", o.AnsweredByKind[probe.TCP], row.tcp, .03)
			}
			check("TIME_WAIT", o.Load.TimeWaitNodes*measured/constants.timeWait.Value*scale, row.timeWait, .15)
			check("conntrack", (o.Load.Connections*measured+answered*constants.trackedReset.Value)*scale, row.conntrack, .05)
			if server == "Go" { // the constants are Go's
				check("kubelet", o.Load.CPU.Kubelets*scale, row.kubelet, .05)
				check("servers", o.Load.CPU.Servers*scale, row.servers, .05)
				if mode == "answer" {
					check("daemon", o.Load.CPU.Daemons*scale, row.daemon, .05)
				}
			}
		}
	}
}

// Estimates for all policies agree with what make bench measured on a node with thirty pods.
func TestPoliciesAreAsMeasured(t *testing.T) {
	type row struct {
		Measure, Variant, Against string
		Value                     float64
	}
	var rows []row
	if err := json.Unmarshal([]byte(read(t, "../../../bench/results.json")), &rows); err != nil {
		t.Fatal(err)
	}
	measured := func(measure, variant string) float64 {
		i := slices.IndexFunc(rows, func(r row) bool { return r.Measure == measure && r.Variant == variant && r.Against == "" })
		if i < 0 {
			t.Fatalf("bench/results.json has no %q of %q", measure, variant)
		}
		return rows[i].Value
	}
	in, err := Read(strings.NewReader(strings.Repeat(`
---
kind: Pod
metadata: {name: pod}
spec:
  containers:
  - {name: container0, livenessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}}
  - {name: container1, livenessProbe: {tcpSocket: {port: 8080}, periodSeconds: 1}}
`, 30)))
	if err != nil {
		t.Fatal(err)
	}
	total, clients := Pods(in.Pods).Total, 30. // whose connections are tracked, too
	loads := map[string]Load{"plain, 1 s": total.Without}
	for _, o := range total.Policies {
		loads[string(o.Policy)+", 1 s"] = o.Load
	}
	if len(loads) != 5 {
		t.Fatalf("%d policies", len(loads))
	}
	const plain, cpu = "plain, 1 s", "CPU of the node"
	for variant, load := range loads {
		for _, test := range []struct {
			what                 string
			got, want, tolerance float64
		}{
			{"connections", load.Connections, measured("connections to pods", variant), .15},
			{"conntrack entries", load.Conntrack + clients, measured("conntrack entries", variant), .15},
			{"TIME_WAIT", load.TimeWaitNodes + load.TimeWaitPods, measured("TIME_WAIT on the node", variant) + measured("TIME_WAIT in pods", variant), .35},
			{"CPU relative to plain probes", load.CPU.Sum() / loads[plain].CPU.Sum(), measured(cpu, variant) / measured(cpu, plain), .25},
		} {
			if test.got != test.want && !about(test.got, test.want, test.tolerance) {
				t.Errorf("%s, %s: %.3g estimated, %.3g measured", variant, test.what, test.got, test.want)
			}
		}
	}
}
