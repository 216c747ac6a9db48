package datapath

import (
	"fmt"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/bpftest"
)

// Sequences of packets must match the model, whatever order of losses, repetitions, other clients and changes of evidence leads to
// them: the programs' verdicts, the bytes, and the complete contents of the maps after each packet.
func TestSequencesMatchTheModel(t *testing.T) {
	seen := map[string]int{}
	steps := 0
	onBench(t, func(t *testing.T, b *bench) {
		rapid.Check(t, func(rt *rapid.T) {
			defer func(t testing.TB) { b.t = t }(b.t)
			s := newSequence(rt, b, seen)
			for range rapid.IntRange(50, 200).Draw(rt, "steps") {
				steps++
				if s.step(); s.m.unsure {
					return // the clock was at a boundary
				}
			}
			s.finish()
		})
	})
	if steps > 20_000 { // shorter runs miss a few of the rarer ones
		allSeen(t, seen)
	}
}

// allSeen asserts that the sequences have covered the whole table.
func allSeen(t *testing.T, seen map[string]int) {
	t.Helper()
	for state := range likely {
		for _, event := range append(slices.Sorted(maps.Keys(events)), "another device's") {
			if seen[stateNames[state]+": "+event] == 0 {
				t.Errorf("never seen: %s in state %s", event, stateNames[state])
			}
		}
	}
	t.Log(seen)
}

// sequence is a bench and its model.
type sequence struct {
	*bench
	m      model
	rt     *rapid.T
	ends   map[connection]*ends
	reader *RecordReader
	table  map[probeletFlowKey]probeletFlow // after this step
	seen   map[string]int
}

// ends tracks what the two ends of a connection would send next, and whose connection it is.
type ends struct {
	isn, podISN   uint32
	options       []layers.TCPOption // of the SYN
	dataOptions   []layers.TCPOption
	text          string // sent by the client
	sent, podSent uint32
	probers       bool   // begun by a prober, and no packet of others has been seen since
	begun         uint32 // by the SYN with this ISN
}

// fairly draws from a list with equal probability; rapid's own choice prefers the first.
func fairly[T any](rt *rapid.T, label string, of ...T) T {
	return rapid.Custom(func(t *rapid.T) T {
		n := 0
		for range 10 {
			n <<= 1
			if rapid.Bool().Draw(t, "bit") {
				n++
			}
		}
		return of[n%len(of)]
	}).Draw(rt, label)
}

// rarely is true in one of 16 cases.
func rarely(rt *rapid.T, label string) bool {
	return fairly(rt, label, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15) == 15
}

// shrinking is a test that fails where rapid can look for a shorter failing sequence.
type shrinking struct {
	testing.TB
	rt *rapid.T
}

func (s shrinking) Helper()                           { s.rt.Helper() }
func (s shrinking) Fatal(args ...any)                 { s.rt.Helper(); s.rt.Fatal(args...) }
func (s shrinking) Fatalf(format string, args ...any) { s.rt.Helper(); s.rt.Fatalf(format, args...) }

const unprobedPort = 9090

// otherRequest asks another question that is probed.
var otherRequest = strings.Replace(request, "1.37", "1.38", 1)

// connections that share ports, and slots of the filter.
var connections = []connection{
	{40000, 8080}, {40000, 8080}, {40000, 8080}, {40000, 8080}, {40000 - flowPortSlots, 8080}, {40001, 8080}, {40000, unprobedPort},
}

// probed returns an endpoint that has evidence, or a port.
type probed struct {
	EndpointKey
	check uint64
}

func allProbed() []probed {
	q, other := question(request), question(otherRequest)
	return []probed{{PortKey(8080), 0}, {TCPKey(8080), 0}, {HTTPKey(8080, q), q.Check}, {HTTPKey(8080, other), other.Check}}
}

func newSequence(rt *rapid.T, b *bench, seen map[string]int) *sequence {
	b.t = shrinking{b.t, rt}
	b.reset()
	r, err := b.d.Records()
	must(b.t, err)
	rt.Cleanup(func() { _ = r.Close() })
	s := &sequence{bench: b, rt: rt, ends: map[connection]*ends{}, reader: r, seen: seen}
	s.m.flows, s.m.stored = map[connection]*probeletFlow{}, map[connection]stored{}
	s.restore()
	return s
}

// restore makes it possible again that connections are taken.
func (s *sequence) restore() {
	s.setProber(true)
	s.attachAgain()
	if fairly(s.rt, "proven", true, true, true, false) {
		s.trust(TrustProven)
		s.m.device = s.device()
	}
	for _, p := range allProbed() {
		s.learn(p)
	}
}

// isStuck reports whether no connection will be taken, whichever packets follow.
func (s *sequence) isStuck() bool {
	port := s.m.evidence[PortKey(8080)]
	return !s.m.prober || !s.m.attached || Trust(s.m.device.Trust) == TrustLost || port.FreshUntil < Now() ||
		port.ObservedAt <= s.m.tally(PortKey(8080)).WithdrawnAt
}

func (s *sequence) setProber(prober bool) {
	s.m.prober = prober
	must(s.t, s.d.SetProber(Prober{AnyLocal: prober}))
}

func (s *sequence) attachAgain() {
	s.attach()
	s.m.attached = true
	s.m.device = s.device()
	s.m.evidence, s.m.tallies = map[EndpointKey]Evidence{}, map[EndpointKey]Tally{}
}

// learn changes the evidence of an endpoint or a port.
func (s *sequence) learn(p probed) {
	if !s.m.attached {
		return
	}
	key := p.EndpointKey
	e := success(s.t, fairly(s.rt, "status", 200, 204, 226), time.Hour)
	e.Check = p.check
	switch fairly(s.rt, "how", "fresh", "fresh", "fresh", "fresh", "cleared", "failure", "for a second", "unknown", "another question") {
	case "another question":
		e.Check ^= 1 << fairly(s.rt, "bit", 0, 31, 32, 63)
	case "cleared":
		e.FreshUntil = 0
	case "failure":
		e.Result = ResultFailure
	case "unknown":
		must(s.t, s.pod.Delete(key))
		delete(s.m.evidence, key)
		delete(s.m.tallies, key)
		return
	case "for a second":
		e.FreshUntil = e.ObservedAt + uint64(time.Second)
	}
	s.put(key, e)
	s.m.evidence[key] = e
	if _, ok := s.m.tallies[key]; !ok {
		s.m.tallies[key] = Tally{}
	}
}

func (s *sequence) step() {
	switch {
	case s.isStuck() && rarely(s.rt, "restored"):
		s.restore()
	case rarely(s.rt, "time passes"):
		s.passTime()
	case rarely(s.rt, "something changes"):
		s.change()
	default:
		s.packet(fairly(s.rt, "connection", connections...), rarely(s.rt, "another device's"))
	}
}

func (s *sequence) passTime() {
	d := fairly(s.rt, "passes", 300*time.Millisecond, 300*time.Millisecond, 600*time.Millisecond, 1200*time.Millisecond,
		31*time.Second, 3*time.Minute, 11*time.Minute, 4*time.Hour)
	s.wait(d)
	for c, f := range s.m.flows {
		*s.m.flows[c] = older(*f, d)
	}
	for key, t := range s.m.tallies {
		s.m.tallies[key] = older(t, d)
	}
	for key, e := range s.m.evidence {
		s.m.evidence[key] = older(e, d)
	}
	s.m.device = older(s.m.device, d)
	if fairly(s.rt, "sweep", false, true) {
		s.sweeps()
	}
}

func (s *sequence) sweeps() {
	s.m.before = Now()
	must(s.t, s.d.Sweep())
	s.m.after = Now()
	s.m.sweep()
	s.table = s.flowTable()
	s.same()
}

// change is something that a person or the daemon does.
func (s *sequence) change() {
	switch fairly(s.rt, "what", "known", "known", "known", "known", "prober", "prober", "trust", "trust", "void", "attached", "detached") {
	case "known":
		s.learn(fairly(s.rt, "of", allProbed()...))
	case "prober":
		s.setProber(!s.m.prober)
	case "trust":
		if s.m.attached {
			must(s.t, s.d.TrustAgain(s.key))
			s.untrust()
		}
	case "void":
		if s.m.attached {
			s.m.device.WithdrawnAt = Now()
			s.voidPod(s.m.device.WithdrawnAt)
		}
	case "attached":
		s.restore()
	case "detached":
		must(s.t, s.d.RemoveDevice(s.key))
		s.m.attached = false
		s.m.evidence, s.m.tallies = nil, nil
	}
}

func (s *sequence) untrust() {
	old := s.m.device
	s.m.device = probeletDevice{Generation: old.Generation, Netns: old.Netns, Hook: old.Hook, WithdrawnAt: old.WithdrawnAt, Nsid: old.Nsid}
}

// packet passes a packet through the programs and the model.
func (s *sequence) packet(c connection, foreign bool) {
	if s.ends[c] == nil {
		s.ends[c] = &ends{}
		s.begin(s.ends[c])
	}
	e, f := s.ends[c], s.m.flows[c]
	state := uint8(0)
	if f != nil {
		state = f.State
	}
	name := fairly(s.rt, "event", likely[state]...)
	if foreign || fairly(s.rt, "unlikely", false, false, true) {
		name = fairly(s.rt, "any event", slices.Sorted(maps.Keys(events))...)
	}
	event := events[name]
	segment := event.make(s, e, f)
	p := packet{of: c, foreign: foreign && !event.pods, Segment: s.address(c, event.pods, segment)}
	if p.foreign {
		name = "another device's"
	}
	s.whose(p, event.pods)
	s.seen[stateNames[state]+": "+name]++
	s.answersLost = state == 0 && rarely(s.rt, "answers get lost")
	got := s.run(p, event.pods)
	s.rt.Logf("%s: %s: %v %s", stateNames[state], name, p, got)
	s.seen[stateNames[state]+": "+string(got)]++
}

// whose tracks whose each connection is, independently of the programs.
func (s *sequence) whose(p packet, pods bool) {
	e := s.ends[p.of]
	switch {
	case pods:
	case p.foreign:
		e.probers = false
	case p.begins() && (!e.probers || p.Seq != e.begun):
		e.probers, e.begun = s.m.prober, p.Seq
	}
}

func (s *sequence) address(c connection, pods bool, segment bpftest.Segment) bpftest.Segment {
	client, pod := netip.AddrPortFrom(s.client.Addr(), c.client), netip.AddrPortFrom(s.srv.Addr(), c.pod)
	segment.Src, segment.Dst, segment.SrcMAC, segment.DstMAC = client, pod, bpftest.ClientMAC, bpftest.PodMAC
	if pods {
		segment.Src, segment.Dst, segment.SrcMAC, segment.DstMAC = pod, client, bpftest.PodMAC, bpftest.ClientMAC
	}
	segment.Window = uint16(1000 + len(segment.Payload))
	return segment
}

func (s *sequence) run(p packet, pods bool) fate {
	in := p.Bytes(s.t, nil)
	var got fate
	var out []byte
	s.m.before = Now()
	switch {
	case pods:
		got, out = s.receives(in)
	case p.foreign:
		got, out = s.egress(bpftest.Packet{Frame: in, From: otherIfindex})
	default:
		got, out = s.sends(in)
	}
	s.m.after = Now()
	s.table = s.flowTable()
	s.m.drawn = s.table[s.flowKey(p.of)]
	var want decision
	if pods {
		want = s.m.observe(p)
	} else {
		want = s.m.steer(p)
	}
	s.arrives(p, want, pods)
	if s.m.unsure {
		return got
	}
	s.compare(p, in, want, got, out)
	s.same()
	return got
}

// arrives notes, like observe, the first answer seen on a device.
func (s *sequence) arrives(p packet, d decision, pods bool) {
	f := s.m.flows[p.of]
	first := !pods && d.fate == toClient && f != nil && f.Flags&(onTrial|connected) == onTrial
	if first && s.m.attached && !s.answersLost {
		s.m.device.Observed = 1
	}
}

func (s *sequence) compare(p packet, in []byte, want decision, got fate, out []byte) {
	s.rt.Helper()
	frame := []byte(nil)
	if want.fate != swallowed {
		frame = want.frame(s.t)
	}
	if want.fate != swallowed && string(frame) == string(in) {
		want.fate = untouched // nothing translates it
	}
	if got != want.fate || string(out) != string(frame) {
		s.rt.Fatalf("%v\n%s:\n% x,\nwant %s:\n% x", p, got, out, want.fate, frame)
	}
	if !s.ends[p.of].probers && got != untouched {
		s.rt.Fatalf("%v, on a connection that is not a prober's, %s", p, got)
	}
}

func (s *sequence) flowKey(c connection) probeletFlowKey {
	return probeletFlowKey{
		ClientAddr: s.client.Addr().As16(), PodAddr: s.srv.Addr().As16(), Ifindex: benchIfindex,
		ClientPort: c.client, PodPort: c.pod,
	}
}

// same asserts that the maps equal the model, and adopts their exact times.
func (s *sequence) same() {
	s.rt.Helper()
	s.sameFlows()
	s.sameStored()
	if s.m.attached {
		got := s.device()
		adopt(s, &s.m.device, &got)
		for key, want := range s.m.tallies {
			got := s.tally(key)
			adopt(s, &want, &got)
			s.m.tallies[key] = want
		}
	}
	s.sameRecords()
}

// adopt asserts that got equals want, except for times that the programs read from their clock in this step.
func adopt[T probeletFlow | probeletDevice | Tally](s *sequence, want, got *T) {
	s.rt.Helper()
	theirs := times(got)
	for i, t := range times(want) {
		if *t == s.m.before || *t > s.m.before && *theirs[i] > *t && *theirs[i]-*t <= s.m.after-s.m.before {
			*t += min(*theirs[i]-*t, s.m.after-s.m.before)
		}
	}
	if *got != *want {
		s.rt.Fatalf("the maps have\n%+v, want\n%+v", *got, *want)
	}
}

func (s *sequence) sameFlows() {
	s.rt.Helper()
	slots := [flowPortSlots]uint32{}
	for c, want := range s.m.flows {
		got, ok := s.table[s.flowKey(c)]
		if !ok {
			s.rt.Fatalf("no flow of %v, want %+v", c, *want)
		}
		adopt(s, want, &got)
		slots[c.client%flowPortSlots]++
	}
	if len(s.table) != len(s.m.flows) {
		s.rt.Fatalf("flows %+v, want %+v", s.table, s.m.flows)
	}
	if s.flowPorts() != slots {
		s.rt.Fatal("flow_ports does not count the flows")
	}
}

func (s *sequence) sameStored() {
	s.rt.Helper()
	got := map[connection]stored{}
	for key, kept := range entries[probeletFlowKey, probeletStored](s.t, s.d.objects.Requests) {
		c := connection{key.ClientPort, key.PodPort}
		if f := s.m.flows[c]; f == nil || kept.Owner != f.Owner || strings.Trim(string(kept.Bytes[kept.Len:]), "\x00") != "" {
			s.rt.Fatalf("stored for %v: %+v; its flow is %+v", c, kept, f)
		}
		got[c] = stored{string(kept.Bytes[:kept.Len]), kept.Fin != 0}
	}
	if !maps.Equal(got, s.m.stored) {
		s.rt.Fatalf("stored %+v, want %+v", got, s.m.stored)
	}
}

func (s *sequence) sameRecords() {
	s.rt.Helper()
	got, want := readAll(s.t, s.reader), s.m.records
	s.m.records = nil
	same := len(got) == len(want)
	for i := 0; i < len(want) && same; i++ {
		if got[i].ObservedAt >= s.m.before && got[i].ObservedAt <= s.m.after {
			want[i].ObservedAt = got[i].ObservedAt
		}
		same = got[i].equal(want[i])
	}
	if !same {
		s.rt.Fatalf("records\n%+v, want\n%+v", got, want)
	}
}

// equal compares records, and treats a nil payload like an empty one.
func (r Record) equal(other Record) bool {
	same := string(r.Payload) == string(other.Payload)
	r.Payload, other.Payload = nil, nil
	return same && reflect.DeepEqual(r, other)
}

// finish lets everything end, after which nothing may be left.
func (s *sequence) finish() {
	s.wait(4 * time.Hour)
	s.m.flows = map[connection]*probeletFlow{}
	must(s.t, s.d.Sweep())
	s.noFlows()
}

var stateNames = [...]string{0: "none", observing: "observing", taken: "taken", handing: "handing", handed: "handed"}

// event is a kind of packet.
type event struct {
	pods bool // sent by the pod
	make func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment
}

// likely lists the events that advance a connection, by the state of its flow; 0: it has none.
var likely = map[uint8][]string{
	0:         {"SYN", "SYN", "SYN", "SYN", "SYN", "SYN", "other SYN", "first data", "SYN-ACK", "answer"},
	observing: {"SYN", "SYN-ACK", "SYN-ACK", "ACK", "first data", "first data", "answer", "answer", "FIN", "refusal"},
	taken:     {"ACK", "ACK", "SYN", "first data", "first data", "first data", "first data", "keep-alive", "FIN", "more data"},
	handing:   {"SYN-ACK", "SYN-ACK", "SYN-ACK", "refusal", "more data", "more data", "first data", "FIN", "keep-alive"},
	handed:    {"first data", "more data", "ACK", "ACK", "answer", "answer", "more answer", "FIN", "pod's FIN", "pod's ACK", "pod's ACK", "SYN-ACK"},
}

var events = map[string]event{
	"SYN":          {false, func(s *sequence, e *ends, _ *probeletFlow) bpftest.Segment { return s.syn(e) }},
	"other SYN":    {false, func(s *sequence, e *ends, _ *probeletFlow) bpftest.Segment { s.begin(e); return s.syn(e) }},
	"ACK":          {false, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment { return s.data("A", e, f, e.sent, "") }},
	"keep-alive":   {false, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment { return s.data("A", e, f, 1<<32-1, "") }},
	"first data":   {false, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment { return s.dataFrom("PA", e, f, 0) }},
	"more data":    {false, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment { return s.dataFrom("A", e, f, e.sent) }},
	"data and FIN": {false, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment { return s.lastData(e, f) }},
	"FIN":          {false, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment { return s.data("FA", e, f, e.sent, "") }},
	"misplaced FIN": {false, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment {
		return s.data("FA", e, f, s.offset(e), "")
	}},
	"RST": {false, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment {
		return s.data(s.pick("R", "RA"), e, f, e.sent, "")
	}},
	"odd one": {false, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment {
		return s.data(s.pick(oddFlags...), e, f, s.offset(e), s.pick("", "", "odd", e.text))
	}},
	"SYN-ACK": {true, func(s *sequence, e *ends, _ *probeletFlow) bpftest.Segment {
		mss := fairly(s.rt, "pod's MSS", 0, clientMSS, 90, 1<<16-1)
		r := bpftest.Segment{Flags: "SA", Seq: e.podISN, Ack: e.isn + 1}
		if mss != 0 {
			r.Options = []layers.TCPOption{mssOption(uint16(mss))}
		}
		return r
	}},
	"other SYN-ACK": {true, func(s *sequence, e *ends, _ *probeletFlow) bpftest.Segment { return s.otherSYNACK(e) }},
	"refusal": {true, func(_ *sequence, e *ends, _ *probeletFlow) bpftest.Segment {
		return bpftest.Segment{Flags: "RA", Ack: e.isn + 1}
	}},
	"answer": {true, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment {
		return s.podData("PA", e, f, 0, s.pick(answers...))
	}},
	"more answer": {true, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment {
		return s.podData("A", e, f, e.podSent, "<html>")
	}},
	"pod's ACK": {true, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment {
		return s.podData("A", e, f, e.podSent, "")
	}},
	"pod's FIN": {true, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment {
		return s.podData("FA", e, f, e.podSent, s.pick("", "", "end"))
	}},
	"pod's RST": {true, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment {
		return s.podData(s.pick("R", "RA"), e, f, e.podSent, "")
	}},
	"pod's odd one": {true, func(s *sequence, e *ends, f *probeletFlow) bpftest.Segment {
		return s.podData(s.pick(oddFlags...), e, f, s.offset(e), s.pick("", "", "odd"))
	}},
}

var (
	oddFlags = []string{"A", "SA", "SF", "SR", "SFA", "FR", "F", "P", "S", "FPA", "AU"}
	answers  = []string{"HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.0 204 No Content\r\n\r\n", "HTTP/1.1 503 Oops\r\n\r\n", "HTTP/1.1 404 Not Found",
		"HTTP/1.1 100 Continue\r\n\r\n", "SSH-2.0-server\r\n", "HTTP/1.1 20"}
)

func (s *sequence) pick(of ...string) string { return fairly(s.rt, "which", of...) }

// begin starts another connection on the same ports.
func (s *sequence) begin(e *ends) {
	options := map[string][]layers.TCPOption{
		"as Linux": s.bench.syn().Options, "none": nil, "small MSS": {mssOption(100)}, "fast open": {{OptionType: 34, OptionLength: 2}},
		"timestamps": {{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: make([]byte, 8)}},
	}
	*e = ends{
		isn: e.isn + rapid.Uint32Range(1, 1<<32-1).Draw(s.rt, "ISN"), podISN: rapid.Uint32().Draw(s.rt, "pod's ISN"),
		options: options[s.pick("as Linux", "as Linux", "as Linux", "none", "small MSS", "fast open")],
		text: s.pick(request, request, request, otherRequest, strings.Replace(request, "/healthz", "/nobody's", 1),
			post, "x", strings.Repeat("long ", 250), strings.Repeat("longer ", 250)),
		dataOptions: options[s.pick("none", "timestamps")],
	}
}

func (s *sequence) syn(e *ends) bpftest.Segment {
	return bpftest.Segment{Flags: "S", Seq: e.isn, Options: e.options}
}

// data returns a client's packet at an offset in its data.
func (s *sequence) data(flags string, e *ends, f *probeletFlow, offset uint32, payload string) bpftest.Segment {
	return bpftest.Segment{
		Flags: flags, Seq: e.isn + 1 + offset, Ack: s.acknowledged(e, f), Payload: payload, Options: e.dataOptions,
	}
}

// acknowledged returns what a client has received from the pod, or from us.
func (s *sequence) acknowledged(e *ends, f *probeletFlow) uint32 {
	isn := e.podISN
	deltas := []uint32{0, 0, e.podSent, e.podSent, e.podSent + 1}
	if f != nil && f.State != observing {
		isn = f.OurIsn
		deltas = append(deltas, uint32(len(reply))+1)
		if f.Flags&podFin != 0 {
			deltas = []uint32{0, e.podSent, f.PodFin - f.PodIsn - 1, f.PodFin - f.PodIsn - 1}
		} else if f.State == taken && f.Flags&requested == 0 {
			deltas = []uint32{0}
		}
	}
	return isn + 1 + fairly(s.rt, "acknowledged", deltas...)
}

// dataFrom returns the next piece of the client's data from an offset on.
func (s *sequence) dataFrom(flags string, e *ends, f *probeletFlow, offset uint32) bpftest.Segment {
	rest := e.text[min(int(offset), len(e.text)):]
	if rest == "" {
		rest = "more"
	}
	n := fairly(s.rt, "bytes", len(rest), len(rest), len(rest), (len(rest)+1)/2, 1)
	if e.sent == offset {
		e.sent += uint32(n)
	}
	return s.data(flags, e, f, offset, rest[:n])
}

func (s *sequence) lastData(e *ends, f *probeletFlow) bpftest.Segment {
	offset := fairly(s.rt, "offset", 0, e.sent)
	return s.data("FPA", e, f, offset, e.text[min(int(offset), len(e.text)-1):])
}

// offset returns an offset that may not fit.
func (s *sequence) offset(e *ends) uint32 {
	return fairly(s.rt, "offset", 0, 0, 1, e.sent, e.sent+1, e.sent-1, 1<<32-1, 1<<32-2, 2047, 2048, MaxRecorded-2, MaxRecorded, 70000)
}

func (s *sequence) otherSYNACK(e *ends) bpftest.Segment {
	r := bpftest.Segment{Flags: "SA", Seq: e.podISN, Ack: e.isn + 1}
	if fairly(s.rt, "other ISN", false, true) {
		r.Seq += 77
	} else {
		r.Ack += 77
	}
	return r
}

// podData returns a pod's packet at an offset in its data.
func (s *sequence) podData(flags string, e *ends, f *probeletFlow, offset uint32, payload string) bpftest.Segment {
	acks := []uint32{e.isn + 1, e.isn + 1 + e.sent, e.isn + 1 + e.sent, e.isn + 2 + e.sent}
	if f != nil && f.Flags&clientFin != 0 {
		acks = []uint32{e.isn + 1 + e.sent, f.ClientFin, f.ClientFin, f.ClientFin}
	}
	if end := offset + uint32(len(payload)); end > e.podSent && end < 1000 {
		e.podSent = end
	}
	return bpftest.Segment{
		Flags: flags, Seq: e.podISN + 1 + offset, Ack: fairly(s.rt, "acknowledged", acks...), Payload: payload, Options: e.dataOptions,
	}
}

func (p packet) String() string { return fmt.Sprintf("%v (foreign: %v)", p.Segment, p.foreign) }
