package refresh

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"syscall"
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
		Request:  []byte("GET " + path + " HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"),
		Question: probe.Question{Hash: 7, Check: 8},
		Timeout:  30 * time.Second, Interval: 10 * time.Millisecond,
	}
	if path == "" {
		t.Endpoint.Kind, t.Request, t.Question = probe.TCP, nil, probe.Question{}
	}
	return t
}

func askOnce(t *testing.T, target Target) (o probe.Outcome, known bool) {
	t.Helper()
	r := New((&net.Dialer{}).DialContext, now, 1)
	defer r.Close()
	return r.ask(t.Context(), target)
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
		event   probe.Event   // 0: no observation
		status  int
	}{
		"200":            {says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"), 0, probe.Answered, 200},
		"HTTP/1.0":       {says("HTTP/1.0 204\r\n\r\n"), 0, probe.Answered, 204},
		"until it ends":  {says("HTTP/1.1 200 OK\r\n\r\nok"), 0, probe.Answered, 200},
		"interim":        {says("HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"), 0, probe.Answered, 200},
		"redirect":       {says("HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n"), 0, probe.Answered, 302},
		"error":          {says("HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"), 0, probe.Answered, 503},
		"long body":      {says(fmt.Sprintf("HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s", len(body), body)), 0, probe.Answered, 200},
		"long headers":   {says("HTTP/1.1 200 OK\r\nX: " + body + "\r\nContent-Length: 0\r\n\r\n"), 0, 0, 0},
		"one of ours":    {says("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nCache-Status: probelet; hit\r\n\r\n"), 0, 0, 0},
		"too short body": {says("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok"), 0, probe.Failed, 0},
		"no HTTP":        {says("220 mail.example ESMTP\r\n"), 0, probe.Failed, 0},
		"closed":         {says(""), 0, probe.Failed, 0},
		"stays open": {func(conn net.Conn) {
			says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")(conn)
			<-released
		}, 0, probe.Answered, 200},
		"piecemeal": {func(conn net.Conn) {
			for _, b := range []byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") {
				_, _ = conn.Write([]byte{b})
			}
			<-released
		}, 0, probe.Answered, 200},
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
			got, known := askOnce(t, asked)
			if known != (test.event != 0) {
				t.Fatalf("got %+v, known: %t", got, known)
			}
			if !known {
				return
			}
			if got.Event != test.event || got.Status != test.status {
				t.Errorf("got %+v, want event %d, status %d", got, test.event, test.status)
			}
			if got.Kind != probe.HTTP || got.Port != asked.Endpoint.Port || got.Request.Path != "/x" || got.Question != asked.Question ||
				!bytes.Equal(got.Text, asked.Request) || !got.Refresh {
				t.Errorf("got %+v, which is not about what was asked", got)
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
	if got, known := askOnce(t, target(at, "")); !known || got.Event != probe.Connected || got.Port != at.Port() || got.Kind != probe.TCP {
		t.Errorf("got %+v, want connected", got)
	}
	if err := <-closed; err == nil {
		t.Error("something was sent")
	}
}

// What kept the daemon from asking says nothing of the pod.
func TestNotAsked(t *testing.T) {
	for _, path := range []string{"", "/x"} {
		r := New(func(context.Context, string, string) (net.Conn, error) {
			return nil, fmt.Errorf("no more files: %w", ErrNotAsked)
		}, now, 1)
		if got, known := r.ask(t.Context(), target(netip.MustParseAddrPort("127.0.0.1:9"), path)); known {
			t.Errorf("%q: got %+v", path, got)
		}
		r.Close()
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
		if got, known := askOnce(t, target(at, path)); !known || got.Event != probe.Reset || got.Port != at.Port() {
			t.Errorf("%q: got %+v, want a reset", path, got)
		}
	}
}

// Each request goes over a connection of its own: a pod that accepts none any more may go on answering on those it has.
func TestRequestIsSentAsItIs(t *testing.T) {
	received, ended := make(chan string, 2), make(chan error, 2)
	at := listen(t, func(conn net.Conn) {
		var text []byte
		for b := make([]byte, 1); !bytes.HasSuffix(text, []byte("\r\n\r\n")); text = append(text, b...) {
			if _, err := conn.Read(b); err != nil {
				break
			}
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
		received <- string(text)
		_, err := io.Copy(io.Discard, conn)
		ended <- err
	})
	asked := target(at, "/x")
	asked.Request = []byte("GET /x HTTP/1.1\r\nhost:h\r\nX-a: 1\r\nx-A:  2\r\nConnection: close\r\n\r\n")
	for range 2 {
		if got, known := askOnce(t, asked); !known || got.Event != probe.Answered {
			t.Fatalf("got %+v", got)
		}
		if text := <-received; text != string(asked.Request) {
			t.Errorf("sent %q", text)
		}
		if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("the connection ended with %v, and left a TIME_WAIT", err)
		}
	}
}

func TestWithoutRequestNothingIsAsked(t *testing.T) {
	at := listen(t, func(net.Conn) { t.Error("connected") })
	asked := target(at, "/x")
	asked.Request = nil
	if got, known := askOnce(t, asked); known {
		t.Errorf("got %+v", got)
	}
}

// What fails because it is given up says nothing of the pod.
func TestGivenUpIsNoFailure(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	at := listen(t, func(conn net.Conn) {
		cancel()
		_, _ = io.Copy(io.Discard, conn)
	})
	r := New((&net.Dialer{}).DialContext, now, 1)
	defer r.Close()
	if got, known := r.ask(ctx, target(at, "/x")); known {
		t.Errorf("got %+v", got)
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
	asked := map[string]bool{}
	for len(asked) < len(targets) {
		o := <-r.C
		if o.Attachment != pod || o.Event != probe.Answered {
			t.Fatalf("got %+v", o)
		}
		asked[o.Request.Path] = true
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
		if o := <-r.C; o.Request.Path == "/y" {
			seen++
		}
	}
	for range 5 {
		if o := <-r.C; o.Request.Path != "/y" {
			t.Fatalf("asked %s, which it was told not to", o.Request.Path)
		}
	}
	r.Set(pod, nil)
	if len(r.running) != 0 {
		t.Fatalf("left %v", r.running)
	}
}

// What says nothing is not told, and asked again.
func TestNothingIsNotTold(t *testing.T) {
	var asked atomic.Int32
	at := listen(t, serveHTTP(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ours" {
			asked.Add(1)
			w.Header().Set("Cache-Status", "probelet; hit")
		}
	}))
	r := New((&net.Dialer{}).DialContext, now, 4)
	defer r.Close()
	r.Set(pod, []Target{target(at, "/ours"), target(at, "/x")})
	for asked.Load() < 3 {
		if o := <-r.C; o.Request.Path != "/x" {
			t.Fatalf("got %+v", o)
		}
	}
}

// A pod that is well is fresh at every moment, whatever the staleness.
func TestAlwaysFresh(t *testing.T) {
	for _, staleness := range []string{"0.5", "1", "2", "5"} {
		t.Run(staleness, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) { alwaysFresh(t, staleness) })
		})
	}
}

func alwaysFresh(t *testing.T, staleness string) {
	const period, timeout, tookToAnswer = 10 * time.Second, time.Second, 300 * time.Millisecond
	defaults := probe.NewDefaults()
	defaults.Refresh.On = true
	settings := defaults.Settings(map[string]string{probe.AnnotationStaleness: staleness})
	specs, err := probe.Endpoints(probe.Pod{IPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Probes: []probe.Spec{{
		Container: "c", Type: probe.Readiness, Kind: probe.HTTP, Port: 80, Path: "/x", Period: period, Timeout: timeout,
	}}}, settings, probe.Limits{Request: 1024, Records: 64})
	if err != nil || settings.Problem != "" {
		t.Fatal(err, settings.Problem)
	}
	spec := specs[0]
	began := now()
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
	asked := target(netip.MustParseAddrPort("192.0.2.1:80"), "/x")
	asked.Timeout, asked.Interval = spec.Timeout, spec.Refresh
	r.Set(pod, []Target{asked})
	const length = 10 * time.Minute
	for freshUntil := began + uint64(spec.Staleness); now()-began < uint64(length); {
		o := <-r.C
		if freshUntil <= now() {
			t.Fatalf("expired %s ago", time.Duration(now()-freshUntil))
		}
		freshUntil = o.ObservedAt - uint64(o.Duration) + uint64(spec.Staleness)
	}
	if most := int(length/(spec.Refresh*4/5)) + 2; opened > most {
		t.Errorf("%d connections, want at most %d", opened, most)
	}
}
