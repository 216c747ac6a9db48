package datapath

import (
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/bpftest"
)

// answerLost is longer than ANSWER_LOST_NS in bpf/abi.h.
const answerLost = 550 * time.Millisecond

// On a new device one connection is taken, to see whether answers arrive. Once they do, all are taken.
func TestTrustIsEarnedByOneConnection(t *testing.T) {
	onBench(t, func(_ *testing.T, b *bench) {
		b.arm()
		b.trust(TrustUnproven)
		first := b.client
		synAck := b.reply(b.syn())
		b.wantTrust(TrustUnproven, "")
		b.client = another(first, 1)
		b.passesSYN()
		b.counted("passed_untrusted", 1)
		b.client = first
		b.swallows(b.toPod("A", b.isn+1, synAck.Seq+1, ""))
		b.wantTrust(TrustProven, "")
		b.client = another(first, 2)
		b.connect()
		b.client = another(first, 3)
		b.reply(b.syn())
	})
}

func TestTrustIsLost(t *testing.T) {
	for name, c := range map[string]struct {
		trust Trust // before
		loss  string
		lose  func(b *bench)
	}{
		"the SYN is repeated": {TrustProven, "syn_repeated", func(b *bench) {
			b.reply(b.syn())
			b.wait(answerLost)
			b.passesSYN()
		}},
		"the trial's SYN is repeated": {TrustUnproven, "syn_repeated", func(b *bench) {
			b.reply(b.syn())
			b.wait(answerLost)
			b.passesSYN()
		}},
		"a client gave up": {TrustProven, "unacknowledged", func(b *bench) {
			b.reply(b.syn())
			b.wait(answerLost)
			b.client = another(b.client, 1)
			b.passesSYN()
		}},
		"the trial's client gave up": {TrustUnproven, "unacknowledged", func(b *bench) {
			b.reply(b.syn())
			b.wait(answerLost)
			b.client = another(b.client, 1)
			b.passesSYN()
		}},
		"the request is repeated": {TrustProven, "request_repeated", func(b *bench) {
			x := b.connect()
			b.reply(b.toPod("PA", b.isn+1, x+1, request))
			b.reply(b.toPod("PA", b.isn+1, x+1, request)) // the first answer may have been delayed
			b.wait(answerLost)
			b.replaysSYN(b.toPod("PA", b.isn+1, x+1, request))
			b.accepts(7000, "PA", request) // the client gets its answer nevertheless
		}},
		"observe does not see the answer": {TrustUnproven, "unobserved", func(b *bench) {
			b.answersLost = true
			x := b.reply(b.syn()).Seq
			b.swallows(b.toPod("A", b.isn+1, x+1, ""))
		}},
	} {
		t.Run(name, func(t *testing.T) {
			onBench(t, func(t *testing.T, b *bench) {
				b.arm()
				b.trust(c.trust)
				c.lose(b)
				b.wantTrust(TrustLost, c.loss)
				b.counted("devices_lost", 1)
				b.answersLost = false

				b.client = another(b.client, 9)
				b.passesSYN()
				b.wait(answerLost)
				b.passesSYN()
				b.counted("devices_lost", 1)

				must(t, b.d.TrustAgain(b.key))
				b.wantTrust(TrustUnproven, "")
				for n := range uint16(2) { // the second one judges what was watched before, if anything
					b.client = another(b.client, 1+n)
					b.connect()
					b.wantTrust(TrustProven, "")
				}
			})
		})
	}
}

// A repeated SYN whose answer cannot be lost yet gets the same answer, because two delayed SYNs arrive together.
func TestDelayedSYNsGetTheSameAnswer(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		x := b.reply(b.syn()).Seq
		b.wait(300 * time.Millisecond)
		if again := b.reply(b.syn()).Seq; again != x {
			t.Fatalf("answered with %d, then with %d", x, again)
		}
		b.wantTrust(TrustProven, "")
	})
}

// If answers do not arrive, the pod gets the connection, which is then observed.
func TestUnansweredSYNGoesToThePod(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		b.reply(b.syn())
		b.wait(answerLost)
		b.passes(b.syn().Bytes(t, nil))
		b.passes(b.syn().Bytes(t, nil))
		const podISN = 7000
		b.podSends(untouched, b.fromPod("SA", podISN, b.isn+1, ""))
		b.passes(b.toPod("A", b.isn+1, podISN+1, "").Bytes(t, nil))
		b.passes(b.toPod("PA", b.isn+1, podISN+1, request).Bytes(t, nil))
		b.podSends(untouched, b.fromPod("PA", podISN+1, b.isn+1+uint32(len(request)), "HTTP/1.1 200 OK\r\n\r\n"))
		b.passes(b.toPod("FA", b.isn+1+uint32(len(request)), podISN+20, "").Bytes(t, nil))
		all := b.records()
		if last := all[len(all)-1]; last.TCPFlags != FlagFIN|FlagACK || last.ObservedAt-last.StartedAt < uint64(answerLost) {
			t.Fatalf("%+v: counted from the repeated SYN", last)
		}
		b.noFlows()
	})
}

// Until the pod has answered the connection last passed on, nothing is answered in its name.
func TestSilentPodIsNotAnsweredFor(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		b.trust(TrustProven)
		b.put(PortKey(8080), Evidence{})
		b.passes(b.syn().Bytes(t, nil)) // a real one, which the pod does not answer
		b.arm()
		b.trust(TrustProven)
		for n := range uint16(3) {
			b.client = another(b.client, 1+n)
			b.passes(b.syn().Bytes(t, nil))
			b.counted("passed_unanswered", uint64(n)+1)
		}
		b.podSends(untouched, b.fromPod("SA", 7000, b.isn+1, ""))
		b.client = another(b.client, 9)
		b.connect()
	})
}

// What is learned about one attachment of a device proves nothing about the next.
func TestTrustEndsWithTheAttachment(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		old := b.key
		x := b.connect()
		b.reply(b.toPod("PA", b.isn+1, x+1, request))
		b.attach()
		b.arm()
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, request)) // would lose trust
		b.wantTrust(TrustProven, "")
		if err := b.d.TrustAgain(old); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("TrustAgain after the device was attached again: %v", err)
		}
	})
}

// Putting a device on trial again must not write tallies: a withdrawal noted meanwhile would be lost.
func TestTrustAgainWritesNoTally(t *testing.T) {
	bpftest.RequireRoot(t)
	d, err := Load()
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	key, err := NewDeviceKey(benchIfindex)
	must(t, err)
	must(t, d.AddDevice(key, 33, HookTC))
	pod, err := d.Pod(key)
	must(t, err)
	must(t, pod.Put(PortKey(8080), success(t, 200, time.Hour)))
	must(t, d.objects.EndpointTallies.Put(PortKey(8080).of(key), Tally{WatchedAt: 1, WatchedPort: 40000}))
	must(t, d.objects.EndpointTallies.Freeze()) // from now on only the kernel may write
	must(t, d.TrustAgain(key))
}

// The prober set and the daemon's own sockets are independent, even if both change at the same time.
func TestProberAndOwnSocketsAreIndependent(t *testing.T) {
	bpftest.RequireRoot(t)
	d, err := Load()
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	for i := range uint64(20_000) {
		must(t, d.objects.Prober.Put(uint32(0), &probeletProberConfig{}))
		d.own = false
		var done sync.WaitGroup
		done.Go(func() { must(t, d.SetProber(Prober{CgroupIDs: []uint64{i + 1}})) })
		done.Go(func() { must(t, d.ExemptSocket(i)) })
		done.Wait()
		var config probeletProberConfig
		must(t, d.objects.Prober.Lookup(uint32(0), &config))
		if config.CgroupIds[0] != i+1 || config.OwnSockets == 0 {
			t.Fatalf("round %d: %+v", i, config)
		}
	}
}
