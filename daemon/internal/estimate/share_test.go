package estimate

import (
	"math"
	"math/rand/v2"
	"net/netip"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/simulate"
)

const usually = 10 * time.Second

func get(t probe.Type, path string, period time.Duration) probe.Spec {
	return probe.Spec{
		Container: "c", Type: t, Kind: probe.HTTP, Port: 80, Path: path, Period: period, Timeout: time.Second, FailureThreshold: 3,
	}
}

func tcp(t probe.Type, period time.Duration) probe.Spec {
	s := get(t, "", period)
	s.Kind = probe.TCP
	return s
}

func defaults(staleness probe.Staleness, refresh bool) probe.Defaults {
	d := probe.NewDefaults()
	d.Staleness, d.StalenessSet = probe.StalenessRange{Short: staleness, Long: staleness}, staleness != probe.DefaultStaleness
	d.Refresh.On = refresh
	return d
}

func endpoints(t *testing.T, d probe.Defaults, live int, probes ...probe.Spec) []probe.EndpointSpec {
	t.Helper()
	pod := probe.Pod{Namespace: "n", Name: "p", IPs: []netip.Addr{netip.MustParseAddr("192.0.2.1")}, Probes: probes}
	limits := Limits
	limits.Live = live
	specs, err := probe.Endpoints(pod, d.Settings(nil), limits)
	if err != nil {
		t.Fatal(err)
	}
	return specs
}

// share returns the share of all probes that the model says is answered, and the daemon's requests per probe. The listening sockets
// allow limit connections in a row to be answered.
func share(specs []probe.EndpointSpec, limit int) (answered, refreshes float64) {
	var all float64
	for _, p := range places(specs) {
		p.limit = min(p.limit, limit)
		if p.decider < 0 {
			p.limit = unlimited
		}
		for i, share := range p.shares() {
			rate := 1 / p.askers[i].period.Seconds()
			if p.askers[i].daemon {
				refreshes += rate
				continue
			}
			all += rate
			answered += rate * share
		}
	}
	return answered / all, refreshes / all
}

func TestShares(t *testing.T) {
	patient := get(probe.Liveness, "/x", time.Second)
	patient.Timeout = 30 * time.Second
	for name, test := range map[string]struct {
		policy   Policy
		defaults probe.Defaults
		live     int
		probes   []probe.Spec
		want     float64
	}{
		"one by HTTP":               {Default, defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", usually)}, 1. / 2},
		"each second, timeout 30":   {Default, defaults(1, false), 9, []probe.Spec{patient}, 1. / 2},
		"staleness 0.5":             {Default, defaults(.5, false), 9, []probe.Spec{get(probe.Readiness, "/x", usually)}, 0},
		"staleness 5":               {Default, defaults(5, false), 9, []probe.Spec{get(probe.Readiness, "/x", usually)}, 5. / 6},
		"refresh":                   {Default, defaults(1, true), 9, []probe.Spec{get(probe.Readiness, "/x", usually)}, 1},
		"one by TCP":                {Default, defaults(1, false), 9, []probe.Spec{tcp(probe.Liveness, usually)}, 9. / 10},
		"one by TCP, queue of five": {Default, defaults(1, false), 1, []probe.Spec{tcp(probe.Liveness, usually)}, 1. / 2},
		"one by TCP, no BTF":        {Default, defaults(1, false), 0, []probe.Spec{tcp(probe.Liveness, usually)}, 1. / 2},
		"one by TCP, staleness 5":   {Default, defaults(5, false), 9, []probe.Spec{tcp(probe.Liveness, usually)}, 5. / 6},
		// Of two probes with a period of 10 s and a timeout of 1 s a fifth begin within a second of each other.
		"one path": {Default, defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", usually), get(probe.Liveness, "/x", usually)},
			.8*2/3 + .2*3/4},
		"two paths":          {Default, defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", usually), get(probe.Liveness, "/y", usually)}, 1. / 2},
		"startup probes end": {Default, defaults(1, false), 9, []probe.Spec{get(probe.Startup, "/x", time.Second), get(probe.Liveness, "/x", usually)}, 1. / 2},
		// Each HTTP probe that reaches the pod shows that it accepts connections, so TCP probes are nearly always answered.
		"HTTP and TCP each second": {Default, defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", time.Second), tcp(probe.Liveness, time.Second)}, 3. / 4},
		"traffic":                  {Traffic, defaults(1, false), 9, []probe.Spec{get(probe.Liveness, "/x", usually)}, 9. / 10},
		"traffic, two paths": {Traffic, defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", usually), get(probe.Liveness, "/y", usually)},
			(1./2 + 9./10) / 2},
		"traffic, one path": {Traffic, defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", usually), get(probe.Liveness, "/x", usually)},
			.8*2/3 + .2*3/4},
	} {
		t.Run(name, func(t *testing.T) {
			if test.policy == Traffic {
				test.defaults.Liveness = probe.LivenessByTraffic
			}
			got, _ := share(endpoints(t, test.defaults, test.live, test.probes...), unlimited)
			if math.Abs(got-test.want) > .01 {
				t.Errorf("%.4f answered, want %.4f", got, test.want)
			}
		})
	}
}

// queues says how many answers in a row the queues of the simulation's servers allow.
var queues = []int{0, 1, 1, 2, 9}

// The model says what simulated pods do while they are well.
func TestSharesAreTheSimulations(t *testing.T) {
	one, two := time.Second, 3*time.Second
	sidecar := tcp(probe.Liveness, usually)
	sidecar.Container = "sidecar"
	traffic := defaults(1, false)
	traffic.Liveness = probe.LivenessByTraffic
	for name, test := range map[string]struct {
		defaults probe.Defaults
		live     int
		probes   []probe.Spec
	}{
		"one by HTTP":                       {defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", usually)}},
		"one by HTTP, each second":          {defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", one)}},
		"one path":                          {defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", usually), get(probe.Liveness, "/x", usually)}},
		"one path, each second":             {defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", one), get(probe.Liveness, "/x", one)}},
		"one path, periods of 3 and 10":     {defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", two), get(probe.Liveness, "/x", usually)}},
		"two paths, periods of 3 and 10":    {defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", two), get(probe.Liveness, "/y", usually)}},
		"staleness 5, periods of 3 and 10":  {defaults(5, false), 9, []probe.Spec{get(probe.Readiness, "/x", two), get(probe.Liveness, "/x", usually)}},
		"refresh, one path":                 {defaults(1, true), 9, []probe.Spec{get(probe.Readiness, "/x", usually), get(probe.Liveness, "/x", usually)}},
		"refresh, staleness 5":              {defaults(5, true), 9, []probe.Spec{get(probe.Readiness, "/x", usually)}},
		"one by TCP":                        {defaults(1, false), 9, []probe.Spec{tcp(probe.Liveness, usually)}},
		"one by TCP, no BTF":                {defaults(1, false), 0, []probe.Spec{tcp(probe.Liveness, usually)}},
		"one by TCP, staleness 5":           {defaults(5, false), 9, []probe.Spec{tcp(probe.Liveness, usually)}},
		"HTTP and TCP":                      {defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", usually), tcp(probe.Liveness, usually)}},
		"HTTP and TCP, periods of 3 and 10": {defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", two), tcp(probe.Liveness, usually)}},
		"HTTP on two paths and TCP":         {defaults(1, false), 9, []probe.Spec{get(probe.Readiness, "/x", usually), get(probe.Liveness, "/y", usually), sidecar}},
		"liveness by HTTP, traffic":         {traffic, 9, []probe.Spec{get(probe.Liveness, "/x", usually)}},
		"liveness by both, traffic":         {traffic, 9, []probe.Spec{get(probe.Liveness, "/x", usually), sidecar}},
		"TCP by traffic, HTTP not":          {traffic, 9, []probe.Spec{get(probe.Readiness, "/x", usually), tcp(probe.Liveness, usually)}},
		"HTTP and TCP, traffic":             {traffic, 9, []probe.Spec{get(probe.Liveness, "/x", usually), tcp(probe.Readiness, usually)}},
		"HTTP and TCP, refresh":             {defaults(1, true), 9, []probe.Spec{get(probe.Readiness, "/x", usually), tcp(probe.Liveness, usually)}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			var want, refreshes float64
			specs := endpoints(t, test.defaults, test.live, test.probes...)
			for _, limit := range queues {
				if test.live == 0 {
					limit = unlimited
				}
				w, r := share(specs, limit)
				want, refreshes = want+w/float64(len(queues)), refreshes+r/float64(len(queues))
			}
			got := simulated(simulate.Config{Probes: test.probes, Live: test.live, Defaults: test.defaults, Clients: time.Second})
			if math.Abs(want-got.HitRate()) > .02 {
				t.Errorf("%.4f answered, simulated %.4f", want, got.HitRate())
			}
			if simulated := float64(got.Refreshes) / float64(got.Probes); math.Abs(refreshes-simulated) > .1*max(refreshes, simulated) {
				t.Errorf("%.3f refreshes per probe, simulated %.3f", refreshes, simulated)
			}
		})
	}
}

// each is how many pods are simulated with each queue.
const each = 2

func total(counts map[int]int) (n int) {
	for _, c := range counts {
		n += c
	}
	return n
}

// simulated simulates pods with each of the queues, and adds what was counted.
func simulated(c simulate.Config) (sum simulate.Result) {
	var one sync.Mutex
	var all sync.WaitGroup
	slots := make(chan struct{}, runtime.GOMAXPROCS(0))
	c.Duration = unlimited
	for _, p := range c.Probes {
		c.Duration = min(c.Duration, 5000*p.Period)
	}
	wanted := map[int]int{}
	for seed := uint64(1); total(wanted) < each*len(queues); seed++ {
		// The length of a server's queue is the first that is drawn.
		limit := rand.New(rand.NewPCG(seed, 1)).IntN(len(queues))
		if wanted[limit] == each {
			continue
		}
		wanted[limit]++
		pod := c
		pod.Seed = seed
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			r := simulate.Run(pod)
			one.Lock()
			defer one.Unlock()
			sum.Probes, sum.HealthyProbes = sum.Probes+r.Probes, sum.HealthyProbes+r.HealthyProbes
			sum.HealthyAnswered, sum.Refreshes = sum.HealthyAnswered+r.HealthyAnswered, sum.Refreshes+r.Refreshes
		})
	}
	all.Wait()
	return sum
}
