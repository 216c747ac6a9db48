package simulate

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"sync"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// Scenario describes a kind of pod.
type Scenario struct {
	Name string
	// Expected is the computed share of probes of healthy servers that are answered; 0 if not computed. Demanded is the
	// least share that passes.
	Expected, Demanded float64
	// Why explains how Expected was computed.
	Why string

	config Config
	draw   func(seed uint64) []probe.Spec // draws the probes instead of using the config's
}

// Run simulates pods concurrently. done, if not nil, is called after each, never concurrently.
func (s Scenario) Run(pods int, d time.Duration, seed uint64, done func()) Result {
	results := make([]Result, pods)
	next := make(chan int)
	var workers sync.WaitGroup
	var one sync.Mutex
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for i := range next {
				c := s.config
				c.Duration, c.Seed = d, seed<<32+uint64(i)
				if s.draw != nil {
					c.Probes = s.draw(c.Seed)
				}
				results[i] = Run(c)
				if done != nil {
					one.Lock()
					done()
					one.Unlock()
				}
			}
		})
	}
	for i := range pods {
		next <- i
	}
	close(next)
	workers.Wait()
	var all Result
	for _, r := range results {
		all.add(r)
	}
	return all
}

func get(container string, t probe.Type, port uint16, path string, period time.Duration) probe.Spec {
	return probe.Spec{
		Container: container, Type: t, Kind: probe.HTTP, Port: port, Path: path,
		Period: period, Timeout: time.Second, FailureThreshold: 3,
	}
}

func tcp(container string, t probe.Type, port uint16, period time.Duration) probe.Spec {
	s := get(container, t, port, "", period)
	s.Kind = probe.TCP
	return s
}

const usually = 10 * time.Second // Kubernetes' default period

func with(staleness string, refresh bool) probe.Defaults {
	d := probe.NewDefaults()
	if err := d.Staleness.UnmarshalText([]byte(staleness)); err != nil {
		panic(err)
	}
	d.StalenessSet = d.Staleness != probe.NewDefaults().Staleness
	d.Refresh.On = refresh
	return d
}

const (
	// live is the maximum number of consecutive TCP probes that the kernel side answers (datapath.MaxAnswers).
	live = 9
	// mostByTraffic is the maximum number of consecutive probes that it answers by traffic (datapath.MaxTrafficAnswers).
	mostByTraffic = 9
)

var (
	lone = []probe.Spec{get("c", probe.Readiness, 80, "/x", usually)}
	pair = []probe.Spec{get("c", probe.Readiness, 80, "/x", usually), get("c", probe.Liveness, 80, "/x", usually)}
	own  = []probe.Spec{get("c", probe.Readiness, 80, "/x", usually), get("c", probe.Liveness, 80, "/y", usually)}
	both = []probe.Spec{get("c", probe.Readiness, 80, "/x", usually), tcp("c", probe.Liveness, 80, usually)}
)

// Of two probes with a period of 10 s and a timeout of 1 s, a fifth begin within a second of each other.
const twoOfThree = 0.8*2/3 + 0.2*3/4

// oneTCP is the mean over limits.
const oneTCP = (0. + 1./2 + 1./2 + 2./3 + 9./10) / 5

// Scenarios returns the scenarios of the table.
func Scenarios() []Scenario {
	const usual = "1"
	scenario := func(name string, expected, demanded float64, why, staleness string, refresh bool, probes ...probe.Spec) Scenario {
		return Scenario{
			Name: name, Expected: expected, Demanded: demanded, Why: why,
			config: Config{Probes: probes, Live: live, Defaults: with(staleness, refresh)},
		}
	}
	changed := func(s Scenario, change func(*Config)) Scenario {
		change(&s.config)
		return s
	}
	threeSuccesses := get("c", probe.Readiness, 80, "/x", usually)
	threeSuccesses.SuccessThreshold = 3
	patient := get("c", probe.Liveness, 80, "/x", time.Second)
	patient.Timeout = 30 * time.Second
	authorized := get("c", probe.Liveness, 80, "/x", usually)
	authorized.Headers = []probe.Header{{Name: "X-Auth", Value: "yes"}}
	starting := get("c", probe.Startup, 80, "/x", time.Second)
	strangers := func(s Scenario, asks probe.Spec) Scenario {
		asks.Period = 3 * time.Second
		return changed(s, func(c *Config) { c.Strangers = []probe.Spec{asks} })
	}
	traffic := func(s Scenario, clients time.Duration) Scenario {
		return changed(s, func(c *Config) { c.Defaults.Liveness, c.Clients = probe.LivenessByTraffic, clients })
	}
	const nineOfTen = 9. / 10
	return []Scenario{
		scenario("one probe", 1./2, .49, "one observed, the next answered", usual, false, lone...),
		scenario("one TCP probe", oneTCP, .45, "K answered between two observed: 0, 1, 1, 2 or 9, depending on the length of the queue", usual, false,
			tcp("c", probe.Liveness, 80, usually)),
		changed(scenario("one TCP probe, listening sockets not inspected", 1./2, .49, "as with HTTP", usual, false,
			tcp("c", probe.Liveness, 80, usually)), func(c *Config) { c.Live = 0 }),
		scenario("readiness + liveness, one path", twoOfThree, .66,
			"two of three answered; three of four for the fifth of pods whose two probes begin within a timeout of each other", usual, false, pair...),
		scenario("readiness + liveness, two paths", 1./2, .49, "each as if it were alone", usual, false, own...),
		scenario("readiness + liveness, one path, other headers", 1./2, .49, "likewise", usual, false, lone[0], authorized),
		strangers(scenario("one probe, plus another pod's with host: and headers", 1./2, .49, "likewise", usual, false, lone...), authorized),
		strangers(scenario("one probe with headers, plus another pod's with host: only", 1./2, .49, "likewise", usual, false, authorized), lone[0]),
		strangers(scenario("one probe, plus another pod's with host: asking the same", 0, .88,
			"not computed: the first probe after 11 s is observed, and the other pod probes three times as often", usual, false, lone...), lone[0]),
		changed(scenario("one probe, a sidecar owns the listening socket", 1./2, .49, "likewise", usual, false, lone...),
			func(c *Config) { c.Sidecar = true }),
		scenario("one probe, successThreshold 3", 1./2, .48, "likewise, after three in a row were observed", usual, false, threeSuccesses),
		scenario("one probe every second, timeout 30 s", 1./2, .49, "the slack is half a second", usual, false, patient),
		scenario("HTTP readiness + TCP liveness, one port", 0, .35,
			"not computed: K counts both, so a short queue limits HTTP too", usual, false, both...),
		scenario("startup + readiness + liveness, one path", twoOfThree, .66, "startup probes end", usual, false,
			append([]probe.Spec{get("c", probe.Startup, 80, "/x", usually)}, pair...)...),
		scenario("startup every second + liveness, one path", 1./2, .49, "startup probes end, and then their period no longer counts", usual, false,
			starting, get("c", probe.Liveness, 80, "/x", usually)),
		scenario("startup every second + readiness with successThreshold 3, one path", 1./2, .48, "likewise", usual, false,
			starting, threeSuccesses),
		scenario("startup every second + liveness, one path, refresh", 1, .99, "likewise", usual, true,
			starting, get("c", probe.Liveness, 80, "/x", usually)),
		scenario("two containers", twoOfThree, .66, "each as if it were alone", usual, false,
			get("c", probe.Readiness, 80, "/x", usually), get("c", probe.Liveness, 80, "/x", usually),
			get("d", probe.Readiness, 81, "/x", usually), get("d", probe.Liveness, 81, "/x", usually)),
		{
			Name: "one to six probes, periods of 1 to 30 s", config: Config{Live: live, Defaults: with(usual, false)}, draw: drawProbes,
			Why: "not computed: random kinds, paths, periods, timeouts and thresholds",
		},
		traffic(scenario("liveness, traffic, a client each second", nineOfTen, .88, "every tenth probe is real", usual, false,
			get("c", probe.Liveness, 80, "/x", usually)), time.Second),
		traffic(scenario("liveness, traffic, no client", 1./2, .49, "as without traffic", usual, false,
			get("c", probe.Liveness, 80, "/x", usually)), 0),
		traffic(scenario("liveness each second, traffic, a client each second", 0, .80, "not computed: a client may be later than the probe", usual, false,
			get("c", probe.Liveness, 80, "/x", time.Second)), time.Second),
		traffic(scenario("liveness by TCP, traffic, a client each second", nineOfTen, .88, "every tenth probe is real", usual, false,
			tcp("c", probe.Liveness, 80, usually)), time.Second),
		traffic(scenario("readiness + liveness, two paths, traffic, a client each second", (1./2+nineOfTen)/2, .68,
			"readiness every second time, liveness nine times of ten", usual, false, own...), time.Second),
		traffic(changed(scenario("liveness, traffic, a proxy in the pod that listens for it", nineOfTen, .88, "likewise", usual, false,
			get("c", probe.Liveness, 80, "/x", usually)), func(c *Config) { c.Sidecar = true }), time.Second),
		scenario("one probe, staleness 1 to 5", 0, .65, "not computed: one observed, one answered, and five of six once it has been well for ten minutes", "1-5", false, lone...),
		scenario("one probe, staleness 5", 5./6, .82, "one observed, five answered", "5", false, lone...),
		scenario("one probe, refresh", 1, .99, "all but the first after a failure", usual, true, lone...),
		scenario("one probe, refresh, staleness 5", 1, .99, "likewise", "5", true, lone...),
		scenario("readiness + liveness, two paths, refresh", 1, .99, "likewise", usual, true, own...),
		scenario("HTTP readiness + TCP liveness, one port, refresh", 0, .50,
			"not computed: with each request, K answers are allowed again", usual, true, both...),
		{
			Name: "one to six probes, refresh", config: Config{Live: live, Defaults: with(usual, true)}, draw: drawProbes,
			Why: "not computed: random as above",
		},
	}
}

// Sweep returns the scenarios of the plot: staleness from 0.5 to 5 periods.
func Sweep() []Scenario {
	var all []Scenario
	for _, kind := range []struct {
		name    string
		probes  []probe.Spec
		refresh bool
	}{{"one probe", lone, false}, {"readiness + liveness, one path", pair, false}, {"one probe, refresh", lone, true}} {
		for half := 1; half <= 10; half++ {
			staleness := fmt.Sprintf("%g", float64(half)/2)
			all = append(all, Scenario{
				Name: kind.name, Why: staleness, config: Config{Probes: kind.probes, Live: live, Defaults: with(staleness, kind.refresh)},
			})
		}
	}
	return all
}

// drawProbes draws the probes of a pod: one or two containers, each with its own port.
func drawProbes(seed uint64) []probe.Spec {
	rng := rand.New(rand.NewPCG(seed, 2))
	types := []probe.Type{probe.Readiness, probe.Liveness, probe.Startup}
	var specs []probe.Spec
	for _, container := range []string{"c", "d"}[:1+rng.IntN(2)] {
		port := uint16(80)
		if container == "d" {
			port = 81
		}
		for _, t := range types[:1+rng.IntN(3)] {
			s := get(container, t, port, []string{"/x", "/y"}[rng.IntN(2)], time.Duration(1+rng.IntN(30))*time.Second)
			if rng.IntN(4) == 0 {
				s = tcp(container, t, port, s.Period)
			}
			s.Timeout = time.Duration(1+rng.IntN(5)) * time.Second
			s.FailureThreshold = 1 + rng.IntN(4)
			if t == probe.Readiness {
				s.SuccessThreshold = 1 + rng.IntN(3)
			}
			specs = append(specs, s)
		}
	}
	return specs
}
