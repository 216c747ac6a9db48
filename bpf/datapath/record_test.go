package datapath

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"golang.org/x/sys/unix"
	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/internal/polltest"
)

const podISN = 7000

// reaching is a probe that reached the pod.
type reaching struct {
	*bench
	passed fate   // fate of the pod's packets
	told   uint32 // the ISN that the client was given
}

// ways lists how probes reach the pod. The records are the same for all.
var ways = map[string]func(b *bench) reaching{
	"passed on": func(b *bench) reaching {
		b.put(PortKey(8080), Evidence{})
		b.putFor(request, Evidence{})
		b.passes(b.syn().Bytes(b.t, nil))
		b.podSends(untouched, b.fromPod("SA", podISN, b.isn+1, ""))
		b.passes(b.toPod("A", b.isn+1, podISN+1, "").Bytes(b.t, nil))
		return reaching{b, untouched, podISN}
	},
	"handed over": func(b *bench) reaching {
		b.armPort()
		return reaching{b, toClient, b.connect()}
	},
}

// onWays runs the test for every way in which a probe reaches the pod, over both hooks and families.
func onWays(t *testing.T, f func(t *testing.T, p reaching)) {
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			onBench(t, func(t *testing.T, b *bench) { f(t, way(b)) })
		})
	}
}

// asks sends a request and delivers it to the pod.
func (p reaching) asks(request string) {
	p.t.Helper()
	s := p.toPod("PA", p.isn+1, p.told+1, request)
	if p.passed == untouched {
		p.passes(s.Bytes(p.t, nil))
		return
	}
	p.replaysSYN(s)
	p.accepts(podISN, "PA", request)
}

// hears sends a packet of the pod after the request; seq counts from its SYN on.
func (p reaching) hears(flags string, seq uint32, payload string) {
	p.t.Helper()
	after := p.isn + 1 + uint32(len(request))
	got := p.podSends(p.passed, p.fromPod(flags, podISN+1+seq, after, payload))
	p.expect(got, flags, p.told+1+seq, after, payload)
}

// closes sends the client's FIN or RST after n bytes of the answer.
func (p reaching) closes(flags string, n uint32) {
	p.t.Helper()
	s := p.toPod(flags, p.isn+1+uint32(len(request)), p.told+1+n, "")
	if p.passed == untouched {
		p.passes(s.Bytes(p.t, nil))
	} else {
		p.rewrites(s)
	}
}

// withdrawn asserts which of port and endpoint was withdrawn.
func (p reaching) withdrawn(port, endpoint bool) {
	p.t.Helper()
	ofPort, ofEndpoint := p.tally(PortKey(8080)), p.tally(p.asked())
	if (ofPort.WithdrawnAt != 0) != port || (ofEndpoint.WithdrawnAt != 0) != endpoint {
		p.t.Fatalf("port %+v, endpoint %+v; want them withdrawn: %v, %v", ofPort, ofEndpoint, port, endpoint)
	}
}

const ok = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

// recorded asserts that these are the records since the last call, given as "sender flags offset+length payload", in any order.
func (p reaching) recorded(want ...string) {
	p.t.Helper()
	var got []string
	for _, r := range p.records() {
		sender, flags := "client", ""
		if r.FromPod {
			sender = "pod"
		}
		for i, name := range "FSRPAU" {
			if r.TCPFlags&(1<<i) != 0 {
				flags += string(name)
			}
		}
		got = append(got, fmt.Sprintf("%s %s %d+%d %s", sender, flags, int32(r.Offset), r.Len, r.Payload))
	}
	slices.Sort(got)
	slices.Sort(want)
	if !slices.Equal(got, want) {
		p.t.Fatalf("recorded\n%q, want\n%q", got, want)
	}
}

func sent(sender, flags string, offset int, payload string) string {
	return fmt.Sprintf("%s %s %d+%d %s", sender, flags, offset, len(payload), payload)
}

// begun lists the records of a connection whose client has asked.
func begun(request string) []string {
	return []string{sent("pod", "SA", 0, ""), sent("client", "PA", 0, request)}
}

func TestExchangeIsRecorded(t *testing.T) {
	for _, end := range []string{"FA", "RA"} {
		onWays(t, func(t *testing.T, p reaching) {
			before := Now()
			p.asks(request)
			flow := p.flow()
			p.hears("A", 0, "")
			p.hears("PA", 0, ok[:10])
			p.hears("PA", 0, ok)
			p.hears("FA", uint32(len(ok)), "")
			p.counted("observed", 0)
			p.closes(end, uint32(len(ok))+1)
			p.counted("observed", 1)
			if p.passed == untouched {
				p.noFlows()
			}
			if end == "FA" {
				p.hears("PA", uint32(len(ok)), "more")
				p.closes("RA", uint32(len(ok)))
			}
			all := p.records()
			if len(all) != 6 {
				t.Fatalf("%d records: %+v", len(all), all)
			}
			last := before
			for _, r := range all {
				same := Record{
					Owner: flow.Owner, StartedAt: flow.StartedAt, ObservedAt: r.ObservedAt, Question: r.Question, Device: p.key,
					Port: 8080, FromPod: r.FromPod, Offset: r.Offset, Len: r.Len, TCPFlags: r.TCPFlags, Payload: r.Payload,
				}
				isSYN := r.TCPFlags&FlagSYN != 0
				if isSYN && p.passed == untouched {
					last = min(last, r.ObservedAt) // before it was asked
				}
				if !r.equal(same) || r.Question != question(request) && !isSYN || r.ObservedAt < last || r.ObservedAt > Now() {
					t.Errorf("%+v, after %d; the flow is %+v", r, last, flow)
				}
				last = r.ObservedAt
			}
		})
	}
}

func TestRecords(t *testing.T) {
	for name, c := range map[string]struct {
		then func(p reaching)
		want []string
		// withdrawn immediately
		port, endpoint bool
	}{
		"a success": {then: func(p reaching) {
			p.hears("FPA", 0, ok)
			p.closes("FA", uint32(len(ok))+1)
		}, want: []string{sent("pod", "FPA", 0, ok), sent("client", "FA", len(request), "")}},
		"an error": {then: func(p reaching) {
			p.hears("PA", 0, "HTTP/1.0 500\r\n\r\n")
			p.hears("FA", 16, "")
			p.closes("FA", 17)
		}, want: []string{sent("pod", "PA", 0, "HTTP/1.0 500\r\n\r\n"), sent("pod", "FA", 16, ""), sent("client", "FA", len(request), "")}, endpoint: true},
		"a redirect": {then: func(p reaching) {
			p.hears("PA", 0, "HTTP/1.1 300")
		}, want: []string{sent("pod", "PA", 0, "HTTP/1.1 300")}, endpoint: true},
		"an interim response": {then: func(p reaching) {
			p.hears("PA", 0, "HTTP/1.1 100 Continue\r\n\r\n")
			p.hears("PA", 25, "HTTP/1.1 500\r\n\r\n")
		}, want: []string{sent("pod", "PA", 0, "HTTP/1.1 100 Continue\r\n\r\n"), sent("pod", "PA", 25, "HTTP/1.1 500\r\n\r\n")}},
		"not HTTP": {then: func(p reaching) {
			p.hears("PA", 0, "SSH-2.0-x 999 500")
		}, want: []string{sent("pod", "PA", 0, "SSH-2.0-x 999 500")}},
		"a short status line": {then: func(p reaching) {
			p.hears("PA", 0, "HTTP/1.1 50")
		}, want: []string{sent("pod", "PA", 0, "HTTP/1.1 50")}},
		"no status": {then: func(p reaching) {
			p.hears("PA", 0, "HTTP/1.1 5x0")
		}, want: []string{sent("pod", "PA", 0, "HTTP/1.1 5x0")}},
		"an error that is not at the start": {then: func(p reaching) {
			p.hears("PA", 9, "HTTP/1.1 500\r\n\r\n")
		}, want: []string{sent("pod", "PA", 9, "HTTP/1.1 500\r\n\r\n")}},
		"a reset": {then: func(p reaching) {
			p.hears("RA", 0, "")
			p.noFlows()
		}, want: []string{sent("pod", "RA", 0, "")}, port: true},
		"a reset after the answer": {then: func(p reaching) {
			p.hears("PA", 0, ok)
			p.hears("RA", uint32(len(ok)), "")
			p.noFlows()
		}, want: []string{sent("pod", "PA", 0, ok), sent("pod", "RA", 0, "")}},
		"a reset after a FIN": {then: func(p reaching) {
			p.hears("FA", 0, "")
			p.hears("RA", 1, "")
		}, want: []string{sent("pod", "FA", 0, ""), sent("pod", "RA", 0, "")}, port: true},
		"no answer": {then: func(p reaching) {
			p.closes("FA", 0)
			p.hears("RA", 0, "") // too late
		}, want: []string{sent("client", "FA", len(request), "")}},
		"the client resets": {then: func(p reaching) {
			p.closes("RA", 0)
			p.noFlows()
		}, want: []string{sent("client", "RA", 0, "")}},
	} {
		t.Run(name, func(t *testing.T) {
			onWays(t, func(_ *testing.T, p reaching) {
				p.asks(request)
				c.then(p)
				p.recorded(append(begun(request), c.want...)...)
				p.withdrawn(c.port, c.endpoint)
			})
		})
	}
}

// Where traffic may vouch for an endpoint, an error counts even if the client has given up on it, and a handed-over one always. Only what
// comes in time is recorded.
func TestLateErrorsAreNoted(t *testing.T) {
	for name, c := range map[string]struct {
		vouched        time.Duration // from now; 0: not at all
		flags, payload string
		withdraws      bool
	}{
		"an error":          {time.Hour, "PA", "HTTP/1.1 503 x\r\n\r\n", true},
		"a redirect":        {time.Hour, "FPA", "HTTP/1.1 302 x\r\n\r\n", true},
		"a success":         {time.Hour, "PA", ok, false},
		"a FIN":             {time.Hour, "FA", "", false},
		"a reset":           {time.Hour, "RA", "", false},
		"without traffic":   {0, "PA", "HTTP/1.1 503 x\r\n\r\n", true},
		"no longer vouched": {-time.Second, "PA", "HTTP/1.1 503 x\r\n\r\n", true},
	} {
		t.Run(name, func(t *testing.T) {
			onWays(t, func(_ *testing.T, p reaching) {
				awaited := c.vouched > 0 || p.passed != untouched
				if c.vouched != 0 {
					p.putFor(request, Evidence{TrafficUntil: Now() + uint64(c.vouched)})
				}
				p.asks(request)
				p.closes("FA", 0)
				if awaited {
					p.flow()
				} else {
					p.noFlows()
				}
				p.counted("observed", 1)
				p.hears(c.flags, 0, c.payload)
				p.withdrawn(false, c.withdraws && awaited)
				p.counted("observed", 1)
				p.recorded(append(begun(request), sent("client", "FA", len(request), ""))...)
				if p.passed == untouched {
					p.noFlows()
				}
			})
		})
	}
}

// A repeated error does not void what was observed since the first one.
func TestErrorIsNotedOnce(t *testing.T) {
	onWays(t, func(_ *testing.T, p reaching) {
		p.asks(request)
		p.hears("PA", 0, "HTTP/1.1 500\r\n\r\n")
		p.setTally(p.asked(), Tally{})
		p.hears("PA", 0, "HTTP/1.1 500\r\n\r\n")
		p.withdrawn(false, false)
	})
}

// Anything but a whole request has no question. On a connection that was passed on it is the last packet that is recorded.
func TestNoQuestion(t *testing.T) {
	for name, text := range map[string]string{
		"a POST": post, "half a request": request[:50], "too long": "GET /" + strings.Repeat("x", MaxRequest) + "\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			onWays(t, func(t *testing.T, p reaching) {
				if p.passed == untouched {
					p.passes(p.toPod("PA", p.isn+1, p.told+1, text).Bytes(t, nil))
				} else {
					p.asks(text)
				}
				p.hears("PA", 0, "HTTP/1.1 500\r\n\r\n")
				if p.passed != untouched {
					p.flow()
				}
				p.hears("RA", 16, "")
				if p.passed == untouched {
					p.recorded(begun(text)...)
				} else {
					p.recorded()
				}
				p.withdrawn(false, false)
				p.counted("passed_not_parsable", 0) // it was counted at its SYN, or counts as handed over
				p.noFlows()
			})
		})
	}
	t.Run("not at the start", func(t *testing.T) {
		onBench(t, func(t *testing.T, b *bench) {
			p := ways["passed on"](b)
			p.passes(p.toPod("PA", p.isn+2, podISN+1, request).Bytes(t, nil)) // preceding data was lost or delayed
			p.hears("PA", 0, "HTTP/1.1 500 x\r\n\r\n")
			p.recorded(sent("pod", "SA", 0, ""), sent("client", "PA", 1, request))
			p.withdrawn(false, false)
		})
	})
}

func TestRefusalIsRecorded(t *testing.T) {
	refusal := func(b *bench) bpftest.Segment { return b.fromPod("RA", 0, b.isn+1, "") }
	t.Run("passed on", func(t *testing.T) {
		onBench(t, func(t *testing.T, b *bench) {
			b.put(PortKey(8080), Evidence{})
			b.passes(b.syn().Bytes(t, nil))
			b.podSends(untouched, refusal(b))
			p := reaching{bench: b}
			p.recorded(sent("pod", "RA", 0, ""))
			p.withdrawn(true, false)
			b.noFlows()
		})
	})
	for _, text := range []string{request, post} { // whatever is asked, the port is closed
		t.Run("handed over", func(t *testing.T) {
			onBench(t, func(_ *testing.T, b *bench) {
				p := ways["handed over"](b)
				p.replaysSYN(p.toPod("PA", b.isn+1, p.told+1, text))
				b.expect(b.podSends(toClient, refusal(b)), "RA", p.told+1, b.isn+1, "")
				if text == request {
					p.recorded(sent("client", "PA", 0, text), sent("pod", "RA", 0, ""))
				} else {
					p.recorded()
				}
				p.withdrawn(true, false)
				b.noFlows()
			})
		})
	}
}

// A client that gives up before the pod has its connection ends the exchange.
func TestImpatientClientIsRecorded(t *testing.T) {
	for flags, offset := range map[string]int{"FA": len(request), "RA": 0} {
		onBench(t, func(_ *testing.T, b *bench) {
			p := ways["handed over"](b)
			p.replaysSYN(p.toPod("PA", b.isn+1, p.told+1, request))
			p.swallows(p.toPod(flags, b.isn+1+uint32(len(request)), p.told+1, ""))
			p.recorded(sent("client", "PA", 0, request), sent("client", flags, offset, ""))
			p.counted("observed", 1)
			if flags == "FA" { // all that follows is too late
				p.accepts(podISN, "FPA", request)
				p.hears("PA", 0, ok)
				p.recorded()
			}
		})
	}
}

// A handed-over request is recorded even if there is no room to store it.
func TestTakenRequestIsRecorded(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		for i := range b.d.objects.Requests.MaxEntries() {
			must(t, b.d.objects.Requests.Put(probeletFlowKey{Ifindex: i}, probeletStored{}))
		}
		p := ways["handed over"](b)
		p.replaysSYN(p.toPod("PA", b.isn+1, p.told+1, request))
		p.recorded(sent("client", "PA", 0, request))
		p.accepts(podISN, "A", "")
		p.rewrites(p.toPod("PA", b.isn+1, p.told+1, request))
		p.recorded(begun(request)...)
	})
}

func TestConnectionIsRecorded(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		p := ways["passed on"](b)
		b.podSends(untouched, b.fromPod("PA", 7001, b.isn+1, "220 hello"))
		b.passes(b.toPod("FA", b.isn+1, 7010, "").Bytes(t, nil))
		p.recorded(sent("pod", "SA", 0, ""), sent("pod", "PA", 0, "220 hello"), sent("client", "FA", 0, ""))
		b.noFlows()
	})
	onBench(t, func(t *testing.T, b *bench) { // and one that never existed
		b.put(PortKey(8080), Evidence{})
		b.passes(b.syn().Bytes(t, nil))
		b.passes(b.toPod("RA", b.isn+1, 0, "").Bytes(t, nil))
		reaching{bench: b}.recorded(sent("client", "RA", 0, ""))
		b.noFlows()
	})
}

// stream is what one side sends, and which parts of it were seen.
type stream struct {
	bytes []byte
	sent  []bool
	got   []bool
}

func newStream(rt *rapid.T, text string, most int) *stream {
	b := []byte(text)
	seed := rapid.Uint32().Draw(rt, "seed")
	for range rapid.IntRange(0, most).Draw(rt, "length") {
		seed = seed*1664525 + 1013904223
		b = append(b, byte(seed>>24))
	}
	return &stream{b, make([]bool, len(b)), make([]bool, len(b))}
}

// piece draws a piece of the stream, often the one that follows the previous one.
func (s *stream) piece(rt *rapid.T, next int) (offset, length int) {
	if next < 0 || rapid.IntRange(0, 3).Draw(rt, "jump") == 0 {
		next = rapid.IntRange(0, len(s.bytes)-1).Draw(rt, "offset")
	}
	length = min(rapid.IntRange(1, 3000).Draw(rt, "bytes"), len(s.bytes)-next)
	for i := range length {
		s.sent[next+i] = true
	}
	return next, length
}

// Every byte within the budget that either side sends is recorded at its offset, however the stream is split up, repeated, reordered,
// or lost in part.
func TestEveryByteIsRecorded(t *testing.T) {
	bytes := 0
	onWays(t, func(t *testing.T, p reaching) {
		rapid.Check(t, func(rt *rapid.T) {
			p.isn = rapid.Uint32().Draw(rt, "ISN")
			if p.told = podISN; p.passed == untouched {
				p.passes(p.syn().Bytes(t, nil))
				p.podSends(untouched, p.fromPod("SA", podISN, p.isn+1, ""))
			} else {
				p.armPort()
				p.told = p.connect()
			}
			p.asks(request)
			pod, client := newStream(rt, "HTTP", 20000), newStream(rt, request, 20000)
			for i := range request {
				client.sent[i] = true
			}
			for range rapid.IntRange(1, 30).Draw(rt, "pieces") {
				if rapid.Bool().Draw(rt, "of the pod") {
					at, n := pod.piece(rt, slices.Index(pod.sent, false))
					p.podSends(p.passed, p.fromPod("PA", podISN+1+uint32(at), p.isn+2, string(pod.bytes[at:at+n])))
				} else {
					at, n := client.piece(rt, slices.Index(client.sent, false))
					s := p.toPod("PA", p.isn+1+uint32(at), p.told+1, string(client.bytes[at:at+n]))
					if got, _ := p.sends(s.Bytes(t, nil)); got == swallowed {
						rt.Fatalf("%v %s", s, got)
					}
				}
			}
			p.closes("RA", 0)
			for _, r := range p.records() {
				from := client
				if r.FromPod {
					from = pod
				}
				if end := min(int(r.Offset)+int(r.Len), MaxRecorded); len(r.Payload) != max(end-int(r.Offset), 0) {
					rt.Fatalf("%d bytes at %d have a payload of %d", r.Len, r.Offset, len(r.Payload))
				}
				for i, c := range r.Payload {
					if from.got[int(r.Offset)+i] = true; from.bytes[int(r.Offset)+i] != c {
						rt.Fatalf("byte %d is %#x, want %#x: %+v", int(r.Offset)+i, c, from.bytes[int(r.Offset)+i], r)
					}
				}
				bytes += len(r.Payload)
			}
			for _, s := range []*stream{pod, client} {
				within := min(len(s.sent), MaxRecorded)
				if !slices.Equal(s.sent[:within], s.got[:within]) {
					rt.Fatal("the recorded bytes are not those that were sent")
				}
			}
		})
	})
	if bytes == 0 {
		t.Fatal("nothing was recorded")
	}
}

// Packets beyond the budget are recorded only if they end something.
func TestRecordingBudget(t *testing.T) {
	onWays(t, func(_ *testing.T, p reaching) {
		p.asks(request)
		p.hears("PA", MaxRecorded-3, "12345")
		p.hears("PA", MaxRecorded, "beyond")
		p.hears("FPA", MaxRecorded+6, "end")
		p.hears("A", 1<<32-1, "x") // an old keep-alive
		p.closes("FA", MaxRecorded+9)
		within := fmt.Sprintf("pod PA %d+5 123", MaxRecorded-3)
		end := fmt.Sprintf("pod FPA %d+3 ", MaxRecorded+6)
		p.recorded(append(begun(request), within, end, sent("client", "FA", len(request), ""))...)
	})
}

// Packets of more than 64 KiB (BIG TCP) are recorded as well.
func TestBigTCPIsRecorded(t *testing.T) {
	onWays(t, func(t *testing.T, p reaching) {
		p.asks(request)
		want := begun(request)
		for i, enlarge := range []func([]byte) []byte{p.withoutLength, p.withJumboHeader} {
			s := p.fromPod("PA", podISN+1+uint32(10*i), p.isn+1+uint32(len(request)), "0123456789")
			s.Options = []layers.TCPOption{{OptionType: layers.TCPOptionKindNop, OptionLength: 1}}
			p.receives(enlarge(s.Bytes(t, nil)))
			want = append(want, sent("pod", "PA", 10*i, "0123456789"))
		}
		p.recorded(want...)
	})
}

// When the ring is full, connections lose records, which is counted, and are not recorded to their end. Nothing else happens to
// them, nor to connections that begin once there is room again.
func TestFullRing(t *testing.T) {
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			onBench(t, func(t *testing.T, b *bench) {
				p := way(b)
				p.asks(request)
				full, ring := strings.Repeat("x", 3000), int(b.d.objects.Records.MaxEntries())
				for range ring / len(full) {
					p.hears("PA", 10000, full)
				}
				p.counted("records_lost", 1)
				p.hears("PA", 0, "HTTP/1.1 500\r\n\r\n")
				p.withdrawn(false, true) // immediately, although it is not recorded
				p.counted("records_lost", 1)
				if n := len(p.records()); n < ring/(len(full)+200) {
					t.Fatalf("there was room for %d records of %d bytes", n, len(full))
				}
				p.hears("FA", 16, "")
				p.closes("FA", 17)
				p.recorded()
				p.counted("observed", 0)

				p.isn += 1000
				p = way(b)
				p.asks(request)
				p.closes("RA", 0)
				p.recorded(append(begun(request), sent("client", "RA", 0, ""))...)
				p.counted("observed", 1)
			})
		})
	}
}

// A reader may be closed at any time, whether it is waiting or reading.
func TestCloseReader(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		for range 200 {
			p := ways["passed on"](b)
			p.closes("RA", 0)
			r, err := b.d.Records()
			must(t, err)
			done := make(chan error)
			go func() {
				var record Record
				for {
					if err := r.Next(&record); err != nil {
						done <- err
						return
					}
				}
			}()
			must(t, r.Close())
			if err := <-done; !errors.Is(err, os.ErrClosed) {
				t.Fatal(err)
			}
			if r.Pending() {
				t.Fatal("records are pending")
			}
			b.isn += 1000
		}
	})
}

// A waiting reader is woken when a connection has ended, or when the ring begins to fill.
func TestWakeReader(t *testing.T) {
	for name, then := range map[string]func(p reaching){
		"client closes": func(p reaching) { p.closes("FA", 0) },
		"pod resets":    func(p reaching) { p.hears("RA", 0, "") },
		"much data": func(p reaching) {
			for range p.d.objects.Records.MaxEntries() / 4 / 3000 {
				p.hears("PA", 0, strings.Repeat("x", 3000))
			}
			p.hears("PA", 0, "x")
		},
	} {
		t.Run(name, func(t *testing.T) {
			onWays(t, func(t *testing.T, p reaching) {
				p.records()
				r, err := p.d.Records()
				must(t, err)
				defer r.Close() //nolint:errcheck // a test's
				late := time.Now().Add(20 * time.Second)
				r.SetDeadline(late) // then it reads what is pending
				thread, read := make(chan int), make(chan error)
				go func() {
					runtime.LockOSThread()
					thread <- unix.Gettid()
					var record Record
					read <- r.Next(&record)
				}()
				untilItPolls(t, <-thread)
				p.asks(request)
				then(p)
				if must(t, <-read); time.Now().After(late) {
					t.Fatal("reader was not woken")
				}
			})
		})
	}
}

// untilItPolls returns once a thread is polling.
func untilItPolls(t *testing.T, thread int) {
	t.Helper()
	polltest.Eventually(t, "the reader waits", func() bool {
		in, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/wchan", thread))
		must(t, err)
		return strings.Contains(string(in), "ep_poll") || strings.Contains(string(in), "epoll")
	})
}

// A withdrawal has a cause, and is counted if there was fresh evidence.
func TestWithdrawalCauses(t *testing.T) {
	for name, c := range map[string]struct {
		key   EndpointKey
		flags string
		text  string
	}{
		"reset":  {PortKey(8080), "RA", ""},
		"status": {HTTPKey(8080, question(request)), "PA", "HTTP/1.1 500 Oops\r\n\r\n"},
	} {
		for _, fresh := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, fresh: %v", name, fresh), func(t *testing.T) {
				onWays(t, func(t *testing.T, p reaching) {
					p.asks(request)
					p.put(PortKey(8080), Evidence{})
					if fresh { // evidence was observed meanwhile
						p.arm()
					}
					at := Now()
					p.hears(c.flags, 0, c.text)
					tally := p.tally(c.key)
					if WithdrawalCauses[tally.WithdrawnCause] != name || tally.WithdrawnAt < at || tally.WithdrawnAt > Now() {
						t.Fatalf("%+v, of cause %q", tally, WithdrawalCauses[tally.WithdrawnCause])
					}
					want := uint64(0)
					if fresh {
						want = 1
					}
					p.counted("withdrawn_"+name, want)
				})
			})
		}
	}
}

// Close unmaps the ring. A concurrent Pending must not fault.
func TestCloseDuringPending(t *testing.T) {
	bpftest.RequireRoot(t)
	d, err := Load()
	must(t, err)
	defer d.Close() //nolint:errcheck // a test's
	for range 200 {
		r, err := d.Records()
		must(t, err)
		looking, ended := make(chan struct{}), make(chan struct{})
		go func() {
			defer close(ended)
			close(looking)
			for range 2000 {
				if r.Pending() {
					t.Error("a record without a packet")
				}
			}
		}()
		<-looking
		must(t, r.Close())
		<-ended
	}
}
