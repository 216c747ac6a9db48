package datapath

import (
	"encoding/binary"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"
	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/bpftest"
)

// passes asserts that a client's frame reaches the pod untouched.
func (b *bench) passes(frame []byte) {
	b.t.Helper()
	if got, _ := b.sends(frame); got != untouched {
		b.t.Fatalf("% x %s", frame, got)
	}
}

// passesSYN asserts that a SYN reaches the pod untouched, and lets the pod answer it.
func (b *bench) passesSYN() {
	b.t.Helper()
	b.passes(b.syn().Bytes(b.t, nil))
	b.podSends(untouched, b.fromPod("SA", 7000, b.isn+1, ""))
}

// swallows asserts that a client's packet is dropped.
func (b *bench) swallows(s bpftest.Segment) {
	b.t.Helper()
	if got, _ := b.sends(s.Bytes(b.t, nil)); got != swallowed {
		b.t.Fatalf("%v %s", s, got)
	}
}

// reply asserts that a client's packet is answered in the kernel.
func (b *bench) reply(s bpftest.Segment) bpftest.Segment {
	b.t.Helper()
	got, frame := b.sends(s.Bytes(b.t, nil))
	if got != toClient {
		b.t.Fatalf("%v %s", s, got)
	}
	r := bpftest.ParseSegment(b.t, frame)
	if r.Src != b.srv || r.Dst != b.client || r.SrcMAC.String() != bpftest.PodMAC.String() ||
		r.DstMAC.String() != bpftest.ClientMAC.String() {
		b.t.Fatalf("reply does not look like the pod's: %v", r)
	}
	return r
}

// rewrites asserts that a client's packet reaches the pod rewritten, and returns the new packet.
func (b *bench) rewrites(s bpftest.Segment) bpftest.Segment {
	b.t.Helper()
	got, frame := b.sends(s.Bytes(b.t, nil))
	if got != toPod {
		b.t.Fatalf("%v %s", s, got)
	}
	r := bpftest.ParseSegment(b.t, frame)
	if r.Src != b.client || r.Dst != b.srv || r.DstMAC.String() != bpftest.PodMAC.String() {
		b.t.Fatalf("does not look like the client's: %v", r)
	}
	return r
}

// podSends passes a pod's packet through observe and returns the result.
func (b *bench) podSends(want fate, s bpftest.Segment) bpftest.Segment {
	b.t.Helper()
	got, frame := b.receives(s.Bytes(b.t, nil))
	if got != want {
		b.t.Fatalf("%v %s; want %s", s, got, want)
	}
	return bpftest.ParseSegment(b.t, frame)
}

func (b *bench) expect(got bpftest.Segment, flags string, seq, ack uint32, payload string) {
	b.t.Helper()
	if got.Flags != flags || got.Seq != seq || got.Ack != ack || got.Payload != payload {
		b.t.Fatalf("got %v, want %s seq %d ack %d %q", got, flags, seq, ack, payload)
	}
}

// connect performs the handshake of a taken connection and returns the sequence number that the client was given.
func (b *bench) connect() uint32 {
	b.t.Helper()
	r := b.reply(b.syn())
	b.expect(r, "SA", r.Seq, b.isn+1, "")
	b.swallows(b.toPod("A", b.isn+1, r.Seq+1, ""))
	return r.Seq
}

func TestHTTPProbeIsAnswered(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		synAck := b.reply(b.syn())
		b.expect(synAck, "SA", synAck.Seq, b.isn+1, "")
		if len(synAck.Options) != 1 || synAck.Options[0].String() != "TCPOption(MSS:1440 0x05a0)" {
			t.Fatalf("options %v, want only the client's MSS", synAck.Options)
		}
		if synAck.Window != 2048 {
			t.Fatalf("first window of %d, want as much as can be stored", synAck.Window)
		}
		if again := b.reply(b.syn()); again.Seq != synAck.Seq {
			t.Fatalf("repeated SYN got %d, the first %d", again.Seq, synAck.Seq)
		}
		x := synAck.Seq
		b.swallows(b.toPod("A", b.isn+1, x+1, ""))

		after := b.isn + 1 + uint32(len(request))
		b.expect(b.reply(b.toPod("PA", b.isn+1, x+1, request)), "FPA", x+1, after, reply)
		acked := x + 1 + uint32(len(reply)) + 1
		b.swallows(b.toPod("A", after, acked, ""))
		b.swallows(b.toPod("PA", b.isn+1, acked, request)) // late: the client has already received the answer
		b.swallows(b.toPod("A", b.isn, acked, ""))         // a keep-alive that waits for nothing
		b.expect(b.reply(b.toPod("FA", after, acked, "")), "RA", acked, after+1, "")
		b.noFlows()
		b.counted("answered_http", 1)
		b.counted("answered_tcp", 0)
		b.wantTrust(TrustProven, "")
		if hits := b.tally(b.asked()).Hits; hits != 1 {
			t.Fatalf("hits %d, want 1", hits)
		}
	})
}

func TestClientWithoutMSSGetsNone(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		for _, options := range [][]layers.TCPOption{nil, {{OptionType: layers.TCPOptionKindNop, OptionLength: 1}}} {
			syn := b.syn()
			syn.Options = options
			r := b.reply(syn)
			if len(r.Options) != 0 {
				t.Fatalf("options %v", r.Options)
			}
			r = b.rewrites(b.toPod("PA", b.isn+1, r.Seq+1, "x"))
			if r.Flags != "S" || len(r.Options) != 0 {
				t.Fatalf("the pod was offered %v, with options %v", r, r.Options)
			}
			b.swallows(b.toPod("R", b.isn+1, 0, ""))
		}
	})
}

// Every reply is what a net/http server would send first, except for our mark.
func TestEveryStatusIsRepeatedAsObserved(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		for status := 200; status < 300; status++ {
			e := success(t, status, time.Hour)
			b.putFor(request, e)
			b.put(PortKey(8080), e)
			b.trust(TrustProven)
			x := b.connect()
			r := b.reply(b.toPod("PA", b.isn+1, x+1, request)) // checksums verified
			want := fmt.Sprintf("HTTP/1.1 %d %s\r\nContent-Length: 0\r\nConnection: close\r\nCache-Status: probelet; hit\r\n\r\n",
				status, http.StatusText(status))
			if status == 204 { // No Content has no length (RFC 9110, section 8.6)
				want = strings.Replace(want, "Content-Length: 0\r\n", "", 1)
			}
			if r.Payload != want {
				t.Fatalf("status %d: %q, want %q", status, r.Payload, want)
			}
			b.swallows(b.toPod("R", b.isn+1, 0, ""))
			b.noFlows()
		}
	})
	for _, status := range []int{0, 199, 300, 404, 500} {
		if (&Evidence{}).SetReply(status) == nil {
			t.Errorf("reply for %d", status)
		}
	}
}

func TestPaddingIsNotPayload(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		r := b.reply(b.syn())
		frame := append(b.toPod("A", b.isn+1, r.Seq+1, "").Bytes(t, nil), make([]byte, 10)...)
		if got, _ := b.sends(frame); got != swallowed {
			t.Fatalf("an ACK with padding was mistaken for data: it %s", got)
		}
	})
}

func TestTCPProbeIsAnswered(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		e := success(t, 200, time.Hour)
		b.put(TCPKey(8080), e)
		b.put(PortKey(8080), e)
		b.trust(TrustProven)
		x := b.connect()
		b.expect(b.reply(b.toPod("FA", b.isn+1, x+1, "")), "RA", x+1, b.isn+2, "")
		b.noFlows()
		b.counted("answered_tcp", 1)
		if hits := b.tally(TCPKey(8080)).Hits; hits != 1 {
			t.Fatalf("hits %d, want 1", hits)
		}
	})
}

func TestOthersPacketsPassUntouched(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		frame := b.syn().Bytes(t, nil)
		// Forwarded or bridged from another device; its socket may belong to a process on this machine.
		if got, _ := b.egress(bpftest.Packet{Frame: frame, From: otherIfindex, Mark: clientMark}); got != untouched {
			t.Fatalf("a packet from another device %s", got)
		}
		must(t, b.d.SetProber(Prober{CgroupIDs: []uint64{1 << 40}}))
		b.passes(frame)
		must(t, b.d.SetProber(Prober{}))
		b.passes(frame)
		b.noFlows()
		b.counted("passed_not_prober", 3)
		b.counted("answered_http", 0)
	})
}

func TestProberIsIdentifiedByItsCgroup(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		for slot := range 4 {
			ids := make([]uint64, 4)
			for i := range ids {
				ids[i] = 1 << 40
			}
			ids[slot] = ownCgroup(t)
			must(t, b.d.SetProber(Prober{CgroupIDs: ids}))
			b.connect()
			b.isn += 1000
		}
	})
	if err := (&Datapath{}).SetProber(Prober{CgroupIDs: make([]uint64, 5)}); err == nil {
		t.Fatal("five cgroups were accepted")
	}
}

// A connection continues as it began, even if the prober has changed.
func TestConnectionOutlivesTheProberSet(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		x := b.connect()
		must(t, b.d.SetProber(Prober{}))
		after := b.isn + 1 + uint32(len(request))
		b.reply(b.toPod("PA", b.isn+1, x+1, request))
		b.reply(b.toPod("FA", after, x+1+uint32(len(reply))+1, ""))
		b.noFlows()

		must(t, b.d.SetProber(Prober{AnyLocal: true}))
		x = b.handOver(7000)
		must(t, b.d.SetProber(Prober{}))
		b.expect(b.rewrites(b.toPod("PA", b.isn+2, x+1, "y")), "PA", b.isn+2, 7001, "y")
		b.expect(b.podSends(toClient, b.fromPod("PA", 7001, b.isn+3, "z")), "PA", x+1, b.isn+3, "z")
	})
}

func TestNothingIsTakenUnlessThePortIsFresh(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.trust(TrustProven)
		syn := b.syn().Bytes(t, nil)
		b.passes(syn)
		b.counted("passed_not_probed", 1)
		b.noFlows()

		// The endpoint alone does not suffice: the port's record speaks for all its endpoints.
		b.putFor(request, success(t, 200, time.Hour))
		b.passes(syn)
		b.put(PortKey(8080), success(t, 200, -time.Second))
		b.passes(syn)
		b.counted("passed_not_fresh", 1)
		b.passes(b.toPod("RA", b.isn+1, 0, "").Bytes(t, nil))

		b.put(PortKey(8080), success(t, 200, time.Hour))
		must(t, b.d.RemoveDevice(b.key))
		b.passes(syn)
		b.noFlows()
		b.counted("answered_http", 0)
	})
}

func TestUnparsablePacketsPassUntouched(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		md5 := b.syn()
		md5.Options = append(md5.Options[:1:1], layers.TCPOption{OptionType: 19, OptionLength: 18, OptionData: make([]byte, 16)})
		b.passes(md5.Bytes(t, nil))
		badMSS := b.syn()
		badMSS.Options = []layers.TCPOption{{OptionType: 2, OptionLength: 3, OptionData: []byte{1}}}
		b.passes(badMSS.Bytes(t, nil))
		b.passes(b.toPod("S", b.isn, 0, "fast open").Bytes(t, nil))
		b.passes(b.toPod("SF", b.isn, 0, "").Bytes(t, nil))
		b.passes(b.toPod("SR", b.isn, 0, "").Bytes(t, nil))
		// Packets of connections that were not taken at their SYN.
		b.passes(b.toPod("PA", b.isn+1, 1, request).Bytes(t, nil))
		b.passes(b.toPod("A", b.isn+1, 1, "").Bytes(t, nil))
		b.passes(b.toPod("FA", b.isn+1, 1, "").Bytes(t, nil))
		b.passes(b.toPod("R", b.isn+1, 1, "").Bytes(t, nil))
		if b.srv.Addr().Is4() {
			// If its IP options were ignored, this would be a SYN to port 8080.
			disguised := b.toPod("A", 1, 0x50020000, "").Bytes(t, func(v4 *layers.IPv4, _ *layers.IPv6) {
				v4.Options = []layers.IPv4Option{{OptionType: 0x94, OptionLength: 4, OptionData: []byte{0x1f, 0x90}}}
			})
			binary.BigEndian.PutUint16(disguised[14+2:], 40)
			b.passes(disguised[:14+40])
			b.passes(b.syn().Bytes(t, func(v4 *layers.IPv4, _ *layers.IPv6) { v4.Flags = layers.IPv4MoreFragments }))
			b.passes(b.syn().Bytes(t, func(v4 *layers.IPv4, _ *layers.IPv6) { v4.FragOffset = 8 }))
			b.passes(b.syn().Bytes(t, func(v4 *layers.IPv4, _ *layers.IPv6) { v4.Protocol = layers.IPProtocolUDP }))
		} else {
			for _, next := range []layers.IPProtocol{0, 43, 44, 60, layers.IPProtocolUDP} { // extension headers
				b.passes(b.syn().Bytes(t, func(_ *layers.IPv4, v6 *layers.IPv6) { v6.NextHeader = next }))
			}
		}
		whole := b.syn().Bytes(t, nil)
		b.passes(whole[:14+b.ipLen()+19]) // ends within the TCP header
		b.passes(whole[:14+b.ipLen()+21]) // ends within its options
		b.noFlows()
	})
}

func (b *bench) ipLen() int {
	if b.srv.Addr().Is4() {
		return 20
	}
	return 40
}

// Any pod may use the EtherType of steered packets: whatever is not an order of ours passes, byte for byte.
func TestOrdersCannotBeForged(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		ordered := b.order()
		passes := func(frame []byte) {
			t.Helper()
			verdict, out := bpftest.RunRespond(t, b.d.Respond(), b.key.Ifindex, frame)
			if verdict != xdpPass || string(out) != string(frame) {
				t.Fatalf("verdict %d for % x, became % x", verdict, frame, out)
			}
			if got, _ := b.receives(frame); got != untouched {
				t.Fatalf("behind respond % x %s", frame, got)
			}
			b.passes(frame)
		}
		order := len(ordered) - 132 // STEERED_ROOM
		for i := range 8 {
			forged := append([]byte(nil), ordered...)
			forged[order+i] ^= 0x55
			passes(forged)
		}
		for length := 14; length < len(ordered); length++ {
			passes(ordered[:length])
		}
		unknown := append([]byte(nil), ordered...)
		unknown[14] = 0x75 // neither IPv4 nor IPv6
		if verdict, _ := bpftest.RunRespond(t, b.d.Respond(), b.key.Ifindex, unknown); verdict != xdpPass {
			t.Fatalf("verdict %d for IP version 7", verdict)
		}
	})
}

// order returns what steer makes of a SYN when respond makes the answers.
func (b *bench) order() []byte {
	b.t.Helper()
	device := b.device()
	device.Hook = uint8(HookXDP)
	b.setDevice(device)
	frame := b.syn().Bytes(b.t, nil)
	verdict, out := bpftest.RunTC(b.t, b.d.Steer(), b.key.Ifindex, bpftest.Packet{Frame: frame})
	if verdict != tcRedirect || binary.BigEndian.Uint16(out.Frame[12:]) != 0x88b5 {
		b.t.Fatalf("verdict %#x, no order: % x", verdict, out.Frame)
	}
	return out.Frame
}

func TestLateSYNDoesNotBreakAConnection(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		x := b.connect()
		b.wait(answerLost)
		if again := b.reply(b.syn()); again.Seq != x {
			t.Fatalf("repeated SYN got %d, the first %d", again.Seq, x)
		}
		b.reply(b.toPod("PA", b.isn+1, x+1, request))
	})
}

func TestEvidenceExpiresBetweenSYNAndRequest(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		x := b.connect()
		b.putFor(request, success(t, 200, 0))
		time.Sleep(time.Millisecond)
		if r := b.reply(b.toPod("PA", b.isn+1, x+1, request)); r.Payload != reply {
			t.Fatalf("answer %v", r)
		}
	})
}

// drawRequest draws what a client may send first.
func drawRequest(rt *rapid.T) string {
	line := rapid.StringMatching(`[ -~]{0,40}`)
	text := rapid.SampledFrom([]string{"GET /", "GET /", "GET /", "GET /", "get /", "POST /", "GET  /", "GET", ""}).Draw(rt, "start")
	text += rapid.OneOf(
		rapid.Just("healthz"), rapid.StringMatching(`[!-~]{0,40}`), rapid.Map(rapid.SliceOfN(rapid.Byte(), 0, 20), func(b []byte) string { return string(b) }),
	).Draw(rt, "path") + " HTTP/1.1\r\n"
	for range rapid.IntRange(0, 30).Draw(rt, "headers") {
		text += "X: " + line.Draw(rt, "header") + "\r\n"
	}
	text += rapid.SampledFrom([]string{"\r\n", "\r\n", "\r\n", "\r\n", "", "\n", "\r\nbody"}).Draw(rt, "end")
	if length := rapid.SampledFrom([]int{0, 0, 0, 1, 8, 9, 10, 1023, MaxRequest, MaxRequest + 1}).Draw(rt, "length"); length != 0 {
		text = text[:min(len(text), max(length-4, 0))] + strings.Repeat("x", max(length-len(text)-4, 0)) + "\r\n\r\n"
		text = text[max(len(text)-max(length, 4), 0):]
	}
	return text
}

// answers reports whether a client that sends text first on a new connection is answered.
func (b *bench) answers(text string) bool {
	b.t.Helper()
	x := b.connect()
	got, _ := b.sends(b.toPod("PA", b.isn+1, x+1, text).Bytes(b.t, nil))
	if got != toClient {
		b.swallows(b.toPod("R", b.isn+1, 0, ""))
	} else {
		b.reply(b.toPod("FA", b.isn+1+uint32(len(text)), x+1, ""))
	}
	b.isn += 0x01000000
	return got == toClient
}

// A request is answered exactly if it has the form that the model accepts and there is evidence for the question that the model computes.
func TestHashesMatchTheModel(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		answered := 0
		rapid.Check(t, func(rt *rapid.T) {
			text := drawRequest(rt)
			if text == "" {
				return
			}
			b.putFor(text, success(t, 200, time.Hour))
			got, want := b.answers(text), isQuestion(text)
			if got != want {
				rt.Fatalf("%q (%d bytes) is answered: %v, want %v", text, len(text), got, want)
			}
			if want {
				answered++
			}
			must(t, b.pod.Delete(HTTPKey(8080, question(text))))
		})
		if answered == 0 {
			t.Fatal("nothing was answered")
		}
	})
}

// Only the same bytes are answered, not ones that differ in a bit, in length, or in what an earlier request left behind.
func TestOnlyTheSameRequestIsAnswered(t *testing.T) {
	changes := map[string]func(rt *rapid.T, text []byte) []byte{
		"one bit": func(rt *rapid.T, text []byte) []byte {
			text[rapid.IntRange(0, len(text)-1).Draw(rt, "at")] ^= 1 << rapid.IntRange(0, 7).Draw(rt, "bit")
			return text
		},
		"two words": func(rt *rapid.T, text []byte) []byte { // sums would stay the same
			i, j := 4*rapid.IntRange(0, len(text)/4-1).Draw(rt, "i"), 4*rapid.IntRange(0, len(text)/4-1).Draw(rt, "j")
			for k := range 4 {
				text[i+k], text[j+k] = text[j+k], text[i+k]
			}
			return text
		},
		"a byte less": func(rt *rapid.T, text []byte) []byte {
			at := rapid.IntRange(0, len(text)-1).Draw(rt, "at")
			return append(text[:at:at], text[at+1:]...)
		},
		"more bytes": func(rt *rapid.T, text []byte) []byte {
			at := rapid.IntRange(0, len(text)).Draw(rt, "at")
			more := rapid.SliceOfN(rapid.Byte(), 1, 16).Draw(rt, "more")
			if rapid.Bool().Draw(rt, "zeroes") {
				more = make([]byte, len(more))
			}
			return append(append(text[:at:at], more...), text[at:]...)
		},
		"cut": func(rt *rapid.T, text []byte) []byte { return text[:rapid.IntRange(1, len(text)-1).Draw(rt, "length")] },
	}
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		answered := 0
		rapid.Check(t, func(rt *rapid.T) {
			text := drawRequest(rt)
			if !isQuestion(text) {
				return
			}
			b.putFor(text, success(t, 200, time.Hour))
			change := rapid.SampledFrom(slices.Sorted(maps.Keys(changes))).Draw(rt, "change")
			other := string(changes[change](rt, []byte(text)))
			if rapid.Bool().Draw(rt, "after the same") && !b.answers(text) {
				rt.Fatalf("%q is not answered", text)
			}
			if other != text && b.answers(other) {
				rt.Fatalf("%q is answered with evidence of %q", other, text)
			}
			if !b.answers(text) {
				rt.Fatalf("%q is not answered", text)
			}
			answered++
			must(t, b.pod.Delete(HTTPKey(8080, question(text))))
		})
		if answered < 10 {
			t.Fatalf("%d requests were answered", answered)
		}
	})
}

// Only one of two questions with the same hash, which has a probability of 2^-32, is answered.
func TestCheckIsCompared(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		for bit := range 64 {
			e := success(t, 200, time.Hour)
			e.Check = question(request).Check ^ 1<<bit
			b.put(b.asked(), e)
			if b.answers(request) {
				t.Fatalf("answered although bit %d of the check differs", bit)
			}
		}
	})
}

// All keys are redrawn whenever the programs are loaded.
func TestKeysAreSecret(t *testing.T) {
	bpftest.RequireRoot(t)
	seen, keys := map[string]bool{}, 0
	for range 2 {
		d, err := Load()
		must(t, err)
		for key := range slices.Chunk(bpftest.KeysOf(t, d.Steer()), 8) {
			seen[string(key)] = true
			keys++
		}
		must(t, d.Close())
	}
	if len(seen) != keys || keys != 2*2*MaxRequest/8 {
		t.Fatalf("%d different keys of %d", len(seen), keys)
	}
}

// The Go model and the program must agree on a SYN's options: the SYN is taken exactly if an answer may ignore them all, and granted
// the MSS that it names.
func TestSYNOptionsMatchTheModel(t *testing.T) {
	option := rapid.OneOf(
		rapid.SampledFrom([]string{"\x02\x04\x05\xa0", "\x04\x02", "\x08\x0atimestam", "\x01", "\x03\x03\x07", "\x02\x04\x01\x00", "\x00", "\x13\x12"}),
		rapid.Custom(func(t *rapid.T) string {
			return string(append([]byte{rapid.SampledFrom([]byte{2, 3, 4, 8, 5, 30, 34, 254}).Draw(t, "kind")}, rapid.SliceOfN(rapid.ByteRange(0, 12), 0, 10).Draw(t, "rest")...))
		}),
	)
	linux := "\x02\x04\x05\xa0\x04\x02\x08\x0atimestam\x01\x03\x03\x07"
	options := rapid.OneOf(
		rapid.Map(rapid.SliceOf(option), func(all []string) string { return strings.Join(all, "") }),
		rapid.Custom(func(t *rapid.T) string { // almost as Linux sends them
			changed := []byte(linux)
			changed[rapid.IntRange(0, len(linux)-1).Draw(t, "at")] ^= rapid.Byte().Draw(t, "by")
			return string(changed)
		}),
	)
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		taken := 0
		rapid.Check(t, func(rt *rapid.T) {
			raw := []byte(options.Draw(rt, "options"))
			raw = append(raw, make([]byte, (4-len(raw)%4)%4)...)
			raw = raw[:min(len(raw), 40)]
			syn := b.syn()
			syn.Options = slices.Repeat([]layers.TCPOption{{OptionType: layers.TCPOptionKindNop, OptionLength: 1}}, len(raw))
			frame := syn.Bytes(t, nil)
			copy(frame[len(frame)-len(raw):], raw)
			mss, understood := readOptions(raw)
			got, out := b.sends(frame)
			if (got == toClient) != understood {
				rt.Fatalf("SYN with options % x %s; the model understands them: %v", raw, got, understood)
			}
			if !understood {
				return
			}
			taken++
			r := bpftest.ParseSegment(t, out)
			if granted, _ := mssOf(r.Options); granted != mss || len(r.Options) > 1 {
				rt.Fatalf("options % x are answered with %v, want MSS %d", raw, r.Options, mss)
			}
			b.swallows(b.toPod("R", b.isn+1, 0, ""))
		})
		if taken == 0 {
			t.Fatal("no SYN was taken")
		}
	})
}

// The Go model and the program must agree on freshness, at the SYN and at the request.
func TestFreshnessMatchesTheModel(t *testing.T) {
	// The program has its own clock, so times stay clear of the boundaries, which TestModelAtTheBoundaries covers.
	distance := rapid.SampledFrom([]int64{-3600e9, -60e9, -10e9, 10e9, 60e9, 3600e9})
	onBench(t, func(t *testing.T, b *bench) {
		b.trust(TrustProven)
		draw := func(rt *rapid.T, name string, now uint64) Evidence {
			e := success(t, 200, 0)
			e.ObservedAt = now + uint64(distance.Draw(rt, name+" observed"))
			e.FreshUntil = now + uint64(distance.Draw(rt, name+" fresh until"))
			if rapid.IntRange(0, 5).Draw(rt, name+" cleared") == 0 {
				e.FreshUntil = 0
			}
			e.Result = rapid.SampledFrom([]uint8{ResultSuccess, ResultSuccess, ResultSuccess, ResultFailure, ResultUnknown}).Draw(rt, name+" result")
			if rapid.Bool().Draw(rt, name+" by traffic") {
				e.TrafficUntil = now + uint64(distance.Draw(rt, name+" traffic until"))
				e.TrafficWindowMs = 30_000
			}
			return e
		}
		drawTally := func(rt *rapid.T, name string, now uint64) (tally Tally) {
			if rapid.Bool().Draw(rt, name+" withdrawn") {
				tally.WithdrawnAt = now + uint64(distance.Draw(rt, name+" withdrawn at")) + 1e9
			}
			if rapid.Bool().Draw(rt, name+" served") {
				tally.ServedAt = now + uint64(distance.Draw(rt, name+" served at"))
			}
			if rapid.Bool().Draw(rt, name+" closed") {
				tally.ClosedAt = now + uint64(distance.Draw(rt, name+" closed at"))
			}
			tally.Answered = rapid.Uint32Range(0, 2*MaxTrafficAnswers).Draw(rt, name+" answered")
			return tally
		}
		rapid.Check(t, func(rt *rapid.T) {
			now := Now()
			port, endpoint := draw(rt, "port", now), draw(rt, "endpoint", now)
			ofPort, ofEndpoint := drawTally(rt, "port", now), drawTally(rt, "endpoint", now)
			b.put(PortKey(8080), port)
			b.putFor(request, endpoint)
			b.setTally(PortKey(8080), ofPort)
			b.setTally(b.asked(), ofEndpoint)
			b.voidPod(drawTally(rt, "pod", now).WithdrawnAt)
			ofPort, err := b.pod.Tally(PortKey(8080)) // includes those of the pod
			must(t, err)

			b.isn += 0x01000000
			got, frame := b.sends(b.syn().Bytes(t, nil))
			// There is no TCP endpoint here, which alone could make a real probe due at the SYN.
			want := ofPort.WithdrawnAt < port.ObservedAt && (now < port.FreshUntil || IsServing(port, ofPort, KindHTTP, now))
			if (got == toClient) != want {
				rt.Fatalf("SYN %s; answered according to the model: %v", got, want)
			}
			if got != toClient {
				return
			}
			x := bpftest.ParseSegment(t, frame).Seq
			got, _ = b.sends(b.toPod("PA", b.isn+1, x+1, request).Bytes(t, nil))
			// A connection that was taken because of traffic is for endpoints that traffic vouches for.
			byTraffic := now >= port.FreshUntil
			want = MayAnswer(endpoint, ofPort, ofEndpoint, now, now) && (!byTraffic || IsServing(endpoint, ofPort, KindHTTP, now))
			if (got == toClient) != want {
				rt.Fatalf("request %s; answered according to the model: %v", got, want)
			}
		})
	})
}

// Answers are noted, along with the age of the evidence.
func TestAnswersAreNoted(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.trust(TrustProven)
		ages := []float64{0}
		for _, bound := range AnswerAgeBounds {
			ages = append(ages, bound*1.1) // in the next bucket, but not in the one after it
		}
		var sum float64
		for i, age := range ages {
			b.put(PortKey(b.srv.Port()), success(t, 200, time.Hour))
			isn := b.connect()
			e := success(t, 200, time.Hour)
			asked := e.ObservedAt
			e.ObservedAt -= uint64(age * float64(time.Second))
			b.putFor(request, e)
			sum += age
			b.reply(b.toPod("PA", b.isn+1, isn+1, request))
			b.reply(b.toPod("FA", b.isn+1+uint32(len(request)), isn+1, ""))
			tally := b.tally(b.asked())
			if tally.Hits != uint64(i+1) || tally.AnsweredAt < asked || tally.AnsweredAt > Now() {
				t.Fatalf("tally %+v after %d answers, the last at %d", tally, i+1, asked)
			}
			got, err := b.d.AnswerAges()
			must(t, err)
			for bucket, n := range got.Buckets {
				if want := bucket <= i; (n == 1) != want || n > 1 {
					t.Fatalf("after an answer of age %v s: %v", age, got.Buckets)
				}
			}
			if got.Sum.Seconds() < sum || got.Sum.Seconds() > sum*1.02+1 {
				t.Fatalf("the sum of ages is %s, want %v s", got.Sum, sum)
			}
		}
	})
}

// An answered connection without a request counts with the age of the port's evidence at its SYN.
func TestConnectionsCountWithTheAgeOfTheirEvidence(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.trust(TrustProven)
		for _, age := range []time.Duration{20 * time.Second, 2 * time.Second} {
			e := success(t, 200, time.Hour)
			e.ObservedAt -= uint64(age)
			b.put(PortKey(8080), e)
			isn := b.connect()
			b.put(PortKey(8080), success(t, 200, time.Hour))
			b.reply(b.toPod("FA", b.isn+1, isn+1, ""))
		}
		b.counted("answered_tcp", 2)
		got, err := b.d.AnswerAges()
		must(t, err)
		if want := [...]uint64{4: 1, 7: 1, len(AnswerAgeBounds): 0}; got.Buckets != want {
			t.Fatalf("got %v, want %v", got.Buckets, want)
		}
	})
}

func TestFills(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		b.connect()
		fills, err := b.d.Fills()
		must(t, err)
		if fills["flows"] != (Fill{1, 4096}) || fills["pods"] != (Fill{1, 4096}) {
			t.Fatalf("%+v", fills)
		}
	})
}
