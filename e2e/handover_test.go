package e2e

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/e2e/harness/node"
)

// probeRequest is the request of the kubelet.
const probeRequest = "GET /healthz HTTP/1.1\r\nHost: 10.88.1.2:8080\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n"

// step is one action of a client.
type step func(net.Conn) error

func send(text string) step {
	return func(c net.Conn) error {
		_, err := io.WriteString(c, text)
		return err
	}
}

func pause(d time.Duration) step {
	return func(net.Conn) error {
		time.Sleep(d)
		return nil
	}
}

// bytewise sends every byte in its own segment.
func bytewise(text string) step {
	return func(c net.Conn) error {
		for i := range len(text) {
			if _, err := io.WriteString(c, text[i:i+1]); err != nil {
				return err
			}
			time.Sleep(5 * time.Millisecond)
		}
		return nil
	}
}

func closeWrite(c net.Conn) error { return c.(*net.TCPConn).CloseWrite() }

// outcome is what a client received: all bytes until the end, and the error that ended them.
type outcome struct {
	bytes []byte
	err   error
}

// exchange executes the steps while reading, until the server ends the connection.
func exchange(t *testing.T, conn net.Conn, steps ...step) outcome {
	t.Helper()
	defer conn.Close() //nolint:errcheck // read to the end
	done := make(chan outcome)
	go func() {
		got, err := io.ReadAll(conn)
		done <- outcome{got, err}
	}()
	var failed error
	for _, step := range steps {
		if failed = step(conn); failed != nil {
			break // the server may have sent the reason
		}
	}
	o := <-done
	if o.err == nil {
		o.err = failed
	}
	return o
}

func (o outcome) expectSame(t *testing.T, other outcome) {
	t.Helper()
	if !bytes.Equal(o.bytes, other.bytes) || !sameError(o.err, other.err) {
		t.Errorf("without probelet the pod gives %s (%v), with it %s (%v)", excerpt(o.bytes), o.err, excerpt(other.bytes), other.err)
	}
}

// sameError compares causes, because addresses differ.
func sameError(a, b error) bool {
	var x, y unix.Errno
	if errors.As(a, &x) && errors.As(b, &y) {
		return x == y
	}
	return (a == nil) == (b == nil)
}

func excerpt(b []byte) string {
	if len(b) > 300 {
		return fmt.Sprintf("%d bytes %.300q …", len(b), b)
	}
	return fmt.Sprintf("%q", b)
}

// clientHello returns the first message of a TLS client, which fits one segment. If it took two, a server that rejects the
// first and closes before the second arrives would reset the connection, with or without probelet.
func clientHello(t *testing.T) string {
	t.Helper()
	ours, theirs := net.Pipe()
	defer ours.Close()                                                                           //nolint:errcheck // a pipe
	config := &tls.Config{InsecureSkipVerify: true, CurvePreferences: []tls.CurveID{tls.X25519}} // keys of other curves take 1 KiB
	go func() { _ = tls.Client(theirs, config).Handshake(); _ = theirs.Close() }()
	hello := make([]byte, 16<<10)
	n, err := ours.Read(hello)
	must(t, err)
	return string(hello[:n])
}

// If the kernel accepted a connection but cannot answer the request, the pod answers as it would without probelet.
func TestHandover(t *testing.T) {
	megabyte := strings.Repeat("0123456789abcdef", 1<<16)
	post := fmt.Sprintf("POST /echo HTTP/1.1\r\nHost: pod\r\nContent-Length: %d\r\n", len(megabyte))
	kept := "GET /healthz HTTP/1.1\r\nHost: pod\r\n\r\n"
	last := "GET /other HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n"
	cases := []struct {
		name  string
		steps []step
	}{
		{"unknown path", []step{send(strings.Replace(probeRequest, healthz, "/other", 1))}},
		{"another method", []step{send(strings.Replace(probeRequest, "GET", "HEAD", 1))}},
		{"HTTP/1.0", []step{send("GET /healthz HTTP/1.0\r\n\r\n")}},
		{"1 MiB body", []step{send(post + "Connection: close\r\n\r\n"), send(megabyte)}},
		{"1 MiB body in one write", []step{send(post + "Connection: close\r\n\r\n" + megabyte)}},
		{"1 MiB body, then a second request", []step{send(post + "\r\n" + megabyte), pause(time.Second / 2), send(last)}},
		{"headers of 100 KiB", []step{send(strings.Replace(last, "\r\nC", "\r\nX-Long: "+megabyte[:100<<10]+"\r\nC", 1))}},
		{"keep-alive", []step{send(kept), pause(time.Second), send(kept), pause(time.Second), send(last)}},
		{"pipelined", []step{send(kept + kept + last)}},
		{"probe, then another request", []step{send(probeRequest + last)}},
		{"TLS", []step{send(clientHello(t))}},
		{"not HTTP", []step{send("\x00\x01\x02\r\n\r\n")}},
		{"slow client", []step{bytewise(last)}},
		{"late client", []step{pause(1500 * time.Millisecond), send(last)}},
		{"half-closed", []step{send(last), closeWrite}},
		{"half-closed in the middle", []step{send(post + "\r\n" + megabyte[:1000]), closeWrite}},
	}
	for _, chain := range []node.Chain{node.PTP, node.Bridge} {
		t.Run(string(chain), func(t *testing.T) {
			t.Parallel()
			s := newScene(t, chain)
			p := s.newFreshPod(longHTTP, longTCP)
			for _, c := range cases {
				t.Run(c.name, func(t *testing.T) { p.expectHandedOver(t, httpPort, c.steps...) })
			}
		})
	}
}

// expectHandedOver compares the response to the prober with that to a client whose connection is left alone.
func (p *pod) expectHandedOver(t *testing.T, port int, steps ...step) {
	t.Helper()
	alone := exchange(t, p.s.dial(t, p.s.other, p.address(port)), steps...)
	before := p.s.counter(t, node.HandedOver)
	alone.expectSame(t, exchange(t, p.s.dial(t, p.s.prober, p.address(port)), steps...))
	if got := p.s.counter(t, node.HandedOver) - before; got != 1 {
		t.Errorf("%d connections were handed over, want 1", got)
	}
}

// A request in two segments reaches the pod, wherever it is split and however long the pause.
func TestSplitAnywhere(t *testing.T) {
	s := newScene(t, node.PTP)
	p := s.newFreshPod(longHTTP)
	alone := exchange(t, s.dial(t, s.other, p.address(httpPort)), send(probeRequest))
	requests := p.seen(httpPort).Requests
	limit := make(chan struct{}, 40)
	var all sync.WaitGroup
	for _, between := range []time.Duration{0, 300 * time.Millisecond} { // shorter and longer than a retransmission takes
		for i := 1; i < len(probeRequest); i++ {
			limit <- struct{}{}
			all.Go(func() {
				defer func() { <-limit }()
				conn, err := s.prober.Dial(p.address(httpPort))
				if err != nil {
					t.Errorf("split at %d: %v", i, err)
					return
				}
				_ = conn.SetDeadline(time.Now().Add(deadline))
				alone.expectSame(t, exchange(t, conn, send(probeRequest[:i]), pause(between), send(probeRequest[i:])))
			})
		}
	}
	all.Wait()
	if got := p.seen(httpPort).Requests - requests; got != 2*(len(probeRequest)-1) {
		t.Errorf("the pod saw %d of %d requests", got, 2*(len(probeRequest)-1))
	}
}

// A TCP probe may target any kind of server.
func TestTLSBehindTCPProbe(t *testing.T) {
	s := newScene(t, node.PTP)
	p := s.newFreshPod(longTLS)
	p.probe(longTLS, p.IPv4, 1)
	if p.hits(longTLS) != 1 {
		t.Error("the TCP probe was not answered")
	}
	conn := tls.Client(s.dial(t, s.prober, p.address(tlsPort)), &tls.Config{InsecureSkipVerify: true})
	o := exchange(t, conn, send("GET /other HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n"))
	if o.err != nil || !bytes.HasPrefix(o.bytes, []byte("HTTP/1.1 404 ")) {
		t.Errorf("over TLS, the pod gives %s (%v)", excerpt(o.bytes), o.err)
	}
	if got := s.counter(t, node.HandedOver); got != 1 {
		t.Errorf("%d connections were handed over, want 1", got)
	}
}

// The pod has stopped listening by the time its connection is handed over.
func TestStoppedListening(t *testing.T) {
	for name, request := range map[string]string{
		"unknown path": "GET /other HTTP/1.1\r\nHost: pod\r\n\r\n",
		"probed path":  probeRequest, // the evidence ended with the socket
	} {
		t.Run(name, func(t *testing.T) {
			if request == probeRequest {
				needBTF(t)
			}
			s := newScene(t, node.PTP)
			p := s.newFreshPod(longHTTP)
			conn := s.dial(t, s.prober, p.address(httpPort))
			must(t, p.Close(httpPort))
			o := exchange(t, conn, send(request))
			if !errors.Is(o.err, unix.ECONNRESET) || len(o.bytes) > 0 {
				t.Errorf("got %s (%v), want a reset", excerpt(o.bytes), o.err)
			}
		})
	}
}
