package probe

import (
	"maps"
	"net/http"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// A request has an endpoint's headers if, and only if, normal returns the same for both.
func TestHasHeaders(t *testing.T) {
	values := map[string][]string{
		"User-Agent": {"kube-probe/1.36", "kube-probe/1.37", "curl"}, "Connection": {"close", "upgrade"}, "Accept": {"*/*", "a"}, "X": {"1", ""},
	}
	request := rapid.Custom(func(t *rapid.T) Request {
		r := Request{Host: rapid.SampledFrom([]string{"10.0.0.1:80", "10.0.0.2:80", "10.0.0.1:81", "web"}).Draw(t, "host"), Header: http.Header{}}
		for _, name := range slices.Sorted(maps.Keys(values)) {
			if sent := rapid.SliceOfN(rapid.SampledFrom(values[name]), 0, 2).Draw(t, name); len(sent) > 0 {
				r.Header[name] = sent
			}
		}
		return r
	})
	same := 0
	rapid.Check(t, func(t *rapid.T) {
		q := question{port: 80, anyHost: rapid.Bool().Draw(t, "any host")}
		q.Request = request.Draw(t, "probe")
		q.header = q.normal(q.Request)
		r := q.Request
		if rapid.Bool().Draw(t, "other") {
			r = request.Draw(t, "request")
		}
		want := maps.EqualFunc(q.normal(r), q.header, slices.Equal)
		if got := q.hasHeaders(r); got != want {
			t.Errorf("%+v of %+v: %v", r, q.Request, got)
		}
		if want {
			same++
		}
	})
	if same == 0 {
		t.Error("no two requests had the same headers")
	}
}
