package source

import (
	"net/netip"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

func TestParse(t *testing.T) {
	pods, err := Parse([]byte(`
pods:
- name: web
  namespace: shop
  ips: [10.0.0.7, "fd00::7"]
  annotations: {probelet.dev/mode: observe, example.org/else: x}
  containers:
  - name: server
    image: example.org/server:1 # as in a pod spec; not looked at
    ports: [{name: http, containerPort: 8080}]
    startupProbe: {httpGet: {port: http}, failureThreshold: 30}
    readinessProbe:
      httpGet: {path: "/ready?x=1", port: "8080", httpHeaders: [{name: X-Probe, value: "1"}]}
      periodSeconds: 5
      timeoutSeconds: 2
      successThreshold: 2
    livenessProbe: {tcpSocket: {port: 8080}}
  initContainers:
  - name: once
  - name: sidecar
    restartPolicy: Always
    readinessProbe: {exec: {command: ["true"]}}
- name: plain
  containers: []
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []probe.Pod{{
		Namespace: "shop", Name: "web", Annotations: map[string]string{probe.AnnotationMode: "observe"},
		IPs: []netip.Addr{netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7")},
		Probes: []probe.Spec{
			{Container: "server", Type: probe.Startup, Kind: probe.HTTP, Port: 8080, Path: "/",
				Period: 10 * time.Second, Timeout: time.Second, FailureThreshold: 30, SuccessThreshold: 1},
			{Container: "server", Type: probe.Readiness, Kind: probe.HTTP, Port: 8080, Path: "/ready?x=1",
				Headers: []probe.Header{{Name: "X-Probe", Value: "1"}}, Period: 5 * time.Second, Timeout: 2 * time.Second, FailureThreshold: 3, SuccessThreshold: 2},
			{Container: "server", Type: probe.Liveness, Kind: probe.TCP, Port: 8080,
				Period: 10 * time.Second, Timeout: time.Second, FailureThreshold: 3, SuccessThreshold: 1},
			{Container: "sidecar", Type: probe.Readiness, Kind: probe.Exec, Period: 10 * time.Second, Timeout: time.Second, FailureThreshold: 3, SuccessThreshold: 1},
		},
	}, {Namespace: "default", Name: "plain"}}
	if !reflect.DeepEqual(pods, want) {
		t.Errorf("got  %+v\nwant %+v", pods, want)
	}
}

func TestParseErrors(t *testing.T) {
	// container wraps a container of pod shop/web.
	container := func(text string) string {
		return "pods: [{name: web, namespace: shop, containers: [{name: c, " + text + "}]}]"
	}
	for name, test := range map[string]struct {
		text string
		want []string
	}{
		"empty":             {"", []string{"pods", "missing"}},
		"not YAML":          {"pods: [", []string{"yaml"}},
		"not an object":     {"web", []string{`"web": must be an object`}},
		"pods not a list":   {"pods: x", []string{`pods: "x": must be a list`}},
		"pods an object":    {"pods: {web: x}", []string{`pods: object: must be a list`}},
		"pod not an object": {"pods: [x]", []string{`pods[0] (default/): "x": must be an object`}},
		"other top level":   {"pods: []\nnodes: []", []string{"nodes"}},
		"repeated key":      {"pods: []\npods: []", []string{"pods"}},
		"no name":           {"pods: [{containers: []}]", []string{"pods[0]", "name"}},
		"unknown pod field": {"pods: [{name: web, ip: 10.0.0.7}]", []string{"default/web", `"ip"`}},
		"bad IP":            {"pods: [{name: web, ips: [10.0.0.300]}]", []string{"default/web", "ips[0]", "10.0.0.300"}},
		"bare off":          {"pods: [{name: web, annotations: {probelet.dev/mode: off}}]", []string{"default/web", "annotations", "false", "quotes"}},
		"same name":         {"pods: [{name: web}, {name: web, namespace: default}]", []string{"default/web", "name"}},
		"same IP": {"pods: [{name: a, ips: [10.0.0.7]}, {name: b, ips: ['::ffff:10.0.0.7']}]",
			[]string{"default/a", "default/b", "ips", "10.0.0.7"}},
		"unknown probe field": {container("readinessProbe: {tcpSocket: {port: 1}, periodSecond: 5}"),
			[]string{"shop/web", "containers[0].readinessProbe.periodSecond"}},
		"field of another case": {container("readinessprobe: {tcpSocket: {port: 1}}"),
			[]string{"shop/web", "containers[0].readinessprobe"}},
		"wrong type": {container("readinessProbe: {tcpSocket: {port: 1}, periodSeconds: soon}"),
			[]string{`shop/web): containers[0].readinessProbe.periodSeconds: "soon": must be a whole number`}},
		"boolean for a string": {container("readinessProbe: {exec: {command: [true]}}"),
			[]string{"shop/web", "readinessProbe.exec.command[0]: true"}},
		"fraction": {container("readinessProbe: {tcpSocket: {port: 1}, periodSeconds: 0.5}"),
			[]string{"shop/web", "readinessProbe.periodSeconds", "0.5"}},
		"annotation that is a number": {"pods: [{name: web, annotations: {probelet.dev/staleness: 2}}]",
			[]string{"default/web", "annotations", "2", "string"}},
		"negative period": {container("readinessProbe: {tcpSocket: {port: 1}, periodSeconds: -5}"),
			[]string{"shop/web", "containers[0]", "readinessProbe.periodSeconds", "-5"}},
		"negative timeout": {container("livenessProbe: {tcpSocket: {port: 1}, timeoutSeconds: -2}"),
			[]string{"shop/web", "livenessProbe.timeoutSeconds", "-2"}},
		"negative threshold": {container("livenessProbe: {tcpSocket: {port: 1}, failureThreshold: -1}"),
			[]string{"shop/web", "livenessProbe.failureThreshold", "-1"}},
		"negative successThreshold": {container("readinessProbe: {tcpSocket: {port: 1}, successThreshold: -1}"),
			[]string{"shop/web", "readinessProbe.successThreshold", "-1"}},
		"port too large": {container("livenessProbe: {httpGet: {port: 70000}}"),
			[]string{"shop/web", "livenessProbe.httpGet.port", "70000"}},
		"port zero": {container("livenessProbe: {tcpSocket: {port: 0}}"),
			[]string{"shop/web", "livenessProbe.tcpSocket.port", "0"}},
		"gRPC port": {container("livenessProbe: {grpc: {port: -1}}"), []string{"livenessProbe.grpc.port", "-1"}},
		"scheme":    {container("livenessProbe: {httpGet: {port: 1, scheme: FTP}}"), []string{"httpGet.scheme", "FTP"}},
		"no handler": {container("startupProbe: {periodSeconds: 1}"),
			[]string{"shop/web", "startupProbe", "httpGet", "0"}},
		"two handlers": {container("startupProbe: {tcpSocket: {port: 1}, exec: {}}"), []string{"startupProbe", "2"}},
		"probed init container": {"pods: [{name: web, initContainers: [{name: i, livenessProbe: {tcpSocket: {port: 1}}}]}]",
			[]string{"default/web", "initContainers[0]", "restartPolicy"}},
		"container without name": {"pods: [{name: web, containers: [{}]}]", []string{"default/web", "containers[0].name"}},
		"every error": {"pods: [{name: web, ips: [x]}, {name: api, ips: [z]}]",
			[]string{"default/web", `"x"`, "default/api", `"z"`}},
	} {
		t.Run(name, func(t *testing.T) {
			pods, err := Parse([]byte(test.text))
			if err == nil {
				t.Fatalf("accepted: %+v", pods)
			}
			for _, part := range test.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("error %q does not name %s", err, part)
				}
			}
		})
	}
}
