package evidence

import (
	"bytes"
	"cmp"
	"slices"
	"time"
	"unsafe"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// maxResponse limits what is kept of one response, in bytes. Repeated packets count again.
const maxResponse = 64 << 10

// exchange is what was seen of one connection.
type exchange struct {
	accepted bool   // by the pod
	request  []byte // nil if none was seen yet
	askedAt  uint64
	question datapath.Question
	segments []segment // of the response
	size     int       // memory of segments, in bytes
	beyond   bool      // there is a segment without any recorded bytes
	cut      bool      // there is a segment of which only part was recorded
	doubt    Doubt     // set: there will be no outcome, whatever follows
	finished bool
	deadline uint64
}

// segment is a packet of the response.
type segment struct {
	at          uint64 // ns
	offset, len uint32
	last        bool // the pod closed its side after it
	bytes       []byte
}

func (x *exchange) add(r datapath.Record) {
	if r.Question != (datapath.Question{}) {
		if x.doubt == "" && x.question != (datapath.Question{}) && x.question != r.Question {
			x.doubt = DoubtDisorder
		}
		x.question = r.Question
	}
	switch {
	case x.doubt != "":
	case r.TCPFlags&datapath.FlagURG != 0:
		x.doubt = DoubtTiming // one of its bytes is not part of what the other side reads
	case !r.FromPod:
		x.ask(r)
	case r.TCPFlags&datapath.FlagSYN != 0:
		x.accepted = true
	default:
		x.answer(r)
	}
}

// ask adds what the client sends. Its first segment is the whole request; later ones may only repeat it.
func (x *exchange) ask(r datapath.Record) {
	switch {
	case r.Len == 0:
	case x.request == nil && r.Offset != 0:
		x.doubt = DoubtUnseen
	case x.request == nil && r.Len == uint32(len(r.Payload)):
		x.request, x.askedAt = bytes.Clone(r.Payload), r.ObservedAt
	case uint64(r.Offset)+uint64(r.Len) > uint64(len(x.request)):
		x.doubt = DoubtNoProbe
	case !bytes.Equal(x.request[r.Offset:r.Offset+r.Len], r.Payload):
		x.doubt = DoubtDisorder
	}
}

// answer adds what the pod sends. Beyond what is recorded, one segment is as good as many.
func (x *exchange) answer(r datapath.Record) {
	beyond := r.Len > 0 && len(r.Payload) == 0 && r.TCPFlags&datapath.FlagFIN == 0
	if beyond && x.beyond {
		return
	}
	x.beyond = x.beyond || beyond
	x.cut = x.cut || uint64(r.Len) > uint64(len(r.Payload))
	s := segment{r.ObservedAt, r.Offset, r.Len, r.TCPFlags&datapath.FlagFIN != 0, bytes.Clone(r.Payload)}
	x.segments = append(x.segments, s)
	x.size += len(s.bytes) + int(unsafe.Sizeof(s))
	if x.size > maxResponse {
		x.doubt = DoubtTooLarge
	}
}

// outcome returns the prober's verdict, if that is certain. end is the last record.
func (x *exchange) outcome(end datapath.Record) (o probe.Outcome, doubt Doubt) {
	o = probe.Outcome{
		Port:       end.Port,
		ObservedAt: end.ObservedAt,
		Duration:   time.Duration(end.ObservedAt - end.StartedAt),
	}
	request, err := probe.ParseRequest(x.request)
	if err == nil {
		o.Kind, o.Request, o.Question, o.Text = probe.HTTP, request, probe.Question(x.question), x.request
	}
	x.segments = slices.DeleteFunc(x.segments, func(s segment) bool { return s.at > end.ObservedAt })
	switch {
	case x.doubt != "":
		return o, x.doubt
	case end.FromPod && !x.answered(): // including a pod that did not even accept
		o.Event = probe.Reset
		return o, ""
	case !x.accepted && x.answered():
		return o, DoubtUnseen
	case !x.accepted:
		o.Event = probe.NoAnswer
		return o, ""
	case x.request == nil && !end.FromPod:
		o.Kind, o.Event = x.withoutRequest(end)
		return o, ""
	case err != nil || x.question == (datapath.Question{}):
		return o, DoubtNoProbe
	}
	response, ok := x.response()
	if !ok {
		return o, DoubtDisorder
	}
	if end.FromPod && response.End == Open {
		response.End = Broken
	}
	o.Event, o.Status, doubt = response.Judge()
	if doubt == DoubtUnseen && x.cut {
		doubt = DoubtTooLarge
	}
	return o, doubt
}

// answered reports whether the pod has sent any data.
func (x *exchange) answered() bool {
	return slices.ContainsFunc(x.segments, func(s segment) bool { return s.len > 0 })
}

// withoutRequest interprets a client that closes without having sent any data. It sends a reset if it closes before the
// pod has accepted, or before it has read what the pod had sent.
func (x *exchange) withoutRequest(end datapath.Record) (probe.Kind, probe.Event) {
	if end.TCPFlags&datapath.FlagRST != 0 && !x.answered() {
		return "", probe.NoAnswer
	}
	return probe.TCP, probe.Connected
}

// response returns what the client could read. It returns false if what the pod sent is contradictory, or began before
// the request.
func (x *exchange) response() (r Response, ok bool) {
	slices.SortStableFunc(x.segments, func(a, b segment) int { return cmp.Compare(a.offset, b.offset) })
	var sent uint32
	var closed bool
	for _, s := range x.segments {
		end := s.offset + s.len
		if s.at < x.askedAt && s.len > 0 || closed && end > sent || s.last && end < sent {
			return r, false
		}
		sent, closed = max(sent, end), closed || s.last
		if !r.add(s) {
			return r, false
		}
	}
	switch {
	case sent > uint32(len(r.Bytes)):
		r.End = Unseen
	case closed:
		r.End = Closed
	}
	return r, true
}

// add adds a segment, unless there is a gap before it. It returns false if the segment contradicts earlier ones.
func (r *Response) add(s segment) bool {
	if uint64(s.offset) > uint64(len(r.Bytes)) {
		return true
	}
	known := r.Bytes[s.offset:]
	again := min(len(known), len(s.bytes))
	r.Bytes = append(r.Bytes, s.bytes[again:]...)
	return bytes.Equal(known[:again], s.bytes[:again])
}
