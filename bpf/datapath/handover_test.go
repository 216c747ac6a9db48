package datapath

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/gopacket/gopacket/layers"

	"github.com/probelet/probelet/bpf/bpftest"
)

// replaysSYN asserts that a client's packet becomes a SYN to the pod.
func (b *bench) replaysSYN(s bpftest.Segment) {
	b.t.Helper()
	r := b.rewrites(s)
	b.expect(r, "S", b.isn, 0, "")
	if len(r.Options) != 1 || r.Options[0].String() != "TCPOption(MSS:1440 0x05a0)" {
		b.t.Fatalf("SYN %v with options %v", r, r.Options)
	}
}

// accepts sends the pod's SYN-ACK for a replayed SYN, asserts that it becomes the ACK, and asserts what the ACK carries.
func (b *bench) accepts(podISN uint32, flags, carried string) {
	b.t.Helper()
	ack := b.podSends(toPod, b.fromPod("SA", podISN, b.isn+1, ""))
	b.expect(ack, flags, b.isn+1, podISN+1, carried)
	if ack.Src != b.client || ack.Dst != b.srv || ack.DstMAC.String() != bpftest.PodMAC.String() {
		b.t.Fatalf("ACK %v", ack)
	}
}

// handOver hands a connection over, so that the pod, with the given ISN, has its first byte. It returns our ISN.
func (b *bench) handOver(podISN uint32) uint32 {
	b.t.Helper()
	b.arm()
	x := b.connect()
	b.replaysSYN(b.toPod("PA", b.isn+1, x+1, "x"))
	b.accepts(podISN, "PA", "x")
	return x
}

const post = "POST /orders HTTP/1.1\r\nHost: pod\r\nContent-Length: 3\r\n\r\n123"

func TestHandover(t *testing.T) {
	onBench(t, func(_ *testing.T, b *bench) {
		b.arm()
		x := b.connect()
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, post))
		b.counted("handed_over", 1)
		b.swallows(b.toPod("A", b.isn+1+100, x+1, ""))
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, post)) // the pod has not answered for a while
		b.replaysSYN(b.toPod("A", b.isn, x+1, ""))
		b.counted("handed_over", 1)

		const p = uint32(0xffffff00)
		for _, flags := range []string{"A", "FA", "PA"} { // belong to an earlier connection on the same ports
			b.expect(b.podSends(toPod, b.fromPod(flags, 4711, 4712, "")), "R", 4712, 0, "")
		}
		for _, flags := range []string{"RA", "R", "S", "SA", "A", "FA", "PA"} { // after the SA they belong to one that the pod accepts
			b.podSends(untouched, b.fromPod(flags, 4711, 4712, ""))
		}
		for range 2 { // the pod repeats its SYN-ACK if our ACK was lost
			b.accepts(p, "PA", post)
		}
		b.expect(b.rewrites(b.toPod("PA", b.isn+1, x+1, post)), "PA", b.isn+1, p+1, post)
		b.swallows(b.syn())

		after := b.isn + 1 + uint32(len(post))
		const answer = "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
		b.expect(b.podSends(toClient, b.fromPod("PA", p+1, after, answer)), "PA", x+1, after, answer)
		b.accepts(p, "A", "") // what the pod has acknowledged is no longer kept
		end := uint32(len(answer)) + 1
		b.expect(b.rewrites(b.toPod("A", after, x+end, "")), "A", after, p+end, "")

		b.expect(b.rewrites(b.toPod("FA", after, x+end, "")), "FA", after, p+end, "")
		b.expect(b.podSends(toClient, b.fromPod("FA", p+end, after+1, "")), "FA", x+end, after+1, "")
		b.flow() // not forgotten before its end
		b.expect(b.rewrites(b.toPod("A", after+1, x+end+1, "")), "A", after+1, p+end+1, "")
		b.noFlows()
	})
}

func TestWithdrawnBetweenSYNAndRequestIsHandedOver(t *testing.T) {
	withdrawals := map[string]func(b *bench){
		"fresh-until cleared": func(b *bench) {
			e := success(t, 200, time.Hour)
			e.FreshUntil = 0
			b.putFor(request, e)
		},
		"failure": func(b *bench) {
			e := success(t, 200, time.Hour)
			e.Result = ResultFailure
			b.putFor(request, e)
		},
		"deleted":                  func(b *bench) { must(t, b.pod.Delete(b.asked())) },
		"the pod is void":          func(b *bench) { b.voidPod(Now()) },
		"the port is void":         func(b *bench) { b.setTally(PortKey(8080), Tally{WithdrawnAt: Now()}) },
		"the endpoint is void":     func(b *bench) { b.setTally(b.asked(), Tally{WithdrawnAt: Now()}) },
		"port without a tally":     func(b *bench) { must(t, b.d.objects.EndpointTallies.Delete(PortKey(8080).of(b.key))) },
		"endpoint without a tally": func(b *bench) { must(t, b.d.objects.EndpointTallies.Delete(b.asked().of(b.key))) },
		"expired before the SYN": func(b *bench) { // another endpoint's evidence let the connection in
			b.putFor(request, success(t, 200, -time.Second))
		},
		"expired, and the request comes late": func(b *bench) {
			b.wait(1100 * time.Millisecond)
			b.putFor(request, success(t, 200, 0))
		},
		"the device is gone": func(b *bench) { must(t, b.d.RemoveDevice(b.key)) },
	}
	for name, withdraw := range withdrawals {
		t.Run(name, func(t *testing.T) {
			onBench(t, func(_ *testing.T, b *bench) {
				b.arm()
				x := b.connect()
				withdraw(b)
				b.replaysSYN(b.toPod("PA", b.isn+1, x+1, request))
				b.accepts(7000, "PA", request)
				b.counted("answered_http", 0)
			})
		})
	}
}

// Whatever a client sends before it has heard from the pod, and however it is split up, reaches the pod with the ACK.
func TestEarlyDataIsStored(t *testing.T) {
	long := strings.Repeat("0123456789abcdef", 90) // clientMSS
	for name, c := range map[string]struct {
		pieces  []string // in order
		carried string
		flags   string
	}{
		"one":              {[]string{request}, request, "PA"},
		"pieces":           {[]string{request[:1], request[1:20], request[20:]}, request, "PA"},
		"odd pieces":       {[]string{"abc", "de", "f", "ghijk"}, "abcdefghijk", "PA"},
		"as much as fits":  {[]string{long}, long, "PA"},
		"in two":           {[]string{long[:1000], long[1000:]}, long, "PA"},
		"rest too long":    {[]string{long[:1000], long[:441]}, long[:1000], "PA"},
		"more than an MSS": {[]string{long + "x"}, "", "A"},
	} {
		t.Run(name, func(t *testing.T) {
			onBench(t, func(_ *testing.T, b *bench) {
				b.armPort()
				x := b.connect()
				at := b.isn + 1
				for i, piece := range c.pieces {
					if i == 0 {
						b.replaysSYN(b.toPod("PA", at, x+1, piece))
					} else {
						b.swallows(b.toPod("PA", at, x+1, piece))
					}
					at += uint32(len(piece))
				}
				b.accepts(7000, c.flags, c.carried)
			})
		})
	}
}

func TestHalfCloseIsHandedOver(t *testing.T) {
	for name, send := range map[string]func(b *bench, x uint32){
		"with the request": func(b *bench, x uint32) { b.replaysSYN(b.toPod("PFA", b.isn+1, x+1, post)) },
		"behind it": func(b *bench, x uint32) {
			b.replaysSYN(b.toPod("PA", b.isn+1, x+1, post))
			b.swallows(b.toPod("FA", b.isn+1+uint32(len(post)), x+1, ""))
			b.swallows(b.toPod("PA", b.isn+1+uint32(len(post)), x+1, "more")) // nothing follows a FIN
		},
		"with its rest": func(b *bench, x uint32) {
			b.replaysSYN(b.toPod("PA", b.isn+1, x+1, post[:9]))
			b.swallows(b.toPod("PFA", b.isn+10, x+1, post[9:]))
		},
		"and a FIN that is too early": func(b *bench, x uint32) {
			b.replaysSYN(b.toPod("PA", b.isn+1, x+1, post))
			for _, early := range []uint32{0, 1, uint32(len(post)) - 1} {
				b.swallows(b.toPod("FA", b.isn+1+early, x+1, ""))
			}
			b.swallows(b.toPod("FA", b.isn+1+uint32(len(post)), x+1, ""))
		},
	} {
		t.Run(name, func(t *testing.T) {
			onBench(t, func(_ *testing.T, b *bench) {
				b.arm()
				x := b.connect()
				send(b, x)
				b.accepts(7000, "FPA", post)
				after := b.isn + 1 + uint32(len(post)) + 1
				b.expect(b.podSends(toClient, b.fromPod("FPA", 7001, after, "bye")), "FPA", x+1, after, "bye")
				b.expect(b.rewrites(b.toPod("A", after, x+5, "")), "A", after, 7005, "")
				b.noFlows()
			})
		})
	}
}

// The ACK could not convey where the urgent data is (RFC 9293, section 3.8.5). The client's retransmission does.
func TestUrgentDataIsNotStored(t *testing.T) {
	onBench(t, func(_ *testing.T, b *bench) {
		b.armPort()
		x := b.connect()
		b.replaysSYN(b.toPod("PAU", b.isn+1, x+1, post))
		b.accepts(7000, "A", "")
		b.expect(b.rewrites(b.toPod("PAU", b.isn+1, x+1, post)), "PAU", b.isn+1, 7001, post)
	})
}

// A request with a FIN is left to the pod: our answer could not be acknowledged correctly after a half-close.
func TestRequestWithFINIsNotAnswered(t *testing.T) {
	onBench(t, func(_ *testing.T, b *bench) {
		b.arm()
		x := b.connect()
		b.replaysSYN(b.toPod("PFA", b.isn+1, x+1, request))
	})
}

// A FIN proves nothing if data before it was lost.
func TestFINThatOvertakesTheRequest(t *testing.T) {
	onBench(t, func(_ *testing.T, b *bench) {
		b.arm()
		x := b.connect()
		after := b.isn + 1 + uint32(len(request))
		b.swallows(b.toPod("FA", after, x+1, ""))
		b.swallows(b.toPod("PA", b.isn+6, x+1, request[5:]))
		b.reply(b.toPod("PA", b.isn+1, x+1, request))
	})
}

// Only the kernel knows the kind of a packet's checksum. A full sum may look like the sum of a pseudo-header.
func TestFullChecksumThatLooksPartial(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		x := b.handOver(7000)
		s := b.fromPod("PA", 7001, b.isn+10, "\x00\x00hello!")
		frame := s.Bytes(t, nil)
		l4 := len(frame) - 20 - len(s.Payload)
		sum := binary.BigEndian.Uint16(frame[l4+16:])
		pseudo := pseudoHeaderSum(b.srv.Addr(), b.client.Addr(), 20+uint32(len(s.Payload)))
		// The first word of the payload compensates for the difference.
		difference, carry := bits.Sub32(uint32(sum), uint32(pseudo), 0)
		binary.BigEndian.PutUint16(frame[l4+20:], uint16(difference-carry))
		binary.BigEndian.PutUint16(frame[l4+16:], pseudo)
		want := string(frame[l4+20:])
		bpftest.ParseSegment(t, frame) // verifies the checksum
		got, out := b.receives(frame)
		if got != toClient {
			t.Fatalf("segment %s", got)
		}
		b.expect(bpftest.ParseSegment(t, out), "PA", x+1, b.isn+10, want)
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

func TestHandoverIsRefused(t *testing.T) {
	onBench(t, func(_ *testing.T, b *bench) {
		b.armPort()
		x := b.connect()
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, "x"))
		b.expect(b.podSends(toClient, b.fromPod("RA", 0, b.isn+1, "")), "RA", x+1, b.isn+1, "")
		b.noFlows()
	})
}

func TestResetsEndAConnection(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		b.connect()
		b.swallows(b.toPod("R", b.isn+1, 0, ""))
		b.noFlows()

		x := b.connect()
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, "x"))
		b.swallows(b.toPod("R", b.isn+1, 0, ""))
		b.noFlows()

		x = b.handOver(7000)
		b.expect(b.rewrites(b.toPod("RA", b.isn+2, x+1, "")), "RA", b.isn+2, 7001, "")
		b.noFlows()

		b.handOver(7000)
		b.passes(b.toPod("R", b.isn+2, 0, "").Bytes(t, nil)) // acknowledges nothing that could be translated
		b.noFlows()

		x = b.handOver(7000)
		b.expect(b.podSends(toClient, b.fromPod("RA", 7001, b.isn+2, "")), "RA", x+1, b.isn+2, "")
		b.noFlows()
	})
}

// A connection whose end was not seen must not affect the next one on its ports.
func TestReusedPortsAreANewConnection(t *testing.T) {
	states := map[string]func(b *bench){
		"observed": func(b *bench) {
			b.put(PortKey(8080), Evidence{})
			b.passes(b.syn().Bytes(t, nil))
		},
		"taken": func(b *bench) { b.arm(); b.connect() },
		"handing": func(b *bench) {
			b.arm()
			b.replaysSYN(b.toPod("PA", b.isn+1, b.connect()+1, "x"))
		},
		"handed": func(b *bench) { b.handOver(7000) },
	}
	for name, prepare := range states {
		t.Run(name, func(t *testing.T) {
			onBench(t, func(_ *testing.T, b *bench) {
				prepare(b)
				// Another client's packets bypass steer; only the pod's packets reveal them.
				for _, s := range []bpftest.Segment{
					b.fromPod("SA", 9000, b.isn+77, ""), b.fromPod("PA", 9001, b.isn+78, "x"), b.fromPod("RA", 9002, b.isn+78, ""),
				} {
					b.podSends(untouched, s)
				}
				if name == "handed" {
					b.noFlows()
				}
			})
			for kind, other := range map[string]bpftest.Packet{"another process": {Mark: clientMark}, "another device": {From: otherIfindex}} {
				for _, flags := range []string{"S", "A", "PA", "FA", "RA"} {
					onBench(t, func(t *testing.T, b *bench) {
						prepare(b)
						must(t, b.d.SetProber(Prober{}))
						if flags != "S" && other.From == 0 {
							return // indistinguishable from the flow's own, because test runs have no sockets
						}
						s := b.toPod(flags, b.isn+77, 5, "")
						other.Frame = s.Bytes(t, nil)
						if got, _ := b.egress(other); got != untouched {
							t.Fatalf("%v of %s %s", s, kind, got)
						}
						b.noFlows()
						b.podSends(untouched, b.fromPod("SA", 7000, b.isn+1, ""))
						b.podSends(untouched, b.fromPod("PA", 7001, b.isn+1, "HTTP/1.1 500 x"))
						b.podSends(untouched, b.fromPod("RA", 7001, b.isn+1, ""))
						if all := b.records(); len(all) != 0 {
							t.Fatalf("records of a connection that is not a prober's: %+v", all)
						}
					})
				}
			}
		})
	}
}

// A client that waits for the server to speak first is handed over at its keep-alive.
func TestKeepAliveIsHandedOver(t *testing.T) {
	onBench(t, func(_ *testing.T, b *bench) {
		b.arm()
		x := b.connect()
		b.replaysSYN(b.toPod("A", b.isn, x+1, ""))
		b.accepts(7000, "A", "")
		b.expect(b.podSends(toClient, b.fromPod("PA", 7001, b.isn+1, "220 hello")), "PA", x+1, b.isn+1, "220 hello")
	})
}

// The two sides close, and acknowledge that, in any order.
func TestHandedOverConnectionEndsWithBothFINs(t *testing.T) {
	type step struct{ from, flags string }
	orders := map[string][]step{
		"client first":   {{"client", "FA"}, {"pod", "A"}, {"pod", "FA"}, {"client", "A"}},
		"pod first":      {{"pod", "FA"}, {"client", "A"}, {"client", "FA"}, {"pod", "A"}},
		"FIN with ACK":   {{"client", "FA"}, {"pod", "FA"}, {"client", "A"}},
		"at once":        {{"client", "FA"}, {"pod", "FA-"}, {"client", "A"}, {"pod", "A"}},
		"FIN repeated":   {{"client", "FA"}, {"client", "FA"}, {"pod", "FA"}, {"pod", "FA"}, {"client", "A"}},
		"half-closed on": {{"client", "FA"}, {"pod", "A"}, {"pod", "PA"}, {"client", "A"}, {"pod", "FA"}, {"client", "A"}},
	}
	for name, steps := range orders {
		t.Run(name, func(t *testing.T) {
			onBench(t, func(_ *testing.T, b *bench) {
				x := b.handOver(7000)
				client, pod := b.isn+2, uint32(7001) // what each side sends next
				var clientFIN, podFIN uint32
				for _, step := range steps {
					b.flow()
					flags := strings.TrimSuffix(step.flags, "-")
					if step.from == "client" {
						b.rewrites(b.toPod(flags, client, pod+podFIN-7000+x, ""))
						if strings.Contains(flags, "F") {
							clientFIN = 1
						} else {
							client, clientFIN = client+clientFIN, 0
						}
						continue
					}
					ack := client + clientFIN
					if flags != step.flags { // does not acknowledge the client's FIN yet
						ack = client
					}
					payload := ""
					if flags == "PA" {
						payload = "more"
					}
					b.podSends(toClient, b.fromPod(flags, pod, ack, payload))
					pod += uint32(len(payload))
					if strings.Contains(flags, "F") {
						podFIN = 1
					}
				}
				b.noFlows()
			})
		})
	}
}

// A handed-over connection with packets of more than 64 KiB (BIG TCP), whose length does not fit into the IP header. The frames
// are small, because test runs take at most a page, but are parsed like large ones.
func TestBigTCPIsTranslated(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		x := b.handOver(7000)
		for name, enlarge := range map[string]func(frame []byte) []byte{
			"no length":    b.withoutLength,
			"jumbo header": b.withJumboHeader,
		} {
			client := b.toPod("PA", b.isn+2, x+1, "a lot of data")
			client.Options = []layers.TCPOption{{OptionType: layers.TCPOptionKindNop, OptionLength: 1}}
			translated := client
			translated.Ack = 7001
			got, out := b.sends(enlarge(client.Bytes(t, nil)))
			if want := enlarge(translated.Bytes(t, nil)); got != toPod || string(out) != string(want) {
				t.Fatalf("%s: segment %s:\n% x, want\n% x", name, got, out, want)
			}
			pod := b.fromPod("A", 7001, b.isn+2, "a lot of data")
			translated = pod
			translated.Seq = x + 1
			got, out = b.receives(enlarge(pod.Bytes(t, nil)))
			if want := enlarge(translated.Bytes(t, nil)); got != toClient || string(out) != string(want) {
				t.Fatalf("%s: segment %s:\n% x, want\n% x", name, got, out, want)
			}
		}
		// The position of the FIN is known as well.
		fin := b.fromPod("FA", 7014, b.isn+2, "end")
		if got, _ := b.receives(b.withJumboHeader(fin.Bytes(t, nil))); got != toClient || b.flow().PodFin != 7018 {
			t.Fatalf("FIN behind a jumbo header: %+v", b.flow())
		}
	})
}

// withoutLength turns a frame into what the kernel makes of a large packet without a jumbo header.
func (b *bench) withoutLength(frame []byte) []byte {
	frame = append([]byte(nil), frame...)
	if b.srv.Addr().Is4() {
		binary.BigEndian.PutUint16(frame[14+2:], 0)
	} else {
		binary.BigEndian.PutUint16(frame[14+4:], 0)
	}
	return frame
}

// withJumboHeader inserts a jumbo payload option before TCP (RFC 2675). IPv4 has none.
func (b *bench) withJumboHeader(frame []byte) []byte {
	frame = b.withoutLength(frame)
	if b.srv.Addr().Is4() {
		return frame
	}
	jumbo := []byte{6, 0, 0xc2, 4, 0, 0, 0, 0}
	binary.BigEndian.PutUint32(jumbo[4:], uint32(len(frame)-14-40+8))
	frame[14+6] = 0 // hop-by-hop options
	return append(append(append([]byte(nil), frame[:14+40]...), jumbo...), frame[14+40:]...)
}

// If the table is full, a connection is not observed, and nothing else happens.
func TestFullFlowTable(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		for name, prepare := range map[string]func(){
			"trusted": b.arm, "on trial": func() {
				b.arm()
				b.setDevice(probeletDevice{Generation: b.key.Generation, Hook: uint8(b.hook), Nsid: -1})
			},
		} {
			prepare()
			var key probeletFlowKey
			for i := range b.d.objects.Flows.MaxEntries() {
				binary.NativeEndian.PutUint32(key.PodAddr[:], i)
				must(t, b.d.objects.Flows.Put(key, probeletFlow{}))
			}
			full, err := b.d.Counters()
			must(t, err)
			b.passes(b.syn().Bytes(t, nil))
			b.counted("passed_full", full["passed_full"]+1)
			if b.flowPorts() != [flowPortSlots]uint32{} {
				t.Fatal("a port counts as in use")
			}
			for i := range b.d.objects.Flows.MaxEntries() {
				binary.NativeEndian.PutUint32(key.PodAddr[:], i)
				must(t, b.d.objects.Flows.Delete(key))
			}
			// Nothing was answered, so no answer was lost.
			b.wait(answerLost)
			if got, _ := b.sends(b.syn().Bytes(t, nil)); got != toClient {
				t.Fatalf("%s: SYN once there is room again: %s; %+v", name, got, b.device())
			}
			b.swallows(b.toPod("R", b.isn+1, 0, ""))
		}
	})
}

// If a request cannot be stored, the client's retransmission brings it.
func TestNoRoomForRequests(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		var key probeletFlowKey
		for i := range uint32(256) {
			binary.NativeEndian.PutUint32(key.PodAddr[:], i)
			must(t, b.d.objects.Requests.Put(key, probeletStored{}))
		}
		b.arm()
		x := b.connect()
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, post))
		b.swallows(b.toPod("PA", b.isn+1+uint32(len(post)), x+1, "more"))
		b.accepts(7000, "A", "")
		b.expect(b.rewrites(b.toPod("PA", b.isn+1, x+1, post)), "PA", b.isn+1, 7001, post)
	})
}

// Connections that share a slot of the port filter do not affect each other.
func TestPortsSharingASlot(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		first := b.client
		x := b.connect()
		b.client = netip.AddrPortFrom(first.Addr(), first.Port()-flowPortSlots)
		y := b.connect()
		if n := b.flowPorts()[first.Port()%flowPortSlots]; n != 2 {
			t.Fatalf("%d flows in the slot", n)
		}
		b.reply(b.toPod("FA", b.isn+1, y+1, ""))
		b.client = first
		b.reply(b.toPod("PA", b.isn+1, x+1, request))
		b.reply(b.toPod("FA", b.isn+1+uint32(len(request)), x+1, ""))
		b.noFlows()
	})
}

// Flows are removed after their deadline, and not before.
func TestFlowsExpire(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(b *bench)
		after   time.Duration
	}{
		"connecting": {func(b *bench) { b.put(PortKey(8080), Evidence{}); b.passes(b.syn().Bytes(t, nil)) }, 30 * time.Second},
		"observing": {func(b *bench) {
			b.put(PortKey(8080), Evidence{})
			b.passes(b.syn().Bytes(t, nil))
			b.podSends(untouched, b.fromPod("SA", 7000, b.isn+1, ""))
		}, 10 * time.Minute},
		"awaited": {func(b *bench) {
			p := ways["passed on"](b)
			b.putFor(request, Evidence{TrafficUntil: Now() + uint64(time.Hour)})
			p.asks(request)
			p.closes("FA", 0)
		}, time.Minute},
		"taken": {func(b *bench) { b.arm(); b.connect() }, 3 * time.Hour},
		"handing": {func(b *bench) {
			b.arm()
			b.replaysSYN(b.toPod("PA", b.isn+1, b.connect()+1, "x"))
		}, 130 * time.Second},
		"handed": {func(b *bench) { b.handOver(7000) }, 3 * time.Hour},
		"handed, closed probe": {func(b *bench) {
			p := ways["handed over"](b)
			p.asks(request)
			p.closes("FA", 0)
		}, time.Minute},
		"handed, half-closed by another client": {func(b *bench) {
			x := b.handOver(7000)
			b.rewrites(b.toPod("FA", b.isn+2, x+1, ""))
		}, 3 * time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			onBench(t, func(t *testing.T, b *bench) {
				before := Now()
				c.prepare(b)
				deadline := b.flow().Deadline
				if deadline < before+uint64(c.after) || deadline > Now()+uint64(c.after) {
					t.Fatalf("deadline in %d ns", deadline-before)
				}
				must(t, b.d.Sweep())
				b.flow()
				b.expire()
				must(t, b.d.Sweep())
				b.noFlows()
				b.counted("flows_expired", 1)
			})
			onBench(t, func(t *testing.T, b *bench) { // or along with the device
				c.prepare(b)
				must(t, b.d.RemoveDevice(b.key))
				must(t, b.d.Sweep())
				b.noFlows()
			})
		})
	}
}

// expire moves every flow just past its deadline.
func (b *bench) expire() {
	b.t.Helper()
	for key, f := range b.flowTable() {
		f.Deadline = Now() - 1
		must(b.t, b.d.objects.Flows.Put(key, f))
	}
}

// As long as the client sends packets, its connection is kept.
func TestHandedOverConnectionIsKeptAlive(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		x := b.handOver(7000)
		for i := range uint32(3) {
			b.expire()
			b.rewrites(b.toPod("PA", b.isn+2+i, x+1, "y"))
			must(t, b.d.Sweep())
			b.flow()
		}
	})
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		x := b.connect()
		for range 3 {
			b.replaysSYN(b.toPod("PA", b.isn+1, x+1, "x"))
			b.expire()
		}
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, "x"))
		must(t, b.d.Sweep())
		if state := b.flow().State; state != uint8(probeletFlowStateFLOW_HANDING) {
			t.Fatal(fmt.Sprint("state ", state))
		}
	})
}
