package attach_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/bpftest"
)

// conversation describes what a client and a server send each other on one connection.
type conversation struct {
	IPv6     bool
	Greeting int // bytes that the server sends before it reads
	Rounds   []round
	Accept   string
	Ending   string
	Cut      int // bytes from the client after which a side aborts, if Ending says so
	Drops    map[bpftest.Place]bpftest.Drop
	Seed     uint64
}

// round is a request and its reply. The client sends the next request after it has read the reply, unless that is empty.
type round struct {
	Prefix         string // of the request
	Request, Reply int    // bytes
	Pieces         []piece
}

// piece ends a write of the client after the given percentage of the request.
type piece struct {
	Percent int
	Pause   time.Duration
}

// How a server accepts.
const (
	acceptNow    = "now"
	acceptSlowly = "slowly"
	acceptFull   = "after its queue was full"
	acceptData   = "when there is data" // TCP_DEFER_ACCEPT
	acceptNever  = "never: no listener"
)

// How a conversation ends.
const (
	serverCloses   = "server closes"
	clientCloses   = "client closes"
	halfClosed     = "client closes its side before the last reply"
	serverResets   = "server resets"
	clientResets   = "client resets"
	clientAbandons = "client closes in the middle"
)

// How a stream of bytes ends.
const (
	endEOF     = "EOF"
	endReset   = "reset"
	endNone    = "none" // the side itself has aborted
	endTimeout = "timeout"
)

// transcript is what the two sides have received.
type transcript struct {
	server, client side
}

type side struct {
	got []byte
	end string
}

func (s side) String() string { return fmt.Sprintf("%d bytes, %s", len(s.got), s.end) }

func (t transcript) String() string {
	return fmt.Sprintf("server got %v; client got %v", t.server, t.client)
}

func endOf(err error) string {
	switch {
	case err == nil, errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return endEOF
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded), errors.Is(err, unix.ETIMEDOUT):
		return endTimeout
	case errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE), errors.Is(err, unix.ECONNREFUSED):
		return endReset
	}
	return err.Error()
}

// patience limits how long anything in a conversation may take. Without SACK, lost packets cost seconds rather than milliseconds
// (grantMSSOnly).
const patience = time.Minute

func (c *conversation) aborted() bool { return c.Ending == clientResets || c.Ending == clientAbandons }

func (c *conversation) random(n int, stream uint64) []byte {
	b := make([]byte, n)
	source := rand.NewChaCha8([32]byte{byte(c.Seed), byte(c.Seed >> 8), byte(stream)})
	_, _ = source.Read(b)
	return b
}

// requests and replies are the two streams.
func (c *conversation) requests() []byte {
	var all []byte
	for i, r := range c.Rounds {
		request := c.random(r.Request, uint64(2*i))
		copy(request, r.Prefix)
		all = append(all, request...)
	}
	return all
}

func (c *conversation) replies() []byte {
	all := c.random(c.Greeting, 255)
	for i, r := range c.Rounds {
		all = append(all, c.random(r.Reply, uint64(2*i+1))...)
	}
	return all
}

// hold holds the conversation with a server in the pod.
func (c *conversation) hold(_ testing.TB, pod *bpftest.Pod, port uint16) (transcript, error) {
	var got transcript
	listener, err := c.listen(pod, port)
	if err != nil {
		return got, err
	}
	served := make(chan struct{})
	go func() {
		defer close(served)
		got.server = side{end: endEOF} // as if the client had closed immediately, like a TCP probe
		if listener == nil {
			return
		}
		if conn, err := c.accept(listener); err == nil {
			got.server = c.serve(conn)
		}
	}()
	got.client = c.ask(pod, port)
	if c.aborted() && listener != nil { // the pod may never learn about it
		_ = listener.SetDeadline(time.Now().Add(2 * time.Second))
	}
	<-served
	if listener != nil {
		return got, listener.Close()
	}
	return got, nil
}

func (c *conversation) listen(pod *bpftest.Pod, port uint16) (listener *net.TCPListener, err error) {
	if c.Accept == acceptNever {
		return nil, nil
	}
	config := net.ListenConfig{Control: func(_, _ string, socket syscall.RawConn) (err error) {
		control := socket.Control(func(fd uintptr) {
			if c.Accept == acceptData {
				err = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 5)
			}
		})
		return errors.Join(control, err)
	}}
	err = inNS(pod.NS, func() error {
		l, err := config.Listen(context.Background(), "tcp", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		listener = l.(*net.TCPListener)
		if c.Accept == acceptFull {
			return fill(listener, port)
		}
		return nil
	})
	if err == nil {
		err = listener.SetDeadline(time.Now().Add(patience))
	}
	return listener, err
}

// fill makes the accept queue hold one connection, and fills it.
func fill(listener *net.TCPListener, port uint16) error {
	socket, err := listener.SyscallConn()
	if err != nil {
		return err
	}
	control := socket.Control(func(fd uintptr) { err = unix.Listen(int(fd), 0) })
	if err := errors.Join(control, err); err != nil {
		return err
	}
	filler, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		return err
	}
	return filler.Close()
}

func (c *conversation) accept(listener *net.TCPListener) (*net.TCPConn, error) {
	switch c.Accept {
	case acceptSlowly:
		time.Sleep(300 * time.Millisecond)
	case acceptFull:
		time.Sleep(700 * time.Millisecond)
	}
	for {
		conn, err := listener.AcceptTCP()
		if err != nil || !conn.RemoteAddr().(*net.TCPAddr).IP.IsLoopback() {
			return conn, err
		}
		_ = conn.Close() // what filled the queue, and may have arrived there late
	}
}

// serve is the server's part.
func (c *conversation) serve(conn *net.TCPConn) side {
	defer conn.Close() //nolint:errcheck // a test's
	_ = conn.SetDeadline(time.Now().Add(patience))
	var got bytes.Buffer
	replies := bytes.NewReader(c.replies())
	_, err := io.CopyN(conn, replies, int64(c.Greeting))
	for i := 0; i < len(c.Rounds) && err == nil; i++ {
		want := c.Rounds[i].Request
		if c.Ending == serverResets && got.Len()+want >= c.Cut {
			_, _ = io.CopyN(&got, conn, int64(c.Cut-got.Len())) // as far as the client got
			_ = conn.SetLinger(0)
			return side{got.Bytes(), endNone}
		}
		_, err = io.CopyN(&got, conn, int64(want))
		if err == nil && c.Ending == halfClosed && i == len(c.Rounds)-1 {
			if n, readErr := conn.Read(make([]byte, 1)); n > 0 || endOf(readErr) != endEOF {
				err = fmt.Errorf("%d bytes, %w: not the end of the client's side", n, readErr)
			}
		}
		if err == nil {
			_, err = io.CopyN(conn, replies, int64(c.Rounds[i].Reply))
		}
	}
	if err == nil && c.Ending == serverCloses {
		err = conn.CloseWrite()
	}
	if err == nil {
		_, err = io.Copy(&got, conn)
	}
	return side{got.Bytes(), endOf(err)}
}

// inbox is what a client reads while it writes.
type inbox struct {
	mu      sync.Mutex
	changed *sync.Cond
	side
}

func (b *inbox) read(conn net.Conn) {
	buf := make([]byte, 64<<10)
	for {
		n, err := conn.Read(buf)
		b.mu.Lock()
		b.got = append(b.got, buf[:n]...)
		if err != nil {
			b.end = endOf(err)
		}
		b.changed.Broadcast()
		b.mu.Unlock()
		if err != nil {
			return
		}
	}
}

// await waits for the given number of bytes, or the end.
func (b *inbox) await(n int) (ended bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.got) < n && b.end == "" {
		b.changed.Wait()
	}
	return b.end != ""
}

// ask is the client's part.
func (c *conversation) ask(pod *bpftest.Pod, port uint16) side {
	addr := pod.IPv4
	if c.IPv6 {
		addr = pod.IPv6
	}
	var conn *net.TCPConn
	err := inNS(pod.Node.NS, func() error {
		dialed, err := net.DialTimeout("tcp", netip.AddrPortFrom(addr, port).String(), patience)
		if err == nil {
			conn = dialed.(*net.TCPConn)
		}
		return err
	})
	if err != nil {
		return side{nil, endOf(err)}
	}
	defer conn.Close() //nolint:errcheck // a test's
	_ = conn.SetDeadline(time.Now().Add(patience))
	in := &inbox{}
	in.changed = sync.NewCond(&in.mu)
	reading := make(chan struct{})
	go func() { defer close(reading); in.read(conn) }()
	failed := endOf(c.say(conn, in))
	if c.aborted() {
		if c.Ending == clientResets {
			_ = conn.SetLinger(0)
		}
		_ = conn.Close()
		<-reading
		return side{in.got, endNone}
	}
	in.await(len(c.replies()))
	if c.Ending == clientCloses {
		_ = conn.CloseWrite()
	}
	<-reading
	if failed != endEOF && in.end == endEOF { // the socket reports a reset only once, here to the writer
		in.end = failed
	}
	return in.side
}

// say writes the client's stream, as far as it goes.
func (c *conversation) say(conn *net.TCPConn, in *inbox) error {
	left, sent, expected := c.requests(), 0, c.Greeting
	for i, r := range c.Rounds {
		request, from := left[:r.Request], 0
		left = left[r.Request:]
		for _, p := range slices.Concat(r.Pieces, []piece{{Percent: 100}}) {
			to := max(from, len(request)*p.Percent/100)
			if c.aborted() {
				to = min(to, c.Cut-sent)
			}
			if to > from {
				if _, err := conn.Write(request[from:to]); err != nil {
					return err
				}
			}
			from = max(from, to)
			time.Sleep(p.Pause)
		}
		sent += from
		if c.aborted() && sent == c.Cut {
			return nil
		}
		if c.Ending == halfClosed && i == len(c.Rounds)-1 {
			return conn.CloseWrite()
		}
		expected += r.Reply
		if in.await(expected) {
			return nil
		}
	}
	return nil
}

// exact reports whether nothing in the conversation depends on chance.
func (c *conversation) exact() bool {
	return !c.aborted() && (c.Ending != serverResets || len(c.Drops) == 0 && c.Greeting == 0)
}

// compare returns what is wrong with a transcript, given the transcript of the same conversation with a pod that is not attached.
func (c *conversation) compare(got, plain transcript) error {
	var errs []error
	if !bytes.HasPrefix(c.requests(), got.server.got) || !bytes.HasPrefix(c.replies(), got.client.got) {
		errs = append(errs, errors.New("wrong bytes"))
	}
	if got.server.end == endTimeout || got.client.end == endTimeout {
		errs = append(errs, errors.New("it never ended"))
	}
	if c.exact() && (got.String() != plain.String()) {
		errs = append(errs, errors.New("it is not what the pod alone gives"))
	}
	return errors.Join(errs...)
}

var prefixes = []string{
	"", "GET /x HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n", "HEAD /x HTTP/1.1\r\nHost: pod\r\n\r\n",
	"GET /healthz HTTP/1.1\r\nHost: pod\r\n\r\nGET /again HTTP/1.1\r\nHost: pod\r\n\r\n",
	"POST /x HTTP/1.1\r\nHost: pod\r\nContent-Length: 300000\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
	"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", "\r\n",
}

// sizes are close to what fits into one segment, a probe's request, and the first window.
var sizes = []int{1, 100, 511, 1023, 1024, 1025, 1460, 1461, 1900, 2047, 2048, 2049, 4096, 20_000, 300_000}

var rounds = rapid.Custom(func(t *rapid.T) round {
	return round{
		Prefix:  rapid.SampledFrom(prefixes).Draw(t, "prefix"),
		Request: rapid.SampledFrom(sizes).Draw(t, "request"),
		Reply:   rapid.SampledFrom(sizes).Draw(t, "reply"),
		Pieces: rapid.SliceOfN(rapid.Custom(func(t *rapid.T) piece {
			return piece{
				Percent: rapid.IntRange(0, 100).Draw(t, "percent"),
				Pause: rapid.SampledFrom([]time.Duration{0, 100 * time.Microsecond, time.Millisecond, 10 * time.Millisecond,
					250 * time.Millisecond}).Draw(t, "pause"),
			}
		}), 0, 4).Draw(t, "pieces"),
	}
})

// drops are what may happen to packets on their way. An answer to a SYN is never lost at HostIn, because the device would lose
// trust. Nor is a client's reset at ClientOut, because it is sent only once, and nothing would reveal that the client is gone
// (TestPortsOfAVanishedOwnerAreReusable).
var drops = map[bpftest.Place][]bpftest.Drop{
	bpftest.ClientOut: {{First: 1}, {Mask: bpftest.PSH, Flags: bpftest.PSH, First: 1}, {Mask: bpftest.RST, Percent: 3}},
	bpftest.PodIn: {
		{Mask: bpftest.SYN, Flags: bpftest.SYN, First: 1}, {Mask: bpftest.SYN, Flags: bpftest.SYN, First: 2},
		{Mask: bpftest.SYN | bpftest.ACK, Flags: bpftest.ACK, First: 1},
		{Mask: bpftest.SYN | bpftest.ACK, Flags: bpftest.ACK, First: 2}, {Percent: 3},
	},
	bpftest.PodOut: {
		{Mask: bpftest.SYN, Flags: bpftest.SYN, First: 1}, {Mask: bpftest.PSH, Flags: bpftest.PSH, First: 1}, {Percent: 3},
	},
	bpftest.HostIn: {{Mask: bpftest.SYN, First: 1}, {Mask: bpftest.SYN, Percent: 3}},
}

var conversations = rapid.Custom(func(t *rapid.T) *conversation {
	c := &conversation{
		IPv6:   rapid.Bool().Draw(t, "IPv6"),
		Rounds: rapid.SliceOfN(rounds, 1, 3).Draw(t, "rounds"),
		Accept: rapid.SampledFrom([]string{acceptNow, acceptNow, acceptNow, acceptSlowly, acceptFull, acceptData, acceptNever}).Draw(t, "accept"),
		Ending: rapid.SampledFrom([]string{serverCloses, clientCloses, halfClosed, serverResets, clientResets, clientAbandons}).Draw(t, "ending"),
		Drops:  map[bpftest.Place]bpftest.Drop{},
		Seed:   rapid.Uint64().Draw(t, "seed"),
	}
	if rapid.IntRange(0, 3).Draw(t, "speaks first") == 0 {
		c.Greeting = rapid.SampledFrom(sizes).Draw(t, "greeting")
	}
	total := 0
	for _, r := range c.Rounds {
		total += r.Request
	}
	c.Cut = rapid.IntRange(1, total).Draw(t, "cut")
	for range rapid.SampledFrom([]int{0, 1, 1, 2}).Draw(t, "places") {
		place := rapid.SampledFrom([]bpftest.Place{bpftest.ClientOut, bpftest.PodIn, bpftest.PodOut, bpftest.HostIn}).Draw(t, "place")
		c.Drops[place] = rapid.SampledFrom(drops[place]).Draw(t, "drop")
	}
	return c
})

func (c *conversation) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "IPv6 %v, accept %s, %s, cut %d, greeting %d, drops %v, seed %d", c.IPv6, c.Accept, c.Ending, c.Cut, c.Greeting, c.Drops, c.Seed)
	for _, r := range c.Rounds {
		fmt.Fprintf(&b, "\n\t%q… %d bytes in pieces %v, reply %d", r.Prefix[:min(len(r.Prefix), 6)], r.Request, r.Pieces, r.Reply)
	}
	return b.String()
}
