package podspec

import (
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// The headers of a hook are those that the kubelet's client sends (NewRequestForHTTPGetAction in its
// pkg/probe/http/request.go).
func TestHookHeaders(t *testing.T) {
	got := make(chan http.Header, 1)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { got <- r.Header }))
	t.Cleanup(server.Close)
	rapid.Check(t, func(rt *rapid.T) {
		headers := rapid.SliceOfNDistinct(rapid.SampledFrom([]probe.Header{
			{Name: "User-Agent", Value: "kube-probe/1.37"}, {Name: "accept-encoding", Value: "identity"}, {Name: "Range", Value: "bytes=0-1"},
			{Name: "X-Auth", Value: "a"}, {Name: "user-agent", Value: "me"}, {Name: "x-auth", Value: "b"},
		}), 0, 4, func(h probe.Header) string { return h.Name }).Draw(rt, "headers")
		request, err := http.NewRequest(http.MethodGet, server.URL, nil)
		if err != nil {
			rt.Fatal(err)
		}
		for _, h := range headers {
			request.Header.Add(h.Name, h.Value)
		}
		if request.Header["User-Agent"] == nil {
			request.Header.Set("User-Agent", "kube-lifecycle/1.37")
		}
		request.Header.Set("Accept", "*/*")
		response, err := server.Client().Do(request)
		if err != nil {
			rt.Fatal(err)
		}
		_ = response.Body.Close()
		want := http.Header{"Accept": {"*/*"}}
		for _, h := range hookHeaders(slices.Clone(headers)) {
			want.Add(h.Name, h.Value)
		}
		sent := <-got
		if agents := want["User-Agent"]; len(agents) > 1 { // net/http sends only the first
			want["User-Agent"] = agents[:1]
		}
		if !maps.EqualFunc(sent, want, slices.Equal) {
			rt.Errorf("sent %v, want %v", sent, want)
		}
	})
}
