package store

import (
	"fmt"
	"maps"
	"path/filepath"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
)

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

func observe(t testing.TB, tracker *probe.Tracker, key datapath.EndpointKey, event uint8, status uint16, at uint64) {
	t.Helper()
	o, ok := Outcome(datapath.Outcome{
		Port: key.Port, Kind: key.Kind, PathHash: key.PathHash, Event: event, Status: status, ObservedAt: at,
	}, tracker.Endpoints())
	if !ok {
		t.Fatalf("%+v is taken for no endpoint's", key)
	}
	tracker.Observe(o)
}

func TestOutcome(t *testing.T) {
	endpoints := tracker(t).Endpoints()
	for name, test := range map[string]struct {
		outcome datapath.Outcome
		want    probe.Outcome
		ok      bool
	}{
		"status": {
			datapath.Outcome{ObservedAt: 5, Duration: 7, PathHash: datapath.PathHash("/x"), Port: 80, Status: 204,
				Kind: datapath.KindHTTP, Event: datapath.EventStatus},
			probe.Outcome{Endpoint: probe.Endpoint{Port: 80, Kind: probe.HTTP, Path: "/x"}, Event: probe.Answered,
				Status: 204, ObservedAt: 5, Duration: 7}, true},
		"connected": {
			datapath.Outcome{Port: 81, Kind: datapath.KindTCP, Event: datapath.EventConnected},
			probe.Outcome{Endpoint: probe.Endpoint{Port: 81, Kind: probe.TCP}, Event: probe.Connected}, true},
		"whole port": {
			datapath.Outcome{Port: 80, Kind: datapath.KindPort, Event: datapath.EventReset},
			probe.Outcome{Endpoint: probe.Endpoint{Port: 80}, Event: probe.Reset}, true},
		"no answer": {
			datapath.Outcome{Port: 81, Kind: datapath.KindPort, Event: datapath.EventNoAnswer},
			probe.Outcome{Endpoint: probe.Endpoint{Port: 81}, Event: probe.NoAnswer}, true},
		"another path": {outcome: datapath.Outcome{PathHash: datapath.PathHash("/y"), Port: 80, Kind: datapath.KindHTTP}},
		"another port": {outcome: datapath.Outcome{Port: 82, Kind: datapath.KindTCP}},
		"not observed": {outcome: datapath.Outcome{Port: 443, Kind: datapath.KindPort, Event: datapath.EventReset}},
	} {
		t.Run(name, func(t *testing.T) {
			got, ok := Outcome(test.outcome, endpoints)
			if ok != test.ok || ok && got != test.want {
				t.Errorf("got %+v, %v; want %+v, %v", got, ok, test.want, test.ok)
			}
		})
	}
}

func TestDesired(t *testing.T) {
	tracker := tracker(t)
	x := datapath.HTTPKey(80, "/x")
	want := Records{
		x: {}, datapath.TCPKey(80): {}, datapath.TCPKey(81): {}, datapath.PortKey(80): {}, datapath.PortKey(81): {},
	}
	check := func() {
		t.Helper()
		got, err := Desired(tracker)
		if err != nil || !maps.Equal(got, want) {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
	}
	check() // unknown, but there: the kernel does not observe what it has no record of

	observe(t, tracker, x, datapath.EventStatus, 204, 100*second)
	http := datapath.Evidence{Result: datapath.ResultSuccess, ObservedAt: 100 * second, FreshUntil: 111 * second}
	if err := http.SetReply(204); err != nil {
		t.Fatal(err)
	}
	want[x] = http
	check() // the port is closed as long as its TCP endpoint is unknown

	observe(t, tracker, datapath.TCPKey(80), datapath.EventConnected, 0, 101*second)
	want[datapath.TCPKey(80)] = datapath.Evidence{Result: datapath.ResultSuccess, ObservedAt: 101 * second, FreshUntil: 112 * second}
	want[datapath.PortKey(80)] = datapath.Evidence{ObservedAt: 100 * second, FreshUntil: 111 * second}
	check()

	observe(t, tracker, x, datapath.EventStatus, 500, 102*second)
	want[x] = datapath.Evidence{Result: datapath.ResultFailure, Status: 500, ObservedAt: 102 * second}
	want[datapath.PortKey(80)] = datapath.Evidence{}
	check()
}

// Whatever success a pod answers with must fit a reply.
func TestEverySuccessHasAReply(t *testing.T) {
	for status := uint16(200); status < 300; status++ {
		tracker := tracker(t)
		observe(t, tracker, datapath.HTTPKey(80, "/x"), datapath.EventStatus, status, second)
		records, err := Desired(tracker)
		if err != nil {
			t.Errorf("status %d: %v", status, err)
		}
		if got := records[datapath.HTTPKey(80, "/x")]; got.ReplyLen == 0 || got.Status != status {
			t.Errorf("status %d: no reply in %+v", status, got)
		}
	}
}

func TestEvidence(t *testing.T) {
	for _, want := range []probe.Evidence{
		{}, {Result: probe.Unknown, Status: 302, ObservedAt: 1}, {Result: probe.Failure, Status: 500, ObservedAt: 1},
		{Result: probe.Success, Status: 200, ObservedAt: 1, FreshUntil: 2},
	} {
		r, err := record(probe.Endpoint{Kind: probe.HTTP}, want)
		if got := Evidence(r); got != want || err != nil {
			t.Errorf("got %+v, %v; want %+v", got, err, want)
		}
	}
	if got := Evidence(datapath.Evidence{Result: 99}); got.Result != probe.Unknown {
		t.Errorf("a result that nobody writes is %s", got.Result)
	}
}

// drawRecords draws what Desired may return: two ports, each with a gate of what its endpoints say.
func drawRecords(t *rapid.T) Records {
	records := Records{}
	for port := uint16(80); port <= 81; port++ {
		gate := datapath.Evidence{ObservedAt: ^uint64(0), FreshUntil: ^uint64(0)}
		endpoints := rapid.IntRange(0, 3).Draw(t, "endpoints")
		for i := range endpoints {
			e := datapath.Evidence{}
			if rapid.Bool().Draw(t, "success") {
				e.Result = datapath.ResultSuccess
				e.ObservedAt = rapid.Uint64Range(1, 9).Draw(t, "observed at")
				e.FreshUntil = e.ObservedAt + rapid.Uint64Range(1, 9).Draw(t, "staleness")
			}
			records[datapath.HTTPKey(port, fmt.Sprint(i))] = e
			gate.ObservedAt = min(gate.ObservedAt, e.ObservedAt)
			gate.FreshUntil = min(gate.FreshUntil, e.FreshUntil)
		}
		if endpoints > 0 {
			if gate.FreshUntil == 0 {
				gate = datapath.Evidence{}
			}
			records[datapath.PortKey(port)] = gate
		}
	}
	return records
}

// Between any two steps, a gate lets no connection through that an endpoint of its port could not answer: one that was
// there before, or comes.
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

// checkOpen: no gate is open wider than what is on its port, and none opens before all is there that will be.
func checkOpen(t *rapid.T, port uint16, have, now, want Records) {
	gate := now[datapath.PortKey(port)]
	for key, e := range now {
		isEndpoint := key.Port == port && key.Kind != datapath.KindPort
		if isEndpoint && (gate.FreshUntil > e.FreshUntil || gate.ObservedAt > e.ObservedAt) {
			t.Fatalf("port %d: gate until %d while %+v is fresh until %d", port, gate.FreshUntil, key, e.FreshUntil)
		}
	}
	if gate.FreshUntil <= have[datapath.PortKey(port)].FreshUntil {
		return
	}
	for key := range want {
		if _, there := now[key]; !there && key.Port == port && key.Kind != datapath.KindPort {
			t.Fatalf("port %d: gate until %d while %+v is still to come", port, gate.FreshUntil, key)
		}
	}
}

// withMaps returns the maps of a pod behind device 1.
// pinned is the kernel side with one pod, of device 1.
type pinned struct {
	*datapath.Datapath
	pins string // where its maps are pinned
}

func opened(pins string) (*Pod, error) {
	maps, err := datapath.OpenPod(pins)
	if err != nil {
		return nil, err
	}
	return Open(maps)
}

func withMaps(t *testing.T) pinned {
	t.Helper()
	bpftest.RequireRoot(t)
	d, err := datapath.Load()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	pod, err := d.NewPod()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pod.Close() })
	if err := d.AddPod(1, 1, pod); err != nil {
		t.Fatal(err)
	}
	pins := filepath.Dir(bpftest.BPFDir(t))
	if err := pod.Pin(pins); err != nil {
		t.Fatal(err)
	}
	return pinned{d, pins}
}

func TestSync(t *testing.T) {
	d := withMaps(t)
	http := datapath.Evidence{Result: datapath.ResultSuccess, ObservedAt: 5, FreshUntil: 9}
	if err := http.SetReply(200); err != nil {
		t.Fatal(err)
	}
	first := Records{
		datapath.HTTPKey(80, "/x"): http,
		datapath.PortKey(80):       {ObservedAt: 5, FreshUntil: 9},
	}
	second := Records{
		datapath.HTTPKey(80, "/y"): {},
		datapath.PortKey(80):       {},
		datapath.TCPKey(81):        {Result: datapath.ResultFailure, ObservedAt: 7},
		datapath.PortKey(81):       {},
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
	full := func(prefix string) Records {
		records := Records{datapath.PortKey(80): {}}
		for i := range Limits.Records - 1 {
			records[datapath.HTTPKey(80, fmt.Sprint(prefix, i))] = datapath.Evidence{}
		}
		return records
	}
	pod := open(t, d)
	for _, want := range []Records{full("/a"), full("/b")} {
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

func open(t *testing.T, d pinned) *Pod {
	t.Helper()
	pod, err := opened(d.pins)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = pod.Close() })
	if ids, err := d.PodIDs(); err != nil || ids[1] != pod.IDs() {
		t.Fatalf("ids %+v, the programs use %+v, %v", pod.IDs(), ids, err)
	}
	return pod
}
