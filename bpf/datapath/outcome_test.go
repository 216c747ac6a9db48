package datapath

import (
	"fmt"
	"strings"
	"testing"

	"github.com/probelet/probelet/bpf/bpftest"
)

func (b *bench) outcome(event, kind uint8, status uint16) Outcome {
	b.t.Helper()
	all := b.outcomes()
	if len(all) != 1 || all[0].Event != event || all[0].Kind != kind || all[0].Status != status ||
		all[0].Port != b.srv.Port() || all[0].Device != b.key {
		b.t.Fatalf("outcomes %+v, want one: event %d kind %d status %d", all, event, kind, status)
	}
	return all[0]
}

const podISN = 7000

// reaching is a probe that reached the pod.
type reaching struct {
	*bench
	passed fate   // what becomes of the pod's packets
	told   uint32 // the ISN that the client was told
}

// ways are those in which probes reach the pod. What is observed of them is the same.
var ways = map[string]func(b *bench) reaching{
	"passed on": func(b *bench) reaching {
		b.put(PortKey(8080), Evidence{})
		b.put(HTTPKey(8080, "/healthz"), Evidence{})
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

// onWays runs the test over all ways of a probe to the pod, both hooks and families.
func onWays(t *testing.T, f func(t *testing.T, p reaching)) {
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			onBench(t, func(t *testing.T, b *bench) { f(t, way(b)) })
		})
	}
}

// asks sends a request and lets the pod have it.
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

// hears is a packet of the pod after it has had the request; seq counts from behind its SYN.
func (p reaching) hears(flags string, seq uint32, payload string) {
	p.t.Helper()
	after := p.isn + 1 + uint32(len(request))
	got := p.podSends(p.passed, p.fromPod(flags, podISN+1+seq, after, payload))
	p.expect(got, flags, p.told+1+seq, after, payload)
}

// closes is the client's FIN or RST, once it has had n bytes.
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
	ofPort, ofEndpoint := p.tally(PortKey(8080)), p.tally(HTTPKey(8080, "/healthz"))
	if (ofPort.WithdrawnAt != 0) != port || (ofEndpoint.WithdrawnAt != 0) != endpoint {
		p.t.Fatalf("port %+v, endpoint %+v; want them withdrawn: %v, %v", ofPort, ofEndpoint, port, endpoint)
	}
}

func (p reaching) noOutcome() {
	p.t.Helper()
	if all := p.outcomes(); len(all) != 0 {
		p.t.Fatalf("outcomes %+v", all)
	}
}

const ok = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

func TestASuccessIsReportedWhenTheClientHasClosed(t *testing.T) {
	onWays(t, func(t *testing.T, p reaching) {
		p.asks(request)
		p.hears("PA", 0, ok)
		p.noOutcome()
		p.closes("FA", uint32(len(ok)))
		o := p.outcome(EventStatus, KindHTTP, 200)
		if o.PathHash != PathHash("/healthz") || o.ObservedAt > Now() || o.Duration == 0 || o.Duration > o.ObservedAt {
			t.Fatalf("outcome %+v", o)
		}
		p.counted("observed", 1)
		p.withdrawn(false, false)
	})
}

func TestAnErrorStatusIsReportedAtOnce(t *testing.T) {
	for name, way := range ways {
		t.Run(name, func(t *testing.T) {
			onBench(t, func(_ *testing.T, b *bench) {
				for i, status := range []uint16{300, 302, 404, 500, 999} {
					b.isn += 1000
					p := way(b)
					b.setTally(HTTPKey(8080, "/healthz"), Tally{})
					p.asks(request)
					p.hears("PA", 0, fmt.Sprintf("HTTP/1.0 %d\r\n\r\n", status))
					p.outcome(EventStatus, KindHTTP, status)
					p.withdrawn(false, true)
					p.counted("observed", uint64(i+1))
					p.closes("FA", 16) // reported already
					p.noOutcome()
				}
			})
		})
	}
}

func TestWhatIsNoEvidence(t *testing.T) {
	for name, text := range map[string]string{
		"interim": "HTTP/1.1 100 Continue\r\n\r\n", "not HTTP": "SSH-2.0-x\r\n\r\n", "short": "HTTP/1.1 20", "letters": "HTTP/1.1 2x0 OK",
	} {
		t.Run(name, func(t *testing.T) {
			onWays(t, func(_ *testing.T, p reaching) {
				p.asks(request)
				p.hears("PA", 0, text)
				p.closes("FA", 9)
				p.noOutcome()
				p.withdrawn(false, false)
			})
		})
	}
	t.Run("status not at the start", func(t *testing.T) {
		onWays(t, func(_ *testing.T, p reaching) {
			p.asks(request)
			p.hears("PA", 8, ok)
			p.closes("FA", 9)
			p.outcome(EventNoAnswer, KindHTTP, 0)
		})
	})
	t.Run("request not at the start", func(t *testing.T) {
		onBench(t, func(_ *testing.T, b *bench) {
			p := ways["passed on"](b)
			p.passes(p.toPod("PA", p.isn+2, podISN+1, request).Bytes(p.t, nil)) // what comes before it was lost, or is late
			p.hears("PA", 0, "HTTP/1.1 500 x\r\n\r\n")
			p.noOutcome()
			p.withdrawn(false, false)
		})
	})
	t.Run("reset after a good status", func(t *testing.T) {
		onWays(t, func(_ *testing.T, p reaching) {
			p.asks(request)
			p.hears("PA", 0, ok)
			p.hears("RA", uint32(len(ok)), "")
			p.noOutcome()
			p.withdrawn(false, false)
			p.noFlows()
		})
	})
	t.Run("a path that is not probed", func(t *testing.T) {
		onWays(t, func(_ *testing.T, p reaching) {
			p.asks(strings.Replace(request, "healthz", "unknown", 1)) // as long
			p.hears("PA", 0, "HTTP/1.1 500 x\r\n\r\n")
			p.closes("FA", 9)
			p.noOutcome()
			p.withdrawn(false, false)
			p.counted("passed_not_probed", 1)
		})
	})
}

func TestAResetIsReportedAtOnce(t *testing.T) {
	onWays(t, func(_ *testing.T, p reaching) {
		p.asks(request)
		p.hears("RA", 0, "")
		p.outcome(EventReset, KindHTTP, 0)
		p.withdrawn(true, false)
		p.noFlows()
	})
}

func TestARefusalIsReportedAtOnce(t *testing.T) {
	refusal := func(b *bench) bpftest.Segment { return b.fromPod("RA", 0, b.isn+1, "") }
	t.Run("passed on", func(t *testing.T) {
		onBench(t, func(t *testing.T, b *bench) {
			b.put(PortKey(8080), Evidence{})
			b.put(HTTPKey(8080, "/healthz"), Evidence{})
			b.passes(b.syn().Bytes(t, nil))
			b.podSends(untouched, refusal(b))
			b.outcome(EventReset, KindPort, 0)
			reaching{bench: b}.withdrawn(true, false)
			b.noFlows()
		})
	})
	t.Run("handed over", func(t *testing.T) {
		onBench(t, func(_ *testing.T, b *bench) {
			b.armPort()
			x := b.connect()
			b.replaysSYN(b.toPod("PA", b.isn+1, x+1, request))
			b.expect(b.podSends(toClient, refusal(b)), "RA", x+1, b.isn+1, "")
			b.outcome(EventReset, KindHTTP, 0)
			reaching{bench: b}.withdrawn(true, false)
			b.noFlows()
		})
	})
}

func TestNoAnswer(t *testing.T) {
	for _, end := range []string{"FA", "RA"} {
		t.Run(end, func(t *testing.T) {
			onWays(t, func(_ *testing.T, p reaching) {
				p.asks(request)
				p.closes(end, 0)
				p.outcome(EventNoAnswer, KindHTTP, 0)
				p.withdrawn(false, false) // whether it waited long enough is for the daemon to judge
			})
		})
	}
}

func TestAConnectionIsReported(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		ways["passed on"](b)
		b.passes(b.toPod("FA", b.isn+1, 7001, "").Bytes(t, nil))
		b.outcome(EventConnected, KindTCP, 0)
		b.noFlows()
	})
	onBench(t, func(t *testing.T, b *bench) { // and one that never was
		b.put(PortKey(8080), Evidence{})
		b.passes(b.syn().Bytes(t, nil))
		b.passes(b.toPod("RA", b.isn+1, 0, "").Bytes(t, nil))
		b.outcome(EventNoAnswer, KindPort, 0)
		b.noFlows()
	})
}

// A withdrawal has a cause, and is counted if there was something to withdraw.
func TestWithdrawalCauses(t *testing.T) {
	for name, c := range map[string]struct {
		key   EndpointKey
		flags string
		text  string
	}{
		"reset":  {PortKey(8080), "RA", ""},
		"status": {HTTPKey(8080, "/healthz"), "PA", "HTTP/1.1 500 Oops\r\n\r\n"},
	} {
		for _, fresh := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, fresh: %v", name, fresh), func(t *testing.T) {
				onWays(t, func(t *testing.T, p reaching) {
					p.asks(request)
					p.put(PortKey(8080), Evidence{})
					if fresh { // meanwhile something is known
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
