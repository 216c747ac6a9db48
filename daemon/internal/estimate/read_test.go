package estimate

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/probelet/probelet/daemon/internal/table"
)

const (
	podJSON = `{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "namespace": "shop"},
		"spec": {"containers": [{"name": "web", "readinessProbe": {"tcpSocket": {"port": 80}}}]}}`
	podYAML = `kind: Pod
metadata: {name: web, namespace: shop}
spec: {containers: [{name: web, readinessProbe: {tcpSocket: {port: 80}}}]}
`
)

func TestRead(t *testing.T) {
	nameless := strings.Replace(podJSON, `"kind": "Pod", `, "", 1) // of an item of the API server's
	for name, test := range map[string]struct {
		text   string
		pods   int
		others string
	}{
		"nothing":                 {"", 0, ""},
		"blanks":                  {" \n\t\n", 0, ""},
		"a pod in JSON":           {podJSON, 1, ""},
		"pods in JSON":            {podJSON + "\n" + podJSON, 2, ""},
		"a list in JSON":          {"\n" + `{"kind": "List", "items": [` + podJSON + "," + podJSON + "]}", 2, ""},
		"a PodList":               {`{"kind": "PodList", "items": [` + nameless + "]}", 1, ""},
		"an empty list":           {`{"kind": "List", "items": []}`, 0, ""},
		"a pod in YAML":           {podYAML, 1, ""},
		"pods in YAML":            {"# pods\n---\n" + podYAML + "---\n---\n" + podYAML, 2, ""},
		"a list in YAML":          {"kind: List\nitems:\n- " + strings.ReplaceAll(podYAML, "\n", "\n  ") + "\n", 1, ""},
		"others":                  {podYAML + "---\nkind: Service\nmetadata: {name: web}\n", 1, "1 of kind Service"},
		"others in a list":        {`{"kind": "List", "items": [` + podJSON + `,{"kind": "Job"}]}`, 1, "1 of kind Job"},
		"fields of later version": {strings.Replace(podYAML, "spec: {", "spec: {new: 1, ", 1), 1, ""},
		"no namespace":            {strings.Replace(podYAML, ", namespace: shop", "", 1), 1, ""},
	} {
		t.Run(name, func(t *testing.T) {
			in, err := Read(strings.NewReader(test.text))
			if err != nil || len(in.Pods) != test.pods || others(in.Others) != test.others {
				t.Fatalf("%d pods, others %q, %v; want %d, %q", len(in.Pods), others(in.Others), err, test.pods, test.others)
			}
			for _, p := range in.Pods {
				if p.Name != "web" || p.Namespace != "shop" && name != "no namespace" || p.Spec.Containers[0].ReadinessProbe == nil {
					t.Errorf("%+v", p)
				}
			}
		})
	}
}

// Manifests count as the pods that they create. A cluster's workloads do not, because its pods are listed too.
func TestWorkloads(t *testing.T) {
	const pods = "template: {metadata: {annotations: {probelet.dev/mode: observe}}, spec: {containers: [{name: web, readinessProbe: {tcpSocket: {port: 80}}}]}}"
	for name, test := range map[string]struct {
		head, spec string
		pods       int
	}{
		"Deployment":               {"apiVersion: apps/v1, kind: Deployment, metadata: {name: web}", "replicas: 3", 3},
		"replicas left out":        {"apiVersion: apps/v1, kind: Deployment, metadata: {name: web}", "paused: false", 1},
		"no replicas":              {"apiVersion: apps/v1, kind: Deployment, metadata: {name: web}", "replicas: 0", 0},
		"many":                     {"apiVersion: apps/v1, kind: Deployment, metadata: {name: web}", "replicas: 2147483647", 2147483647},
		"ReplicaSet":               {"apiVersion: apps/v1, kind: ReplicaSet, metadata: {name: web}", "replicas: 2", 2},
		"StatefulSet":              {"apiVersion: apps/v1, kind: StatefulSet, metadata: {name: web}", "replicas: 2", 2},
		"Job":                      {"apiVersion: batch/v1, kind: Job, metadata: {generateName: web-}", "completions: 9, parallelism: 4", 4},
		"Job of one pod":           {"apiVersion: batch/v1, kind: Job, metadata: {name: web}", "completions: 9", 1},
		"Job with few completions": {"apiVersion: batch/v1, kind: Job, metadata: {name: web}", "completions: 2, parallelism: 4", 2},
		"DaemonSet":                {"apiVersion: apps/v1, kind: DaemonSet, metadata: {name: web}", "minReadySeconds: 1", 0},
		"of a cluster":             {"apiVersion: apps/v1, kind: Deployment, metadata: {name: web, uid: u}", "replicas: 3", 0},
		"of another API":           {"apiVersion: batch.volcano.sh/v1, kind: Job, metadata: {name: web}", "replicas: 3", 0},
	} {
		r := reportOf(t, "---\n{"+test.head+", spec: {"+test.spec+", "+pods+"}}")
		one := reportOf(t, podText("web", "annotations: {probelet.dev/mode: observe}", "", "", "readinessProbe: {tcpSocket: {port: 80}}"))
		if test.pods == 0 && len(r.NotCounted.Others) != 1 {
			t.Errorf("%s: %+v", name, r.NotCounted)
		}
		n := float64(test.pods)
		if r.Total.Pods != test.pods || r.Total.Probed != test.pods || !near(r.Total.Without.Connections, n*one.Total.Without.Connections) ||
			!near(r.Total.Policies[0].Load.CPU.Daemons, n*one.Total.Policies[0].Load.CPU.Daemons) ||
			test.pods > 0 && (len(r.Total.NotAnswerable) != 1 || r.Total.NotAnswerable[0].Probes != test.pods) {
			t.Errorf("%s: %+v, want %d pods like %+v", name, r.Total, test.pods, one.Total)
		}
	}
}

// No text in a file does anything to the terminal but take its place in a line.
func TestHostileText(t *testing.T) {
	text := rapid.OneOf(rapid.StringMatching("[a-z]+"), rapid.String(), rapid.SampledFrom([]string{"\x1b[31mred", "a\nb", "a\tb", "\u202eb", "a\u0085b", ""}))
	rapid.Check(t, func(rt *rapid.T) {
		names := map[string]string{}
		for _, field := range []string{"name", "namespace", "node", "container", "key", "value", "port", "path", "kind", "period"} {
			names[field] = "x"
			if rapid.IntRange(0, 4).Draw(rt, "draw "+field) == 0 {
				names[field] = text.Draw(rt, field)
			}
		}
		period := any(10)
		if names["period"] != "x" {
			period = names["period"]
		}
		pod := map[string]any{
			"kind": "Pod", "metadata": map[string]any{
				"name": names["name"], "namespace": names["namespace"], "annotations": map[string]any{"probelet.dev/" + names["key"]: names["value"]},
			},
			"spec": map[string]any{"nodeName": names["node"], "containers": []any{map[string]any{"name": names["container"], "livenessProbe": map[string]any{
				"httpGet": map[string]any{"port": names["port"], "path": names["path"]}, "periodSeconds": period,
			}}}},
		}
		input, err := json.Marshal(map[string]any{"kind": "List", "items": []any{pod, map[string]any{"kind": names["kind"]}}})
		if err != nil {
			rt.Fatal(err)
		}
		for _, output := range []string{"wide", "json"} {
			out, err := execute(t, bytes.NewReader(input), 0, "-f", "-", "-o", output)
			if err != nil {
				out += err.Error() + "\n"
			}
			for line := range strings.Lines(out) {
				if line := strings.TrimSuffix(line, "\n"); table.Printable(line) != line {
					rt.Fatalf("%s: %q", input, line)
				}
			}
			if err != nil && strings.Count(out, "\n") != 1 {
				rt.Fatalf("%s: %q", input, out)
			}
		}
	})
}

func TestReadErrors(t *testing.T) {
	const quoted = `"10"`
	text := strings.Replace(podJSON, `"tcpSocket"`, `"periodSeconds": `+quoted+`, "tcpSocket"`, 1)
	for name, test := range map[string]struct{ text, want string }{
		"not JSON":          {`{"kind": `, "document 1: unexpected EOF"},
		"not YAML":          {"kind: [", "document 1: "},
		"a table":           {"NAME READY\nweb 1/1\n", "document 1: "},
		"no kind":           {"metadata: {name: x}", "document 1: kind: missing"},
		"a workload":        {"---\n{apiVersion: apps/v1, kind: Deployment, metadata: {name: x}, spec: {replicas: three}}", `document 1: deployment default/x: spec.replicas: "three": must be a whole number`},
		"fewer than none":   {"---\n{apiVersion: apps/v1, kind: Deployment, metadata: {name: x}, spec: {replicas: -1}}", `document 1: deployment default/x: spec: -1 pods: must not be negative`},
		"escape sequence":   {`{"kind": "Pod", "metadata": {"name": "\u001b[31m"}}`, `document 1: metadata.name: "\x1b[31m": must be a DNS name`},
		"no name":           {podYAML + "---\nkind: Pod\nspec: {}\n", "document 2: metadata.name: missing"},
		"type of a field":   {text, `document 1: pod shop/web: spec.containers[0].readinessProbe.periodSeconds: "10": must be a whole number`},
		"too large":         {strings.Replace(text, quoted, "99999999999999999999", 1), `spec.containers[0].readinessProbe.periodSeconds: 99999999999999999999: must be at most 2147483647`},
		"too small":         {strings.Replace(text, quoted, "-2147483649", 1), `spec.containers[0].readinessProbe.periodSeconds: -2147483649: must be at least -2147483648`},
		"a fraction":        {strings.Replace(text, quoted, "0.5", 1), `spec.containers[0].readinessProbe.periodSeconds: 0.5: must be a whole number`},
		"an object":         {strings.Replace(text, quoted, `{"s": 1}`, 1), `spec.containers[0].readinessProbe.periodSeconds: object: must be a whole number`},
		"a list":            {strings.Replace(text, quoted, `[1]`, 1), `spec.containers[0].readinessProbe.periodSeconds: array: must be a whole number`},
		"long text":         {strings.Replace(text, quoted, `"`+strings.Repeat("ü", 50)+`"`, 1), `periodSeconds: "` + strings.Repeat("ü", 40) + `…": must be a whole number`},
		"a port":            {strings.Replace(podYAML, "port: 80", "port: [80]", 1), `spec.containers.readinessProbe.tcpSocket.port: array: must be a`},
		"a port's size":     {strings.Replace(podYAML, "port: 80", "port: 80000000000", 1), `spec.containers.readinessProbe.tcpSocket.port: 80000000000: must be at most 2147483647`},
		"bare off":          {strings.Replace(podYAML, "name: web,", "name: web, annotations: {probelet.dev/mode: off},", 1), "document 1: pod shop/web: metadata.annotations.probelet.dev/mode: false: must be a string; put it in quotes"},
		"value of a field":  {strings.Replace(podYAML, "{tcp", "{periodSeconds: -1, tcp", 1), `document 1: pod shop/web: containers[0] (web): readinessProbe.periodSeconds: -1: must not be negative`},
		"no handler":        {strings.Replace(podYAML, "tcpSocket: {port: 80}", "", 1), `containers[0] (web): readinessProbe.httpGet, tcpSocket, grpc, exec: 0 are set; exactly one must be`},
		"in a list":         {`{"kind": "List", "items": [` + podJSON + "," + text + "]}", "document 1: items[1]: pod shop/web: spec.containers"},
		"a list of strings": {`{"kind": "List", "items": ["x"]}`, `document 1: items[0]: "x": must be an object`},
	} {
		if in, err := Read(strings.NewReader(test.text)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %d pods, %v; want %s", name, len(in.Pods), err, test.want)
		}
	}
}
