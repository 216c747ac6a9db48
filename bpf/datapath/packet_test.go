package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/gopacket/gopacket/layers"
	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/bpftest"
)

// Verdicts of the two hooks, as the kernel names them.
const (
	tcPass     = 0xffffffff // TC_ACT_UNSPEC
	tcRedirect = 7
	xdpDrop    = 1
	xdpPass    = 2
	xdpTX      = 3
)

const request = "GET /healthz HTTP/1.1\r\nHost: pod:8080\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n"

// bench is a pod's device without a pod: packets are put into the programs and looked at when they come out.
type bench struct {
	t           testing.TB
	d           *Datapath
	pod         *Pod
	ifindex     uint32
	client, srv netip.AddrPort
	isn         uint32
}

var families = map[string][2]string{
	"ipv4": {"10.244.1.1:40000", "10.244.1.8:8080"},
	"ipv6": {"[fd00:10:244:1::1]:40000", "[fd00:10:244:1::8]:8080"},
}

// onBench runs the test for both families, in the namespace that has the device.
func onBench(t *testing.T, f func(b *bench)) {
	for family, addrs := range families {
		t.Run(family, func(t *testing.T) {
			node := bpftest.NewNode(t)
			pod := node.AddPod(t)
			d, err := Load()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = d.Close() })
			p, err := d.NewPod()
			must(t, err)
			t.Cleanup(func() { _ = p.Close() })
			must(t, d.AddPod(uint32(pod.IfIndex), pod.Netns, p))
			must(t, d.SetProber(Prober{AnyLocal: true}))
			b := &bench{
				t: t, d: d, pod: p, ifindex: uint32(pod.IfIndex), isn: 0xfffffff0, // wraps within a request
				client: netip.MustParseAddrPort(addrs[0]), srv: netip.MustParseAddrPort(addrs[1]),
			}
			must(t, node.NS.Do(func(ns.NetNS) error { f(b); return nil }))
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// success is evidence that is good for d.
func success(t testing.TB, status int, d time.Duration) Evidence {
	t.Helper()
	now := Now()
	e := Evidence{ObservedAt: now, FreshUntil: uint64(int64(now) + int64(d)), Result: ResultSuccess}
	must(t, e.SetReply(status))
	return e
}

func (b *bench) put(key EndpointKey, e Evidence) {
	b.t.Helper()
	must(b.t, b.pod.Put(key, e))
}

// arm makes /healthz fresh for an hour.
func (b *bench) arm() {
	b.t.Helper()
	e := success(b.t, 200, time.Hour)
	b.put(HTTPKey(b.srv.Port(), "/healthz"), e)
	b.put(PortKey(b.srv.Port()), e)
}

func (b *bench) toPod(flags string, seq, ack uint32, payload string) bpftest.Segment {
	return bpftest.Segment{
		Src: b.client, Dst: b.srv, SrcMAC: bpftest.ClientMAC, DstMAC: bpftest.PodMAC,
		Flags: flags, Seq: seq, Ack: ack, Window: 501, Payload: payload,
	}
}

func (b *bench) fromPod(flags string, seq, ack uint32, payload string) bpftest.Segment {
	return bpftest.Segment{
		Src: b.srv, Dst: b.client, SrcMAC: bpftest.PodMAC, DstMAC: bpftest.ClientMAC,
		Flags: flags, Seq: seq, Ack: ack, Window: 502, Payload: payload,
	}
}

func (b *bench) syn() bpftest.Segment {
	s := b.toPod("S", b.isn, 0, "")
	s.Options = []layers.TCPOption{ // as Linux sends them
		{OptionType: layers.TCPOptionKindMSS, OptionLength: 4, OptionData: []byte{0x05, 0xa0}},
		{OptionType: layers.TCPOptionKindSACKPermitted, OptionLength: 2},
		{OptionType: layers.TCPOptionKindTimestamps, OptionLength: 10, OptionData: make([]byte, 8)},
		{OptionType: layers.TCPOptionKindNop, OptionLength: 1},
		{OptionType: layers.TCPOptionKindWindowScale, OptionLength: 3, OptionData: []byte{7}},
	}
	return s
}

// passes asserts that a client's frame goes on to the pod untouched.
func (b *bench) passes(frame []byte) {
	b.t.Helper()
	verdict, out := bpftest.RunSteer(b.t, b.d.Steer(), b.ifindex, 0, frame)
	if verdict != tcPass || string(out) != string(frame) {
		b.t.Fatalf("verdict %#x for\n% x, now\n% x", verdict, frame, out)
	}
}

// steered asserts that a client's frame is redirected, and returns what respond makes of it.
func (b *bench) steered(s bpftest.Segment) (uint32, []byte) {
	b.t.Helper()
	verdict, frame := bpftest.RunSteer(b.t, b.d.Steer(), b.ifindex, 0, s.Bytes(b.t, nil))
	if verdict != tcRedirect {
		b.t.Fatalf("verdict %#x for %v, not redirected", verdict, s)
	}
	if proto := binary.BigEndian.Uint16(frame[12:]); proto != 0x88b5 {
		b.t.Fatalf("EtherType %#x of a steered packet", proto)
	}
	return bpftest.RunRespond(b.t, b.d.Respond(), b.ifindex, frame)
}

func (b *bench) ipLen() int {
	if b.srv.Addr().Is4() {
		return 20
	}
	return 40
}

// dropped asserts that a client's packet ends here.
func (b *bench) dropped(s bpftest.Segment) {
	b.t.Helper()
	if verdict, _ := b.steered(s); verdict != xdpDrop {
		b.t.Fatalf("verdict %d for %v, not dropped", verdict, s)
	}
}

// reply asserts that a client's packet is answered in the kernel.
func (b *bench) reply(s bpftest.Segment) bpftest.Segment {
	b.t.Helper()
	verdict, frame := b.steered(s)
	if verdict != xdpPass {
		b.t.Fatalf("verdict %d for %v, not up the stack", verdict, s)
	}
	r := bpftest.ParseSegment(b.t, frame)
	if r.Src != b.srv || r.Dst != b.client || r.SrcMAC.String() != bpftest.PodMAC.String() ||
		r.DstMAC.String() != bpftest.ClientMAC.String() {
		b.t.Fatalf("reply not as from the pod: %v", r)
	}
	return r
}

func (b *bench) expect(got bpftest.Segment, flags string, seq, ack uint32, payload string) {
	b.t.Helper()
	if got.Flags != flags || got.Seq != seq || got.Ack != ack || got.Payload != payload {
		b.t.Fatalf("got %v, want %s seq %d ack %d %q", got, flags, seq, ack, payload)
	}
}

// connect does the handshake of a taken connection and returns the sequence number the client was given.
func (b *bench) connect() uint32 {
	b.t.Helper()
	r := b.reply(b.syn())
	b.expect(r, "SA", r.Seq, b.isn+1, "")
	b.dropped(b.toPod("A", b.isn+1, r.Seq+1, ""))
	return r.Seq
}

// pass puts a client's packet through steer and returns it as the pod gets it.
func (b *bench) pass(s bpftest.Segment) bpftest.Segment {
	b.t.Helper()
	verdict, frame := bpftest.RunSteer(b.t, b.d.Steer(), b.ifindex, 0, s.Bytes(b.t, nil))
	if verdict != tcPass {
		b.t.Fatalf("verdict %#x for %v, not passed", verdict, s)
	}
	return bpftest.ParseSegment(b.t, frame)
}

// podSends puts a pod's packet through respond.
func (b *bench) podSends(want uint32, s bpftest.Segment) bpftest.Segment {
	b.t.Helper()
	verdict, frame := bpftest.RunRespond(b.t, b.d.Respond(), b.ifindex, s.Bytes(b.t, nil))
	if verdict != want {
		b.t.Fatalf("verdict %d for %v, want %d", verdict, s, want)
	}
	return bpftest.ParseSegment(b.t, frame)
}

func (b *bench) flows() int {
	b.t.Helper()
	n, err := b.d.Flows()
	must(b.t, err)
	return n
}

func (b *bench) noFlows() {
	b.t.Helper()
	if n := b.flows(); n != 0 {
		b.t.Fatalf("%d flows are left", n)
	}
}

func (b *bench) counted(name string, want uint64) {
	b.t.Helper()
	counters, err := b.d.Counters()
	must(b.t, err)
	if counters[name] != want {
		b.t.Fatalf("counter %s is %d, want %d; all: %v", name, counters[name], want, counters)
	}
}

// outcomes are those reported since the last call.
func (b *bench) outcomes() []Outcome {
	b.t.Helper()
	r, err := b.d.Outcomes()
	must(b.t, err)
	defer r.Close() //nolint:errcheck // a test's
	r.SetDeadline(time.Unix(1, 0))
	all, err := r.Read()
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		must(b.t, err)
	}
	return all
}

func (b *bench) outcome(event, kind uint8, status uint16) Outcome {
	b.t.Helper()
	all := b.outcomes()
	if len(all) != 1 || all[0].Event != event || all[0].Kind != kind || all[0].Status != status ||
		all[0].Port != b.srv.Port() || all[0].Ifindex != b.ifindex {
		b.t.Fatalf("outcomes %+v, want one: event %d kind %d status %d", all, event, kind, status)
	}
	return all[0]
}

func TestHTTPProbeIsAnswered(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		synAck := b.reply(b.syn())
		b.expect(synAck, "SA", synAck.Seq, b.isn+1, "")
		if len(synAck.Options) != 1 || synAck.Options[0].String() != "TCPOption(MSS:1440 0x05a0)" {
			t.Fatalf("options %v, want the client's MSS alone", synAck.Options)
		}
		if again := b.reply(b.syn()); again.Seq != synAck.Seq {
			t.Fatalf("a SYN sent again got %d, the first %d", again.Seq, synAck.Seq)
		}
		x := synAck.Seq
		b.dropped(b.toPod("A", b.isn+1, x+1, ""))

		const reply = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\nCache-Status: probelet; hit\r\n\r\n"
		after := b.isn + 1 + uint32(len(request))
		for range 3 { // the first, and retransmissions
			b.expect(b.reply(b.toPod("PA", b.isn+1, x+1, request)), "FPA", x+1, after, reply)
		}
		acked := x + 1 + uint32(len(reply)) + 1
		b.dropped(b.toPod("A", after, acked, ""))
		b.expect(b.reply(b.toPod("FA", after, acked, "")), "RA", acked, after+1, "")
		b.noFlows()
		b.counted("answered_http", 1)
		b.counted("answered_tcp", 0)
		if _, tally, err := b.pod.Get(HTTPKey(8080, "/healthz")); err != nil || tally.Hits != 1 {
			t.Fatalf("hits %d (%v), want 1", tally.Hits, err)
		}
	})
}

func TestEveryStatusIsRepliedAsObserved(t *testing.T) {
	onBench(t, func(b *bench) {
		for status := 200; status < 300; status++ {
			e := success(t, status, time.Hour)
			b.put(HTTPKey(8080, "/healthz"), e)
			b.put(PortKey(8080), e)
			x := b.connect()
			r := b.reply(b.toPod("PA", b.isn+1, x+1, request)) // checksums verified
			if !strings.HasPrefix(r.Payload, fmt.Sprintf("HTTP/1.1 %d ", status)) ||
				strings.Contains(r.Payload, "Content-Length") == (status == 204) {
				t.Fatalf("status %d: %q", status, r.Payload)
			}
			b.dropped(b.toPod("R", b.isn+1, 0, ""))
			b.noFlows()
		}
	})
	for _, status := range []int{0, 199, 300, 404, 500} {
		if (&Evidence{}).SetReply(status) == nil {
			t.Errorf("a reply for %d", status)
		}
	}
}

func TestPaddingIsNotPayload(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		r := b.reply(b.syn())
		frame := append(b.toPod("A", b.isn+1, r.Seq+1, "").Bytes(t, nil), make([]byte, 10)...)
		verdict, frame := bpftest.RunSteer(t, b.d.Steer(), b.ifindex, 0, frame)
		if verdict != tcRedirect {
			t.Fatalf("verdict %#x", verdict)
		}
		if verdict, _ := bpftest.RunRespond(t, b.d.Respond(), b.ifindex, frame); verdict != xdpDrop {
			t.Fatalf("verdict %d: an ACK with padding was taken for data", verdict)
		}
	})
}

func TestTCPProbeIsAnswered(t *testing.T) {
	onBench(t, func(b *bench) {
		e := success(t, 200, time.Hour)
		b.put(TCPKey(8080), e)
		b.put(PortKey(8080), e)
		x := b.connect()
		b.expect(b.reply(b.toPod("FA", b.isn+1, x+1, "")), "RA", x+1, b.isn+2, "")
		b.noFlows()
		b.counted("answered_tcp", 1)
		if _, tally, err := b.pod.Get(TCPKey(8080)); err != nil || tally.Hits != 1 {
			t.Fatalf("hits %d (%v), want 1", tally.Hits, err)
		}
	})
}

func TestWhatIsNotAProbersPassesUntouched(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		frame := b.syn().Bytes(t, nil)
		// Forwarded, or bridged, from another device; its socket may be a process' of this machine.
		verdict, out := bpftest.RunSteer(t, b.d.Steer(), b.ifindex, 1, frame)
		if verdict != tcPass || string(out) != string(frame) {
			t.Fatalf("verdict %#x for a packet from device 1", verdict)
		}
		must(t, b.d.SetProber(Prober{CgroupIDs: []uint64{1 << 40}}))
		b.passes(frame)
		must(t, b.d.SetProber(Prober{}))
		b.passes(frame)
		b.noFlows()
		b.counted("answered_http", 0)
	})
}

func TestProberIsKnownByItsCgroup(t *testing.T) {
	onBench(t, func(b *bench) {
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
		t.Fatal("five cgroups were taken")
	}
}

func TestNothingIsTakenUnlessThePortIsFresh(t *testing.T) {
	onBench(t, func(b *bench) {
		syn := b.syn().Bytes(t, nil)
		b.passes(syn)
		b.counted("passed_not_probed", 1)
		b.noFlows()

		// The endpoint alone is not enough: the port's record speaks for all its endpoints.
		b.put(HTTPKey(8080, "/healthz"), success(t, 200, time.Hour))
		b.passes(syn)
		b.put(PortKey(8080), success(t, 200, -time.Second))
		b.passes(syn)
		b.counted("passed_not_fresh", 1)

		b.put(PortKey(8080), success(t, 200, time.Hour))
		must(t, b.d.RemovePod(b.ifindex))
		b.passes((bpftest.Segment{Src: b.client, Dst: netip.AddrPortFrom(b.srv.Addr(), 8080), Flags: "S", Seq: 9,
			SrcMAC: bpftest.ClientMAC, DstMAC: bpftest.PodMAC}).Bytes(t, nil))
		b.counted("answered_http", 0)
	})
}

func TestWhatIsNotUnderstoodPassesUntouched(t *testing.T) {
	onBench(t, func(b *bench) {
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
			// Read without regard to its IP options, this is a SYN to port 8080.
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

func TestOrdersCannotBeForged(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		verdict, frame := bpftest.RunSteer(t, b.d.Steer(), b.ifindex, 0, b.syn().Bytes(t, nil))
		if verdict != tcRedirect {
			t.Fatal("not redirected")
		}
		order := len(frame) - 132 // STEERED_ROOM
		for i := range 8 {
			forged := append([]byte(nil), frame...)
			forged[order+i] ^= 0x55
			if verdict, _ := bpftest.RunRespond(t, b.d.Respond(), b.ifindex, forged); verdict != xdpDrop {
				t.Fatalf("verdict %d on a wrong token", verdict)
			}
		}
		for length := 14; length < len(frame); length++ {
			if verdict, _ := bpftest.RunRespond(t, b.d.Respond(), b.ifindex, frame[:length]); verdict != xdpDrop {
				t.Fatalf("verdict %d on a steered packet cut to %d bytes", verdict, length)
			}
		}
	})
}

// answerLost is longer than ANSWER_LOST_NS in bpf/abi.h.
const answerLost = 550 * time.Millisecond

// A SYN that comes again although it was answered long ago: nobody obeys steer, and the pod gets the connection.
func TestAnUnansweredSYNGoesToThePod(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		b.reply(b.syn())
		time.Sleep(answerLost)
		b.passes(b.syn().Bytes(t, nil))
		b.passes(b.syn().Bytes(t, nil))
		const podISN = 7000
		b.podSends(xdpPass, b.fromPod("SA", podISN, b.isn+1, ""))
		b.passes(b.toPod("A", b.isn+1, podISN+1, "").Bytes(t, nil))
		b.passes(b.toPod("PA", b.isn+1, podISN+1, request).Bytes(t, nil))
		b.podSends(xdpPass, b.fromPod("PA", podISN+1, b.isn+1+uint32(len(request)), "HTTP/1.1 200 OK\r\n\r\n"))
		b.passes(b.toPod("FA", b.isn+1+uint32(len(request)), podISN+20, "").Bytes(t, nil))
		b.outcome(EventStatus, KindHTTP, 200)
		b.noFlows()
	})
}

// The client has the answer to its SYN; one that comes late changes nothing.
func TestALateSYNDoesNotBreakAConnection(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		x := b.connect()
		time.Sleep(answerLost)
		if again := b.reply(b.syn()); again.Seq != x {
			t.Fatalf("a SYN sent again got %d, the first %d", again.Seq, x)
		}
		b.reply(b.toPod("PA", b.isn+1, x+1, request))
	})
}

func TestEvidenceExpiresBetweenSYNAndRequest(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		x := b.connect()
		expired := success(t, 200, 0)
		b.put(HTTPKey(8080, "/healthz"), expired)
		time.Sleep(time.Millisecond)
		if r := b.reply(b.toPod("PA", b.isn+1, x+1, request)); !strings.HasPrefix(r.Payload, "HTTP/1.1 200") {
			t.Fatalf("answer %v", r)
		}
	})
}

func TestWithdrawnBetweenSYNAndRequestIsHandedOver(t *testing.T) {
	withdrawals := map[string]func(b *bench){
		"fresh-until cleared": func(b *bench) {
			e := success(t, 200, time.Hour)
			e.FreshUntil = 0
			b.put(HTTPKey(8080, "/healthz"), e)
		},
		"failure": func(b *bench) {
			e := success(t, 200, time.Hour)
			e.Result = ResultFailure
			b.put(HTTPKey(8080, "/healthz"), e)
		},
		"deleted": func(b *bench) { must(t, b.pod.Delete(HTTPKey(8080, "/healthz"))) },
		"voided by the kernel": func(b *bench) {
			must(t, b.pod.tallies.Put(PortKey(8080), Tally{WithdrawnAt: Now()}))
		},
		"without a tally": func(b *bench) { must(t, b.pod.tallies.Delete(PortKey(8080))) },
		"expired before the SYN": func(b *bench) { // another endpoint's record let the connection in
			b.put(HTTPKey(8080, "/healthz"), success(t, 200, -time.Second))
		},
	}
	for name, withdraw := range withdrawals {
		t.Run(name, func(t *testing.T) {
			onBench(t, func(b *bench) {
				b.arm()
				x := b.connect()
				withdraw(b)
				b.replaysSYN(b.toPod("PA", b.isn+1, x+1, request))
			})
		})
	}
}

func TestWithdrawnBetweenOrderAndAnswerIsHandedOver(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		x := b.connect()
		ask := b.toPod("PA", b.isn+1, x+1, request)
		verdict, frame := bpftest.RunSteer(t, b.d.Steer(), b.ifindex, 0, ask.Bytes(t, nil))
		if verdict != tcRedirect {
			t.Fatalf("verdict %#x", verdict)
		}
		must(t, b.pod.Delete(HTTPKey(8080, "/healthz")))
		if verdict, _ := bpftest.RunRespond(t, b.d.Respond(), b.ifindex, frame); verdict != xdpDrop {
			t.Fatalf("verdict %d on an answer that is gone", verdict)
		}
		b.counted("answered_http", 0)
		b.replaysSYN(ask)
	})
	onBench(t, func(b *bench) { // but not if the client has had the answer
		b.arm()
		x := b.connect()
		ask := b.toPod("PA", b.isn+1, x+1, request)
		reply := b.reply(ask)
		must(t, b.pod.Delete(HTTPKey(8080, "/healthz")))
		ask.Ack += uint32(len(reply.Payload)) + 1
		b.dropped(ask)
	})
}

// replaysSYN asserts that a client's packet becomes a SYN to the pod.
func (b *bench) replaysSYN(s bpftest.Segment) {
	b.t.Helper()
	verdict, frame := b.steered(s)
	if verdict != xdpTX {
		b.t.Fatalf("verdict %d for %v, not sent to the pod", verdict, s)
	}
	r := bpftest.ParseSegment(b.t, frame)
	b.expect(r, "S", b.isn, 0, "")
	if r.Src != b.client || r.Dst != b.srv || r.DstMAC.String() != bpftest.PodMAC.String() ||
		len(r.Options) != 1 || r.Options[0].OptionType != layers.TCPOptionKindMSS {
		b.t.Fatalf("SYN %v with options %v", r, r.Options)
	}
}

func TestHandover(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		x := b.connect()
		const post = "POST /orders HTTP/1.1\r\nHost: pod\r\nContent-Length: 3\r\n\r\n123"
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, post))
		b.counted("handed_over", 1)
		b.dropped(b.toPod("A", b.isn+1+100, x+1, "")) // nothing but the first byte matters now
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, post))
		b.counted("handed_over", 1)

		const p = uint32(0xffffff00)
		for _, flags := range []string{"A", "SA", "RA", "R"} { // of an earlier connection on the same ports
			b.podSends(xdpDrop, b.fromPod(flags, 4711, 4712, ""))
		}
		for range 2 { // the pod sends its SYN-ACK again if our ACK was lost
			ack := b.podSends(xdpTX, b.fromPod("SA", p, b.isn+1, ""))
			b.expect(ack, "A", b.isn+1, p+1, "")
			if ack.Src != b.client || ack.Dst != b.srv || ack.DstMAC.String() != bpftest.PodMAC.String() {
				t.Fatalf("ACK %v", ack)
			}
		}

		got := b.pass(b.toPod("PA", b.isn+1, x+1, post))
		b.expect(got, "PA", b.isn+1, p+1, post)
		after := b.isn + 1 + uint32(len(post))
		const answer = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
		b.expect(b.podSends(xdpPass, b.fromPod("PA", p+1, after, answer)), "PA", x+1, after, answer)
		end := uint32(len(answer)) + 1
		b.expect(b.pass(b.toPod("A", after, x+end, "")), "A", after, p+end, "")

		b.expect(b.pass(b.toPod("FA", after, x+end, "")), "FA", after, p+end, "")
		b.expect(b.podSends(xdpPass, b.fromPod("FA", p+end, after+1, "")), "FA", x+end, after+1, "")
		if b.flows() != 1 {
			t.Fatal("forgotten before its end")
		}
		b.expect(b.pass(b.toPod("A", after+1, x+end+1, "")), "A", after+1, p+end+1, "")
		b.noFlows()
	})
}

func TestPartialChecksumsStay(t *testing.T) {
	onBench(t, func(b *bench) {
		b.handOver(7000)
		frame := b.fromPod("PA", 7001, b.isn+10, "hello").Bytes(t, nil)
		l4 := len(frame) - 20 - 5
		partial := pseudoHeaderSum(b.srv.Addr(), b.client.Addr(), 25)
		binary.BigEndian.PutUint16(frame[l4+16:], partial)
		_, out := bpftest.RunRespond(t, b.d.Respond(), b.ifindex, frame)
		if got := binary.BigEndian.Uint16(out[l4+16:]); got != partial {
			t.Fatalf("the pseudo-header's sum %#x became %#x", partial, got)
		}
	})
}

func pseudoHeaderSum(a, b netip.Addr, tcpBytes uint32) uint16 {
	sum := tcpBytes + 6
	for _, addr := range [][]byte{a.AsSlice(), b.AsSlice()} {
		for i := 0; i < len(addr); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(addr[i:]))
		}
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}

// handOver brings a connection to the point where the pod, with that ISN, has it. Returns ours.
func (b *bench) handOver(podISN uint32) uint32 {
	b.t.Helper()
	b.arm()
	x := b.connect()
	b.replaysSYN(b.toPod("PA", b.isn+1, x+1, "x"))
	b.podSends(xdpTX, b.fromPod("SA", podISN, b.isn+1, ""))
	return x
}

func TestHandoverIsRefused(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		x := b.connect()
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, "x"))
		b.expect(b.podSends(xdpPass, b.fromPod("RA", 0, b.isn+1, "")), "RA", x+1, b.isn+1, "")
		b.noFlows()
	})
}

func TestResetsEndAConnection(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		b.connect()
		b.dropped(b.toPod("R", b.isn+1, 0, ""))
		b.noFlows()

		x := b.connect()
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, "x"))
		b.dropped(b.toPod("R", b.isn+1, 0, ""))
		b.noFlows()

		x = b.handOver(7000)
		b.expect(b.pass(b.toPod("RA", b.isn+2, x+1, "")), "RA", b.isn+2, 7001, "")
		b.noFlows()

		x = b.handOver(7000)
		b.expect(b.podSends(xdpPass, b.fromPod("RA", 7001, b.isn+2, "")), "RA", x+1, b.isn+2, "")
		b.noFlows()
	})
}

// A connection whose end was not seen must not touch the next one on the same ports.
func TestANewConnectionOnOldPortsIsItsOwn(t *testing.T) {
	states := map[string]func(b *bench){
		"taken":  func(b *bench) { b.arm(); b.connect() },
		"handed": func(b *bench) { b.handOver(7000) },
		"observed": func(b *bench) {
			b.put(PortKey(8080), Evidence{})
			b.pass(b.syn())
		},
	}
	for name, prepare := range states {
		t.Run(name, func(t *testing.T) {
			onBench(t, func(b *bench) {
				prepare(b)
				// Sent by somebody else, whom steer does not look at: only the pod's packets tell.
				must(t, b.d.SetProber(Prober{CgroupIDs: []uint64{1 << 40}}))
				synAck := b.fromPod("SA", 9000, b.isn+77, "")
				b.expect(b.podSends(xdpPass, synAck), "SA", 9000, b.isn+77, "")
				b.noFlows()
				b.expect(b.podSends(xdpPass, b.fromPod("PA", 9001, 5, "x")), "PA", 9001, 5, "x")
			})
			onBench(t, func(b *bench) {
				prepare(b)
				must(t, b.d.SetProber(Prober{AnyLocal: true}))
				must(t, b.pod.Delete(PortKey(8080)))
				b.isn += 77
				b.passes(b.syn().Bytes(t, nil))
				b.noFlows()
			})
		})
	}
}

func TestOutcomes(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
	after := uint32(len(request)) + 1
	observe := func(t *testing.T, b *bench) {
		b.put(PortKey(8080), Evidence{})
		b.put(HTTPKey(8080, "/healthz"), Evidence{})
		b.passes(b.syn().Bytes(t, nil))
	}
	connected := func(t *testing.T, b *bench) {
		observe(t, b)
		b.podSends(xdpPass, b.fromPod("SA", 7000, b.isn+1, ""))
		b.passes(b.toPod("A", b.isn+1, 7001, "").Bytes(t, nil))
	}
	requested := func(t *testing.T, b *bench) {
		connected(t, b)
		b.passes(b.toPod("PA", b.isn+1, 7001, request).Bytes(t, nil))
	}
	withdrawn := func(t *testing.T, b *bench, want bool) {
		t.Helper()
		if _, tally, err := b.pod.Get(PortKey(8080)); err != nil || (tally.WithdrawnAt != 0) != want {
			t.Fatalf("withdrawn at %d (%v), want that: %v", tally.WithdrawnAt, err, want)
		}
	}

	t.Run("success is reported when the client has closed", func(t *testing.T) {
		onBench(t, func(b *bench) {
			requested(t, b)
			b.podSends(xdpPass, b.fromPod("PA", 7001, b.isn+after, ok))
			if all := b.outcomes(); len(all) != 0 {
				t.Fatalf("reported already: %+v", all)
			}
			b.passes(b.toPod("FA", b.isn+after, 7001+uint32(len(ok)), "").Bytes(t, nil))
			o := b.outcome(EventStatus, KindHTTP, 200)
			if o.PathHash != PathHash("/healthz") || o.ObservedAt > Now() || o.Duration == 0 || o.Duration > o.ObservedAt {
				t.Fatalf("outcome %+v", o)
			}
			b.noFlows()
			b.counted("observed", 1)
			withdrawn(t, b, false)
		})
	})
	for _, status := range []uint16{300, 302, 404, 500, 999} {
		t.Run(fmt.Sprint(status), func(t *testing.T) {
			onBench(t, func(b *bench) {
				requested(t, b)
				b.podSends(xdpPass, b.fromPod("PA", 7001, b.isn+after, fmt.Sprintf("HTTP/1.0 %d\r\n\r\n", status)))
				b.outcome(EventStatus, KindHTTP, status)
				withdrawn(t, b, true)
				b.noFlows()
			})
		})
	}
	for name, text := range map[string]string{
		"interim": "HTTP/1.1 100 Continue\r\n\r\n", "not HTTP": "SSH-2.0-x\r\n\r\n", "short": "HTTP/1.1 20", "letters": "HTTP/1.1 2x0 OK",
	} {
		t.Run(name+" is no evidence", func(t *testing.T) {
			onBench(t, func(b *bench) {
				requested(t, b)
				b.podSends(xdpPass, b.fromPod("PA", 7001, b.isn+after, text))
				b.passes(b.toPod("FA", b.isn+after, 7010, "").Bytes(t, nil))
				if all := b.outcomes(); len(all) != 0 {
					t.Fatalf("outcomes %+v", all)
				}
				b.noFlows()
			})
		})
	}
	t.Run("status not at the start is no evidence", func(t *testing.T) {
		onBench(t, func(b *bench) {
			requested(t, b)
			b.podSends(xdpPass, b.fromPod("PA", 7009, b.isn+after, ok))
			b.passes(b.toPod("FA", b.isn+after, 7010, "").Bytes(t, nil))
			b.outcome(EventNoAnswer, KindHTTP, 0)
		})
	})
	t.Run("connected", func(t *testing.T) {
		onBench(t, func(b *bench) {
			connected(t, b)
			b.passes(b.toPod("FA", b.isn+1, 7001, "").Bytes(t, nil))
			b.outcome(EventConnected, KindTCP, 0)
			b.noFlows()
		})
	})
	t.Run("refused", func(t *testing.T) {
		onBench(t, func(b *bench) {
			observe(t, b)
			b.podSends(xdpPass, b.fromPod("RA", 0, b.isn+1, ""))
			b.outcome(EventReset, KindPort, 0)
			withdrawn(t, b, true)
			b.noFlows()
		})
	})
	t.Run("reset instead of an answer", func(t *testing.T) {
		onBench(t, func(b *bench) {
			requested(t, b)
			b.podSends(xdpPass, b.fromPod("RA", 7001, b.isn+after, ""))
			b.outcome(EventReset, KindHTTP, 0)
			withdrawn(t, b, true)
		})
	})
	t.Run("reset after a good status says nothing", func(t *testing.T) {
		onBench(t, func(b *bench) {
			requested(t, b)
			b.podSends(xdpPass, b.fromPod("PA", 7001, b.isn+after, ok))
			b.podSends(xdpPass, b.fromPod("RA", 7001, b.isn+after, ""))
			if all := b.outcomes(); len(all) != 0 {
				t.Fatalf("outcomes %+v", all)
			}
			withdrawn(t, b, false)
			b.noFlows()
		})
	})
	for _, end := range []string{"FA", "RA"} {
		t.Run("no answer "+end, func(t *testing.T) {
			onBench(t, func(b *bench) {
				requested(t, b)
				b.passes(b.toPod(end, b.isn+after, 7001, "").Bytes(t, nil))
				b.outcome(EventNoAnswer, KindHTTP, 0)
				withdrawn(t, b, false) // whether it waited long enough is for the daemon to judge
			})
		})
	}
	t.Run("a path nobody probes is not reported", func(t *testing.T) {
		onBench(t, func(b *bench) {
			connected(t, b)
			b.passes(b.toPod("PA", b.isn+1, 7001, strings.Replace(request, "healthz", "other", 1)).Bytes(t, nil))
			b.noFlows()
			b.counted("passed_not_probed", 1)
		})
	})
}

// parseRequest is the model of parse_request: the whole of what the kernel calls a probe's request.
func parseRequest(request string) (path string, ok bool) {
	rest, isGet := strings.CutPrefix(request, "GET ")
	path, rest, hasPath := strings.Cut(rest, " ")
	if !isGet || !hasPath || !strings.HasPrefix(path, "/") || len(path) > MaxPath || len(request) > MaxRequest {
		return "", false
	}
	for _, c := range []byte(path) {
		if c < 0x21 || c > 0x7e {
			return "", false
		}
	}
	end := strings.Index(request, "\r\n\r\n")
	return path, strings.HasPrefix(rest, "HTTP/1.1\r\n") && strings.HasSuffix(request, "\r\nConnection: close\r\n\r\n") &&
		end == len(request)-4
}

// The Go model and the program must agree on every request: answered exactly if it is a probe's, of a known path.
func TestRequestsAreReadAsTheModelReadsThem(t *testing.T) {
	line := rapid.StringMatching(`[ -~]{0,40}`)
	path := rapid.OneOf(
		rapid.Just("/healthz"), rapid.StringMatching(`/[!-~]{0,40}`), rapid.StringMatching(`/[a-z?=&%]{240,260}`),
		rapid.StringMatching(`[ -~]{0,10}`), rapid.Custom(func(t *rapid.T) string { return "/" + string(rapid.SliceOfN(rapid.Byte(), 0, 20).Draw(t, "bytes")) }),
	)
	onBench(t, func(b *bench) {
		answered := 0
		rapid.Check(t, func(rt *rapid.T) {
			p := path.Draw(rt, "path")
			text := rapid.SampledFrom([]string{"GET ", "GET ", "GET ", "GET ", "get ", "POST ", "GET  ", "HEAD "}).Draw(rt, "method") + p +
				rapid.SampledFrom([]string{" HTTP/1.1\r\n", " HTTP/1.1\r\n", " HTTP/1.1\r\n", " HTTP/1.0\r\n", " HTTP/1.1\n", "\r\n"}).Draw(rt, "version")
			for range rapid.IntRange(0, 30).Draw(rt, "headers") {
				text += "X: " + line.Draw(rt, "header") + "\r\n"
			}
			text += rapid.SampledFrom([]string{
				"Connection: close\r\n\r\n", "Connection: close\r\n\r\n", "Connection: close\r\n\r\n", "Connection: close\r\n\r\n",
				"connection: close\r\n\r\n", "Connection: keep-alive\r\n\r\n", "Connection: close\r\n", "\r\n",
				"\r\nConnection: close\r\n\r\n", "Connection: close\r\n\r\nGET", "X-Connection: close\r\n\r\n",
			}).Draw(rt, "end")
			if cut := rapid.IntRange(0, 9).Draw(rt, "cut"); cut == 0 {
				text = text[:rapid.IntRange(1, len(text)).Draw(rt, "length")]
			}
			modelPath, want := parseRequest(text)
			if !want {
				modelPath = p
			}
			e := success(t, 200, time.Hour)
			b.put(HTTPKey(8080, modelPath), e)
			b.put(PortKey(8080), e)

			x := b.connect()
			verdict, _ := b.steered(b.toPod("PA", b.isn+1, x+1, text))
			if got := verdict == xdpPass; got != want {
				rt.Fatalf("%q: answered %v, the model says %v", text, got, want)
			}
			if want {
				answered++
			}
			must(t, b.pod.Delete(HTTPKey(8080, modelPath)))
			b.isn += 0x01000000
		})
		if answered == 0 {
			t.Fatal("no request was a probe's")
		}
	})
}

// The Go model and the program must agree on freshness, at the SYN and at the request.
func TestFreshnessIsJudgedAsTheModelJudgesIt(t *testing.T) {
	// The program has a clock of its own, so times stay clear of the borders; those are the model's to test.
	distance := rapid.SampledFrom([]int64{-3600e9, -60e9, -10e9, 10e9, 60e9, 3600e9})
	onBench(t, func(b *bench) {
		draw := func(rt *rapid.T, name string, now uint64) Evidence {
			e := success(t, 200, 0)
			e.ObservedAt = now + uint64(distance.Draw(rt, name+" observed"))
			e.FreshUntil = now + uint64(distance.Draw(rt, name+" fresh until"))
			if rapid.IntRange(0, 5).Draw(rt, name+" cleared") == 0 {
				e.FreshUntil = 0
			}
			e.Result = rapid.SampledFrom([]uint8{ResultSuccess, ResultSuccess, ResultSuccess, ResultFailure, ResultUnknown}).Draw(rt, name+" result")
			return e
		}
		rapid.Check(t, func(rt *rapid.T) {
			now := Now()
			port, endpoint := draw(rt, "port", now), draw(rt, "endpoint", now)
			tally := Tally{}
			if rapid.Bool().Draw(rt, "withdrawn") {
				tally.WithdrawnAt = now + uint64(distance.Draw(rt, "withdrawn at")) + 1e9
			}
			b.put(PortKey(8080), port)
			b.put(HTTPKey(8080, "/healthz"), endpoint)
			must(t, b.pod.tallies.Put(PortKey(8080), tally))

			b.isn += 0x01000000
			verdict, frame := bpftest.RunSteer(t, b.d.Steer(), b.ifindex, 0, b.syn().Bytes(t, nil))
			if want := PortFresh(port, tally, now); (verdict == tcRedirect) != want {
				rt.Fatalf("taken %v, the model says %v", verdict == tcRedirect, want)
			}
			if verdict != tcRedirect {
				return
			}
			_, out := bpftest.RunRespond(t, b.d.Respond(), b.ifindex, frame)
			x := bpftest.ParseSegment(t, out).Seq
			verdict, _ = b.steered(b.toPod("PA", b.isn+1, x+1, request))
			if want := MayAnswer(endpoint, tally, now, now); (verdict == xdpPass) != want {
				rt.Fatalf("answered %v, the model says %v", verdict == xdpPass, want)
			}
		})
	})
}

// The grace after the SYN ends: a request that comes late is not answered with what has expired.
func TestALateRequestIsHandedOver(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		x := b.connect()
		b.put(HTTPKey(8080, "/healthz"), success(t, 200, 0))
		time.Sleep(1100 * time.Millisecond)
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, request))
	})
}

// A client that waits for the server to speak is handed over at its keep-alive.
func TestAKeepAliveIsHandedOver(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		x := b.connect()
		b.replaysSYN(b.toPod("A", b.isn, x+1, ""))
		b.podSends(xdpTX, b.fromPod("SA", 7000, b.isn+1, ""))
		b.expect(b.podSends(xdpPass, b.fromPod("PA", 7001, b.isn+1, "220 hello")), "PA", x+1, b.isn+1, "220 hello")
	})
}

// What is answered is noted, with the age of what it is answered with.
func TestAnswersAreNoted(t *testing.T) {
	onBench(t, func(b *bench) {
		ages := []float64{0.05}
		for _, bound := range AnswerAgeBounds {
			ages = append(ages, bound*1.1) // in the next bucket, and not in the one after that
		}
		var sum float64
		for i, age := range ages {
			e := success(t, 200, time.Hour)
			e.ObservedAt -= uint64(age * float64(time.Second))
			b.put(HTTPKey(b.srv.Port(), "/healthz"), e)
			b.put(PortKey(b.srv.Port()), e)
			sum += age
			asked := Now()
			isn := b.connect()
			b.reply(b.toPod("PA", b.isn+1, isn+1, request))
			b.reply(b.toPod("FA", b.isn+1+uint32(len(request)), isn+1, ""))
			_, tally, err := b.pod.Get(HTTPKey(b.srv.Port(), "/healthz"))
			must(t, err)
			if tally.Hits != uint64(i+1) || tally.AnsweredAt < asked || tally.AnsweredAt > Now() {
				t.Fatalf("%+v after %d answers, the last at %d", tally, i+1, asked)
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

// An answered connection without a request is as old as the port's evidence, if nothing else is known.
func TestAgeOfConnections(t *testing.T) {
	onBench(t, func(b *bench) {
		for i, key := range []EndpointKey{PortKey(b.srv.Port()), TCPKey(b.srv.Port())} {
			e := success(t, 200, time.Hour)
			e.ObservedAt -= uint64([]time.Duration{20 * time.Second, 2 * time.Second}[i])
			b.put(key, e)
			isn := b.connect()
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

// A withdrawal has a cause, and is counted if there was something to withdraw.
func TestWithdrawalCauses(t *testing.T) {
	onBench(t, func(b *bench) {
		for name, fails := range map[string]func(isn uint32){
			"reset": func(isn uint32) { b.podSends(xdpPass, b.fromPod("RA", isn+1, b.isn+1, "")) },
			"status": func(isn uint32) {
				b.podSends(xdpPass, b.fromPod("PA", isn+1, b.isn+1+uint32(len(request)), "HTTP/1.1 500 Oops\r\n\r\n"))
			},
		} {
			// Observed while nothing was known; and meanwhile something is.
			for _, fresh := range []bool{true, false} {
				b.put(HTTPKey(b.srv.Port(), "/healthz"), Evidence{})
				b.put(PortKey(b.srv.Port()), Evidence{})
				const podISN = 7000
				b.pass(b.syn())
				b.podSends(xdpPass, b.fromPod("SA", podISN, b.isn+1, ""))
				b.pass(b.toPod("PA", b.isn+1, podISN+1, request))
				if fresh {
					b.arm()
				}
				before, err := b.d.Counters()
				must(t, err)
				at := Now()
				fails(podISN)
				after, err := b.d.Counters()
				must(t, err)
				_, tally, err := b.pod.Get(PortKey(b.srv.Port()))
				must(t, err)
				if WithdrawalCauses[tally.WithdrawnCause] != name || tally.WithdrawnAt < at {
					t.Fatalf("%s: %+v, of cause %q", name, tally, WithdrawalCauses[tally.WithdrawnCause])
				}
				if counted := after["withdrawn_"+name]-before["withdrawn_"+name] == 1; counted != fresh {
					t.Fatalf("%s: counted: %v; was fresh: %v", name, counted, fresh)
				}
			}
		}
	})
}

func TestFills(t *testing.T) {
	onBench(t, func(b *bench) {
		b.arm()
		b.connect()
		fills, err := b.d.Fills()
		must(t, err)
		if fills["flows"] != (Fill{1, 65536}) || fills["pods"] != (Fill{1, 4096}) {
			t.Fatalf("%+v", fills)
		}
	})
}
