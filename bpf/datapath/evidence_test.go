package datapath

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/bpftest"
)

// sealed returns evidence as the daemon writes it.
func sealed(key probeletEndpointKey, e Evidence) []byte {
	e.Seal = sealOf(key, e)
	var value [40]byte
	if n, err := binary.Encode(value[:], binary.NativeEndian, e); err != nil || n != len(value) {
		panic(fmt.Sprint(n, err))
	}
	return value[:]
}

// sealedBytes is the number of bytes covered by the seal; the others are padding.
var sealedBytes = []int{
	0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 32, 33, 34, 35, 36, 37, 38, 39,
}

// The seal does not match evidence that is read while it is written, or whose memory has become another key's.
func TestOnlySealedEvidenceIsUsed(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		rapid.Check(t, func(rt *rapid.T) {
			b.arm()
			key := rapid.SampledFrom([]EndpointKey{PortKey(8080), b.asked()}).Draw(rt, "key").of(b.key)
			of := func(status int, d time.Duration) Evidence {
				e := success(t, status, d)
				if key.Kind == KindHTTP {
					e.Check = question(request).Check
				}
				return e
			}
			e := of(200, time.Hour)
			good := sealed(key, e)
			bad := append([]byte(nil), good...)
			switch rapid.SampledFrom([]string{"tampered", "torn", "foreign"}).Draw(rt, "how") {
			case "tampered":
				at := rapid.SampledFrom(sealedBytes).Draw(rt, "byte")
				bad[at] ^= rapid.ByteRange(1, 255).Draw(rt, "by")
			case "torn":
				newer := of(201, 2*time.Hour)
				newer.ObservedAt = e.ObservedAt + 1 // differs from the first byte on
				copy(bad, sealed(key, newer)[:rapid.IntRange(1, 32).Draw(rt, "new bytes")])
			case "foreign":
				bad = sealed(foreign(key).Draw(rt, "of"), of(200, time.Hour))
			}
			must(t, b.d.objects.EndpointEvidence.Put(key, bad))
			// The SYN is answered on the port's evidence, the request on the endpoint's.
			got, frame := b.sends(b.syn().Bytes(t, nil))
			if want := key.Kind != KindPort; (got == toClient) != want {
				rt.Fatalf("SYN %s", got)
			}
			if got == toClient {
				b.replaysSYN(b.toPod("PA", b.isn+1, bpftest.ParseSegment(t, frame).Seq+1, request))
				b.swallows(b.toPod("R", b.isn+1, 0, ""))
			}
			b.noFlows()
			b.counted("answered_http", 0)
			if _, _, err := b.pod.Get(EndpointKey{Hash: key.Hash, Port: key.Port, Kind: key.Kind}); err == nil || !strings.Contains(err.Error(), "seal") {
				rt.Fatalf("the daemon reads unsealed evidence: %v", err)
			}
		})
	})
}

// foreign returns a random key that differs from k in one way.
func foreign(k probeletEndpointKey) *rapid.Generator[probeletEndpointKey] {
	return rapid.Custom(func(t *rapid.T) probeletEndpointKey {
		k := k
		by := rapid.Uint32Range(1, 1<<32-1).Draw(t, "by")
		switch rapid.SampledFrom([]string{"question", "device", "generation", "port", "kind"}).Draw(t, "differs in") {
		case "question":
			k.Hash ^= uint64(by) << rapid.IntRange(0, 32).Draw(t, "shift")
		case "device":
			k.Device.Ifindex ^= by
		case "generation":
			k.Device.Generation ^= by
		case "port":
			k.Port ^= uint16(by%65535 + 1)
		case "kind":
			k.Kind ^= uint8(by%255 + 1)
		}
		return k
	})
}

// What was known about a previous attachment of a device is out of reach, even if it was left behind.
func TestEvidenceOfAPreviousAttachmentIsOutOfReach(t *testing.T) {
	onBench(t, func(t *testing.T, b *bench) {
		b.arm()
		x := b.connect()
		old, oldPod := b.key, b.pod
		leftBehind := entries[probeletEndpointKey, Evidence](t, b.d.objects.EndpointEvidence)
		tallies := entries[probeletEndpointKey, Tally](t, b.d.objects.EndpointTallies)
		b.attach()
		if all := entries[probeletEndpointKey, Evidence](t, b.d.objects.EndpointEvidence); len(all) != 0 {
			t.Fatalf("still there: %+v", all)
		}
		for key, e := range leftBehind {
			must(t, b.d.objects.EndpointEvidence.Put(key, e))
			must(t, b.d.objects.EndpointTallies.Put(key, tallies[key]))
		}
		b.trust(TrustProven)
		client := b.client
		b.client = another(client, 1)
		b.passes(b.syn().Bytes(t, nil))

		b.put(PortKey(8080), success(t, 200, time.Hour))
		y := b.connect()
		b.replaysSYN(b.toPod("PA", b.isn+1, y+1, request))
		for key := range leftBehind {
			must(t, b.d.objects.EndpointEvidence.Delete(key))
		}
		b.client = client // taken during the previous attachment
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, request))
		b.counted("answered_http", 0)

		if _, err := b.d.Pod(old); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("pod of the previous attachment: %v", err)
		}
		if err := oldPod.Put(TCPKey(1), Evidence{}); !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("Put to the previous attachment: %v", err)
		}
		must(t, b.d.RemoveDevice(old)) // must not affect the current attachment
		if keys, err := b.pod.Keys(); err != nil || len(keys) != 1 {
			t.Fatalf("keys of the current attachment: %v, %v", keys, err)
		}
	})
}

// withdrawn_at is the latest of all withdrawals: a slow one does not reset a later one.
func TestWithdrawalsAreNotReset(t *testing.T) {
	onWays(t, func(t *testing.T, p reaching) {
		later := Now() + uint64(time.Hour)
		for _, key := range []EndpointKey{PortKey(8080), p.asked()} {
			p.setTally(key, Tally{WithdrawnAt: later, WithdrawnCause: 9})
		}
		p.asks(request)
		p.hears("PA", 0, "HTTP/1.1 500 Oops\r\n\r\n")
		if got := p.tally(p.asked()); got.WithdrawnAt != later || got.WithdrawnCause != 9 {
			t.Fatalf("after an error status: %+v", got)
		}
	})
	onBench(t, func(t *testing.T, b *bench) {
		b.armPort()
		later := Now() - 1
		x := b.connect()
		b.replaysSYN(b.toPod("PA", b.isn+1, x+1, request))
		later += uint64(time.Hour)
		b.setTally(PortKey(8080), Tally{WithdrawnAt: later, WithdrawnCause: 9})
		b.podSends(toClient, b.fromPod("RA", 0, b.isn+1, ""))
		if got := b.tally(PortKey(8080)); got.WithdrawnAt != later || got.WithdrawnCause != 9 {
			t.Fatalf("after a refusal: %+v", got)
		}
	})
}

// left asserts that no map has an entry for any device.
func left(t testing.TB, d *Datapath) {
	t.Helper()
	for name, m := range map[string]*ebpf.Map{
		"devices": d.objects.Devices, "evidence": d.objects.EndpointEvidence, "tallies": d.objects.EndpointTallies,
		"lists": d.objects.EndpointLists, "namespaces": d.objects.PodNetns,
	} {
		n := 0
		for key, err := m.NextKeyBytes(nil); key != nil; key, err = m.NextKeyBytes(key) {
			must(t, err)
			n++
		}
		if n != 0 {
			t.Errorf("%s: %d entries left", name, n)
		}
	}
}

// numbered returns the key of one of many endpoints.
func numbered(i int) EndpointKey { return HTTPKey(80, Question{Hash: uint64(i + 1)}) }

func TestRemovedDeviceLeavesNothingBehind(t *testing.T) {
	bpftest.RequireRoot(t)
	d, err := Load()
	must(t, err)
	defer d.Close() //nolint:errcheck // a test's
	for i := range 1000 {
		key, err := NewDeviceKey(10 + i%3)
		must(t, err)
		must(t, d.AddDevice(key, uint32(30+i%2), Hook(i%2)))
		p, err := d.Pod(key)
		must(t, err)
		for n := range i % 7 {
			must(t, p.Put(numbered(n), Evidence{}))
		}
		if i%5 == 0 {
			must(t, p.Delete(numbered(0)))
		}
		if i%4 != 0 { // the rest is removed by the next attachment, or at the end
			must(t, d.RemoveDevice(key))
			must(t, d.RemoveDevice(key))
		}
	}
	devices, err := d.Devices()
	must(t, err)
	for _, device := range devices {
		must(t, d.RemoveDevice(device.Key))
	}
	left(t, d)
}

// The daemon may be putting evidence while the plugin removes the device.
func TestPutRacesWithRemoval(t *testing.T) {
	bpftest.RequireRoot(t)
	d, err := Ensure(t.Context(), bpftest.BPFDir(t))
	must(t, err)
	defer d.Close() //nolint:errcheck // a test's
	for round := range 1000 {
		key, err := NewDeviceKey(10)
		must(t, err)
		must(t, d.AddDevice(key, 33, HookTC))
		p, err := d.Pod(key)
		must(t, err)
		began, done := make(chan struct{}), make(chan error)
		go func() {
			var err error
			for n := 0; err == nil && n < 100_000; n++ {
				if n == round%30 {
					close(began)
				}
				if err = p.Put(numbered(n%20), Evidence{}); n%7 == 6 && err == nil {
					err = p.Delete(numbered(n % 20))
				}
			}
			done <- err
		}()
		<-began
		must(t, d.RemoveDevice(key))
		if err := <-done; !errors.Is(err, os.ErrNotExist) {
			t.Fatalf("Put after the device was removed: %v", err)
		}
		if left(t, d); t.Failed() {
			t.Fatalf("failed in round %d", round)
		}
	}
}

func TestPodHoldsSixtyFourEndpoints(t *testing.T) {
	bpftest.RequireRoot(t)
	d, err := Load()
	must(t, err)
	defer d.Close() //nolint:errcheck // a test's
	key, err := NewDeviceKey(10)
	must(t, err)
	must(t, d.AddDevice(key, 33, HookTC))
	p, err := d.Pod(key)
	must(t, err)
	for i := range MaxEndpoints {
		must(t, p.Put(numbered(i), Evidence{Status: uint16(i % 63)}))
	}
	if err := p.Put(numbered(64), Evidence{}); !errors.Is(err, errTooMany) {
		t.Fatalf("65th endpoint: %v", err)
	}
	if _, _, err := p.Get(numbered(64)); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatalf("65th endpoint exists nevertheless: %v", err)
	}
	must(t, p.Put(numbered(63), Evidence{Status: 63})) // existing endpoints can still be changed
	must(t, p.Delete(numbered(20)))
	must(t, p.Put(numbered(64), Evidence{Status: 64}))
	keys, err := p.Keys()
	if err != nil || len(keys) != MaxEndpoints {
		t.Fatalf("%d keys, %v", len(keys), err)
	}
	for i := range 65 {
		e, _, err := p.Get(numbered(i))
		if i != 20 && (err != nil || e.Status != uint16(i)) {
			t.Errorf("endpoint %d: %+v, %v", i, e, err)
		}
	}
	must(t, d.RemoveDevice(key))
	left(t, d)
}
