package attach_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
)

// behaviour is what a pod does with a probe, and what is to be learned from it.
type behaviour struct {
	serve   func(conn *net.TCPConn) // nil: nobody listens
	drops   map[bpftest.Place]bpftest.Drop
	gaveUp  time.Duration // when the client closes; 0: when the server has
	want    string        // outcome, without its duration
	passed  string        // the same of a connection that was passed on, if it is another one
	atLeast time.Duration // duration
	causes  [2]string     // why the port's and the endpoint's evidence is void, if it is
}

const slow = 300 * time.Millisecond

// says answers a request with text, and closes.
func says(text ...string) func(conn *net.TCPConn) {
	return func(conn *net.TCPConn) {
		_, _ = io.ReadFull(conn, make([]byte, len(probe)))
		for _, t := range text {
			_, _ = io.WriteString(conn, t)
			time.Sleep(20 * time.Millisecond)
		}
		_ = conn.CloseWrite()
		_, _ = io.Copy(io.Discard, conn)
	}
}

// resets answers a request with text, and resets the connection.
func resets(text string) func(conn *net.TCPConn) {
	return func(conn *net.TCPConn) {
		_, _ = io.ReadFull(conn, make([]byte, len(probe)))
		_, _ = io.WriteString(conn, text)
		time.Sleep(20 * time.Millisecond)
		_ = conn.SetLinger(0)
	}
}

var (
	lostSYN    = bpftest.Drop{Mask: bpftest.SYN, Flags: bpftest.SYN, First: 1}
	behaviours = map[string]behaviour{
		"200":         {serve: says("HTTP/1.1 200 OK\r\n\r\n"), want: "http status 200"},
		"204":         {serve: says("HTTP/1.1 204 No Content\r\n\r\n"), want: "http status 204"},
		"200 in two":  {serve: says("HTTP/1.1 200 OK\r\n", "\r\nhello"), want: "http status 200"},
		"HTTP/1.0":    {serve: says("HTTP/1.0 200 OK\r\n\r\n"), want: "http status 200"},
		"302":         {serve: says("HTTP/1.1 302 Found\r\n\r\n"), want: "http status 302", causes: [2]string{"", "status"}},
		"404":         {serve: says("HTTP/1.1 404 Not Found\r\n\r\n"), want: "http status 404", causes: [2]string{"", "status"}},
		"503":         {serve: says("HTTP/1.1 503 Busy\r\n\r\n"), want: "http status 503", causes: [2]string{"", "status"}},
		"100 first":   {serve: says("HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\n")},
		"torn status": {serve: says("HTTP/1.1 2", "00 OK\r\n\r\n")},
		"no HTTP":     {serve: says("220 ready\r\n")},
		"no answer":   {serve: says(), want: "http no answer 0"},
		"gives up":    {serve: says(), gaveUp: slow, want: "http no answer 0"},
		"reset":       {serve: resets(""), want: "http reset 0", causes: [2]string{"reset", ""}},
		"reset after": {serve: resets("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n")}, // the client may have had all of it
		"refused":     {want: "http reset 0", passed: "port reset 0", causes: [2]string{"reset", ""}},
		"slow": {serve: func(conn *net.TCPConn) {
			time.Sleep(slow)
			says("HTTP/1.1 200 OK\r\n\r\n")(conn)
		}, want: "http status 200", atLeast: slow},
		// The client repeats its SYN, or what it has sent since it was handed over.
		"lost SYN": {
			serve: says("HTTP/1.1 200 OK\r\n\r\n"), drops: map[bpftest.Place]bpftest.Drop{bpftest.PodIn: lostSYN},
			want: "http status 200", atLeast: 150 * time.Millisecond,
		},
	}
	kinds  = map[uint8]string{datapath.KindPort: "port", datapath.KindTCP: "tcp", datapath.KindHTTP: "http"}
	events = map[uint8]string{
		datapath.EventConnected: "connected", datapath.EventStatus: "status", datapath.EventReset: "reset", datapath.EventNoAnswer: "no answer",
	}
)

// What comes of a probe is learned alike, whether it was passed on or handed over.
func TestOutcomes(t *testing.T) {
	for _, way := range ways {
		for _, ipv6 := range []bool{false, true} {
			for _, passed := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s IPv6 %v passed on %v", way, ipv6, passed), func(t *testing.T) {
					t.Parallel()
					testOutcomes(t, way, ipv6, passed)
				})
			}
		}
	}
}

// learned is what is known of one probe in the end.
type learned struct {
	behaviour
	name     string
	port     uint16
	took     time.Duration // as its client saw it
	outcomes []datapath.Outcome
}

func testOutcomes(t *testing.T, way way, ipv6, passed bool) {
	node := bpftest.NewNode(t)
	pod := node.AddPod(t)
	s := serve(t, pod, way)
	dropper := pod.NewDropper(t)
	s.prove(t)
	outcomes, err := s.d.Outcomes()
	if err != nil {
		t.Fatal(err)
	}
	defer outcomes.Close() //nolint:errcheck // a test's
	addr := pod.IPv4
	if ipv6 {
		addr = pod.IPv6
	}
	var probes []func() error
	all := map[uint16]*learned{}
	for name, b := range behaviours {
		l := &learned{behaviour: b, name: name, port: basePort + uint16(len(all))}
		all[l.port] = l
		l.listen(t, s)
		s.knowHealthz(t, l.port, passed)
		for place, drop := range b.drops {
			dropper.At(t, place, l.port, drop)
		}
		probes = append(probes, func() error {
			return inNS(node.NS, func() error { return l.probe(netip.AddrPortFrom(addr, l.port)) })
		})
	}
	if err := atOnce(probes); err != nil {
		t.Error(err)
	}
	s.wantNothingLeft(t)
	for _, o := range readOutcomes(t, outcomes) {
		if all[o.Port] == nil {
			t.Fatalf("an outcome of port %d", o.Port)
		}
		all[o.Port].outcomes = append(all[o.Port].outcomes, o)
	}
	for _, l := range all {
		l.check(t, s, passed)
	}
}

// knowHealthz makes the port's /healthz known, and not answerable.
func (s *served) knowHealthz(t *testing.T, port uint16, passed bool) {
	t.Helper()
	s.armPort(t, port)
	if passed {
		s.expirePort(t, port)
	}
	s.put(t, datapath.HTTPKey(port, "/healthz"), datapath.Evidence{})
}

func (l *learned) listen(t *testing.T, s *served) {
	if l.serve == nil {
		return
	}
	listener := s.Listen(t, int(l.port))
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		l.serve(conn.(*net.TCPConn))
		_ = conn.Close()
	}()
}

// probe asks as Kubernetes' prober does.
func (l *learned) probe(to netip.AddrPort) error {
	start := time.Now()
	defer func() { l.took = time.Since(start) }()
	conn, err := dialFrom(netip.AddrPort{}, to)
	if err != nil {
		return l.unlessRefused(err)
	}
	defer conn.Close() //nolint:errcheck // a test's
	if _, err := io.WriteString(conn, probe); err != nil {
		return l.unlessRefused(err)
	}
	if l.gaveUp > 0 {
		_ = conn.SetReadDeadline(start.Add(l.gaveUp))
	}
	_, err = io.Copy(io.Discard, conn)
	if l.gaveUp > 0 && errors.Is(err, os.ErrDeadlineExceeded) {
		return nil
	}
	return l.unlessRefused(err)
}

func (l *learned) unlessRefused(err error) error {
	if end := endOf(err); end == endEOF || end == endReset && (l.serve == nil || strings.HasPrefix(l.name, "reset")) {
		return nil
	}
	return fmt.Errorf("%s: %w", l.name, err)
}

// readOutcomes reads all that there are.
func readOutcomes(t *testing.T, r *datapath.OutcomeReader) (all []datapath.Outcome) {
	t.Helper()
	r.SetDeadline(time.Now().Add(50 * time.Millisecond))
	for {
		some, err := r.Read()
		all = append(all, some...)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func (l *learned) check(t *testing.T, s *served, passed bool) {
	want := l.want
	if passed && l.passed != "" {
		want = l.passed
	}
	pod := s.known(t)
	var got []string
	for _, o := range l.outcomes {
		got = append(got, fmt.Sprintf("%s %s %d", kinds[o.Kind], events[o.Event], o.Status))
		if o.Device != pod.Device() || o.Kind == datapath.KindHTTP && o.PathHash != datapath.PathHash("/healthz") {
			t.Errorf("%s: an outcome of another endpoint: %+v", l.name, o)
		}
		if d := time.Duration(o.Duration); d < l.atLeast || d > l.took+slow {
			t.Errorf("%s: it took %v, says the outcome, and at least %v and at most %v in truth", l.name, d, l.atLeast, l.took)
		}
	}
	if wanted := slices.DeleteFunc([]string{want}, func(s string) bool { return s == "" }); !slices.Equal(got, wanted) {
		t.Errorf("%s: outcomes %q, want %q", l.name, got, wanted)
	}
	for i, key := range []datapath.EndpointKey{datapath.PortKey(l.port), datapath.HTTPKey(l.port, "/healthz")} {
		tally, err := pod.Tally(key)
		if cause := datapath.WithdrawalCauses[tally.WithdrawnCause]; err != nil || cause != l.causes[i] {
			t.Errorf("%s: void because of %q, want %q; %v", l.name, cause, l.causes[i], err)
		}
	}
}
