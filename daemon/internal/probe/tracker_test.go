package probe

import (
	"maps"
	"net/http"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"
)

const second = uint64(time.Second)

var x = Endpoint{Port: 80, Kind: HTTP, Path: "/x"}

// track returns a tracker of the probes, set up at 1000 s.
func track(t testing.TB, probes ...Spec) *Tracker {
	tracker := NewTracker()
	tracker.SetEndpoints(endpoints(t, probes...), 1000*second)
	return tracker
}

// after returns an outcome observed that many seconds later, with a duration of 0.
func after(seconds uint64, e Endpoint, event Event, status int) Outcome {
	return about(e, Outcome{Event: event, Status: status, ObservedAt: (1000 + seconds) * second})
}

// about assigns an outcome to the endpoint, or to its port if the endpoint has no kind.
func about(e Endpoint, o Outcome) Outcome {
	o.Port, o.Kind = e.Port, e.Kind
	if e.Kind == HTTP {
		o.Request = asked(e.Path)
	}
	return o
}

// asked returns the kubelet's request for a path.
func asked(path string) Request {
	return Request{Path: path, Host: "10.0.0.7:80", Header: http.Header{
		"User-Agent": {"kube-probe/1.37"}, "Accept": {"*/*"}, "Connection": {"close"},
	}}
}

func known(result Result, status int, observedAt, freshUntil uint64) Evidence {
	return Evidence{Result: result, Status: status, ObservedAt: observedAt, FreshUntil: freshUntil}
}

func took(d time.Duration, o Outcome) Outcome {
	o.Duration = d
	return o
}

func TestJudgement(t *testing.T) {
	tcp, anyOf80 := Endpoint{Port: 80, Kind: TCP}, Endpoint{Port: 80}
	good := after(10, x, Answered, 200)
	unchanged := known(Success, 200, 1010*second, 1021*second)
	at := func(seconds uint64, r Result, status int) Evidence {
		e := Evidence{Result: r, Status: status, ObservedAt: (1000 + seconds) * second}
		if r == Success {
			e.FreshUntil = e.ObservedAt + 11*second
		}
		return e
	}
	askedFor := func(d time.Duration) Evidence { // a success dates from when it was requested
		return known(Success, 200, 1010*second-uint64(d), 1021*second-uint64(d))
	}
	for name, test := range map[string]struct {
		endpoint Endpoint
		outcomes []Outcome
		want     Evidence
	}{
		"nothing":              {x, nil, Evidence{}},
		"200":                  {x, []Outcome{good}, unchanged},
		"299":                  {x, []Outcome{after(10, x, Answered, 299)}, at(10, Success, 299)},
		"just in time":         {x, []Outcome{took(899*time.Millisecond, good)}, askedFor(899 * time.Millisecond)},
		"failed meanwhile":     {x, []Outcome{after(15, x, Reset, 0), took(500*time.Millisecond, about(x, Outcome{Event: Answered, Status: 200, ObservedAt: 1015*second + second/4}))}, at(15, Failure, 0)},
		"too near":             {x, []Outcome{took(900*time.Millisecond, good)}, at(10, Failure, 200)},
		"too late":             {x, []Outcome{took(time.Minute, after(100, x, Answered, 200))}, at(100, Failure, 200)},
		"redirect":             {x, []Outcome{good, after(20, x, Answered, 302)}, at(20, Unknown, 302)},
		"client error":         {x, []Outcome{good, after(20, x, Answered, 404)}, at(20, Failure, 404)},
		"server error":         {x, []Outcome{good, after(20, x, Answered, 503)}, at(20, Failure, 503)},
		"interim response":     {x, []Outcome{good, after(20, x, Answered, 101)}, unchanged},
		"reset":                {x, []Outcome{good, after(20, x, Reset, 0)}, at(20, Failure, 0)},
		"port refused":         {x, []Outcome{good, after(20, anyOf80, Reset, 0)}, at(20, Failure, 0)},
		"gave up":              {x, []Outcome{good, took(time.Second, after(20, x, NoAnswer, 0))}, at(20, Failure, 0)},
		"broken":               {x, []Outcome{good, after(20, x, Failed, 0)}, at(20, Failure, 0)},
		"another path broken":  {x, []Outcome{good, after(20, Endpoint{Port: 80, Kind: HTTP, Path: "/y"}, Failed, 0)}, unchanged},
		"another path reset":   {x, []Outcome{good, after(20, Endpoint{Port: 80, Kind: HTTP, Path: "/y"}, Reset, 0)}, at(20, Failure, 0)},
		"TCP beside it reset":  {tcp, []Outcome{after(10, tcp, Connected, 0), after(20, x, Reset, 0)}, at(20, Failure, 0)},
		"TCP, an error status": {tcp, []Outcome{after(10, tcp, Connected, 0), after(20, x, Answered, 503)}, at(10, Success, 0)},
		"left early":           {x, []Outcome{good, took(time.Second/2, after(20, x, NoAnswer, 0))}, unchanged},
		"no connection":        {x, []Outcome{good, took(time.Second, after(20, anyOf80, NoAnswer, 0))}, at(20, Failure, 0)},
		"recovered":            {x, []Outcome{after(5, x, Reset, 0), good}, unchanged},
		"older":                {x, []Outcome{good, after(9, x, Answered, 500)}, unchanged},
		"as old":               {x, []Outcome{good, after(10, x, Answered, 500)}, unchanged},
		"another path":         {x, []Outcome{good, after(20, Endpoint{Port: 80, Kind: HTTP, Path: "/y"}, Answered, 500)}, unchanged},
		"another port":         {x, []Outcome{good, after(20, Endpoint{Port: 81, Kind: HTTP, Path: "/x"}, Reset, 0)}, unchanged},
		"other port":           {x, []Outcome{good, after(20, Endpoint{Port: 81}, Reset, 0)}, unchanged},
		"another kind":         {x, []Outcome{after(10, tcp, Connected, 0)}, Evidence{}},
		"connected":            {tcp, []Outcome{after(10, tcp, Connected, 0)}, at(10, Success, 0)},
		"connected late":       {tcp, []Outcome{took(time.Second, after(10, tcp, Connected, 0))}, at(10, Failure, 0)},
		"TCP refused":          {tcp, []Outcome{after(10, anyOf80, Reset, 0)}, at(10, Failure, 0)},
		"asked before it was known": {x, []Outcome{took(500*time.Millisecond, about(x, Outcome{
			Event: Answered, Status: 200, ObservedAt: 1000*second + 1}))}, Evidence{}},
	} {
		t.Run(name, func(t *testing.T) {
			tracker := track(t, httpProbe(Readiness, "/x"), tcpProbe(Liveness))
			for _, o := range test.outcomes {
				tracker.Observe(o)
			}
			if got := tracker.Evidence()[test.endpoint]; got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

// A response of any status shows that a connection to the port was accepted, and so prolongs a TCP probe's success if the
// listening socket is checked as well. It arms nothing, and no other outcome prolongs.
func TestAnswersProlongTCP(t *testing.T) {
	tcp := Endpoint{Port: 80, Kind: TCP}
	connected := after(5, tcp, Connected, 0)
	of := func(seconds, live uint64) Evidence {
		bound := (live+1)*10*second + second // the periods and the slack
		return known(Success, 0, (1000+seconds)*second, (1000+seconds)*second+bound)
	}
	for name, test := range map[string]struct {
		live      int
		threshold int
		outcomes  []Outcome
		want      Evidence
	}{
		"a success":             {9, 1, []Outcome{connected, after(10, x, Answered, 200)}, of(10, 9)},
		"an error":              {9, 1, []Outcome{connected, after(10, x, Answered, 503)}, of(10, 9)},
		"without checks":        {0, 1, []Outcome{connected, after(10, x, Answered, 200)}, of(5, 0)},
		"nothing known":         {9, 1, []Outcome{after(10, x, Answered, 200)}, Evidence{}},
		"after a failure":       {9, 1, []Outcome{connected, after(7, tcp, Reset, 0), after(10, x, Answered, 200)}, known(Failure, 0, 1007*second, 0)},
		"no success of its own": {9, 2, []Outcome{connected, after(10, x, Answered, 200)}, known(Success, 0, 1005*second, 0)},
		"no answer":             {9, 1, []Outcome{connected, after(10, x, NoAnswer, 0)}, of(5, 9)},
		"cut":                   {9, 1, []Outcome{connected, after(10, x, Failed, 200)}, of(5, 9)},
		"late":                  {9, 1, []Outcome{connected, took(time.Second, after(10, x, Answered, 200))}, of(5, 9)},
		"older":                 {9, 1, []Outcome{connected, after(4, x, Answered, 200)}, of(5, 9)},
	} {
		t.Run(name, func(t *testing.T) {
			limits := limits
			limits.Live = test.live
			probes := []Spec{httpProbe(Liveness, "/x"), with(tcpProbe(Readiness), func(s *Spec) { s.SuccessThreshold = test.threshold })}
			specs, err := Endpoints(Pod{IPs: []netip.Addr{netip.MustParseAddr("10.0.0.7")}, Probes: probes}, NewDefaults().Settings(nil), limits)
			if err != nil {
				t.Fatal(err)
			}
			tracker := NewTracker()
			tracker.SetEndpoints(specs, 1000*second)
			for _, o := range test.outcomes {
				tracker.Observe(o)
			}
			if got := tracker.Evidence()[tcp]; got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

// The smallest timeout counts, because it is unknown which of the probes it was.
func TestSharedTimeout(t *testing.T) {
	tracker := track(t, httpProbe(Readiness, "/x"), with(httpProbe(Liveness, "/x"), func(s *Spec) { s.Timeout = time.Minute }))
	tracker.Observe(took(2*time.Second, after(10, x, Answered, 200)))
	if got := tracker.Evidence()[x].Result; got != Failure {
		t.Errorf("%s, want failure", got)
	}
}

func TestGate(t *testing.T) {
	y := Endpoint{Port: 80, Kind: HTTP, Path: "/y"}
	both := []Spec{httpProbe(Readiness, "/x"), with(httpProbe(Liveness, "/y"), func(s *Spec) { s.Period = 2 * time.Second })}
	tcp := Endpoint{Port: 80, Kind: TCP}
	startup, startupTCP := httpProbe(Startup, "/y"), tcpProbe(Startup)
	https := with(httpProbe(Startup, "/y"), func(s *Spec) { s.Kind = HTTPS })
	closed, ofX := Gate{}, Gate{ObservedAt: 1010 * second, FreshUntil: 1021 * second}
	good := after(10, x, Answered, 200)
	for name, test := range map[string]struct {
		probes   []Spec
		outcomes []Outcome
		want     Gate
	}{
		"nothing known": {both, nil, closed},
		"one known":     {both, []Outcome{good}, ofX},
		"newest and latest": {both, []Outcome{good, after(12, y, Answered, 200)},
			Gate{ObservedAt: 1012 * second, FreshUntil: 1021 * second}},
		"one failed": {both, []Outcome{good, after(12, y, Answered, 200), after(13, x, Answered, 500)},
			Gate{ObservedAt: 1012 * second, FreshUntil: 1015 * second}},
		"both failed":              {both, []Outcome{good, after(12, y, Answered, 500), after(13, x, Answered, 500)}, closed},
		"reset":                    {both, []Outcome{good, after(12, y, Answered, 200), after(13, x, Reset, 0)}, closed},
		"one redirects":            {both, []Outcome{good, after(12, y, Answered, 301)}, ofX},
		"a startup probe, unknown": {[]Spec{both[0], startup}, []Outcome{good}, ofX},
		"a startup probe, failed":  {[]Spec{both[0], startup}, []Outcome{good, after(12, y, Answered, 500)}, ofX},
		"a startup probe by HTTPS": {[]Spec{both[0], https}, []Outcome{good}, ofX},
		"a startup probe by TCP":   {[]Spec{both[0], startupTCP}, []Outcome{good}, ofX},
		"startup probes only":      {[]Spec{startup, startupTCP}, []Outcome{after(10, y, Answered, 200), after(10, tcp, Connected, 0)}, closed},
		"beside HTTPS":             {[]Spec{both[0], with(https, func(s *Spec) { s.Type = Liveness })}, []Outcome{good}, ofX},
		"TCP unknown":              {[]Spec{both[0], tcpProbe(Liveness)}, []Outcome{good}, closed},
		"only TCP known":           {[]Spec{both[0], tcpProbe(Liveness)}, []Outcome{after(12, tcp, Connected, 0)}, Gate{ObservedAt: 1012 * second, FreshUntil: 1023 * second}},
		"TCP older":                {[]Spec{both[0], tcpProbe(Liveness)}, []Outcome{after(5, tcp, Connected, 0), good}, Gate{ObservedAt: 1005 * second, FreshUntil: 1016 * second}},
		"TCP too late":             {[]Spec{both[0], tcpProbe(Liveness)}, []Outcome{good, took(time.Second, after(12, tcp, Connected, 0))}, closed},
		"TCP, HTTP failed":         {[]Spec{both[0], tcpProbe(Liveness)}, []Outcome{after(5, tcp, Connected, 0), after(10, x, Answered, 500)}, Gate{ObservedAt: 1005 * second, FreshUntil: 1016 * second}},
		"TCP at another address":   {[]Spec{both[0], with(tcpProbe(Liveness), func(s *Spec) { s.Host = "fd00::7" })}, []Outcome{good}, closed},
		"TCP of two types":         {[]Spec{both[0], startupTCP, with(tcpProbe(Liveness), func(s *Spec) { s.Container = "d" })}, []Outcome{good}, closed},
	} {
		t.Run(name, func(t *testing.T) {
			tracker := track(t, test.probes...)
			for _, o := range test.outcomes {
				tracker.Observe(o)
			}
			if got := tracker.Gates()[80]; got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

func TestGatesOfEachPort(t *testing.T) {
	tracker := track(t, httpProbe(Readiness, "/x"), with(tcpProbe(Liveness), func(s *Spec) { s.Port = 81 }),
		with(tcpProbe(Liveness), func(s *Spec) { s.Container, s.Port, s.Host = "d", 82, "h" }))
	tracker.Observe(after(10, x, Answered, 200))
	if ports := slices.Sorted(maps.Keys(tracker.Gates())); !slices.Equal(ports, []uint16{80, 81}) {
		t.Errorf("gates for ports %v, want 80 and 81", ports)
	}
	if gate := tracker.Gates()[81]; gate != (Gate{}) {
		t.Errorf("a success on port 80 opens port 81: %+v", gate)
	}
}

func TestSetEndpoints(t *testing.T) {
	probe := httpProbe(Readiness, "/x")
	fresh := known(Success, 200, 1010*second, 1021*second)
	for name, test := range map[string]struct {
		probes []Spec
		want   Evidence
	}{
		"the same":        {[]Spec{probe}, fresh},
		"shorter period":  {[]Spec{with(probe, func(s *Spec) { s.Period = 3 * time.Second })}, known(Success, 200, 1010*second, 1014*second)},
		"longer period":   {[]Spec{with(probe, func(s *Spec) { s.Period = time.Minute })}, fresh},
		"other headers":   {[]Spec{with(probe, func(s *Spec) { s.Headers = []Header{{"A", "1"}} })}, Evidence{}},
		"startup only":    {[]Spec{with(probe, func(s *Spec) { s.Type = Startup })}, known(Success, 200, 1010*second, 0)},
		"HTTPS beside it": {[]Spec{probe, with(probe, func(s *Spec) { s.Kind = HTTPS })}, fresh},
		"also at a name":  {[]Spec{probe, with(probe, func(s *Spec) { s.Host = "h" })}, fresh},
		"a new container": {[]Spec{with(probe, func(s *Spec) { s.Instance = "b" })}, Evidence{}},
		"gone":            {nil, Evidence{}},
	} {
		t.Run(name, func(t *testing.T) {
			tracker := track(t, probe)
			tracker.Observe(after(10, x, Answered, 200))
			tracker.SetEndpoints(endpoints(t, test.probes...), 1015*second)
			if got := tracker.Evidence()[x]; got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

// Probes of one path with different headers count separately.
func TestHeadersAreAnotherEndpoint(t *testing.T) {
	header := []Header{{"A", "1"}}
	tracker := track(t, httpProbe(Readiness, "/x"), with(httpProbe(Liveness, "/x"), func(s *Spec) { s.Headers = header }))
	with := endpoints(t, with(httpProbe(Liveness, "/x"), func(s *Spec) { s.Headers = header }))[0].Endpoint
	o := after(10, x, Answered, 200)
	o.Request.Header.Set("A", "1")
	tracker.Observe(o)
	if got := tracker.Evidence(); got[x] != (Evidence{}) || got[with].Result != Success {
		t.Fatalf("after the one with the header: %+v", got)
	}
	tracker.Observe(after(11, x, Answered, 403))
	if got := tracker.Evidence(); got[x].Result != Failure || got[with].Result != Success {
		t.Fatalf("after the one without: %+v", got)
	}
}

// Evidence belongs to the bytes that were sent last.
func TestQuestion(t *testing.T) {
	a, b := Question{1, 2}, Question{3, 4}
	tracker := track(t, httpProbe(Readiness, "/x"), httpProbe(Liveness, "/y"))
	for i, step := range []struct {
		question Question
		event    Event
		status   int
		path     string
		want     Question
	}{
		{a, Answered, 200, "/x", a},
		{b, Answered, 200, "/x", b}, // for example after a kubelet update
		{a, Answered, 503, "/x", a},
		{Question{}, Reset, 0, "/x", a},
		{b, Reset, 0, "/y", a}, // affects the whole port, but not the question
	} {
		e := x
		e.Path = step.path
		o := after(uint64(10+i), e, step.event, step.status)
		o.Question = step.question
		tracker.Observe(o)
		if got := tracker.Evidence()[x].Question; got != step.want {
			t.Fatalf("step %d: %v, want %v", i, got, step.want)
		}
	}
	tracker.Withdraw(func(Endpoint) bool { return true }, 1020*second)
	if got := tracker.Evidence()[x]; got != (Evidence{Question: a}) {
		t.Errorf("after it was withdrawn: %+v", got)
	}
}

// After a failure, or when nothing is known, it takes as many successes as the prober requires.
func TestSuccessThreshold(t *testing.T) {
	ok, bad := after(0, x, Answered, 200), after(0, x, Answered, 503)
	redirect, refused, refresh := after(0, x, Answered, 302), after(0, Endpoint{Port: 80}, Reset, 0), ok
	refresh.Refresh = true
	three := with(httpProbe(Readiness, "/x"), func(s *Spec) { s.SuccessThreshold = 3 })
	for name, test := range map[string]struct {
		probes   []Spec
		outcomes []Outcome
		armed    bool
	}{
		"one":                  {[]Spec{three}, []Outcome{ok}, false},
		"two":                  {[]Spec{three}, []Outcome{ok, ok}, false},
		"three":                {[]Spec{three}, []Outcome{ok, ok, ok}, true},
		"after a failure":      {[]Spec{three}, []Outcome{ok, ok, ok, bad, ok, ok}, false},
		"three after it":       {[]Spec{three}, []Outcome{ok, ok, ok, bad, ok, ok, ok}, true},
		"refused in between":   {[]Spec{three}, []Outcome{ok, ok, refused, ok}, false},
		"redirect in between":  {[]Spec{three}, []Outcome{ok, ok, redirect, ok}, false},
		"by the daemon itself": {[]Spec{three}, []Outcome{ok, ok, refresh}, false},
		"usual":                {[]Spec{httpProbe(Readiness, "/x")}, []Outcome{bad, ok}, true},
		// While the readiness probe takes up to 31 s for its third success, up to four of the liveness probe may arrive.
		"shared, six":   {[]Spec{three, httpProbe(Liveness, "/x")}, []Outcome{ok, ok, ok, ok, ok, ok}, false},
		"shared, seven": {[]Spec{three, httpProbe(Liveness, "/x")}, []Outcome{ok, ok, ok, ok, ok, ok, ok}, true},
	} {
		t.Run(name, func(t *testing.T) {
			tracker := track(t, test.probes...)
			for i, o := range test.outcomes {
				o.ObservedAt = (1010 + uint64(i)) * second
				tracker.Observe(o)
			}
			if got := tracker.Evidence()[x]; (got.FreshUntil != 0) != test.armed {
				t.Errorf("got %+v, want armed: %v", got, test.armed)
			}
		})
	}
}

func TestSuccessThresholdAfterWithdrawal(t *testing.T) {
	tracker := track(t, with(httpProbe(Readiness, "/x"), func(s *Spec) { s.SuccessThreshold = 2 }))
	see := func(seconds uint64) bool {
		tracker.Observe(after(seconds, x, Answered, 200))
		return tracker.Evidence()[x].FreshUntil != 0
	}
	if see(10) || !see(11) {
		t.Fatal("not armed by the second success")
	}
	tracker.Void(func(Endpoint) bool { return true }, 1005*second)
	if !see(12) {
		t.Fatal("successes after the withdrawal no longer count")
	}
	tracker.Void(func(e Endpoint) bool { return e != x }, 1012*second)
	if !see(13) {
		t.Fatal("the withdrawal of another endpoint counts")
	}
	tracker.Void(func(Endpoint) bool { return true }, 1013*second)
	if see(14) || !see(15) {
		t.Fatal("not armed by the second success after the withdrawal")
	}
	fresh := tracker.Evidence()[x]
	restarted := track(t, with(httpProbe(Readiness, "/x"), func(s *Spec) { s.SuccessThreshold = 2 }))
	if restarted.Restore(x, fresh, 1016*second); restarted.Evidence()[x] != fresh {
		t.Fatalf("restored %+v", restarted.Evidence()[x])
	}
	for seconds, armed := range []bool{false, true} { // what happened meanwhile is unknown
		restarted.Observe(after(17+uint64(seconds), x, Answered, 200))
		if got := restarted.Evidence()[x]; (got.FreshUntil != 0) != armed {
			t.Fatalf("after restoring and %d successes: %+v", seconds+1, got)
		}
	}
}

// Requests to the old container, and its late responses, do not count for the new one.
func TestNewContainer(t *testing.T) {
	of := func(instance string) Spec {
		return with(httpProbe(Readiness, "/x"), func(s *Spec) { s.Instance = instance })
	}
	liveness := with(of("a"), func(s *Spec) { s.Type = Liveness })
	sidecar := with(of("s"), func(s *Spec) { s.Container = "sidecar" })
	for name, test := range map[string]struct {
		before, after []Spec
		kept          bool
	}{
		"the same":                     {[]Spec{of("a"), liveness}, []Spec{of("a"), liveness}, true},
		"another":                      {[]Spec{of("a")}, []Spec{of("b")}, false},
		"ended":                        {[]Spec{of("a")}, []Spec{of("")}, false},
		"not known before":             {[]Spec{of("")}, []Spec{of("a")}, false},
		"never known":                  {[]Spec{of("")}, []Spec{of("")}, true},
		"one of two that ask it":       {[]Spec{of("a"), sidecar}, []Spec{of("b"), sidecar}, false},
		"the other of two":             {[]Spec{sidecar, of("a")}, []Spec{sidecar, of("b")}, false},
		"another that does not ask it": {[]Spec{of("a"), with(sidecar, func(s *Spec) { s.Path = "/y" })}, []Spec{of("a"), with(sidecar, func(s *Spec) { s.Path, s.Instance = "/y", "t" })}, true},
	} {
		t.Run(name, func(t *testing.T) {
			tracker := track(t, test.before...)
			tracker.Observe(after(10, x, Answered, 200))
			fresh := tracker.Evidence()[x]
			changes := tracker.SetEndpoints(endpoints(t, test.after...), 1015*second)
			if test.kept {
				if got := tracker.Evidence()[x]; got != fresh || len(changes) != 0 {
					t.Fatalf("got %+v, %+v; want %+v kept", got, changes, fresh)
				}
				return
			}
			if got := tracker.Evidence()[x]; got != (Evidence{}) {
				t.Fatalf("kept %+v", got)
			}
			want := Change{x, ByRestart, fresh, Evidence{}}
			if len(changes) != 1 || changes[0] != want || !want.Withdrawn(1015*second) || want.Withdrawn(1021*second) {
				t.Fatalf("changes %+v, want %+v", changes, want)
			}
			tracker.Observe(took(500*time.Millisecond, about(x, Outcome{Event: Answered, Status: 200, ObservedAt: 1015*second + 1})))
			if got := tracker.Evidence()[x]; got != (Evidence{}) {
				t.Fatalf("a request to the old container led to %+v", got)
			}
		})
	}
}

func TestWithdraw(t *testing.T) {
	y := Endpoint{Port: 80, Kind: HTTP, Path: "/y"}
	tracker := track(t, httpProbe(Readiness, "/x"), httpProbe(Liveness, "/y"))
	tracker.Observe(after(10, x, Answered, 200))
	tracker.Observe(after(10, y, Answered, 200))
	fresh := tracker.Evidence()[x]
	changes := tracker.Withdraw(func(e Endpoint) bool { return e == x }, 1012*second)
	if want := (Change{x, ByRequest, fresh, Evidence{}}); len(changes) != 1 || changes[0] != want {
		t.Fatalf("changes %+v, want %+v", changes, want)
	}
	if got := tracker.Evidence(); got[x] != (Evidence{}) || got[y] != fresh {
		t.Fatalf("left: %+v", got)
	}
	if got, want := tracker.Gates()[80], (Gate{ObservedAt: fresh.ObservedAt, FreshUntil: fresh.FreshUntil}); got != want {
		t.Fatalf("gate %+v, want %+v as for the other path", got, want)
	}
	tracker.Observe(took(time.Second/2, about(x, Outcome{Event: Answered, Status: 200, ObservedAt: 1012*second + second/4})))
	if got := tracker.Evidence()[x]; got != (Evidence{}) {
		t.Fatalf("a request from before the withdrawal led to %+v", got)
	}
	tracker.Observe(after(13, x, Answered, 200))
	if got := tracker.Evidence()[x].Result; got != Success {
		t.Fatalf("after the next success: %s", got)
	}
	if changes := tracker.Withdraw(func(e Endpoint) bool { return e.Port == 81 }, 1020*second); len(changes) != 0 {
		t.Fatalf("for an unknown port: %+v", changes)
	}
}

// The daemon sends only requests that are known to succeed.
func TestRefreshing(t *testing.T) {
	tracker := NewTracker()
	pod := Pod{IPs: []netip.Addr{netip.MustParseAddr("10.0.0.7")}, Probes: []Spec{
		httpProbe(Readiness, "/x"),
		with(httpProbe(Startup, "/startup"), func(*Spec) {}),
		with(tcpProbe(Liveness), func(s *Spec) { s.Port = 81 }),
		with(httpProbe(Liveness, "/y"), func(s *Spec) { s.Container, s.Port, s.Host = "d", 82, "elsewhere" }),
	}}
	set := func(annotations map[string]string) {
		t.Helper()
		defaults := NewDefaults()
		defaults.RefreshByAnnotation = true
		specs, err := Endpoints(pod, defaults.Settings(annotations), limits)
		if err != nil {
			t.Fatal(err)
		}
		tracker.SetEndpoints(specs, 1000*second)
	}
	expect := func(want ...Endpoint) {
		t.Helper()
		var got []Endpoint
		for _, s := range tracker.Refreshing() {
			got = append(got, s.Endpoint)
		}
		if !slices.Equal(got, want) {
			t.Fatalf("refreshing %v, want %v", got, want)
		}
	}
	on := map[string]string{AnnotationRefresh: "true"}
	tcp := Endpoint{Port: 81, Kind: TCP}
	set(on)
	expect()
	recorded := func(o Outcome) Outcome {
		o.Question, o.Text = Question{1, 2}, []byte("GET /x")
		return o
	}
	tracker.Observe(after(10, x, Answered, 200))
	expect() // the bytes of the request are unknown
	tracker.Observe(recorded(after(11, x, Answered, 200)))
	tracker.Observe(recorded(after(11, Endpoint{Port: 80, Kind: HTTP, Path: "/startup"}, Answered, 200)))
	tracker.Observe(after(10, tcp, Connected, 0))
	expect(x, tcp)
	if a := tracker.Refreshing()[0]; a.Question != (Question{1, 2}) || string(a.Text) != "GET /x" {
		t.Fatalf("asks %+v", a)
	}

	refused := after(15, x, Answered, 503)
	refused.Refresh = true
	if changes := tracker.Observe(refused); len(changes) != 1 || changes[0].Cause != ByRefresh || !changes[0].Withdrawn(1015*second) {
		t.Fatalf("changes %+v", changes)
	}
	expect(tcp)
	tracker.Observe(after(20, x, Answered, 200))
	expect(x, tcp)
	set(map[string]string{AnnotationRefresh: "true", AnnotationMode: "observe"})
	expect()
	set(nil)
	expect()
	set(on)
	expect(x, tcp)
}

func TestRestore(t *testing.T) {
	now := 1010 * second
	for name, test := range map[string]struct{ evidence, want Evidence }{
		"within the bound": {known(Success, 200, 1005*second, 1008*second), known(Success, 200, 1005*second, 1008*second)},
		"beyond the bound": {known(Success, 200, 1005*second, 9999*second), known(Success, 200, 1005*second, 1016*second)},
		"failure":          {known(Failure, 500, 1005*second, 9999*second), known(Failure, 500, 1005*second, 0)},
		"from the future":  {known(Success, 200, 1011*second, 1012*second), Evidence{}},
		"empty":            {Evidence{}, Evidence{}},
	} {
		t.Run(name, func(t *testing.T) {
			tracker := track(t, httpProbe(Readiness, "/x"))
			tracker.Restore(x, test.evidence, now)
			if got := tracker.Evidence()[x]; got != test.want {
				t.Errorf("got %+v, want %+v", got, test.want)
			}
		})
	}
}

var (
	modelEndpoints = []Endpoint{x, {Port: 80, Kind: HTTP, Path: "/y"}, {Port: 80, Kind: TCP}, {Port: 81, Kind: TCP}}
	wholePorts     = []Endpoint{{Port: 80}, {Port: 81}}
)

func drawOutcome(t *rapid.T) Outcome {
	return about(rapid.SampledFrom(slices.Concat(modelEndpoints, wholePorts)).Draw(t, "endpoint"), Outcome{
		Event:      rapid.SampledFrom([]Event{Connected, Answered, Reset, NoAnswer, Failed}).Draw(t, "event"),
		Status:     rapid.SampledFrom([]int{0, 101, 200, 204, 302, 404, 503}).Draw(t, "status"),
		ObservedAt: (2000 + rapid.Uint64Range(0, 60).Draw(t, "observed at")) * second,
		Duration:   time.Duration(rapid.IntRange(0, 1500).Draw(t, "duration")) * time.Millisecond,
		Refresh:    rapid.Bool().Draw(t, "refresh"),
	})
}

// asks returns the endpoint that an outcome belongs to.
func (o Outcome) asks() Endpoint { return Endpoint{Port: o.Port, Kind: o.Kind, Path: o.Request.Path} }

func drawSettings(t *rapid.T) Settings {
	stalenesses := []Staleness{0.5, 1, 2.5, 5}
	defaults := Defaults{
		Mode:      rapid.SampledFrom([]Mode{Answer, Answer, Observe, Off}).Draw(t, "mode of the node"),
		Staleness: StalenessRange{1, rapid.SampledFrom(stalenesses[1:]).Draw(t, "staleness of the node")},
		Ceiling:   rapid.SampledFrom(stalenesses).Draw(t, "ceiling"),

		RefreshByAnnotation: rapid.Bool().Draw(t, "refresh by annotation"),
		Liveness:            rapid.SampledFrom([]LivenessEvidence{LivenessByProbes, LivenessByTraffic}).Draw(t, "liveness of the node"),
	}
	annotations := map[string]string{}
	if text := rapid.SampledFrom([]string{"", "answer", "observe", "off", "of"}).Draw(t, "mode"); text != "" {
		annotations[AnnotationMode] = text
	}
	if text := rapid.SampledFrom([]string{"", "0.5", "1", "5", "6", "0.5-5"}).Draw(t, "staleness"); text != "" {
		annotations[AnnotationStaleness] = text
	}
	if text := rapid.SampledFrom([]string{"", "true", "1s", "x"}).Draw(t, "refresh"); text != "" {
		annotations[AnnotationRefresh] = text
	}
	return defaults.Settings(annotations)
}

// success reports whether an outcome is an undisputed success: of this very endpoint, of its kind, and well in time.
func success(o Outcome, e Endpoint) bool {
	if o.asks() != e || o.Duration >= 900*time.Millisecond {
		return false
	}
	return e.Kind == TCP && o.Event == Connected || e.Kind == HTTP && o.Event == Answered && o.Status/100 == 2
}

// failure reports whether an outcome is an undisputed failure.
func failure(o Outcome, e Endpoint) bool {
	if o.Event == Reset && o.Port == e.Port {
		return true
	}
	return o.asks() == e && (o.Event == Failed || e.Kind == HTTP && o.Event == Answered && o.Status >= 400)
}

// timeout reports whether the prober may have given up without having seen an error.
func timeout(o Outcome, e Endpoint) bool {
	return o.Port == e.Port && o.Duration >= 900*time.Millisecond && (o.Event == NoAnswer || o.Event == Connected || o.Event == Answered && o.Status/100 == 2)
}

func TestInvariants(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		tracker := NewTracker()
		successes := map[Endpoint]map[uint64]bool{} // when each endpoint was observed to succeed
		failures := map[Endpoint]uint64{}           // when it was last observed to fail
		for _, e := range modelEndpoints {
			successes[e] = map[uint64]bool{}
		}
		staleness := map[Endpoint]uint64{}
		instances := map[Endpoint]string{}
		var mode Mode
		set := func(t *rapid.T) {
			var probes []Spec
			for _, e := range modelEndpoints {
				p := Spec{Container: "c", Type: Liveness, Kind: e.Kind, Port: e.Port, Path: e.Path, Timeout: time.Second}
				p.Period = time.Duration(rapid.IntRange(1, 30).Draw(t, "period")) * time.Second
				p.Instance = rapid.SampledFrom([]string{"", "a", "a", "b"}).Draw(t, "instance")
				probes = append(probes, p)
			}
			settings := drawSettings(t)
			specs, err := Endpoints(Pod{Probes: probes}, settings, limits)
			if err != nil {
				t.Fatal(err)
			}
			before := tracker.Evidence()
			changes := tracker.SetEndpoints(specs, 1000*second)
			for _, s := range specs {
				if instances[s.Endpoint] != s.Instance && tracker.Evidence()[s.Endpoint] != (Evidence{}) {
					t.Fatalf("%s: %+v is kept from %q to %q", s.Endpoint, tracker.Evidence()[s.Endpoint], instances[s.Endpoint], s.Instance)
				}
				if instances[s.Endpoint] != s.Instance {
					delete(failures, s.Endpoint)
				}
				instances[s.Endpoint] = s.Instance
			}
			checkChanges(t, changes, before, tracker.Evidence())
			if mode = settings.Mode; mode == Off {
				clear(failures) // endpoints that are not observed are forgotten
			}
			for _, s := range specs {
				staleness[s.Endpoint] = uint64(s.SteadyStaleness)
				if most := settings.Ceiling.Of(s.Period, s.Timeout); max(s.Staleness, s.SteadyStaleness) > most {
					t.Fatalf("%s: staleness %s, %s above the ceiling of %s", s.Endpoint, s.Staleness, s.SteadyStaleness, most)
				}
			}
			for e, now := range tracker.Evidence() {
				if now.FreshUntil > before[e].FreshUntil || now.TrafficUntil > before[e].TrafficUntil {
					t.Fatalf("%s: prolonged from %+v to %+v by %+v", e, before[e], now, settings)
				}
			}
		}
		set(t)

		t.Repeat(map[string]func(*rapid.T){
			"reload": set,
			"outcome": func(t *rapid.T) {
				o := drawOutcome(t)
				before := tracker.Evidence()
				checkChanges(t, tracker.Observe(o), before, tracker.Evidence())
				for e, now := range tracker.Evidence() {
					if success(o, e) {
						successes[e][o.ObservedAt-uint64(o.Duration)] = true
					}
					if failure(o, e) && o.ObservedAt > before[e].ObservedAt {
						failures[e] = o.ObservedAt
					}
					if o.ObservedAt < before[e].ObservedAt && now != before[e] && (o.Refresh || success(o, e) || now.FreshUntil != 0) {
						t.Fatalf("%s: an older outcome changed %+v to %+v", e, before[e], now)
					}
					if now.FreshUntil > before[e].FreshUntil && !success(o, e) {
						t.Fatalf("%s: prolonged to %+v by %+v", e, now, o)
					}
					if now.TrafficUntil > before[e].TrafficUntil && !success(o, e) && (before[e].TrafficUntil == 0 || !timeout(o, e)) {
						t.Fatalf("%s: traffic may vouch for it after %+v, by %+v", e, before[e], o)
					}
					if e != o.asks() && o.Kind != "" && o.Event != Reset && now != before[e] {
						t.Fatalf("%s: changed to %+v by %+v, which is about another endpoint", e, now, o)
					}
				}
			},
			"": func(t *rapid.T) {
				evidence := tracker.Evidence()
				if mode == Off && len(evidence) > 0 {
					t.Fatalf("mode off, but observed: %+v", evidence)
				}
				for _, e := range modelEndpoints {
					if mode != Answer && (evidence[e].FreshUntil != 0 || evidence[e].TrafficUntil != 0) {
						t.Fatalf("%s: fresh in mode %s: %+v", e, mode, evidence[e])
					}
					checkEvidence(t, e, evidence[e], staleness[e], successes[e], failures[e])
				}
			},
		})
	})
}

// What the prober knows decides, in whatever order its outcomes and those of the daemon's own requests are learned: an endpoint is
// fresh only after as many successes in a row as the prober needs, and traffic may vouch for it only if its last outcome was no error.
func TestOwnRequestsHideNoFailure(t *testing.T) {
	tcp := Endpoint{Port: 80, Kind: TCP}
	good := map[Endpoint]Outcome{x: {Event: Answered, Status: 200}, tcp: {Event: Connected}}
	bad := map[Endpoint][]Outcome{
		x: {
			{Event: NoAnswer, Duration: time.Second}, {Event: Answered, Status: 503}, {Event: Failed}, {Event: Reset},
		},
		tcp: {{Event: Reset}},
	}
	fresh := 0
	rapid.Check(t, func(t *rapid.T) {
		threshold, settings := rapid.IntRange(1, 3).Draw(t, "threshold"), NewDefaults().Settings(map[string]string{AnnotationRefresh: "true"})
		http, connects := httpProbe(Liveness, "/x"), tcpProbe(Liveness)
		if threshold > 1 {
			http.Type, connects.Type = Readiness, Readiness
			http.SuccessThreshold, connects.SuccessThreshold = threshold, threshold
		} else if rapid.Bool().Draw(t, "traffic") {
			settings.Liveness = LivenessByTraffic
		}
		specs, err := Endpoints(Pod{Probes: []Spec{http, connects}}, settings, limits)
		if err != nil {
			t.Fatal(err)
		}
		tracker := NewTracker()
		tracker.SetEndpoints(specs, 1000*second)

		type stream struct {
			endpoint Endpoint
			own      bool
		}
		streams := []stream{{x, false}, {tcp, false}, {x, true}}
		pending := make([][]Outcome, len(streams))
		row, failed := map[Endpoint]int{}, map[Endpoint]bool{}
		for i := range rapid.IntRange(1, 12).Draw(t, "outcomes") {
			n := rapid.IntRange(0, len(streams)-1).Draw(t, "whose")
			e := streams[n].endpoint
			o := good[e]
			if !streams[n].own && rapid.Bool().Draw(t, "bad") {
				o = rapid.SampledFrom(bad[e]).Draw(t, "how")
			}
			o.ObservedAt, o.Refresh = uint64(1002+2*i)*second, streams[n].own
			o = about(e, o)
			pending[n] = append(pending[n], o)
			switch {
			case o.Refresh:
			case success(o, e):
				row[e], failed[e] = row[e]+1, false
			default:
				row[e], failed[e] = 0, failed[e] || o.Event != NoAnswer
			}
		}
		for slices.ContainsFunc(pending, func(left []Outcome) bool { return len(left) > 0 }) {
			n := rapid.IntRange(0, len(streams)-1).Draw(t, "next")
			if len(pending[n]) > 0 {
				tracker.Observe(pending[n][0])
				pending[n] = pending[n][1:]
			}
		}
		for e, got := range tracker.Evidence() {
			if got.FreshUntil != 0 {
				fresh++
			}
			if got.FreshUntil != 0 && row[e] < threshold {
				t.Errorf("%s: fresh after %d successes in a row, want %d: %+v", e, row[e], threshold, got)
			}
			if got.TrafficUntil != 0 && failed[e] {
				t.Errorf("%s: traffic vouches for it after an error: %+v", e, got)
			}
		}
	})
	if fresh == 0 && !testing.Short() {
		t.Error("nothing was ever fresh")
	}
}

// Nor do they hide a prober's connection that was not answered, or a failure that no outcome tells of.
func TestOwnRequestsHideNoUnseenFailure(t *testing.T) {
	tcp := Endpoint{Port: 80, Kind: TCP}
	for name, fails := range map[string]func(*Tracker) []Change{
		"unanswered": func(t *Tracker) []Change { return t.Unanswered(80, 1003*second, 1010*second) },
		"void":       func(t *Tracker) []Change { return t.Void(func(Endpoint) bool { return true }, 1004*second) },
	} {
		tracker := track(t, httpProbe(Readiness, "/x"), tcpProbe(Readiness))
		tracker.Observe(after(2, x, Answered, 200))
		tracker.Observe(after(2, tcp, Connected, 0))
		own := after(6, x, Answered, 200) // renews what is known of TCP, too
		own.Refresh = true
		tracker.Observe(own)
		fails(tracker)
		for e, got := range tracker.Evidence() {
			if got.FreshUntil != 0 {
				t.Errorf("%s, %s: still fresh: %+v", name, e, got)
			}
		}
	}
}

// A success of the daemon's own between two timeouts does not end what traffic vouches for.
func TestOwnSuccessKeepsTraffic(t *testing.T) {
	tracker := byTraffic(t, httpProbe(Liveness, "/x"))
	tracker.Observe(after(20, x, Answered, 200))
	timeout := after(31, x, NoAnswer, 0)
	timeout.Duration = time.Second
	tracker.Observe(timeout)
	until := tracker.Evidence()[x].TrafficUntil
	own := after(32, x, Answered, 200)
	own.Refresh = true
	tracker.Observe(own)
	if got := tracker.Evidence()[x]; until == 0 || got.TrafficUntil != until || got.FreshUntil != 0 {
		t.Errorf("got %+v, want traffic to vouch until %d, and no more", got, until)
	}
}

// Evidence that outlived a tracker is not voided by connections that were unanswered before it.
func TestRestoredEvidenceIsNewerThanOldConnections(t *testing.T) {
	tracker := track(t, httpProbe(Readiness, "/x"))
	tracker.Restore(x, Evidence{Result: Success, ObservedAt: 990 * second, FreshUntil: 1001 * second}, 1000*second)
	if changes := tracker.Unanswered(80, 975*second, 1000*second); changes != nil {
		t.Errorf("an earlier connection: %+v", changes)
	}
	if changes := tracker.Unanswered(80, 995*second, 1000*second); len(changes) != 1 || changes[0].To.Result != Failure {
		t.Errorf("a later connection: %+v", changes)
	}
}

// Successes of the time during which an endpoint was barred do not count: others may have asked for them.
func TestBarredSuccessesDoNotCount(t *testing.T) {
	probe := httpProbe(Readiness, "/x")
	probe.SuccessThreshold = 2
	specs, barred := endpoints(t, probe), endpoints(t, probe)
	Bar(barred, 0, Reason{ReasonBeside, "x"})
	tracker := NewTracker()
	tracker.SetEndpoints(barred, 1000*second)
	for s := range uint64(5) {
		tracker.Observe(after(1+s, x, Answered, 200))
	}
	tracker.SetEndpoints(specs, 1006*second)
	for n, want := range []bool{false, true} {
		tracker.Observe(after(7+uint64(n), x, Answered, 200))
		if fresh := tracker.Evidence()[x].FreshUntil != 0; fresh != want {
			t.Errorf("after %d successes since the bar was lifted: fresh: %t", n+1, fresh)
		}
	}
}

// checkChanges checks that every change is reported, and nothing else. Endpoints that are no longer asked are not
// reported.
func checkChanges(t *rapid.T, changes []Change, before, after map[Endpoint]Evidence) {
	reported := map[Endpoint]bool{}
	for _, c := range changes {
		reported[c.Endpoint] = true
		if c.From != before[c.Endpoint] || c.To != after[c.Endpoint] || c.Cause == "" {
			t.Fatalf("reported %+v, was %+v, is %+v", c, before[c.Endpoint], after[c.Endpoint])
		}
	}
	for e, evidence := range after {
		if evidence != before[e] && !reported[e] {
			t.Fatalf("%s: unreported change from %+v to %+v", e, before[e], evidence)
		}
	}
}

func checkEvidence(t *rapid.T, e Endpoint, got Evidence, staleness uint64, successes map[uint64]bool, failed uint64) {
	if (got.TrafficWindow == 0) != (got.TrafficUntil == 0) {
		t.Fatalf("%s: %+v", e, got)
	}
	if got.FreshUntil == 0 && got.TrafficUntil == 0 {
		return
	}
	if got.Result != Success || !successes[got.ObservedAt] {
		t.Fatalf("%s: fresh without an observed success: %+v", e, got)
	}
	if got.FreshUntil > got.ObservedAt+staleness {
		t.Fatalf("%s: fresh for longer than %d: %+v", e, staleness, got)
	}
	if failed != 0 && got.ObservedAt <= failed {
		t.Fatalf("%s: fresh after a failure at %d: %+v", e, failed, got)
	}
}

// drawProbes draws the probes of one port: what they ask, of which container, and at which host.
func drawProbes(t *rapid.T) []Spec {
	var probes []Spec
	for i := range rapid.IntRange(1, 5).Draw(t, "probes") {
		s := httpProbe(rapid.SampledFrom([]Type{Readiness, Liveness, Startup}).Draw(t, "type"), "")
		s.Container = string(rune('a' + i))
		s.Kind = rapid.SampledFrom([]Kind{HTTP, HTTP, TCP, TCP, HTTPS, GRPC}).Draw(t, "kind")
		if s.Kind == HTTP {
			s.Path = rapid.SampledFrom([]string{"/x", "/y", "/" + longPath}).Draw(t, "path")
		}
		s.Host = rapid.SampledFrom([]string{"", "", "", "", "h.example", "fd00::7", "10.9.9.9"}).Draw(t, "host")
		s.Period = time.Duration(rapid.IntRange(1, 30).Draw(t, "period")) * time.Second
		probes = append(probes, s)
	}
	return probes
}

var longPath = strings.Repeat("x", limits.Request)

// TestGateInvariants: a port is open if and only if one of its endpoints can be answered; with a TCP probe, if and only
// if that one can be, because taking the connection answers it.
func TestGateInvariants(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		probes := drawProbes(rt)
		tracker := NewTracker()
		tracker.SetEndpoints(endpoints(t, probes...), 1000*second)
		for range rapid.IntRange(0, 20).Draw(rt, "outcomes") {
			tracker.Observe(drawOutcome(rt))
			checkAddresses(rt, tracker, probes)
			for now := 2000 * second; now < 2120*second; now += second / 2 {
				checkGate(rt, tracker, probes, now)
			}
		}
	})
}

func checkGate(t *rapid.T, tracker *Tracker, probes []Spec, now uint64) {
	const port = 80
	gate, evidence := tracker.Gates()[port], tracker.Evidence()
	var newest uint64
	answerable := false
	for _, s := range tracker.Endpoints() {
		e := evidence[s.Endpoint]
		if s.Observed && s.Reason.Text == "" && e.Result == Success && e.FreshUntil != 0 {
			answerable = answerable || now < e.FreshUntil
			newest = max(newest, e.ObservedAt)
		}
	}
	open := now < gate.FreshUntil
	tcp := Endpoint{Port: port, Kind: TCP}
	ofTCP := Gate{ObservedAt: evidence[tcp].ObservedAt, FreshUntil: evidence[tcp].FreshUntil}
	switch asked, elsewhere := askedByTCP(probes); {
	case elsewhere && open:
		t.Fatalf("%+v is open, so a TCP probe of another address would be answered", gate)
	case elsewhere:
	case asked && open != (evidence[tcp].Result == Success && now < ofTCP.FreshUntil):
		t.Fatalf("%+v at %d, but TCP is %+v", gate, now, evidence[tcp])
	case asked && gate.FreshUntil != 0 && gate != ofTCP:
		t.Fatalf("%+v is not the gate of TCP, %+v", gate, evidence[tcp])
	case !asked && open != answerable:
		t.Fatalf("%+v at %d, of %+v", gate, now, evidence)
	case !asked && gate.ObservedAt != newest:
		t.Fatalf("%+v, but the newest evidence is from %d", gate, newest)
	}
}

// checkAddresses checks that the port is closed if taking its connections would answer a TCP probe of another address of
// the pod, which is not observed.
func checkAddresses(t *rapid.T, tracker *Tracker, probes []Spec) {
	for _, s := range probes {
		known := tracker.Evidence()[Endpoint{Port: s.Port, Kind: TCP}]
		if s.Kind == TCP && (s.Host == "h.example" || s.Host == "fd00::7") && known.FreshUntil != 0 {
			t.Fatalf("%+v would be answered with %+v", s, known)
		}
	}
}

// askedByTCP reports whether a TCP probe that outlives the startup asks the pod, and whether one may reach the pod by
// another address or name.
func askedByTCP(probes []Spec) (asked, elsewhere bool) {
	for _, s := range probes {
		if s.Kind == TCP {
			asked = asked || s.Host == "" && s.Type != Startup
			elsewhere = elsewhere || s.Host == "h.example" || s.Host == "fd00::7"
		}
	}
	return asked, elsewhere
}
