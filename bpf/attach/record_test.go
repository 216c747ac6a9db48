package attach_test

import (
	"cmp"
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

// behaviour describes what a pod does with a probe, and what is recorded of it.
type behaviour struct {
	serve   func(conn *net.TCPConn) // nil: there is no listener
	drops   map[bpftest.Place]bpftest.Drop
	gaveUp  time.Duration // from its SYN until the client closes; 0: it closes after the server
	says    string        // what the pod sends, as far as it is recorded
	ends    string        // who ends the connection, and how; empty: clientCloses
	atLeast time.Duration // from the SYN to the end
	causes  [2]string     // why the port's and the endpoint's evidence is void, if it is
}

const slow = 300 * time.Millisecond

// says answers a request with text and closes.
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

// resets answers a request with text and resets the connection.
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
	large      = "HTTP/1.1 200 OK\r\n\r\n" + strings.Repeat("0123456789abcde\n", 4096)
	behaviours = map[string]behaviour{
		"200":         {serve: says("HTTP/1.1 200 OK\r\n\r\n"), says: "HTTP/1.1 200 OK\r\n\r\n"},
		"200 in two":  {serve: says("HTTP/1.1 200 OK\r\n", "\r\nhello"), says: "HTTP/1.1 200 OK\r\n\r\nhello"},
		"large":       {serve: says(large), says: large[:datapath.MaxRecorded]}, // few packets because of segmentation offload
		"302":         {serve: says("HTTP/1.1 302 Found\r\n\r\n"), says: "HTTP/1.1 302 Found\r\n\r\n", causes: [2]string{"", "status"}},
		"503":         {serve: says("HTTP/1.1 503 Busy\r\n\r\n"), says: "HTTP/1.1 503 Busy\r\n\r\n", causes: [2]string{"", "status"}},
		"100 first":   {serve: says("HTTP/1.1 100 Continue\r\n\r\n", "HTTP/1.1 500 x\r\n\r\n"), says: "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 500 x\r\n\r\n"},
		"torn status": {serve: says("HTTP/1.1 5", "00 x\r\n\r\n"), says: "HTTP/1.1 500 x\r\n\r\n"},
		"no HTTP":     {serve: says("220 ready\r\n"), says: "220 ready\r\n"},
		"no answer":   {serve: says()},
		"gives up":    {serve: says(), gaveUp: slow},
		"reset":       {serve: resets(""), ends: podResets, causes: [2]string{"reset", ""}},
		"reset after": {serve: resets("HTTP/1.1 200 OK\r\n\r\n"), says: "HTTP/1.1 200 OK\r\n\r\n", ends: podResets}, // the client may have received all of it
		"refused":     {ends: podResets, causes: [2]string{"reset", ""}},
		"slow": {serve: func(conn *net.TCPConn) {
			time.Sleep(slow)
			says("HTTP/1.1 200 OK\r\n\r\n")(conn)
		}, says: "HTTP/1.1 200 OK\r\n\r\n", atLeast: slow},
		// The client repeats its SYN, or what it has sent since it was handed over.
		"lost SYN": {
			serve: says("HTTP/1.1 200 OK\r\n\r\n"), drops: map[bpftest.Place]bpftest.Drop{bpftest.PodIn: lostSYN},
			says: "HTTP/1.1 200 OK\r\n\r\n", atLeast: 150 * time.Millisecond,
		},
	}
)

const podResets = "pod resets"

// Probes are recorded in the same way, whether they were passed on or handed over.
func TestProbesAreRecorded(t *testing.T) {
	for _, way := range ways {
		for _, ipv6 := range []bool{false, true} {
			for _, passed := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s IPv6 %v passed on %v", way, ipv6, passed), func(t *testing.T) {
					t.Parallel()
					testRecords(t, way, ipv6, passed)
				})
			}
		}
	}
}

// learned is what is known about one probe in the end.
type learned struct {
	behaviour
	name    string
	port    uint16
	took    time.Duration // as its client saw it
	records []datapath.Record
}

func testRecords(t *testing.T, way way, ipv6, passed bool) {
	node := bpftest.NewNode(t)
	pod := node.AddPod(t)
	s := serve(t, pod, way)
	dropper := pod.NewDropper(t)
	s.prove(t)
	s.lookAway(t) // some ports have no listener
	records, err := s.d.Records()
	if err != nil {
		t.Fatal(err)
	}
	defer records.Close() //nolint:errcheck // a test's
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
		s.knowProbe(t, l.port, passed)
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
	for _, r := range readRecords(t, records) {
		if all[r.Port] == nil {
			t.Fatalf("unexpected record of port %d", r.Port)
		}
		all[r.Port].records = append(all[r.Port].records, r)
	}
	for _, l := range all {
		l.check(t, s, passed)
	}
}

// knowProbe makes what probe asks known but not answerable.
func (s *served) knowProbe(t *testing.T, port uint16, passed bool) {
	t.Helper()
	s.armPort(t, port)
	if passed {
		s.expirePort(t, port)
	}
	s.putProbe(t, port, datapath.Evidence{})
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

// probe sends a request like Kubernetes' prober.
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
	if end := endOf(err); end == endEOF || end == endReset && l.ends == podResets {
		return nil
	}
	return fmt.Errorf("%s: %w", l.name, err)
}

// readRecords reads all pending records.
func readRecords(t *testing.T, reader *datapath.RecordReader) (all []datapath.Record) {
	t.Helper()
	for reader.Pending() {
		var r datapath.Record
		if err := reader.Next(&r); err != nil {
			t.Fatal(err)
		}
		r.Payload = slices.Clone(r.Payload)
		all = append(all, r)
	}
	return all
}

// bytesOf assembles what one side sent, with 0 for unknown bytes.
func bytesOf(records []datapath.Record, fromPod bool) string {
	var all []byte
	for _, r := range records {
		if end := int(r.Offset) + len(r.Payload); r.FromPod == fromPod && len(r.Payload) > 0 {
			all = append(all, make([]byte, max(end-len(all), 0))...)
			copy(all[r.Offset:], r.Payload)
		}
	}
	return string(all)
}

func (l *learned) check(t *testing.T, s *served, passed bool) {
	pod, question := s.known(t), s.question(t)
	if len(l.records) == 0 {
		t.Errorf("%s: no records", l.name)
		return
	}
	first, last := l.records[0], l.records[len(l.records)-1]
	asked := datapath.Question{}
	for i, r := range l.records {
		if r.Owner != first.Owner || r.StartedAt != first.StartedAt || r.Device != pod.Device() || r.ObservedAt < r.StartedAt {
			t.Errorf("%s: record of another connection: %+v", l.name, r)
		}
		if endOfRecord(r) != "" && i < len(l.records)-1 {
			t.Errorf("%s: records after the end: %+v", l.name, l.records)
		}
		if !r.FromPod && r.Len > 0 {
			asked = question
		}
		if r.Question != asked {
			t.Errorf("%s: question %+v, want %+v", l.name, r.Question, asked)
		}
	}
	want := probe
	if passed && l.serve == nil {
		want = "" // refused before
	}
	if got := bytesOf(l.records, false); got != want {
		t.Errorf("%s: the client sent %q", l.name, got)
	}
	if got := bytesOf(l.records, true); got != l.says {
		t.Errorf("%s: the pod sent %d bytes: %.100q", l.name, len(got), got)
	}
	if end := endOfRecord(last); end != cmp.Or(l.ends, clientCloses) {
		t.Errorf("%s: %s, at the end: %+v", l.name, end, last)
	}
	if d := time.Duration(last.ObservedAt - last.StartedAt); d < l.atLeast || d > l.took+slow {
		t.Errorf("%s: took %v according to the records, actually between %v and %v", l.name, d, l.atLeast, l.took)
	}
	for i, key := range []datapath.EndpointKey{datapath.PortKey(l.port), datapath.HTTPKey(l.port, question)} {
		tally, err := pod.Tally(key)
		if cause := datapath.WithdrawalCauses[tally.WithdrawnCause]; err != nil || cause != l.causes[i] {
			t.Errorf("%s: void because of %q, want %q; %v", l.name, cause, l.causes[i], err)
		}
	}
}

// endOfRecord returns how a connection ends with a record, if it does.
func endOfRecord(r datapath.Record) string {
	switch {
	case r.FromPod && r.TCPFlags&datapath.FlagRST != 0:
		return podResets
	case !r.FromPod && r.TCPFlags&datapath.FlagFIN != 0:
		return clientCloses
	case !r.FromPod && r.TCPFlags&datapath.FlagRST != 0:
		return clientResets
	}
	return ""
}
