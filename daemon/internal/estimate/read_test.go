package estimate

import (
	"encoding/json"
	"strings"
	"testing"
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

func TestReadErrors(t *testing.T) {
	quoted, err := json.Marshal("10")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Replace(podJSON, `"tcpSocket"`, `"periodSeconds": `+string(quoted)+`, "tcpSocket"`, 1)
	for name, test := range map[string]struct{ text, want string }{
		"not JSON":          {`{"kind": `, "document 1: unexpected EOF"},
		"not YAML":          {"kind: [", "document 1: "},
		"a table":           {"NAME READY\nweb 1/1\n", "document 1: "},
		"no kind":           {"metadata: {name: x}", "document 1: kind: missing"},
		"no name":           {podYAML + "---\nkind: Pod\nspec: {}\n", "document 2: metadata.name: missing"},
		"type of a field":   {text, `document 1: pod shop/web: spec.containers.readinessProbe.periodSeconds: string: must be a whole number`},
		"bare off":          {strings.Replace(podYAML, "name: web,", "name: web, annotations: {probelet.dev/mode: off},", 1), "document 1: pod shop/web: metadata.annotations: bool: must be a string; put it in quotes"},
		"value of a field":  {strings.Replace(podYAML, "{tcp", "{periodSeconds: -1, tcp", 1), `document 1: pod shop/web: containers[0] (web): readinessProbe.periodSeconds: -1: must not be negative`},
		"no handler":        {strings.Replace(podYAML, "tcpSocket: {port: 80}", "", 1), `containers[0] (web): readinessProbe.httpGet, tcpSocket, grpc, exec: 0 are set; exactly one must be`},
		"in a list":         {`{"kind": "List", "items": [` + podJSON + "," + text + "]}", "document 1: items[1]: pod shop/web: spec.containers"},
		"a list of strings": {`{"kind": "List", "items": ["x"]}`, "document 1: items[0]: the document: string: must be an object"},
	} {
		if in, err := Read(strings.NewReader(test.text)); err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: %d pods, %v; want %s", name, len(in.Pods), err, test.want)
		}
	}
}
