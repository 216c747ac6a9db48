package podspec

import (
	"net/http"
	"net/url"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// sentByClient returns the path that Go's client sends for a probe whose URL is made as the kubelet makes it. It is empty
// if nothing is sent, or if the path does not end at the first space.
func sentByClient(t *testing.T, path string) string {
	t.Helper()
	u, err := url.Parse(path)
	if err != nil {
		u = &url.URL{Path: path}
	}
	u.Scheme, u.Host = "http", "10.0.0.7:80"
	request, err := http.NewRequest(http.MethodGet, u.String(), nil)
	if err != nil {
		return ""
	}
	var wire strings.Builder
	if err := request.Write(&wire); err != nil {
		return ""
	}
	words := strings.Fields(strings.SplitN(wire.String(), "\r\n", 2)[0])
	if len(words) != 3 {
		return ""
	}
	return words[1]
}

func TestWirePath(t *testing.T) {
	for path, want := range map[string]string{
		"":                   "/",
		"/":                  "/",
		"/healthz":           "/healthz",
		"healthz":            "/healthz",
		"?x=1":               "/?x=1",
		"/a b?x=1#f":         "/a%20b?x=1",
		"/a%20b":             "/a%20b",
		"/a%2Fb":             "/a%2Fb",
		"/100%":              "/100%25",
		"/100%?x=1":          "/100%25%3Fx=1",
		"/ü":                 "/%C3%BC",
		"/a//b/../c":         "/a//b/../c",
		"/x?":                "/x?",
		"/x;v=1?a=b&c=d+e":   "/x;v=1?a=b&c=d+e",
		"//other/x":          "/x",
		"http://other:1/x?y": "/x?y",
		"/a:b":               "/a:b",
		"/x?a b":             "", // sent unchanged
	} {
		got, err := wirePath(path)
		if got != want || (err == nil) != (want != "") {
			t.Errorf("wirePath(%q) = %q, %v; want %q", path, got, err, want)
		}
		if sent := sentByClient(t, path); sent != want {
			t.Errorf("path %q: the client sends %q, want %q", path, sent, want)
		}
	}
	for _, path := range []string{
		"a:b/c",          // an opaque URL without a host
		"//user@other/x", // adds an Authorization header
		"/x?ü",           // sent unchanged, but the kernel side reads ASCII
	} {
		if got, err := wirePath(path); err == nil {
			t.Errorf("wirePath(%q) = %q, want an error", path, got)
		}
	}
}

func TestConvert(t *testing.T) {
	h2c := corev1.HTTPProtocolHTTP2
	port := intstr.FromInt32(80)
	get := func(a corev1.HTTPGetAction) corev1.ProbeHandler { return corev1.ProbeHandler{HTTPGet: &a} }
	converted := map[probe.Kind]bool{}
	for name, test := range map[string]struct {
		handler corev1.ProbeHandler
		want    probe.Spec
	}{
		"HTTP":     {get(corev1.HTTPGetAction{Port: port, Scheme: "HTTP"}), probe.Spec{Kind: probe.HTTP, Port: 80, Path: "/"}},
		"HTTPS":    {get(corev1.HTTPGetAction{Port: port, Scheme: "HTTPS"}), probe.Spec{Kind: probe.HTTPS, Port: 80, Path: "/"}},
		"h2c":      {get(corev1.HTTPGetAction{Port: port, Protocol: &h2c}), probe.Spec{Kind: probe.HTTP2, Port: 80, Path: "/"}},
		"own host": {get(corev1.HTTPGetAction{Port: port, Host: "h"}), probe.Spec{Kind: probe.HTTP, Host: "h", Port: 80, Path: "/"}},
		"TCP": {corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: port, Host: "h"}},
			probe.Spec{Kind: probe.TCP, Host: "h", Port: 80}},
		"named port":            {get(corev1.HTTPGetAction{Port: intstr.FromString("web")}), probe.Spec{Kind: probe.HTTP, Port: 8080, Path: "/"}},
		"number in a string":    {get(corev1.HTTPGetAction{Port: intstr.FromString("81")}), probe.Spec{Kind: probe.HTTP, Port: 81, Path: "/"}},
		"name that is a number": {get(corev1.HTTPGetAction{Port: intstr.FromString("82")}), probe.Spec{Kind: probe.HTTP, Port: 8082, Path: "/"}},
		"gRPC":                  {corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 80}}, probe.Spec{Kind: probe.GRPC, Port: 80}},
		"exec":                  {corev1.ProbeHandler{Exec: &corev1.ExecAction{}}, probe.Spec{Kind: probe.Exec}},
	} {
		converted[test.want.Kind] = true
		t.Run(name, func(t *testing.T) {
			c := &corev1.Container{Ports: []corev1.ContainerPort{
				{Name: "web", ContainerPort: 8080}, {Name: "82", ContainerPort: 8082},
			}}
			got, err := convert(c, probe.Liveness, &corev1.Probe{ProbeHandler: test.handler})
			if err != nil {
				t.Fatal(err)
			}
			if got.Kind != test.want.Kind || got.Host != test.want.Host || got.Port != test.want.Port ||
				got.Path != test.want.Path || got.Problem != "" {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
	for _, k := range probe.Kinds() {
		if !converted[k] {
			t.Errorf("no probe is converted to kind %s", k)
		}
	}
}

func TestConvertProblems(t *testing.T) {
	for name, test := range map[string]struct {
		get  corev1.HTTPGetAction
		want string
	}{
		"unknown port name": {corev1.HTTPGetAction{Port: intstr.FromString("web")}, `port "web"`},
		"unsendable path":   {corev1.HTTPGetAction{Port: intstr.FromInt32(80), Path: "a:b"}, `path "a:b"`},
	} {
		t.Run(name, func(t *testing.T) {
			p := &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &test.get}}
			got, err := convert(&corev1.Container{}, probe.Liveness, p)
			if err != nil || !strings.Contains(got.Problem, test.want) {
				t.Errorf("problem %q, error %v; want %s", got.Problem, err, test.want)
			}
		})
	}
}
