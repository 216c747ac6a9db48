package evidence

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
)

const (
	request  = "GET /x HTTP/1.1\r\nHost: 192.0.2.1:80\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n"
	response = ok + "Content-Length: 2\r\n\r\nok"
	startAt  = uint64(1000 * time.Second)
)

var (
	device   = datapath.DeviceKey{Ifindex: 3, Generation: 4}
	question = datapath.Question{Hash: 5, Check: 6}
)

// record returns a record without a time, which records sets.
func record(fromPod bool, flags uint8, offset int, payload string) datapath.Record {
	return datapath.Record{
		FromPod: fromPod, TCPFlags: flags, Offset: uint32(offset), Len: uint32(len(payload)), Payload: []byte(payload),
	}
}

var (
	synAck    = record(true, datapath.FlagSYN|datapath.FlagACK, 0, "")
	asks      = with(record(false, datapath.FlagACK, 0, request), func(r *datapath.Record) { r.Question = question })
	clientFIN = record(false, datapath.FlagFIN|datapath.FlagACK, len(request), "")
	clientRST = record(false, datapath.FlagRST, 0, "")
	podRST    = record(true, datapath.FlagRST, 0, "")
)

func pod(offset int, text string) datapath.Record {
	return record(true, datapath.FlagACK, offset, text)
}
func podFIN(offset int, text string) datapath.Record {
	return record(true, datapath.FlagFIN|datapath.FlagACK, offset, text)
}

func with(r datapath.Record, change func(*datapath.Record)) datapath.Record {
	change(&r)
	return r
}

// at moves a record to a time, in milliseconds.
func at(ms int, r datapath.Record) datapath.Record {
	r.ObservedAt = startAt + uint64(ms)*uint64(time.Millisecond)
	return r
}

// records makes the records belong to one connection, a millisecond apart unless they have a time.
func records(owner uint64, all ...datapath.Record) []datapath.Record {
	for i := range all {
		if all[i].ObservedAt == 0 {
			all[i] = at(i+1, all[i])
		}
		all[i].Owner, all[i].StartedAt, all[i].Device, all[i].Port = owner, startAt, device, 80
	}
	return all
}

// observe returns the outcomes, and checks the assembler's count of what it keeps.
func observe(t interface{ Fatalf(string, ...any) }, a *Assembler, all []datapath.Record) []Observation {
	var observed []Observation
	for _, r := range all {
		if o, ok := a.Add(r); ok {
			observed = append(observed, o)
		}
		kept := 0
		for _, x := range a.exchanges {
			kept += x.size
		}
		if kept != a.bytes || kept > maxBytes {
			t.Fatalf("%d bytes are kept, but %d are counted", kept, a.bytes)
		}
	}
	return observed
}

func TestOutcome(t *testing.T) {
	whole := pod(0, response)
	second := len(response) / 2
	const none = 0
	recognised := map[probe.Kind]bool{}
	for name, test := range map[string]struct {
		records []datapath.Record
		event   probe.Event // none if there is no outcome
		kind    probe.Kind
		doubt   Doubt
	}{
		"success":                    {[]datapath.Record{synAck, asks, whole, clientFIN}, probe.Answered, probe.HTTP, ""},
		"client resets":              {[]datapath.Record{synAck, asks, whole, clientRST}, probe.Answered, probe.HTTP, ""},
		"handed over":                {[]datapath.Record{asks, synAck, whole, clientFIN}, probe.Answered, probe.HTTP, ""},
		"pod closes first":           {[]datapath.Record{synAck, asks, podFIN(0, response), clientFIN}, probe.Answered, probe.HTTP, ""},
		"until closed":               {[]datapath.Record{synAck, asks, pod(0, ok+"\r\n"), podFIN(len(ok)+2, ""), clientFIN}, probe.Answered, probe.HTTP, ""},
		"pod resets then":            {[]datapath.Record{synAck, asks, whole, podRST}, probe.Answered, probe.HTTP, ""},
		"pod resets a part":          {[]datapath.Record{synAck, asks, pod(0, response[:second]), podRST}, probe.Failed, probe.HTTP, ""},
		"pod resets":                 {[]datapath.Record{synAck, asks, podRST}, probe.Reset, probe.HTTP, ""},
		"pod refuses":                {[]datapath.Record{podRST}, probe.Reset, "", ""},
		"pod refuses, handed over":   {[]datapath.Record{asks, podRST}, probe.Reset, probe.HTTP, ""},
		"no answer":                  {[]datapath.Record{synAck, asks, clientFIN}, probe.NoAnswer, probe.HTTP, ""},
		"cut":                        {[]datapath.Record{synAck, asks, podFIN(0, response[:second]), clientFIN}, probe.Failed, probe.HTTP, ""},
		"client closes too early":    {[]datapath.Record{synAck, asks, pod(0, response[:second]), clientFIN, pod(second, response[second:])}, probe.NoAnswer, probe.HTTP, ""},
		"two segments":               {[]datapath.Record{synAck, asks, pod(0, response[:second]), pod(second, response[second:]), clientFIN}, probe.Answered, probe.HTTP, ""},
		"out of order":               {[]datapath.Record{synAck, asks, pod(second, response[second:]), pod(0, response[:second]), clientFIN}, probe.Answered, probe.HTTP, ""},
		"sent again":                 {[]datapath.Record{synAck, synAck, asks, asks, whole, whole, clientFIN, clientFIN}, probe.Answered, probe.HTTP, ""},
		"overlapping":                {[]datapath.Record{synAck, asks, pod(0, response[:second]), whole, podFIN(second, response[second:]), clientFIN}, probe.Answered, probe.HTTP, ""},
		"part sent again":            {[]datapath.Record{synAck, asks, whole, pod(second, response[second:]), clientFIN}, probe.Answered, probe.HTTP, ""},
		"sent again, other text":     {[]datapath.Record{synAck, asks, whole, pod(0, strings.ToLower(response)), clientFIN}, none, "", DoubtDisorder},
		"a gap":                      {[]datapath.Record{synAck, asks, pod(second, response[second:]), clientFIN}, none, "", DoubtUnseen},
		"a gap before the end":       {[]datapath.Record{synAck, asks, pod(0, ok+"\r\n"), podFIN(len(ok)+3, ""), clientFIN}, none, "", DoubtUnseen},
		"a gap, not needed":          {[]datapath.Record{synAck, asks, whole, podFIN(len(response)+9, "x"), clientFIN}, probe.Answered, probe.HTTP, ""},
		"a part not recorded":        {[]datapath.Record{synAck, asks, with(whole, func(r *datapath.Record) { r.Payload = r.Payload[:9] }), clientFIN}, none, "", DoubtTooLarge},
		"recorded later":             {[]datapath.Record{synAck, asks, with(whole, func(r *datapath.Record) { r.Payload = r.Payload[:9] }), pod(9, response[9:]), clientFIN}, probe.Answered, probe.HTTP, ""},
		"data after the end":         {[]datapath.Record{synAck, asks, podFIN(0, response), pod(len(response), "!"), clientFIN}, none, "", DoubtDisorder},
		"urgent data":                {[]datapath.Record{synAck, asks, pod(0, response[:second]), with(podFIN(second, response[second:]), func(r *datapath.Record) { r.TCPFlags |= datapath.FlagURG }), clientFIN}, none, "", DoubtTiming},
		"two ends":                   {[]datapath.Record{synAck, asks, podFIN(0, response), podFIN(0, response[:second]), clientFIN}, none, "", DoubtDisorder},
		"keep-alive":                 {[]datapath.Record{synAck, asks, pod(-1, "?"), whole, clientFIN}, probe.Answered, probe.HTTP, ""},
		"answer before the request":  {[]datapath.Record{synAck, whole, asks, clientFIN}, none, "", DoubtDisorder},
		"records in another order":   {[]datapath.Record{synAck, at(5, whole), at(4, asks), at(6, clientFIN)}, probe.Answered, probe.HTTP, ""},
		"answer after the client":    {[]datapath.Record{synAck, asks, at(9, whole), at(8, clientFIN)}, probe.NoAnswer, probe.HTTP, ""},
		"no beginning":               {[]datapath.Record{asks, whole, clientFIN}, none, "", DoubtUnseen},
		"no request":                 {[]datapath.Record{synAck, whole, with(clientFIN, func(r *datapath.Record) { r.Question = question })}, probe.Connected, probe.TCP, ""},
		"only an end":                {[]datapath.Record{clientFIN}, none, "", DoubtUnseen},
		"connected":                  {[]datapath.Record{synAck, record(false, datapath.FlagFIN, 0, "")}, probe.Connected, probe.TCP, ""},
		"connected, greeted":         {[]datapath.Record{synAck, pod(0, "220 hello\r\n"), clientRST}, probe.Connected, probe.TCP, ""},
		"not accepted":               {[]datapath.Record{clientRST}, probe.NoAnswer, "", ""},
		"not accepted, handed over":  {[]datapath.Record{asks, clientFIN}, probe.NoAnswer, probe.HTTP, ""},
		"gave up connecting":         {[]datapath.Record{synAck, clientRST}, probe.NoAnswer, "", ""},
		"greeted, then reset":        {[]datapath.Record{synAck, pod(0, "220 hello\r\n"), podRST}, none, "", DoubtNoProbe},
		"no question":                {[]datapath.Record{synAck, record(false, datapath.FlagACK, 0, request), whole, clientFIN}, none, "", DoubtNoProbe},
		"another question":           {[]datapath.Record{synAck, asks, with(whole, func(r *datapath.Record) { r.Question = datapath.Question{Hash: 1} }), clientFIN}, none, "", DoubtDisorder},
		"two requests":               {[]datapath.Record{synAck, asks, with(record(false, datapath.FlagACK, len(request), request), func(r *datapath.Record) { r.Question = question }), whole, clientFIN}, none, "", DoubtNoProbe},
		"request sent again, other":  {[]datapath.Record{synAck, asks, with(asks, func(r *datapath.Record) { r.Payload = bytes.ToUpper(r.Payload) }), whole, clientFIN}, none, "", DoubtDisorder},
		"request not whole":          {[]datapath.Record{synAck, with(asks, func(r *datapath.Record) { r.Payload = r.Payload[:50] }), whole, clientFIN}, none, "", DoubtNoProbe},
		"more after the request":     {[]datapath.Record{synAck, with(asks, func(r *datapath.Record) { r.Len += 5 }), whole, clientFIN}, none, "", DoubtNoProbe},
		"request with a body":        {[]datapath.Record{synAck, with(asks, func(r *datapath.Record) { r.Payload = append(r.Payload, '!'); r.Len++ }), whole, clientFIN}, none, "", DoubtNoProbe},
		"a long response":            {[]datapath.Record{synAck, asks, pod(0, ok+"\r\n"+strings.Repeat("x", maxBody)), with(pod(20000, ""), func(r *datapath.Record) { r.Len = 60000 }), clientRST}, probe.Answered, probe.HTTP, ""},
		"a very long response":       {slices.Concat([]datapath.Record{synAck, asks, pod(0, ok+"\r\n"+strings.Repeat("x", maxBody))}, repeat(with(pod(20000, ""), func(r *datapath.Record) { r.Len = 60000 }), 5000), []datapath.Record{clientRST}), probe.Answered, probe.HTTP, ""},
		"the request's end only":     {[]datapath.Record{synAck, with(asks, func(r *datapath.Record) { r.Offset = 5 }), whole, clientFIN}, none, "", DoubtUnseen},
		"a response of ours":         {[]datapath.Record{synAck, asks, pod(0, ok+"Cache-Status: probelet; hit\r\nContent-Length: 0\r\n\r\n"), clientFIN}, none, "", DoubtOurs},
		"many interim responses":     {[]datapath.Record{synAck, asks, pod(0, strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", maxInterim+1)+response), clientFIN}, none, "", DoubtTiming},
		"too many packets are known": {slices.Concat([]datapath.Record{synAck, asks}, repeat(whole, 2000), []datapath.Record{clientFIN}), none, "", DoubtTooLarge},
	} {
		recognised[test.kind] = true
		t.Run(name, func(t *testing.T) {
			a := NewAssembler()
			observed := observe(t, a, records(1, test.records...))
			doubtful := a.TakeDoubtful()
			if n := doubtful[Doubtful{device, test.doubt}]; n != uint64(min(1, len(test.doubt))) || len(doubtful) != int(n) {
				t.Errorf("doubts %v, want %q", doubtful, test.doubt)
			}
			if test.event == none {
				if len(observed) > 0 {
					t.Fatalf("got %+v", observed)
				}
				return
			}
			if len(observed) != 1 {
				t.Fatalf("got %+v, want one outcome", observed)
			}
			o := observed[0]
			if o.Event != test.event || o.Kind != test.kind || o.Port != 80 || o.Device != device {
				t.Errorf("got %+v, want event %d of kind %q", o, test.event, test.kind)
			}
			isHTTP := test.kind == probe.HTTP
			if isHTTP != (string(o.Text) == request) || isHTTP != (o.Question == probe.Question(question)) || isHTTP != (o.Request.Path == "/x") {
				t.Errorf("got %+v, which does not match the request", o)
			}
			if o.Duration <= 0 || o.ObservedAt != startAt+uint64(o.Duration) {
				t.Errorf("duration %s, observed at %d", o.Duration, o.ObservedAt)
			}
		})
	}
	for _, k := range probe.Kinds() {
		if recognised[k] != k.Observable() {
			t.Errorf("an outcome of kind %s is recognised: %t; the kind is observable: %t", k, recognised[k], k.Observable())
		}
	}
}

func repeat(r datapath.Record, n int) []datapath.Record {
	all := make([]datapath.Record, n)
	for i := range all {
		all[i] = r
	}
	return all
}

// The packets of a response do not matter, nor do retransmissions and their order: the response is judged as if it had
// come in one packet.
func TestPacketsDoNotMatter(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		text := rapid.SampledFrom([]string{
			response, ok + "\r\nuntil it ends", ok + "Content-Length: 9\r\n\r\ncut",
			ok + "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n3\r\n!!!\r\n0\r\n\r\n", ok + "Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n3\r\n",
			"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n",
		}).Draw(t, "text")
		want, status, _ := Response{[]byte(text), Closed}.Judge()
		position := rapid.IntRange(0, len(text))
		packets := []datapath.Record{podFIN(len(text), "")}
		cuts := append(rapid.SliceOfN(position, 0, 5).Draw(t, "cuts"), 0, len(text))
		for _, from := range cuts {
			to := len(text)
			for _, c := range cuts {
				if c > from {
					to = min(to, c)
				}
			}
			packets = append(packets, pod(from, text[from:to]))
		}
		for range rapid.IntRange(0, 3).Draw(t, "again") {
			from, to := position.Draw(t, "from"), position.Draw(t, "to")
			packets = append(packets, pod(min(from, to), text[min(from, to):max(from, to)]))
		}
		packets = rapid.Permutation(packets).Draw(t, "order")
		observed := observe(t, NewAssembler(), records(1, append(append([]datapath.Record{synAck, asks}, packets...), clientFIN)...))
		if len(observed) != 1 || observed[0].Event != want || observed[0].Status != status {
			t.Fatalf("got %+v, want event %d, status %d", observed, want, status)
		}
	})
}

// Exchanges on different connections do not mix, and finished ones do not begin again.
func TestConnectionsDoNotMix(t *testing.T) {
	a := NewAssembler()
	other := ok + "Content-Length: 2\r\n\r\nno"
	one := records(1, synAck, asks, pod(0, response), clientFIN, podRST)
	two := records(2, synAck, asks, pod(0, other), clientFIN, podRST)
	var all []datapath.Record
	for i := range one {
		all = append(all, one[i], two[i])
	}
	if observed := observe(t, a, all); len(observed) != 2 || observed[0].Event != probe.Answered || observed[1].Event != probe.Answered {
		t.Fatalf("got %+v", observed)
	}
	if doubtful := a.TakeDoubtful(); len(doubtful) != 0 {
		t.Errorf("doubts: %v", doubtful)
	}
}

func TestAbandonedAreForgotten(t *testing.T) {
	a := NewAssembler()
	observe(t, a, records(1, synAck, asks, pod(0, response)))
	if len(a.exchanges) != 1 || a.bytes == 0 {
		t.Fatalf("%d exchanges of %d bytes are kept", len(a.exchanges), a.bytes)
	}
	later := int((abandonedAfter + tidyEvery) / time.Millisecond)
	observed := observe(t, a, records(2, at(later, synAck), at(later, asks), at(later, pod(0, response)), at(later, clientFIN)))
	if doubtful := a.TakeDoubtful(); len(observed) != 1 || len(a.exchanges) != 1 || a.bytes != 0 || doubtful[Doubtful{device, DoubtUnseen}] != 1 {
		t.Errorf("got %+v; %d exchanges of %d bytes are kept, doubts %v", observed, len(a.exchanges), a.bytes, doubtful)
	}
	later += int((lingering + tidyEvery) / time.Millisecond)
	observe(t, a, records(1, at(later, clientFIN)))
	if len(a.exchanges) != 0 {
		t.Errorf("%d exchanges are still kept", len(a.exchanges))
	}
}

// Memory stays bounded however many exchanges never end, and exchanges that fit are still judged.
func TestBounds(t *testing.T) {
	a := NewAssembler()
	for owner := range uint64(maxExchanges + 10) {
		for _, r := range records(owner, synAck, asks) {
			a.Add(r)
		}
	}
	if len(a.exchanges) != maxExchanges {
		t.Errorf("%d exchanges are kept, want %d", len(a.exchanges), maxExchanges)
	}
	a.Add(records(maxExchanges, at(3, clientFIN))[0])
	if doubtful := a.TakeDoubtful(); doubtful[Doubtful{device, DoubtTooLarge}] != 1 {
		t.Errorf("beyond the limit: %v", doubtful)
	}
	for owner := range uint64(maxBytes / (16 << 10)) {
		a.Add(records(owner, at(3, pod(0, ok+strings.Repeat("x", 16<<10))))[0])
	}
	observed := observe(t, a, records(0, at(9, pod(0, response)), at(9, clientFIN)))
	if doubtful := a.TakeDoubtful(); len(observed) != 0 || doubtful[Doubtful{device, DoubtDisorder}] != 1 {
		t.Errorf("got %+v of a contradictory exchange, %v", observed, doubtful)
	}
	if observed := observe(t, a, records(1e4, at(9, pod(0, response)), at(9, clientFIN))); len(observed) != 1 {
		t.Errorf("got %+v", observed)
	}
}

func BenchmarkExchange(b *testing.B) {
	a := NewAssembler()
	all := records(1, synAck, asks, pod(0, response), podFIN(len(response), ""), clientFIN)
	b.ReportAllocs()
	for owner := uint64(0); b.Loop(); owner++ {
		ended := 0
		for _, r := range all {
			r.Owner, r.StartedAt, r.ObservedAt = owner, r.StartedAt+owner*1e6, r.ObservedAt+owner*1e6
			if _, ok := a.Add(r); ok {
				ended++
			}
		}
		if ended != 1 {
			b.Fatal("no outcome")
		}
	}
}
