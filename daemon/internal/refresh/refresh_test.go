package refresh

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/probe"
)

func now() uint64 { return uint64(time.Now().UnixNano()) }

// listen serves each connection on loopback, in a goroutine of its own.
func listen(t *testing.T, serve func(net.Conn)) netip.AddrPort {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close() //nolint:errcheck // a test's
				serve(conn)
			}()
		}
	}()
	return netip.MustParseAddrPort(listener.Addr().String())
}

func target(at netip.AddrPort, path string) Target {
	t := Target{
		Endpoint: probe.Endpoint{Port: at.Port(), Kind: probe.HTTP, Path: path}, Address: at.Addr(),
		Timeout: 30 * time.Second, Interval: 10 * time.Millisecond, Keep: time.Hour,
	}
	if path == "" {
		t.Endpoint.Kind = probe.TCP
	}
	return t
}

func askOnce(t *testing.T, target Target) probe.Outcome {
	t.Helper()
	a := asker{Target: target, now: now, dial: (&net.Dialer{}).DialContext}
	defer a.close()
	return a.ask(t.Context())
}

func serveHTTP(handler http.HandlerFunc) func(net.Conn) {
	return func(conn net.Conn) {
		for r := bufio.NewReader(conn); ; {
			request, err := http.ReadRequest(r)
			if err != nil {
				return
			}
			recorder := &response{header: http.Header{}}
			handler(recorder, request)
			if recorder.write(conn) != nil {
				return
			}
		}
	}
}

// response is what a handler answers with, sent as HTTP/1.1.
type response struct {
	header http.Header
	status int
	body   strings.Builder
}

func (r *response) Header() http.Header         { return r.header }
func (r *response) WriteHeader(status int)      { r.status = status }
func (r *response) Write(p []byte) (int, error) { return r.body.Write(p) }

func (r *response) write(w io.Writer) error {
	answer := http.Response{
		StatusCode: max(r.status, 200), ProtoMajor: 1, ProtoMinor: 1, Header: r.header,
		ContentLength: int64(r.body.Len()), Body: io.NopCloser(strings.NewReader(r.body.String())),
	}
	return answer.Write(w)
}

func TestOutcome(t *testing.T) {
	released := make(chan struct{})
	defer close(released)
	says := func(text string) func(net.Conn) {
		return func(conn net.Conn) {
			if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
				_, _ = io.WriteString(conn, text)
			}
		}
	}
	body := strings.Repeat("x", 1<<20)
	const brief = 50 * time.Millisecond
	for name, test := range map[string]struct {
		serve   func(net.Conn)
		timeout time.Duration // 0: ample
		event   probe.Event
		status  int
	}{
		"200":            {says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"), 0, probe.Answered, 200},
		"HTTP/1.0":       {says("HTTP/1.0 204\r\n\r\n"), 0, probe.Answered, 204},
		"interim":        {says("HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), 0, probe.Answered, 200},
		"redirect":       {says("HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"), 0, probe.Answered, 302},
		"error":          {says("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"), 0, probe.Answered, 503},
		"long body":      {says(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)), 0, probe.Answered, 200},
		"too short body": {says("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok"), 0, probe.Failed, 0},
		"no HTTP":        {says("220 mail.example ESMTP\r\n"), 0, probe.Failed, 0},
		"closed":         {says(""), 0, probe.Failed, 0},
		"reset": {func(conn net.Conn) {
			says("")(conn)
			_ = conn.(*net.TCPConn).SetLinger(0)
		}, 0, probe.Reset, 0},
		"hangs": {func(net.Conn) { <-released }, brief, probe.NoAnswer, 0},
		"endless body": {func(conn net.Conn) {
			says("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok")(conn)
			<-released
		}, brief, probe.NoAnswer, 0},
	} {
		t.Run(name, func(t *testing.T) {
			asked := target(listen(t, test.serve), "/x")
			if test.timeout != 0 {
				asked.Timeout = test.timeout
			}
			got := askOnce(t, asked)
			if got.Event != test.event || got.Status != test.status || got.Endpoint != asked.Endpoint || !got.Refresh {
				t.Errorf("got %+v, want event %d, status %d", got, test.event, test.status)
			}
			if test.event == probe.NoAnswer && got.Duration < test.timeout {
				t.Errorf("no answer after %s, before the timeout", got.Duration)
			}
		})
	}
}

func TestOutcomeOfTCP(t *testing.T) {
	closed := make(chan error, 1)
	at := listen(t, func(conn net.Conn) {
		_, err := conn.Read(make([]byte, 1))
		closed <- err
	})
	if got := askOnce(t, target(at, "")); got.Event != probe.Connected || got.Endpoint != (probe.Endpoint{Port: at.Port(), Kind: probe.TCP}) {
		t.Errorf("got %+v, want connected", got)
	}
	if err := <-closed; err == nil {
		t.Error("something was sent")
	}
}

func TestRefused(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := netip.MustParseAddrPort(listener.Addr().String())
	_ = listener.Close()
	for _, path := range []string{"", "/x"} {
		asked := target(at, path)
		if got := askOnce(t, asked); got.Event != probe.Reset || got.Endpoint != asked.Endpoint {
			t.Errorf("%q: got %+v, want a reset", path, got)
		}
	}
}

func TestRequestIsTheKubelets(t *testing.T) {
	for name, test := range map[string]struct {
		path    string
		headers []probe.Header
		want    string // HOST stands for address and port
	}{
		"plain": {"/a%20b?x=1", nil, "GET /a%20b?x=1 HTTP/1.1|Host: HOST|User-Agent: kube-probe/probelet|Accept: */*"},
		"own": {"/", []probe.Header{{Name: "x-a", Value: "1"}, {Name: "Host", Value: "web.example"}, {Name: "X-A", Value: "2"}},
			"GET / HTTP/1.1|Host: web.example|User-Agent: kube-probe/probelet|Accept: */*|X-A: 1|X-A: 2"},
		"left out": {"/", []probe.Header{{Name: "Accept", Value: ""}, {Name: "User-Agent", Value: ""}}, "GET / HTTP/1.1|Host: HOST"},
		"replaced": {"/", []probe.Header{{Name: "accept", Value: "text/plain"}, {Name: "user-agent", Value: "me"}},
			"GET / HTTP/1.1|Host: HOST|User-Agent: me|Accept: text/plain"},
	} {
		t.Run(name, func(t *testing.T) {
			got := make(chan string, 1)
			at := listen(t, func(conn net.Conn) {
				var lines []string
				for r := bufio.NewScanner(conn); r.Scan() && r.Text() != ""; {
					lines = append(lines, r.Text())
				}
				got <- strings.Join(lines, "|")
			})
			asked := target(at, test.path)
			asked.Headers = test.headers
			askOnce(t, asked)
			if want := strings.ReplaceAll(test.want, "HOST", at.String()); <-got != want {
				t.Errorf("asked other than %s", want)
			}
		})
	}
}

// A pod that accepts no connection any more may go on answering on those it has. That is nothing new, and in time the
// connection is renewed, and the truth comes out.
func TestKeptConnectionProvesNothingNew(t *testing.T) {
	released := make(chan struct{})
	defer close(released)
	var connections, requests atomic.Int32
	at := listen(t, func(conn net.Conn) {
		if connections.Add(1) > 1 {
			<-released
			return
		}
		serveHTTP(func(http.ResponseWriter, *http.Request) { requests.Add(1) })(conn)
	})
	a := asker{Target: target(at, "/x"), now: now, dial: (&net.Dialer{}).DialContext}
	defer a.close()
	first := a.ask(t.Context())
	second := a.ask(t.Context())
	if first.Event != probe.Answered || second.Event != probe.Answered || connections.Load() != 1 || requests.Load() != 2 {
		t.Fatalf("%+v and %+v by %d connections", first, second, connections.Load())
	}
	if second.ConnectedAt != first.ConnectedAt || first.ConnectedAt == 0 || second.ConnectedAt > second.ObservedAt-uint64(second.Duration) {
		t.Fatalf("connected at %d, then %d", first.ConnectedAt, second.ConnectedAt)
	}
	a.Keep, a.Timeout = 0, 50*time.Millisecond
	if third := a.ask(t.Context()); third.Event != probe.NoAnswer || third.ConnectedAt != 0 {
		t.Fatalf("the new connection: %+v", third)
	}
}

// The server may close what was kept, at any moment: then another connection is opened.
func TestClosedConnectionIsNoFailure(t *testing.T) {
	var connections atomic.Int32
	at := listen(t, func(conn net.Conn) {
		connections.Add(1)
		if _, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		}
	})
	a := asker{Target: target(at, "/x"), now: now, dial: (&net.Dialer{}).DialContext}
	defer a.close()
	var last uint64
	for range 50 {
		o := a.ask(t.Context())
		if o.Event != probe.Answered || o.ConnectedAt <= last {
			t.Fatalf("got %+v; the last connection was of %d", o, last)
		}
		last = o.ConnectedAt
	}
	if connections.Load() != 50 {
		t.Fatalf("%d connections", connections.Load())
	}
}

var pod = attach.ID{ContainerID: "c", IfName: "eth0"}

func TestOnlySoManyAtATime(t *testing.T) {
	const most = 3
	var active, highest atomic.Int32
	at := listen(t, serveHTTP(func(http.ResponseWriter, *http.Request) {
		n := active.Add(1)
		for was := highest.Load(); n > was && !highest.CompareAndSwap(was, n); was = highest.Load() {
		}
		time.Sleep(time.Millisecond)
		active.Add(-1)
	}))
	r := New((&net.Dialer{}).DialContext, now, most)
	defer r.Close()
	var targets []Target
	for i := range 20 {
		targets = append(targets, target(at, fmt.Sprintf("/%d", i)))
	}
	r.Set(pod, targets)
	asked := map[probe.Endpoint]bool{}
	for len(asked) < len(targets) {
		o := <-r.C
		if o.Attachment != pod || o.Event != probe.Answered {
			t.Fatalf("got %+v", o)
		}
		asked[o.Endpoint] = true
	}
	if highest.Load() > most {
		t.Errorf("%d at a time, want at most %d", highest.Load(), most)
	}
}

func TestSet(t *testing.T) {
	at := listen(t, serveHTTP(func(http.ResponseWriter, *http.Request) {}))
	r := New((&net.Dialer{}).DialContext, now, 4)
	defer r.Close()
	x, y := target(at, "/x"), target(at, "/y")
	r.Set(pod, []Target{x, y})
	before := r.running[pod][x.Endpoint].stop
	changed := y
	changed.Interval = 20 * time.Millisecond
	r.Set(pod, []Target{x, changed})
	if got := len(r.running[pod]); got != 2 || before == nil {
		t.Fatalf("%d are asked", got)
	}
	r.Set(pod, []Target{changed})
	// One that was just being asked may still tell.
	for seen := 0; seen < 5; {
		if o := <-r.C; o.Endpoint == changed.Endpoint {
			seen++
		}
	}
	for range 5 {
		if o := <-r.C; o.Endpoint != changed.Endpoint {
			t.Fatalf("asked %s, which it was told not to", o.Endpoint)
		}
	}
	r.Set(pod, nil)
	if len(r.running) != 0 {
		t.Fatalf("left %v", r.running)
	}
}

// With whatever staleness, a pod that is well is fresh at every moment, and a connection is opened no more often than
// that takes.
func TestAlwaysFresh(t *testing.T) {
	for text, connections := range map[string]int{"0.5": 300, "1": 300, "1+timeout": 150, "2+timeout": 60, "5+timeout": 25} {
		t.Run(text, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { alwaysFresh(t, text, connections) })
		})
	}
}

func alwaysFresh(t *testing.T, staleness string, mostConnections int) {
	const period, timeout, tookToAnswer = 10 * time.Second, time.Second, 300 * time.Millisecond
	defaults := probe.NewDefaults()
	defaults.Refresh.On = true
	settings := defaults.Settings(map[string]string{probe.AnnotationStaleness: staleness})
	specs, err := probe.Endpoints(probe.Pod{Probes: []probe.Spec{{
		Container: "c", Type: probe.Readiness, Kind: probe.HTTP, Port: 80, Path: "/x", Period: period, Timeout: timeout,
	}}}, settings, probe.Limits{Path: 255, Request: 1024, Records: 64})
	if err != nil || settings.Problem != "" {
		t.Fatal(err, settings.Problem)
	}
	tracker := probe.NewTracker()
	tracker.SetEndpoints(specs, now()-1)
	endpoint := specs[0].Endpoint
	tracker.Observe(probe.Outcome{Endpoint: endpoint, Event: probe.Answered, Status: 200, ObservedAt: now()})

	opened := 0
	r := New(func(context.Context, string, string) (net.Conn, error) {
		opened++
		ours, theirs := net.Pipe()
		go serveHTTP(func(http.ResponseWriter, *http.Request) { time.Sleep(tookToAnswer) })(theirs)
		return ours, nil
	}, now, 1)
	defer func() {
		r.Close()
		time.Sleep(time.Minute) // for what was under way to end
	}()
	r.Set(pod, []Target{TargetOf(specs[0], netip.MustParseAddr("192.0.2.1"))})
	for end := time.After(10 * time.Minute); ; {
		var o Outcome
		select {
		case <-end:
			if opened > mostConnections {
				t.Fatalf("%d connections, want at most %d", opened, mostConnections)
			}
			return
		case o = <-r.C:
		}
		if known := tracker.Evidence()[endpoint]; known.FreshUntil <= now() {
			t.Fatalf("expired %s ago", time.Duration(now()-known.FreshUntil))
		}
		tracker.Observe(o.Outcome)
	}
}
