package store

import (
	"errors"
	"maps"
	"net/netip"
	"os"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
)

func TestMain(m *testing.M) { bpftest.RunInOwnCgroup(m.Run) }

const second = uint64(time.Second)

func spec(kind probe.Kind, port uint16, path string) probe.Spec {
	return probe.Spec{
		Container: "c", Type: probe.Liveness, Kind: kind, Port: port, Path: path,
		Period: 10 * time.Second, Timeout: time.Second,
	}
}

// tracker tracks HTTP :80/x, TCP :80 and TCP :81, and something that has no record.
func tracker(t testing.TB) *probe.Tracker {
	t.Helper()
	specs, err := probe.Endpoints(probe.Pod{Probes: []probe.Spec{
		spec(probe.HTTP, 80, "/x"), spec(probe.TCP, 80, ""), spec(probe.TCP, 81, ""), spec(probe.HTTPS, 443, "/"),
	}}, probe.NewDefaults().Settings(nil), Limits)
	if err != nil {
		t.Fatal(err)
	}
	tracker := probe.NewTracker()
	tracker.SetEndpoints(specs, 0)
	return tracker
}

var x = probe.Question{Hash: 7, Check: 8}

// observe has the tracker see a probe of HTTP :80/x answered.
func observe(t testing.TB, tracker *probe.Tracker, status int, at uint64) {
	t.Helper()
	request, err := probe.ParseRequest([]byte("GET /x HTTP/1.1\r\nHost: 10.0.0.7:80\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n"))
	if err != nil {
		t.Fatal(err)
	}
	o := probe.Outcome{Port: 80, Kind: probe.HTTP, Request: request, Question: x, Event: probe.Answered, Status: status, ObservedAt: at}
	if changes := tracker.Observe(o); len(changes) != 1 {
		t.Fatalf("changes %+v", changes)
	}
}

func TestEveryObservableKindHasAKey(t *testing.T) {
	keys := map[datapath.EndpointKey]probe.Kind{datapath.PortKey(80): "port"}
	for _, k := range probe.Kinds() {
		endpoint := probe.Endpoint{Port: 80, Kind: k, Path: "/x"}
		key, ok := Key(endpoint, x)
		if ok != k.Observable() {
			t.Errorf("%s has a key: %t; the kind is observable: %t", k, ok, k.Observable())
		}
		if !ok {
			continue
		}
		if other, taken := keys[key]; taken {
			t.Errorf("%s has the key of %s: %+v", k, other, key)
		}
		keys[key] = k
		_, known := Key(endpoint, probe.Question{})
		if byPort := k.Keying() == probe.KeyedByPort; known != byPort || key.Hash == 0 != byPort {
			t.Errorf("%s is keyed by its port: %t, has key %+v, and one without a question: %t", k, byPort, key, known)
		}
	}
	for k := range kinds {
		if !k.Observable() {
			t.Errorf("the kernel side has a name for %s, which is not observable", k)
		}
	}
}

func TestDesired(t *testing.T) {
	tracker := tracker(t)
	keyX := datapath.HTTPKey(80, datapath.Question(x))
	want := Records{datapath.TCPKey(80): {}, datapath.TCPKey(81): {}, datapath.PortKey(80): {}, datapath.PortKey(81): {}}
	check := func() {
		t.Helper()
		got, err := Desired(tracker)
		if err != nil || !maps.Equal(got, want) {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
	}
	check() // unknown, but there: the kernel does not observe ports that it has no record of

	observe(t, tracker, 204, 100*second)
	http := datapath.Evidence{Check: x.Check, Result: datapath.ResultSuccess, ObservedAt: 100 * second, FreshUntil: 111 * second}
	if err := http.SetReply(204); err != nil {
		t.Fatal(err)
	}
	want[keyX] = http
	check() // the port stays closed while its TCP endpoint is unknown

	tracker.Observe(probe.Outcome{Port: 80, Kind: probe.TCP, Event: probe.Connected, ObservedAt: 101 * second})
	want[datapath.TCPKey(80)] = datapath.Evidence{Result: datapath.ResultSuccess, ObservedAt: 101 * second, FreshUntil: 112 * second}
	want[datapath.PortKey(80)] = datapath.Evidence{ObservedAt: 101 * second, FreshUntil: 112 * second}
	check()

	observe(t, tracker, 500, 102*second)
	want[keyX] = datapath.Evidence{Check: x.Check, Result: datapath.ResultFailure, Status: 500, ObservedAt: 102 * second}
	check() // TCP is still answered

	tracker.Observe(probe.Outcome{Port: 80, Event: probe.Reset, ObservedAt: 103 * second})
	want[keyX] = datapath.Evidence{Check: x.Check, Result: datapath.ResultFailure, ObservedAt: 103 * second}
	want[datapath.TCPKey(80)] = datapath.Evidence{Result: datapath.ResultFailure, ObservedAt: 103 * second}
	want[datapath.PortKey(80)] = datapath.Evidence{}
	check()
}

// What was asked at the pod's earlier address may be what another probe says outright. Endpoints with one question have one
// record, which answers for no longer than either would.
func TestDesiredOfTheSameQuestion(t *testing.T) {
	seldom := spec(probe.HTTP, 80, "/x")
	seldom.Type, seldom.Period = probe.Readiness, time.Minute
	seldom.Headers = []probe.Header{{Name: "Host", Value: "10.0.0.7:80"}}
	at := func(ip string) []probe.EndpointSpec {
		pod := probe.Pod{IPs: []netip.Addr{netip.MustParseAddr(ip)}, Probes: []probe.Spec{spec(probe.HTTP, 80, "/x"), seldom}}
		specs, err := probe.Endpoints(pod, probe.NewDefaults().Settings(nil), Limits)
		if err != nil {
			t.Fatal(err)
		}
		return specs
	}
	request, err := probe.ParseRequest([]byte("GET /x HTTP/1.1\r\nHost: 10.0.0.7:80\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n"))
	if err != nil {
		t.Fatal(err)
	}
	for range 20 { // in whichever order
		tracker := probe.NewTracker()
		tracker.SetEndpoints(at("10.0.0.7"), 0)
		o := probe.Outcome{Port: 80, Kind: probe.HTTP, Request: request, Question: x, Event: probe.Answered, Status: 200, ObservedAt: second}
		tracker.Observe(o)
		tracker.SetEndpoints(at("10.0.0.8"), 0)
		o.ObservedAt = 2 * second
		tracker.Observe(o)
		records, err := Desired(tracker)
		if got := records[datapath.HTTPKey(80, datapath.Question(x))]; err != nil || got.FreshUntil != 12*second || len(tracker.Evidence()) != 2 {
			t.Fatalf("got %+v, %v", got, err)
		}
	}
}

// Whatever success a pod answers with must fit a reply.
func TestEverySuccessHasAReply(t *testing.T) {
	for status := 200; status < 300; status++ {
		tracker := tracker(t)
		observe(t, tracker, status, second)
		records, err := Desired(tracker)
		if err != nil {
			t.Errorf("status %d: %v", status, err)
		}
		if got := records[datapath.HTTPKey(80, datapath.Question(x))]; int(got.Status) != status {
			t.Errorf("status %d: the reply has that of %+v", status, got)
		}
	}
}

func TestEvidence(t *testing.T) {
	for _, want := range []probe.Evidence{
		{}, {Result: probe.Unknown, Status: 302, ObservedAt: 1}, {Result: probe.Failure, Status: 500, ObservedAt: 1},
		{Result: probe.Success, Status: 200, ObservedAt: 1, FreshUntil: 2},
		{Question: x, Result: probe.Success, Status: 200, ObservedAt: 1, FreshUntil: 2},
	} {
		r, err := record(probe.Endpoint{Kind: probe.HTTP}, want)
		if got := Evidence(want.Question, r); got != want || err != nil {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
	}
	if got := Evidence(x, datapath.Evidence{Result: 99}); got.Result != probe.Unknown {
		t.Errorf("a result that nobody writes is %s", got.Result)
	}
}

// drawRecords draws what Desired may return: two ports, each with a gate as its endpoints have it.
func drawRecords(t *rapid.T) Records {
	records := Records{}
	for port := uint16(80); port <= 81; port++ {
		var gate datapath.Evidence
		endpoints := rapid.IntRange(0, 3).Draw(t, "endpoints")
		for i := range endpoints {
			e := datapath.Evidence{}
			if rapid.Bool().Draw(t, "success") {
				e.Result = datapath.ResultSuccess
				e.ObservedAt = rapid.Uint64Range(1, 9).Draw(t, "observed at")
				e.FreshUntil = e.ObservedAt + rapid.Uint64Range(1, 9).Draw(t, "staleness")
			}
			own := datapath.Evidence{ObservedAt: e.ObservedAt, FreshUntil: e.FreshUntil}
			if i == endpoints-1 && rapid.Bool().Draw(t, "TCP") {
				records[datapath.TCPKey(port)], gate = e, own
				continue
			}
			records[datapath.HTTPKey(port, datapath.Question{Hash: uint64(i)})] = e
			gate.ObservedAt, gate.FreshUntil = max(gate.ObservedAt, own.ObservedAt), max(gate.FreshUntil, own.FreshUntil)
		}
		if endpoints > 0 {
			records[datapath.PortKey(port)] = gate
		}
	}
	return records
}

// Between any two steps, no gate answers a TCP probe on other evidence than its own.
func TestDiff(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		have, want := drawRecords(t), drawRecords(t)
		now := maps.Clone(have)
		for _, s := range diff(have, want) {
			if !s.remove && now[s.key] == s.record {
				if _, ok := now[s.key]; ok {
					t.Fatalf("%+v is touched and stays as it is", s.key)
				}
			}
			if s.remove {
				delete(now, s.key)
			} else {
				now[s.key] = s.record
			}
			for port := uint16(80); port <= 81; port++ {
				checkOpen(t, port, have, now, want)
			}
		}
		if !maps.Equal(now, want) {
			t.Fatalf("from %v to %v: ended at %v", have, want, now)
		}
	})
}

// checkOpen: no gate is open wider than the evidence of its port's TCP endpoint, and none opens wider before all of the
// port's records are there that will be.
func checkOpen(t *rapid.T, port uint16, have, now, want Records) {
	gate := now[datapath.PortKey(port)]
	if tcp, ok := now[datapath.TCPKey(port)]; ok && (gate.FreshUntil > tcp.FreshUntil || gate.ObservedAt > tcp.ObservedAt) {
		t.Fatalf("port %d: gate %+v while TCP is fresh until %d", port, gate, tcp.FreshUntil)
	}
	if before := have[datapath.PortKey(port)]; gate.FreshUntil <= before.FreshUntil && gate.ObservedAt <= before.ObservedAt {
		return
	}
	for key, e := range want {
		if key.Port == port && key.Kind != datapath.KindPort && now[key] != e {
			t.Fatalf("port %d: gate %+v while %+v is still to come", port, gate, key)
		}
	}
}

// oneDevice is the kernel side with one pod.
type oneDevice struct {
	*datapath.Datapath
	device datapath.DeviceKey
}

func withMaps(t *testing.T) oneDevice {
	t.Helper()
	bpftest.RequireRoot(t)
	d, err := datapath.Load()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	device, err := datapath.NewDeviceKey(1)
	if err == nil {
		err = d.AddDevice(device, 1, datapath.HookTC)
	}
	if err != nil {
		t.Fatal(err)
	}
	return oneDevice{d, device}
}

func TestSync(t *testing.T) {
	d := withMaps(t)
	http := datapath.Evidence{Result: datapath.ResultSuccess, ObservedAt: 5, FreshUntil: 9}
	if err := http.SetReply(200); err != nil {
		t.Fatal(err)
	}
	first := Records{
		datapath.HTTPKey(80, datapath.Question{Hash: 1}): http,
		datapath.PortKey(80):                             {ObservedAt: 5, FreshUntil: 9},
	}
	second := Records{
		datapath.HTTPKey(80, datapath.Question{Hash: 2}): {},
		datapath.PortKey(80):                             {},
		datapath.TCPKey(81):                              {Result: datapath.ResultFailure, ObservedAt: 7},
		datapath.PortKey(81):                             {},
	}
	pod := open(t, d)
	for _, want := range []Records{first, first, second, {}, first} {
		if err := pod.Sync(want); err != nil {
			t.Fatal(err)
		}
		// And as whoever comes next finds it.
		if !maps.Equal(pod.Records(), want) || !maps.Equal(open(t, d).Records(), want) {
			t.Errorf("got %+v; want %+v", open(t, d).Records(), want)
		}
	}
}

func TestSyncAsMuchAsFits(t *testing.T) {
	d := withMaps(t)
	full := func(first uint64) Records {
		records := Records{datapath.PortKey(80): {}}
		for i := range Limits.Records - 1 {
			records[datapath.HTTPKey(80, datapath.Question{Hash: first + uint64(i)})] = datapath.Evidence{}
		}
		return records
	}
	pod := open(t, d)
	for _, want := range []Records{full(0), full(1000)} {
		if err := pod.Sync(want); err != nil {
			t.Fatal(err)
		}
	}
}

// Records that somebody else removed are missed, not forgotten.
func TestSyncFindsRecordsGone(t *testing.T) {
	d := withMaps(t)
	pod := open(t, d)
	key := datapath.TCPKey(80)
	if err := pod.Sync(Records{key: {}}); err != nil {
		t.Fatal(err)
	}
	if err := pod.maps.Delete(key); err != nil {
		t.Fatal(err)
	}
	if err := pod.Sync(Records{key: {ObservedAt: 1}}); err == nil {
		t.Error("nothing was missed")
	}
}

func open(t *testing.T, d oneDevice) *Pod {
	t.Helper()
	pod, err := opened(d.Datapath, d.device)
	if err != nil {
		t.Fatal(err)
	}
	if pod.Device() != d.device {
		t.Fatalf("opened %+v, want %+v", pod.Device(), d.device)
	}
	return pod
}

func opened(d *datapath.Datapath, device datapath.DeviceKey) (*Pod, error) {
	maps, err := d.Pod(device)
	if err != nil {
		return nil, err
	}
	return Open(maps)
}

// What is written for a device that was attached again since reaches nobody, and is not left behind.
func TestSyncOfAnEarlierLife(t *testing.T) {
	key := datapath.TCPKey(80)
	for name, before := range map[string]Records{"a new record": {}, "one that was there": {key: {}}} {
		t.Run(name, func(t *testing.T) {
			d := withMaps(t)
			pod := open(t, d)
			if err := pod.Sync(before); err != nil {
				t.Fatal(err)
			}
			next, err := datapath.NewDeviceKey(int(d.device.Ifindex))
			if err == nil {
				err = d.AddDevice(next, 1, datapath.HookTC)
			}
			if err != nil {
				t.Fatal(err)
			}
			if err := pod.Sync(Records{key: {ObservedAt: 1}}); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("error %v", err)
			}
			if keys, err := pod.maps.Keys(); err != nil || len(keys) > 0 {
				t.Errorf("left %v, %v", keys, err)
			}
			d.device = next
			if records := open(t, d).Records(); len(records) > 0 {
				t.Errorf("the device has %+v", records)
			}
		})
	}
}
