package datapath

import (
	"cmp"
	"encoding/binary"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"

	"github.com/probelet/probelet/bpf/bpftest"
)

// Constants from bpf/abi.h, flow.h and probelet.bpf.c.
const (
	connectingFor = uint64(30 * time.Second)
	observingFor  = uint64(10 * time.Minute)
	lateFor       = uint64(time.Minute)
	takenFor      = uint64(3 * time.Hour)
	handingFor    = uint64(130 * time.Second)
	handedFor     = uint64(3 * time.Hour)
	answerLostNS  = uint64(500 * time.Millisecond)
	defaultMSS    = 536
	storedMax     = 2048
	firstWindow   = storedMax
)

const (
	observing = uint8(probeletFlowStateFLOW_OBSERVING)
	taken     = uint8(probeletFlowStateFLOW_TAKEN)
	handing   = uint8(probeletFlowStateFLOW_HANDING)
	handed    = uint8(probeletFlowStateFLOW_HANDED)
)

const (
	connected    = uint32(probeletFlowFlagFLOW_CONNECTED)
	requested    = uint32(probeletFlowFlagFLOW_REQUESTED)
	clientFin    = uint32(probeletFlowFlagFLOW_CLIENT_FIN)
	clientFinAck = uint32(probeletFlowFlagFLOW_CLIENT_FIN_ACKED)
	podFin       = uint32(probeletFlowFlagFLOW_POD_FIN)
	podFinAck    = uint32(probeletFlowFlagFLOW_POD_FIN_ACKED)
	storing      = uint32(probeletFlowFlagFLOW_STORED)
	onTrial      = uint32(probeletFlowFlagFLOW_TRIAL)
	byXDP        = uint32(probeletFlowFlagFLOW_XDP)
	done         = uint32(probeletFlowFlagFLOW_DONE)
	contested    = uint32(probeletFlowFlagFLOW_CONTESTED)
	answering    = uint32(probeletFlowFlagFLOW_ANSWERED)
	unrecorded   = uint32(probeletFlowFlagFLOW_UNRECORDED)
	forTraffic   = uint32(probeletFlowFlagFLOW_BY_TRAFFIC)
)

// model implements the table in bpf/flow.h in Go: what the programs do with packets, given what is known. It holds what the maps
// should contain, including times. For a time that the programs read from their clock it has before; the maps may have up to after.
type model struct {
	prober   bool // the clients are probers
	attached bool
	device   probeletDevice
	wanted   bool // its port's traffic has been asked for
	evidence map[EndpointKey]Evidence
	tallies  map[EndpointKey]Tally
	flows    map[connection]*probeletFlow
	stored   map[connection]stored
	records  []Record // written in this step

	before, after uint64       // bounds of this step
	unsure        bool         // the result depends on when exactly the step took place
	drawn         probeletFlow // the owner and our ISN are chosen by the kernel
}

// connection identifies a flow by those parts of its key that vary on a bench.
type connection struct{ client, pod uint16 }

// stored is what a client has sent on a connection that is being handed over.
type stored struct {
	bytes string
	fin   bool
}

// packet is a packet of a connection.
type packet struct {
	bpftest.Segment
	of      connection
	foreign bool // from a client, but received by another device
}

func (p packet) has(flags string) bool { return strings.ContainsAny(p.Flags, flags) }
func (p packet) begins() bool          { return p.has("S") && !p.has("FRA") }
func (p packet) len() uint32           { return uint32(len(p.Payload)) }

// decision is what the programs do with a packet.
type decision struct {
	fate
	segment bpftest.Segment // as it continues, unless it is swallowed
	made    bool            // its headers are new, not modified
}

func pass(p packet) decision               { return decision{fate: untouched, segment: p.Segment} }
func swallow(packet) decision              { return decision{fate: swallowed} }
func translate(to fate, p packet) decision { return decision{fate: to, segment: p.Segment} }

// frame returns the decision's segment as bytes.
func (d decision) frame(t testing.TB) []byte {
	if !d.made {
		return d.segment.Bytes(t, nil)
	}
	return d.segment.Bytes(t, func(v4 *layers.IPv4, v6 *layers.IPv6) { v4.Id, v6.FlowLabel = 0, 0 })
}

// become replaces p with a segment of our own.
func (p packet) become(to fate, flags string, seq, ack uint32, window, mss uint16, payload string) decision {
	s := bpftest.Segment{
		Src: p.Src, Dst: p.Dst, SrcMAC: p.SrcMAC, DstMAC: p.DstMAC,
		Flags: flags, Seq: seq, Ack: ack, Window: window, Payload: payload,
	}
	if mss != 0 {
		s.Options = []layers.TCPOption{mssOption(mss)}
	}
	return decision{to, s, true}
}

// back returns a segment of our own to the sender of p.
func (p packet) back(to fate, flags string, seq, ack uint32, window, mss uint16, payload string) decision {
	p.Src, p.Dst, p.SrcMAC, p.DstMAC = p.Dst, p.Src, p.DstMAC, p.SrcMAC
	return p.become(to, flags, seq, ack, window, mss, payload)
}

// tally returns an endpoint's tally like Pod.Tally.
func (m *model) tally(key EndpointKey) Tally {
	t := m.tallies[key]
	t.WithdrawnAt = max(t.WithdrawnAt, m.device.WithdrawnAt)
	return t
}

// reached reports whether a time has been reached.
func (m *model) reached(t uint64) bool {
	m.unsure = m.unsure || m.before < t && t <= m.after
	return t <= m.before
}

func (m *model) tooLong(since uint64) bool { return m.reached(since + answerLostNS + 1) }

func (m *model) end(c connection) {
	delete(m.flows, c)
	delete(m.stored, c)
}

// knows reports whether the evidence belongs to the same attachment of the device as the flow.
func (m *model) knows(f *probeletFlow) bool { return m.attached && m.device.Generation == f.Generation }

// steer models steer.
func (m *model) steer(p packet) decision {
	f := m.flows[p.of]
	if f != nil && (p.foreign || p.begins() && p.Seq != f.ClientIsn) {
		if f.Flags&(onTrial|connected) == onTrial && m.attached && m.device.TrialAt == f.StartedAt {
			m.device.TrialAt = 0
		}
		m.end(p.of)
		f = nil
	}
	switch {
	case f == nil && p.begins():
		return m.decide(p)
	case f == nil:
		return pass(p)
	case p.begins():
		return m.synAgain(p, f)
	case f.State == taken:
		return m.taken(p, f)
	case f.State == handing:
		return m.handing(p, f)
	case f.State == handed:
		return m.handed(p, f)
	}
	return m.observing(p, f)
}

func (m *model) decide(p packet) decision {
	port, known := m.evidence[PortKey(p.of.pod)]
	mss, understood := mssOf(p.Options)
	if p.foreign || !m.prober || !m.attached || !known || !understood || p.Payload != "" {
		return pass(p)
	}
	f := &probeletFlow{
		Owner: m.drawn.Owner, StartedAt: m.before, Deadline: m.before + connectingFor, State: observing,
		Generation: m.device.Generation, ClientIsn: p.Seq, ClientMss: mss, Flags: byXDP * uint32(m.device.Hook),
	}
	valid := port.ObservedAt > m.tally(PortKey(p.of.pod)).WithdrawnAt
	fresh := !m.reached(port.FreshUntil) && valid
	due := valid && IsRealDue(port, m.tallies[TCPKey(p.of.pod)])
	serving := valid && !due && m.isServing(p, port)
	if due && fresh {
		m.meet(p, probeletObstacleOBSTACLE_REAL_DUE)
	}
	byTraffic := serving && (!fresh || m.tallies[PortKey(p.of.pod)].AskedAt != 0)
	take := (fresh && !due && (serving || m.isAnswered(p)) || serving) && m.trusts(p, f)
	if take && byTraffic {
		f.Flags |= forTraffic
	}
	m.flows[p.of] = f
	if tally, ok := m.tallies[PortKey(p.of.pod)]; ok && !take {
		tally.AskedAt = f.StartedAt
		m.tallies[PortKey(p.of.pod)] = tally
	}
	if !take && port.TrafficUntil != 0 {
		m.notePassed(TCPKey(p.of.pod))
	}
	if !take {
		return pass(p)
	}
	f.State, f.OurIsn, f.EvidenceAt, f.Deadline = taken, m.drawn.OurIsn, port.ObservedAt, m.before+takenFor
	if most := m.device.PodMtu; most > headers(p) {
		f.ClientMss = min(mss, most-headers(p))
	}
	return synAck(p, f)
}

// isAnswered reports whether the pod has answered the connection last passed on.
func (m *model) isAnswered(p packet) bool {
	if m.tallies[PortKey(p.of.pod)].AskedAt != 0 {
		m.meet(p, probeletObstacleOBSTACLE_UNANSWERED)
		return false
	}
	return true
}

// meet notes what keeps a probe of a port from being answered.
func (m *model) meet(p packet, o probeletObstacle) {
	if tally, ok := m.tallies[PortKey(p.of.pod)]; ok {
		tally.Obstacle = uint8(o)
		m.tallies[PortKey(p.of.pod)] = tally
	}
}

// isServing reports whether the port's traffic shows that it would be served.
func (m *model) isServing(p packet, port Evidence) bool {
	tally, noted := m.tallies[PortKey(p.of.pod)]
	kind := KindHTTP
	if _, tcp := m.tallies[TCPKey(p.of.pod)]; tcp {
		kind = KindTCP
	}
	serving := noted && IsServing(port, tally, kind, m.before)
	m.unsure = m.unsure || noted && serving != IsServing(port, tally, kind, m.after)
	return serving
}

// notePassed notes that a probe of an endpoint is passed on.
func (m *model) notePassed(key EndpointKey) {
	if tally, ok := m.tallies[key]; ok {
		tally.Answered = 0
		m.tallies[key] = tally
	}
}

// notedAgain returns when a packet is noted again after one that was noted then.
func notedAgain(at uint64) uint64 { return at + uint64(20*time.Millisecond) }

// noteTraffic notes what a packet of the pod's shows.
func (m *model) noteTraffic(p packet) {
	tally, ok := m.tallies[PortKey(p.of.pod)]
	if !ok || !m.attached || !m.wanted || p.has("R") {
		return
	}
	status := statusOf(p.Payload)
	served, closed := status >= 200 && status < 500, p.has("F")
	due := served && m.reached(notedAgain(tally.ServedAt))
	if closed {
		due = m.reached(notedAgain(tally.ClosedAt)) || due
	}
	if !due {
		return
	}
	if closed {
		tally.ClosedAt = m.before
	}
	if served {
		tally.ServedAt = m.before
	}
	m.tallies[PortKey(p.of.pod)] = tally
}

// noteAnswered notes the pod's answer to a SYN.
func (m *model) noteAnswered(p packet, f *probeletFlow) {
	if tally, ok := m.tallies[PortKey(p.of.pod)]; ok && m.knows(f) && tally.AskedAt <= f.StartedAt {
		tally.AskedAt = 0
		m.tallies[PortKey(p.of.pod)] = tally
	}
}

// headers returns the length of the headers of a packet without options.
func headers(p packet) uint16 {
	if p.Src.Addr().Is4() {
		return 20 + 20
	}
	return 40 + 20
}

// noteMTU reads the MTU from the pod's SYN-ACK.
func (m *model) noteMTU(p packet, f *probeletFlow) {
	mss, understood := mssOf(p.Options)
	if mtu := uint32(mss) + uint32(headers(p)); understood && mss != 0 && mtu <= 1<<16-1 && m.knows(f) {
		m.device.PodMtu = uint16(mtu)
	}
}

// mssOf is like readOptions, for well-formed options.
func mssOf(options []layers.TCPOption) (mss uint16, understood bool) {
	var raw []byte
	for _, o := range options {
		raw = append(raw, byte(o.OptionType))
		if o.OptionType > layers.TCPOptionKindNop {
			raw = append(append(raw, byte(len(o.OptionData)+2)), o.OptionData...)
		}
	}
	return readOptions(raw)
}

// readOptions parses a SYN's options (RFC 9293, section 3.1) and reports whether an answer may ignore them all.
func readOptions(raw []byte) (mss uint16, understood bool) {
	for len(raw) > 0 {
		kind := raw[0]
		switch kind {
		case 0: // end
			return mss, true
		case 1: // padding
			raw = raw[1:]
			continue
		case 2, 3, 4, 8: // MSS, window scale, SACK permitted, timestamps
		default:
			return 0, false
		}
		if len(raw) < 2 || raw[1] < 2 || len(raw) < int(raw[1]) || kind == 2 && raw[1] != 4 {
			return 0, false
		}
		if kind == 2 {
			mss = binary.BigEndian.Uint16(raw[2:])
		}
		raw = raw[raw[1]:]
	}
	return mss, true
}

func synAck(p packet, f *probeletFlow) decision {
	return p.back(toClient, "SA", f.OurIsn, f.ClientIsn+1, firstWindow, f.ClientMss, "")
}

func (m *model) trusts(p packet, f *probeletFlow) bool {
	switch Trust(m.device.Trust) {
	case TrustLost:
		return false
	case TrustUnproven:
		if m.device.TrialAt == 0 {
			m.device.TrialAt = m.before
			f.Flags |= onTrial
			return true
		}
		if m.tooLong(m.device.TrialAt) {
			m.lose(f, probeletLossLOSS_UNACKNOWLEDGED)
		}
		return false
	}
	port := m.tallies[PortKey(p.of.pod)]
	watched := m.flows[connection{port.WatchedPort, p.of.pod}]
	if port.WatchedAt >= m.device.TrialAt && watched != nil && watched.StartedAt == port.WatchedAt && watched.State == taken && watched.Flags&connected == 0 {
		if m.tooLong(port.WatchedAt) {
			m.lose(f, probeletLossLOSS_UNACKNOWLEDGED)
			return false
		}
		return true
	}
	port.WatchedAt, port.WatchedPort = m.before, p.of.client
	m.tallies[PortKey(p.of.pod)] = port
	return true
}

func (m *model) lose(f *probeletFlow, loss probeletLoss) {
	if m.knows(f) && Trust(m.device.Trust) != TrustLost {
		m.device.Trust, m.device.Loss, m.device.LostAt = uint16(TrustLost), uint16(loss), m.before
	}
}

func (m *model) synAgain(p packet, f *probeletFlow) decision {
	switch {
	case f.State == observing:
		return pass(p)
	case f.State != taken:
		return swallow(p)
	case f.Flags&connected != 0 || !m.tooLong(f.StartedAt):
		return synAck(p, f)
	}
	m.lose(f, probeletLossLOSS_SYN_REPEATED)
	f.State, f.Deadline = observing, m.before+connectingFor
	return pass(p)
}

func (m *model) observing(p packet, f *probeletFlow) decision {
	if p.has("R") && f.Flags&connected == 0 && p.Seq != f.ClientIsn+1 { // a client in SYN-SENT resets the leftover of an earlier connection
		return pass(p)
	}
	understood := p.Payload == "" || f.Flags&requested != 0 || p.Seq == f.ClientIsn+1 && m.noteRequest(p, f)
	m.record(p, f, false)
	switch {
	case p.has("R") || !understood, p.has("F") && !m.isAwaited(p, f):
		m.end(p.of)
	case p.has("F"):
		f.Flags |= done
		f.Deadline = m.before + lateFor
	}
	return pass(p)
}

// isAwaited reports whether it still matters how the pod answers a request that its client has given up on.
func (m *model) isAwaited(p packet, f *probeletFlow) bool {
	e, known := m.evidence[EndpointKey{f.Question.Hash, p.of.pod, KindHTTP}]
	return f.Flags&(requested|answering) == requested && known && m.knows(f) && !m.reached(e.TrafficUntil)
}

// closedProbe models a handed-over connection that its client has closed.
func (m *model) closedProbe(p packet, f *probeletFlow) {
	if _, known := m.evidence[EndpointKey{f.Question.Hash, p.of.pod, KindHTTP}]; f.Flags&requested != 0 && known && m.knows(f) {
		f.Deadline = m.before + lateFor
	}
}

func (m *model) noteRequest(p packet, f *probeletFlow) bool {
	if !isQuestion(p.Payload) {
		return false
	}
	q := question(p.Payload)
	f.Question.Hash, f.Question.Check = q.Hash, q.Check
	f.Flags |= requested
	if m.knows(f) {
		m.notePassed(HTTPKey(p.of.pod, q))
	}
	return true
}

// isQuestion reports whether a segment may be a whole request without a body.
func isQuestion(text string) bool {
	const start, end = "GET /", "\r\n\r\n"
	return strings.HasPrefix(text, start) && strings.HasSuffix(text[len(start):], end) && len(text) <= MaxRequest
}

func (m *model) taken(p packet, f *probeletFlow) decision {
	offset := p.Seq - f.ClientIsn - 1
	m.acknowledge(f)
	switch {
	case p.has("R"):
		m.end(p.of)
		return swallow(p)
	case p.Payload == "" && p.has("F"):
		return m.closed(p, f, offset)
	case p.Payload == "":
		if offset != 1<<32-1 || f.Flags&requested != 0 {
			return swallow(p)
		}
		f.Flags |= done
		return m.replay(p, f)
	case offset != 0 || p.Ack != f.OurIsn+1:
		return swallow(p)
	}
	if answer, ok := m.answer(p, f); ok {
		return answer
	}
	if m.noteRequest(p, f) {
		m.record(p, f, false)
	} else {
		f.Flags |= done
	}
	m.store(p, f, 0)
	return m.replay(p, f)
}

func (m *model) acknowledge(f *probeletFlow) {
	if f.Flags&connected == 0 && f.Flags&onTrial != 0 && m.knows(f) {
		if m.device.Observed == 0 {
			m.lose(f, probeletLossLOSS_UNOBSERVED)
		} else if Trust(m.device.Trust) == TrustUnproven {
			m.device.Trust = uint16(TrustProven)
		}
	}
	f.Flags |= connected
}

// closed models the client's FIN on a taken connection.
func (m *model) closed(p packet, f *probeletFlow, offset uint32) decision {
	if f.Flags&requested == 0 && offset != 0 {
		return swallow(p)
	}
	if f.Flags&requested == 0 {
		m.hit(f, TCPKey(p.of.pod), f.StartedAt)
	}
	m.end(p.of)
	return p.back(toClient, "RA", p.Ack, p.Seq+1, 0, 0, "")
}

func (m *model) hit(f *probeletFlow, key EndpointKey, at uint64) {
	if t, ok := m.tallies[key]; ok && m.knows(f) {
		t.Hits++
		t.Answered++
		t.AnsweredAt = at
		m.tallies[key] = t
	}
}

func (m *model) answer(p packet, f *probeletFlow) (decision, bool) {
	again := f.Flags&requested != 0
	if again {
		f.Flags &^= requested
		if m.tooLong(f.StartedAt) {
			m.lose(f, probeletLossLOSS_REQUEST_REPEATED)
			return decision{}, false
		}
	}
	q := question(p.Payload)
	key := HTTPKey(p.of.pod, q)
	e, known := m.evidence[key]
	_, noted := m.tallies[PortKey(p.of.pod)] // without a tally nothing is known about withdrawals
	if p.has("F") || !isQuestion(p.Payload) || !known || e.Check != q.Check || !noted || !m.knows(f) {
		return decision{}, false
	}
	port, endpoint := m.tally(PortKey(p.of.pod)), m.tallies[key]
	if f.Flags&forTraffic != 0 {
		e.FreshUntil = 0
	}
	may := MayAnswer(e, port, endpoint, f.StartedAt, m.before)
	m.unsure = m.unsure || may != MayAnswer(e, port, endpoint, f.StartedAt, m.after)
	if !may {
		return decision{}, false
	}
	if !again {
		m.hit(f, key, m.before)
	}
	f.Flags |= requested
	return p.back(toClient, "FPA", f.OurIsn+1, p.Seq+p.len(), firstWindow, 0, replyText(int(e.Status))), true
}

func (m *model) store(p packet, f *probeletFlow, offset uint32) {
	most := uint64(cmp.Or(f.ClientMss, defaultMSS))
	if uint64(offset)+uint64(p.len()) > most || offset >= storedMax || p.len() > storedMax || p.has("U") {
		return
	}
	s := m.stored[p.of]
	if s.fin || uint32(len(s.bytes)) != offset || f.Flags&storing == 0 && offset != 0 {
		return
	}
	f.Flags |= storing
	m.stored[p.of] = stored{s.bytes + p.Payload, p.has("F")}
}

func (m *model) replay(p packet, f *probeletFlow) decision {
	f.State, f.ClientWindow, f.Deadline = handing, p.Window, m.before+handingFor
	return p.become(toPod, "S", f.ClientIsn, 0, p.Window, f.ClientMss, "")
}

func (m *model) handing(p packet, f *probeletFlow) decision {
	offset := p.Seq - f.ClientIsn - 1
	m.record(p, f, false)
	switch {
	case p.has("R"):
		m.end(p.of)
	case offset == 1<<32-1, offset == 0 && p.Payload != "":
		return m.replay(p, f)
	case f.Flags&storing != 0 && (p.Payload != "" || p.has("F")):
		m.store(p, f, offset)
	}
	return swallow(p)
}

func (m *model) handed(p packet, f *probeletFlow) decision {
	if p.has("S") {
		return swallow(p)
	}
	f.Deadline = m.before + handedFor
	meant := p.Ack + f.PodIsn - f.OurIsn
	m.record(p, f, false)
	if p.has("F") {
		f.ClientFin = p.Seq + p.len() + 1
		f.Flags |= clientFin
	}
	if f.Flags&clientFin != 0 {
		m.closedProbe(p, f)
	}
	if f.Flags&podFin != 0 && meant == f.PodFin {
		f.Flags |= podFinAck
	}
	m.endIfDone(p, f)
	if p.has("A") {
		p.Ack = meant
	}
	return translate(toPod, p)
}

func (m *model) endIfDone(p packet, f *probeletFlow) {
	if p.has("R") || f.Flags&clientFinAck != 0 && f.Flags&podFinAck != 0 {
		m.end(p.of)
	}
}

// observe models observe.
func (m *model) observe(p packet) decision {
	m.noteTraffic(p)
	f := m.flows[p.of]
	switch {
	case f == nil || f.State == taken:
		return pass(p)
	case f.State == handing:
		return m.podHanding(p, f)
	case f.State == handed:
		return m.podHanded(p, f)
	case p.has("R"):
		m.noteAnswered(p, f)
		m.noteReset(p, f)
		m.record(p, f, true)
		m.end(p.of)
		return pass(p)
	case p.has("S") && p.Ack != f.ClientIsn+1:
		return pass(p)
	case p.has("S"):
		f.PodIsn, f.Deadline = p.Seq, m.before+observingFor
		f.Flags |= connected
		m.noteMTU(p, f)
		m.noteAnswered(p, f)
	}
	if f.Flags&connected != 0 {
		m.noteStatus(p, f)
		m.record(p, f, true)
		if f.Flags&done != 0 && (f.Flags&answering != 0 || p.has("F")) {
			m.end(p.of)
		}
	}
	return pass(p)
}

func (m *model) podHanding(p packet, f *probeletFlow) decision {
	switch {
	case !p.has("A"):
	case p.Ack != f.ClientIsn+1: // belongs to an earlier connection on these ports
		if p.has("S") {
			f.Flags |= contested
		}
		if !p.has("R") && f.Flags&contested == 0 {
			return p.back(toPod, "R", p.Ack, 0, 0, 0, "")
		}
	case p.has("R"):
		m.noteReset(p, f)
		m.record(p, f, true)
		m.end(p.of)
		return p.become(toClient, "RA", f.OurIsn+1, p.Ack, 0, 0, "")
	case p.has("S"):
		m.noteMTU(p, f)
		m.noteAnswered(p, f)
		f.State, f.PodIsn, f.Deadline = handed, p.Seq, m.before+handedFor
		return m.accept(p, f)
	}
	return pass(p)
}

func (m *model) accept(p packet, f *probeletFlow) decision {
	m.record(p, f, true)
	s, flags := m.stored[p.of], "A"
	if f.Flags&storing != 0 {
		flags = "PA"
	}
	if s.fin {
		flags = "FPA"
		f.ClientFin = p.Ack + uint32(len(s.bytes)) + 1
		f.Flags |= clientFin
		m.closedProbe(p, f)
	}
	return p.back(toPod, flags, p.Ack, p.Seq+1, f.ClientWindow, 0, s.bytes)
}

func (m *model) podHanded(p packet, f *probeletFlow) decision {
	if p.has("S") {
		if p.Seq == f.PodIsn && p.Ack == f.ClientIsn+1 {
			return m.accept(p, f)
		}
		m.end(p.of)
		return pass(p)
	}
	if p.has("A") && p.Ack != f.ClientIsn+1 {
		f.Flags &^= storing
		delete(m.stored, p.of)
	}
	if p.has("R") {
		m.noteReset(p, f)
	} else {
		m.noteStatus(p, f)
	}
	m.record(p, f, true)
	if p.has("F") {
		f.PodFin = p.Seq + p.len() + 1
		f.Flags |= podFin
	}
	if f.Flags&clientFin != 0 && p.Ack == f.ClientFin {
		f.Flags |= clientFinAck
	}
	m.endIfDone(p, f)
	p.Seq += f.OurIsn - f.PodIsn
	return translate(toClient, p)
}

// noteReset models a connection that the pod has refused or reset.
func (m *model) noteReset(p packet, f *probeletFlow) {
	if f.State == handing || f.Flags&(done|answering) == 0 {
		m.withdraw(f, PortKey(p.of.pod), probeletWithdrawalCauseWITHDRAWN_RESET)
	}
}

// noteStatus reads the beginning of the pod's answer.
func (m *model) noteStatus(p packet, f *probeletFlow) {
	if f.Flags&(requested|answering) != requested || p.Payload == "" || p.Seq != f.PodIsn+1 {
		return
	}
	f.Flags |= answering
	if statusOf(p.Payload) >= 300 {
		m.withdraw(f, EndpointKey{f.Question.Hash, p.of.pod, KindHTTP}, probeletWithdrawalCauseWITHDRAWN_STATUS)
	}
}

// statusOf returns NNN of "HTTP/1.x NNN", or 0.
func statusOf(answer string) uint16 {
	if len(answer) < 12 || answer[:7] != "HTTP/1." || answer[8] != ' ' {
		return 0
	}
	status, err := strconv.ParseUint(answer[9:12], 10, 16)
	if err != nil {
		return 0
	}
	return uint16(status)
}

func (m *model) withdraw(f *probeletFlow, key EndpointKey, cause probeletWithdrawalCause) {
	if t, ok := m.tallies[key]; ok && m.knows(f) {
		t.WithdrawnAt, t.WithdrawnCause = m.before, uint8(cause)
		m.tallies[key] = t
	}
}

// record models what the daemon receives of a packet.
func (m *model) record(p packet, f *probeletFlow, fromPod bool) {
	if f.Flags&done != 0 {
		return
	}
	r := Record{
		Owner: f.Owner, StartedAt: f.StartedAt, ObservedAt: m.before, Question: Question{f.Question.Hash, f.Question.Check},
		Device: DeviceKey{Ifindex: benchIfindex, Generation: f.Generation}, Port: p.of.pod, FromPod: fromPod, TCPFlags: tcpFlags(p.Flags),
	}
	if !p.has("SR") {
		isn := f.ClientIsn
		if fromPod {
			isn = f.PodIsn
		}
		r.Offset, r.Len = p.Seq-isn-1, p.len()
		within := max(MaxRecorded-int64(r.Offset), 0)
		r.Payload = []byte(p.Payload[:min(int64(r.Len), within)])
	}
	if len(r.Payload) > 0 || p.has("SFR") {
		m.records = append(m.records, r)
	}
	if p.has("R") || p.has("F") && !fromPod {
		f.Flags |= done
	}
}

// tcpFlags returns the flags of a segment as bits.
func tcpFlags(names string) (bits uint8) {
	for i, name := range "FSRPAU" {
		if strings.ContainsRune(names, name) {
			bits |= 1 << i
		}
	}
	return bits
}

// sweep removes flows after their deadline, or all of them if there is no device.
func (m *model) sweep() {
	for c, f := range m.flows {
		if !m.attached || m.reached(f.Deadline+1) {
			m.end(c)
		}
	}
}
