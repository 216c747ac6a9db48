package datapath

import (
	"net/netip"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/bpftest"
)

// armByTraffic makes the endpoint answerable by the pod's traffic only: its last success has expired.
func (b *bench) armByTraffic(keys ...EndpointKey) {
	b.t.Helper()
	for _, key := range keys {
		e := success(b.t, 200, -time.Second)
		e.ObservedAt -= uint64(2 * time.Second)
		e.TrafficUntil, e.TrafficWindowMs = Now()+uint64(time.Hour), 10_000
		if key.Kind == KindHTTP {
			e.Check = question(request).Check
		}
		b.put(key, e)
	}
	b.trust(TrustProven)
	must(b.t, b.pod.WantTraffic(b.srv.Port()))
}

// serves makes the pod send a packet to another client.
func (b *bench) serves(flags, payload string) {
	b.t.Helper()
	s := b.fromPod(flags, 1, 1, payload)
	s.Dst = netip.AddrPortFrom(b.client.Addr(), 50123)
	if got, _ := b.receives(s.Bytes(b.t, nil)); got != untouched {
		b.t.Fatalf("the pod's packet to a client %s", got)
	}
}

// probes sends an HTTP or TCP probe, and reports whether it is answered. The pod itself does not respond.
func (b *bench) probes(http bool) bool {
	b.t.Helper()
	b.isn += 0x01000000
	got, frame := b.sends(b.syn().Bytes(b.t, nil))
	if got != toClient {
		b.resets()
		return false
	}
	x := bpftest.ParseSegment(b.t, frame).Seq
	if !http {
		b.expect(b.reply(b.toPod("FA", b.isn+1, x+1, "")), "RA", x+1, b.isn+2, "")
		return true
	}
	got, _ = b.sends(b.toPod("PA", b.isn+1, x+1, request).Bytes(b.t, nil))
	b.resets()
	return got == toClient
}

// resets makes the client give up.
func (b *bench) resets() {
	b.t.Helper()
	_, _ = b.sends(b.toPod("R", b.isn+1, 0, "").Bytes(b.t, nil))
	port := b.tally(PortKey(b.srv.Port()))
	port.AskedAt = 0 // as if the pod had answered the SYN
	b.setTally(PortKey(b.srv.Port()), port)
}

// A response with a status below 500 shows that a pod serves; for TCP probes, so does a connection that it closes.
func TestWhatTrafficShows(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		for name, test := range map[string]struct {
			flags, payload string
			http, tcp      bool
		}{
			"nothing":                  {"A", "", false, false},
			"a response":               {"PA", "HTTP/1.1 200 OK\r\n", true, true},
			"the last response":        {"FPA", "HTTP/1.0 204 No Content\r\n\r\n", true, true},
			"a client's error":         {"PA", "HTTP/1.1 404 Not Found\r\n", true, true},
			"the last client's error":  {"PA", "HTTP/1.1 499 \r\n\r\n", true, true},
			"a server's error":         {"PA", "HTTP/1.1 500 Internal\r\n", false, false},
			"a server's error, closed": {"FPA", "HTTP/1.1 503 Unavailable\r\n", false, true},
			"an interim response":      {"PA", "HTTP/1.1 100 Continue\r\n\r\n", false, false},
			"a body":                   {"PA", "body: HTTP/1.1 200 OK", false, false},
			"another protocol":         {"PA", "SSH-2.0-OpenSSH_9.9\r\n", false, false},
			"a FIN":                    {"FA", "", false, true},
			"a reset":                  {"RA", "", false, false},
			"a response and a reset":   {"RPA", "HTTP/1.1 200 OK\r\n", false, false},
			"a short packet":           {"PA", "HTTP/1.1 20", false, false},
		} {
			for _, http := range []bool{true, false} {
				b.reset()
				must(t, b.d.IgnoreTraffic())
				keys := []EndpointKey{PortKey(8080), b.asked()}
				if !http {
					keys[1] = TCPKey(8080)
				}
				b.armByTraffic(keys...)
				b.serves(test.flags, test.payload)
				want := test.tcp
				if http {
					want = test.http
				}
				if got := b.probes(http); got != want {
					t.Errorf("%s, HTTP %v: answered %v, want %v", name, http, got, want)
				}
			}
		}
	})
}

// Traffic vouches only for endpoints of its port, for a while, as long as their evidence permits, and not after an error.
func TestTrafficHasBounds(t *testing.T) {
	const ok = "HTTP/1.1 200 OK\r\n\r\n"
	onBench(t, func(t *testing.T, b *bench) {
		for name, test := range map[string]struct {
			change func()
			want   bool
		}{
			"as is":                  {func() {}, true},
			"within the window":      {func() { b.wait(9 * time.Second) }, true},
			"after the window":       {func() { b.wait(11 * time.Second) }, false},
			"after the evidence":     {func() { b.wait(2 * time.Hour); b.serves("PA", ok) }, false},
			"a reset probe":          {func() { b.withdraws(PortKey(8080)) }, false},
			"an error status":        {func() { b.withdraws(b.asked()) }, false},
			"a listener that closed": {func() { b.voidPod(Now()) }, false},
			"a failure":              {func() { e := success(t, 200, time.Hour); e.Result = ResultFailure; b.putFor(request, e) }, false},
			"ignored":                {func() { must(t, b.d.IgnoreTraffic()); b.wait(11 * time.Second); b.serves("PA", ok) }, false},
			"attached again":         {func() { b.attach(); b.armByTraffic(PortKey(8080), b.asked()) }, false},
			"untrusted":              {func() { b.trust(TrustLost) }, false},
		} {
			b.reset()
			must(t, b.d.IgnoreTraffic())
			b.armByTraffic(PortKey(8080), b.asked())
			b.serves("PA", ok)
			test.change()
			if got := b.probes(true); got != test.want {
				t.Errorf("%s: answered %v, want %v", name, got, test.want)
			}
		}
	})
}

// Every tenth probe reaches the pod, whatever the traffic, and whatever else is known.
func TestEveryTenthProbeIsReal(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		for _, http := range []bool{true, false} {
			for _, fresh := range []bool{false, true} {
				b.reset()
				key := b.asked()
				if !http {
					key = TCPKey(8080)
				}
				b.armByTraffic(PortKey(8080), key)
				if fresh {
					for _, k := range []EndpointKey{PortKey(8080), key} {
						e, _, err := b.pod.Get(k)
						must(t, err)
						e.FreshUntil = Now() + uint64(time.Hour)
						b.put(k, e)
					}
				}
				b.serves("FPA", "HTTP/1.1 200 OK\r\n\r\n")
				for i := 1; i <= 3*(MaxTrafficAnswers+1); i++ {
					if got, want := b.probes(http), i%(MaxTrafficAnswers+1) != 0; got != want {
						t.Fatalf("HTTP %v, fresh %v: probe %d answered %v, want %v", http, fresh, i, got, want)
					}
				}
			}
		}
	})
}

// withdraws acts as if the kernel had withdrawn the evidence under a key.
func (b *bench) withdraws(key EndpointKey) {
	b.t.Helper()
	tally := b.tally(key)
	tally.WithdrawnAt = Now()
	b.setTally(key, tally)
}

// Traffic that is no longer wanted is no longer looked at.
func TestWantTrafficOnly(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		must(t, b.d.IgnoreTraffic())
		check := func(want int) {
			t.Helper()
			got := 0
			for _, wanted := range entries[uint32, uint32](t, b.d.objects.TrafficSlots) {
				got += int(wanted)
			}
			if got != want {
				t.Errorf("%d slots are looked at, want %d", got, want)
			}
		}
		for port := range uint16(3) {
			must(t, b.pod.WantTraffic(port))
		}
		check(3)
		must(t, b.d.WantTrafficOnly([]PodPort{{b.key, 0}, {b.key, 2}}))
		check(2)
		must(t, b.pod.WantTraffic(1)) // again
		must(t, b.pod.WantTraffic(2))
		check(3)
		must(t, b.d.WantTrafficOnly(nil))
		check(0)
	})
}

// BenchmarkTraffic measures observe on packets of a pod to an ordinary client, from a port whose traffic is evidence, and from one
// whose traffic is not ("other").
func BenchmarkTraffic(b *testing.B) {
	const pause = 20_000 // packets per variant and round
	bench := newBench(b, HookTC, families["ipv4"])
	bench.armByTraffic(PortKey(8080), bench.asked())
	wanted := bench.fromPod("PA", 1, 1, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
	wanted.Dst = netip.AddrPortFrom(bench.client.Addr(), 50123)
	other, ack, body := wanted, wanted, wanted
	other.Src = netip.AddrPortFrom(wanted.Src.Addr(), 8081)
	ack.Flags, ack.Payload = "A", ""
	body.Payload = "<html>" + body.Payload
	packets := []struct {
		name  string
		frame []byte
		total time.Duration
	}{{name: "other", frame: other.Bytes(b, nil)}, {name: "acknowledgement", frame: ack.Bytes(b, nil)}, {name: "body", frame: body.Bytes(b, nil)}, {name: "response", frame: wanted.Bytes(b, nil)}}
	rounds := 0
	for b.Loop() {
		rounds++
		for i := range packets {
			_, took, err := bench.d.Observe().Benchmark(packets[i].frame, pause, nil)
			must(b, err)
			packets[i].total += took
		}
	}
	for _, p := range packets {
		b.ReportMetric(float64(p.total.Nanoseconds())/float64(rounds), p.name+"-ns/packet")
	}
}

func TestTrafficModelAtTheBoundaries(t *testing.T) {
	e := Evidence{TrafficUntil: 100e9, TrafficWindowMs: 10_000}
	for name, test := range map[string]struct {
		port Tally
		kind uint8
		at   uint64
		want bool
	}{
		"never seen":              {Tally{}, KindTCP, 50e9, false},
		"last moment of window":   {Tally{ServedAt: 40e9}, KindHTTP, 50e9 - 1, true},
		"end of window":           {Tally{ServedAt: 40e9}, KindHTTP, 50e9, false},
		"seen by another CPU":     {Tally{ServedAt: 51e9}, KindHTTP, 50e9, true},
		"last moment of evidence": {Tally{ServedAt: 99e9}, KindHTTP, 100e9 - 1, true},
		"end of evidence":         {Tally{ServedAt: 99e9}, KindHTTP, 100e9, false},
		"closed, HTTP":            {Tally{ClosedAt: 49e9}, KindHTTP, 50e9, false},
		"closed, TCP":             {Tally{ClosedAt: 49e9}, KindTCP, 50e9, true},
		"closed later, TCP":       {Tally{ServedAt: 10e9, ClosedAt: 49e9}, KindTCP, 50e9, true},
	} {
		if got := IsServing(e, test.port, test.kind, test.at); got != test.want {
			t.Errorf("%s: %v, want %v", name, got, test.want)
		}
	}
	for answered, want := range map[uint32]bool{MaxTrafficAnswers - 1: false, MaxTrafficAnswers: true, MaxTrafficAnswers + 1: true} {
		if got := IsRealDue(e, Tally{Answered: answered}); got != want {
			t.Errorf("after %d answers a real probe is due: %v", answered, got)
		}
	}
	if IsRealDue(Evidence{}, Tally{Answered: MaxTrafficAnswers}) {
		t.Error("due, where traffic is no evidence")
	}
}
