package refresh

import (
	"fmt"
	"net/netip"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// world runs a schedule in simulated time.
type world struct {
	*schedule
	now   uint64
	began map[*job][]uint64
}

func newWorld() *world {
	return &world{newSchedule(), uint64(time.Hour + 10*time.Millisecond), map[*job][]uint64{}}
}

func (w *world) targets(pod, n int, interval, timeout time.Duration) attach.ID {
	id := attach.ID{ContainerID: fmt.Sprint(pod)}
	var all []Target
	for i := range n {
		t := target(netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, 0, byte(pod)}), 80), fmt.Sprintf("/%d", i))
		t.Interval, t.Timeout = interval, timeout
		all = append(all, t)
	}
	w.set(id, all, w.now)
	return id
}

// run lets time pass. A job's request takes as long as took returns, but at most its timeout.
func (w *world) run(length time.Duration, took func(*job) time.Duration) {
	for end := w.now + uint64(length); len(w.due) > 0 && w.due[0].at < end; {
		w.now = max(w.now, w.due[0].at)
		for j := w.next(w.now); j != nil; j = w.next(w.now) {
			if began := w.began[j]; len(began) > 0 && began[len(began)-1] == j.began {
				w.end(j, w.now)
				continue
			}
			w.began[j] = append(w.began[j], w.now)
			w.plan(j, w.now+uint64(min(took(j), j.Timeout)))
		}
	}
}

func (w *world) of(id attach.ID) (began [][]uint64) {
	for j, all := range w.began {
		if j.pod.id == id {
			began = append(began, all)
		}
	}
	return began
}

// However often the pods are to be asked, and however slow they are: no pod exceeds its limits of connections and of
// their rate, and a pod within these limits is asked when it is due, whatever the others do.
func TestLimitsArePerPod(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		const length = 20 * time.Second
		slow := map[attach.ID]time.Duration{}
		for pod := range rapid.IntRange(1, 6).Draw(t, "greedy pods") {
			id := w.targets(pod, rapid.IntRange(1, 64).Draw(t, "endpoints"), 100*time.Millisecond, 5*time.Second)
			slow[id] = rapid.SampledFrom([]time.Duration{0, time.Millisecond, time.Second, time.Minute}).Draw(t, "takes")
		}
		modest := w.targets(100, 2, time.Second, time.Second)
		w.run(length, func(j *job) time.Duration {
			if open := j.pod.open; open > podConnections {
				t.Fatalf("%d connections to one pod", open)
			}
			return slow[j.pod.id]
		})
		for id := range slow {
			n := 0
			for _, began := range w.of(id) {
				n += len(began)
			}
			if most := int(length/podApart) + podConnections; n > most {
				t.Errorf("a pod was asked %d times, want at most %d", n, most)
			}
		}
		for _, began := range w.of(modest) {
			for i := range began[1:] {
				// After a late one, the next is in its slot again.
				if late := time.Duration(began[i+1]-began[i]) - time.Second; late <= -longestSlot || late > podApart {
					t.Errorf("a modest pod was asked %s late", late)
				}
			}
			if len(began) < int(length/time.Second)-1 {
				t.Errorf("a modest pod was asked %d times", len(began))
			}
		}
	})
}

// The endpoints of a pod within its limits are asked once per interval, however many there are.
func TestEndpointsOfOnePod(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		n := rapid.IntRange(1, 10).Draw(t, "endpoints")
		interval := time.Duration(rapid.IntRange(1000, 3000).Draw(t, "interval in ms")) * time.Millisecond
		took := time.Duration(rapid.IntRange(1, 200).Draw(t, "takes, in ms")) * time.Millisecond
		id := w.targets(1, n, interval, time.Second)
		const rounds = 30
		w.run(rounds*interval, func(*job) time.Duration { return took })
		for _, began := range w.of(id) {
			if len(began) < rounds-1 || len(began) > rounds+1 {
				t.Errorf("%d requests in %d intervals", len(began), rounds)
			}
			for i := range began[1:] {
				// By default a success stays valid for half a period after the next request is due.
				if late := time.Duration(began[i+1]-began[i]) - interval; late+took > interval/2 {
					t.Errorf("%s late: expired before it was renewed", late)
				}
			}
		}
	})
}

// All endpoints of a pod that exceeds its limits are asked, in turn.
func TestGreedyPodServesAllItsEndpoints(t *testing.T) {
	w := newWorld()
	id := w.targets(1, 64, 100*time.Millisecond, time.Second)
	w.run(time.Minute, func(*job) time.Duration { return time.Millisecond })
	all := w.of(id)
	if len(all) != 64 {
		t.Fatalf("%d of 64 endpoints were asked", len(all))
	}
	for _, began := range all {
		if len(began) < 10 {
			t.Errorf("an endpoint was asked %d times in a minute", len(began))
		}
	}
}

// Requests to different pods begin together, so the goroutine wakes up a few times per interval, however many pods there are. None
// is later for it.
func TestPodsShareSlots(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		w := newWorld()
		interval := time.Duration(rapid.IntRange(100, 10_000).Draw(t, "interval in ms")) * time.Millisecond
		for pod := range 50 {
			w.targets(pod, 1, interval, time.Second)
		}
		const rounds = 10
		w.run(rounds*interval, func(*job) time.Duration { return time.Millisecond })
		wakeups := map[uint64]bool{}
		for _, began := range w.began {
			for i, at := range began {
				wakeups[at] = true
				if i > 0 && at-began[i-1] > uint64(interval) {
					t.Errorf("asked again after %s, not %s", time.Duration(at-began[i-1]), interval)
				}
			}
		}
		slots := int(uint64(interval) / Target{Interval: interval}.slotLength())
		if most := rounds * (slots + 2); len(wakeups) > most {
			t.Errorf("%d wake-ups, want at most %d", len(wakeups), most)
		}
	})
}

// So do requests to one pod, as far as its rate allows.
func TestEndpointsShareSlots(t *testing.T) {
	const pods, endpoints, rounds = 20, 4, 10
	w := newWorld()
	for pod := range pods {
		w.targets(pod, endpoints, time.Second, time.Second)
	}
	w.run(rounds*time.Second, func(*job) time.Duration { return time.Millisecond })
	wakeups := map[uint64]bool{}
	for _, began := range w.began {
		for _, at := range began {
			wakeups[at] = true
		}
	}
	slots := int(time.Second / longestSlot)
	if most := (rounds + 1) * slots; len(wakeups) > most {
		t.Errorf("%d wake-ups, want at most %d", len(wakeups), most)
	}
}

// A healthy pod stays fresh throughout, whatever the staleness, and is asked no more than once per interval.
func TestAlwaysFresh(t *testing.T) {
	for _, staleness := range []string{"0.5", "1", "2", "5"} {
		t.Run(staleness, func(t *testing.T) { alwaysFresh(t, staleness) })
	}
}

func alwaysFresh(t *testing.T, staleness string) {
	const period, timeout, took = 10 * time.Second, time.Second, 300 * time.Millisecond
	defaults := probe.NewDefaults()
	defaults.Refresh.On = true
	settings := defaults.Settings(map[string]string{probe.AnnotationStaleness: staleness})
	specs, err := probe.Endpoints(probe.Pod{IPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Probes: []probe.Spec{{
		Container: "c", Type: probe.Readiness, Kind: probe.HTTP, Port: 80, Path: "/x", Period: period, Timeout: timeout,
	}}}, settings, probe.Limits{Request: 1024, Records: 64})
	if err != nil || settings.Problem != "" {
		t.Fatal(err, settings.Problem)
	}
	w := newWorld()
	id := w.targets(1, 1, specs[0].Refresh, specs[0].Timeout)
	freshUntil := w.now + uint64(specs[0].Staleness)
	const length = 10 * time.Minute
	w.run(length, func(*job) time.Duration { return took })
	began := w.of(id)[0]
	for _, at := range began {
		if known := at + uint64(took); known > freshUntil {
			t.Fatalf("expired for %s", time.Duration(known-freshUntil))
		}
		freshUntil = at + uint64(specs[0].Staleness)
	}
	if most := int(length/specs[0].Refresh) + 1; len(began) > most {
		t.Errorf("%d connections, want at most %d", len(began), most)
	}
}
