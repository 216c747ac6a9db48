package refresh

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/internal/polltest"
)

func now() uint64 { return uint64(time.Now().UnixNano()) }

// listen serves each connection on loopback in a goroutine of its own.
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
		Timeout:  30 * time.Second, Interval: 100 * time.Millisecond,
	}
	if path == "" {
		t.Endpoint.Kind, t.Request, t.Question = probe.TCP, nil, probe.Question{}
	}
	return t
}

// plain opens ordinary sockets, and counts how many were opened and settled.
type plain struct {
	err             error
	opened, settled atomic.Int64
}

func (p *plain) Open(family int) (fd int, cookie uint64, err error) {
	if p.err != nil {
		return 0, 0, p.err
	}
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	return fd, uint64(p.opened.Add(1)), err
}

func (p *plain) Done(uint64) { p.settled.Add(1) }

func newRefresher(t *testing.T, sockets Sockets) *Refresher {
	t.Helper()
	r, err := New(sockets, now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	return r
}

// outcomes calls f for each outcome until it returns false.
func outcomes(r *Refresher, f func(Outcome) bool) {
	for range r.C {
		for _, o := range r.Take() {
			if !f(o) {
				return
			}
		}
	}
}

// askOnce returns the first outcome; none if the target was asked twice without an outcome.
func askOnce(t *testing.T, asked Target) (o probe.Outcome, known bool) {
	t.Helper()
	sockets := &plain{}
	r := newRefresher(t, sockets)
	r.Set(podID, []Target{asked})
	for sockets.opened.Load() < 2 {
		select {
		case <-r.C:
			r.Set(podID, nil)
			return r.Take()[0].Outcome, true
		case <-time.After(time.Millisecond):
		}
	}
	return o, false
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

// response is the response of a handler, sent as HTTP/1.1.
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
	chunks := "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + strings.Repeat("800\r\n"+body[:2048]+"\r\n", 5) // as much as the kubelet reads
	for name, test := range map[string]struct {
		serve   func(net.Conn)
		timeout time.Duration // 0 for an ample one
		event   probe.Event   // 0 for no outcome
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
		"not HTTP":       {says("220 mail.example ESMTP\r\n"), 0, probe.Failed, 0},
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
		"whole, then reset": {func(conn net.Conn) {
			says("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")(conn)
			_ = conn.(*net.TCPConn).SetLinger(0)
		}, 0, probe.Answered, 200},
		"cut short by a reset": {func(conn net.Conn) {
			says("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nok")(conn)
			_ = conn.(*net.TCPConn).SetLinger(0)
		}, 0, probe.Reset, 0},
		"chunks, with a pause": {func(conn net.Conn) {
			says(strings.TrimSuffix(chunks, "\r\n"))(conn)
			time.Sleep(20 * time.Millisecond)
			_, _ = io.WriteString(conn, "\r\n5\r\nhello\r\n0\r\n\r\n")
		}, 0, probe.Answered, 200},
		"chunks, without an end": {func(conn net.Conn) {
			says(chunks)(conn)
			<-released
		}, brief, 0, 0},
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
				t.Errorf("got %+v, which does not match the request", got)
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
		t.Error("data was sent")
	}
}

func TestEveryObservableKindIsAsked(t *testing.T) {
	at := listen(t, func(conn net.Conn) {
		_, _ = conn.Read(make([]byte, 1024))
		_, _ = conn.Write([]byte("HTTP/1.1 204 No Content\r\n\r\n"))
	})
	targets := map[probe.Kind]Target{}
	for _, path := range []string{"", "/x"} {
		target := target(at, path)
		targets[target.Endpoint.Kind] = target
	}
	for _, k := range probe.Kinds() {
		if _, ok := targets[k]; ok != k.Observable() {
			t.Errorf("there is a target of kind %s: %t; the kind is observable: %t", k, ok, k.Observable())
		}
	}
	for k, target := range targets {
		if got, known := askOnce(t, target); !known || got.Kind != k || got.Event != probe.Connected && got.Event != probe.Answered {
			t.Errorf("%s: got %+v", k, got)
		}
	}
}

// Local errors that prevent a request say nothing about the pod.
func TestLocalErrorsAreNotReported(t *testing.T) {
	for _, path := range []string{"", "/x"} {
		r := newRefresher(t, &plain{err: errors.New("no more files")})
		r.Set(podID, []Target{target(netip.MustParseAddrPort("127.0.0.1:9"), path)})
		for range 3 {
			time.Sleep(50 * time.Millisecond)
			if got := r.Take(); len(got) > 0 {
				t.Errorf("%q: got %+v", path, got)
			}
		}
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

// Each request uses a connection of its own: a pod that no longer accepts connections may still answer on existing ones.
func TestRequestIsSentUnchanged(t *testing.T) {
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
			t.Errorf("the connection ended with %v and left a TIME_WAIT", err)
		}
	}
}

func TestWithoutRequestNothingIsAsked(t *testing.T) {
	at := listen(t, func(net.Conn) {})
	sockets := &plain{}
	r := newRefresher(t, sockets)
	none, some := target(at, "/none"), target(at, "")
	none.Request = nil
	r.Set(podID, []Target{none, some})
	n := 0
	outcomes(r, func(o Outcome) bool {
		if o.Kind != probe.TCP {
			t.Errorf("got %+v", o)
		}
		n++
		return n < 5
	})
}

var podID = attach.ID{ContainerID: "c", IfName: "eth0"}

// A request whose target is withdrawn has no outcome, and its connection is closed.
func TestWithdrawn(t *testing.T) {
	connected, ended := make(chan bool, 1), make(chan error, 1)
	at := listen(t, func(conn net.Conn) {
		connected <- true
		_, err := io.Copy(io.Discard, conn)
		ended <- err
	})
	r := newRefresher(t, &plain{})
	r.Set(podID, []Target{target(at, "/x")})
	<-connected
	r.Set(podID, nil)
	if err := <-ended; !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the connection ended with %v", err)
	}
	if got := r.Take(); len(got) > 0 {
		t.Errorf("got %+v", got)
	}
	if len(r.open) != 0 || len(r.schedule.pods) != 0 || len(r.schedule.due) != 0 {
		t.Errorf("left over: %v, %v", r.open, r.schedule)
	}
}

func TestSet(t *testing.T) {
	at := listen(t, serveHTTP(func(http.ResponseWriter, *http.Request) {}))
	r := newRefresher(t, &plain{})
	x, y := target(at, "/x"), target(at, "/y")
	r.Set(podID, []Target{x, y})
	before := r.schedule.pods[podID].jobs[x.Endpoint]
	changed := y
	changed.Interval = 120 * time.Millisecond
	r.Set(podID, []Target{x, changed})
	if jobs := r.schedule.pods[podID].jobs; len(jobs) != 2 || jobs[x.Endpoint] != before {
		t.Fatalf("asked: %v", jobs)
	}
	r.Set(podID, []Target{changed})
	r.Take()
	n := 0
	outcomes(r, func(o Outcome) bool {
		if o.Request.Path != "/y" {
			t.Errorf("asked %s, which is no longer a target", o.Request.Path)
		}
		n++
		return n < 5
	})
}

// An inconclusive reply is not reported, and the endpoint is asked again.
func TestInconclusiveReplyIsNotReported(t *testing.T) {
	var asked atomic.Int32
	at := listen(t, serveHTTP(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/ours" {
			asked.Add(1)
			w.Header().Set("Cache-Status", "probelet; hit")
		}
	}))
	r := newRefresher(t, &plain{})
	r.Set(podID, []Target{target(at, "/ours"), target(at, "/x")})
	outcomes(r, func(o Outcome) bool {
		if o.Request.Path != "/x" {
			t.Errorf("got %+v", o)
		}
		return asked.Load() < 3
	})
}

// Each socket is settled once, and all are closed.
func TestSocketsAreSettled(t *testing.T) {
	at := listen(t, serveHTTP(func(http.ResponseWriter, *http.Request) {}))
	sockets := &plain{}
	r := newRefresher(t, sockets)
	r.Set(podID, []Target{target(at, "/x"), target(at, "/y"), target(at, "")})
	n := 0
	outcomes(r, func(Outcome) bool { n++; return n < 9 })
	r.Close()
	if opened, settled := sockets.opened.Load(), sockets.settled.Load(); opened != settled || len(r.open) != 0 {
		t.Errorf("%d opened, %d settled, %d left open", opened, settled, len(r.open))
	}
}

// hostile sets up 32 pods with 64 endpoints each, asked as often as possible.
func hostile(r *Refresher, at netip.AddrPort) {
	for pod := range 32 {
		var targets []Target
		for i := range 64 {
			targets = append(targets, target(at, fmt.Sprintf("/%d", i)))
		}
		r.Set(attach.ID{ContainerID: fmt.Sprint("hostile", pod)}, targets)
	}
}

// A pod that sends endless headers is cut off: the daemon keeps no more of them than it judges.
func TestEndlessHeaders(t *testing.T) {
	line := []byte("X-Header: " + strings.Repeat("x", 4000) + "\r\n")
	var sent atomic.Int64
	at := listen(t, func(conn net.Conn) {
		if _, err := http.ReadRequest(bufio.NewReader(conn)); err != nil {
			return
		}
		for text := []byte("HTTP/1.1 200 OK\r\n"); ; text = line {
			n, err := conn.Write(text)
			sent.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	sockets := &plain{}
	r := newRefresher(t, sockets)
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	hostile(r, at)
	for sockets.opened.Load() < 1000 {
		time.Sleep(10 * time.Millisecond)
		if got := r.Take(); len(got) > 0 {
			t.Fatalf("got %+v", got)
		}
		if grown := int64(heap()) - int64(before); grown > 16<<20 {
			t.Fatalf("the heap has grown by %d MiB", grown>>20)
		}
	}
	r.Close()
	// What the daemon reads, and what the sockets on both sides buffer meanwhile.
	if most := sockets.opened.Load() * 4 << 20; sent.Load() > most {
		t.Errorf("%d MiB were sent on %d connections", sent.Load()>>20, sockets.opened.Load())
	}
}

// Pods that never reply, or only byte by byte, do not delay the requests to others.
func TestHeldConnections(t *testing.T) {
	released := make(chan struct{})
	defer close(released)
	for name, serve := range map[string]func(net.Conn){
		"silent": func(net.Conn) { <-released },
		"byte by byte": func(conn net.Conn) {
			for err := error(nil); err == nil; _, err = conn.Write([]byte("\n")) {
				time.Sleep(time.Millisecond)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			at := listen(t, serve)
			sockets := &plain{}
			r := newRefresher(t, sockets)
			hostile(r, at)
			polltest.Eventually(t, "all connections have been opened", func() bool { return sockets.opened.Load() >= 32*podConnections })
			good := target(listen(t, serveHTTP(func(http.ResponseWriter, *http.Request) {})), "/x")
			r.Set(podID, []Target{good})
			n := 0
			outcomes(r, func(o Outcome) bool {
				if o.Attachment == podID {
					n++
				}
				return n < 5
			})
			r.mu.Lock()
			defer r.mu.Unlock()
			if len(r.open) > 32*podConnections+1 {
				t.Errorf("%d connections", len(r.open))
			}
		})
	}
}

// After Close its descriptors may belong to anything, so nothing is written to them.
func TestNothingIsWrittenAfterClose(t *testing.T) {
	r, err := New(&plain{}, now)
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	file := filepath.Join(t.TempDir(), "another")
	for range 8 { // one of them reuses the eventfd's number
		f, err := os.Create(file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close() //nolint:errcheck // a test's
	}
	r.Set(podID, []Target{target(netip.MustParseAddrPort("127.0.0.1:9"), "")})
	r.Close()
	if text, err := os.ReadFile(file); err != nil || len(text) > 0 {
		t.Errorf("%q was written into a file, %v", text, err)
	}
}

// A success dates from the daemon's request (Outcome.Duration): not after the pod received it, and not before it was due.
func TestSuccessDatesFromItsRequest(t *testing.T) {
	var asked atomic.Uint64
	at := listen(t, func(conn net.Conn) {
		r, err := http.ReadRequest(bufio.NewReader(conn))
		if err != nil || r.URL.Path != "/x" {
			return
		}
		asked.Store(now())
		for _, b := range []byte("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") {
			_, _ = conn.Write([]byte{b})
			time.Sleep(time.Millisecond)
		}
		_, _ = conn.Read(make([]byte, 1))
	})
	for _, path := range []string{"/x", ""} {
		target := target(at, path)
		target.Interval = 1 // due at once
		r := newRefresher(t, &plain{})
		began := now()
		r.Set(podID, []Target{target})
		outcomes(r, func(o Outcome) bool {
			asked := asked.Load()
			if path == "" {
				asked = o.ObservedAt
			}
			if from := o.ObservedAt - uint64(o.Duration); from < began || from > asked {
				t.Errorf("%q: dated %s after it was due, and %s before the pod was asked: %+v", path, time.Duration(from-began), time.Duration(asked-from), o)
			}
			return false
		})
		r.Set(podID, nil)
	}
}
