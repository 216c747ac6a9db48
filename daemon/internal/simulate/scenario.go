package simulate

import (
	"fmt"
	"math/rand/v2"
	"runtime"
	"slices"
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

// scenario returns a scenario with a staleness of 1, without refresh and without clients.
func scenario(name string, expected, demanded float64, why string, probes ...probe.Spec) Scenario {
	s := Scenario{
		Name: name, Expected: expected, Demanded: demanded, Why: why,
		config: Config{Probes: probes, Live: live, Defaults: probe.NewDefaults()},
	}
	return s.staleness("1")
}

func (s Scenario) staleness(periods string) Scenario {
	d := &s.config.Defaults
	if err := d.Staleness.UnmarshalText([]byte(periods)); err != nil {
		panic(err)
	}
	d.StalenessSet = d.Staleness != probe.NewDefaults().Staleness
	return s
}

func (s Scenario) refresh() Scenario {
	s.config.Defaults.Refresh.On = true
	return s
}

// traffic makes traffic evidence for liveness probes, with clients that send requests at that interval.
func (s Scenario) traffic(clients time.Duration) Scenario {
	s.config.Defaults.Liveness, s.config.Clients = probe.LivenessByTraffic, clients
	return s
}

func (s Scenario) sidecar() Scenario {
	s.config.Sidecar = true
	return s
}

// stranger adds another pod's probe with host: set to this pod, three times as often.
func (s Scenario) stranger(asks probe.Spec) Scenario {
	asks.Period = 3 * time.Second
	s.config.Strangers = []probe.Spec{asks}
	return s
}

// uninspected describes a kernel that cannot inspect listening sockets.
func (s Scenario) uninspected() Scenario {
	s.config.Live = 0
	return s
}

func (s Scenario) randomProbes() Scenario {
	s.draw = drawProbes
	return s
}

// Scenarios returns the scenarios of the table, in its order: Why may refer to the one above ("likewise").
func Scenarios() []Scenario {
	return slices.Concat(probeScenarios(), trafficScenarios(), policyScenarios())
}

// probeScenarios differ in who probes what.
func probeScenarios() []Scenario {
	threeSuccesses := get("c", probe.Readiness, 80, "/x", usually)
	threeSuccesses.SuccessThreshold = 3
	patient := get("c", probe.Liveness, 80, "/x", time.Second)
	patient.Timeout = 30 * time.Second
	authorized := get("c", probe.Liveness, 80, "/x", usually)
	authorized.Headers = []probe.Header{{Name: "X-Auth", Value: "yes"}}
	starting := get("c", probe.Startup, 80, "/x", time.Second)
	return []Scenario{
		scenario("one probe", 1./2, .49, "one observed, the next answered", lone...),
		scenario("one TCP probe", oneTCP, .45, "K answered between two observed: 0, 1, 1, 2 or 9, depending on the length of the queue",
			tcp("c", probe.Liveness, 80, usually)),
		scenario("one TCP probe, listening sockets not inspected", 1./2, .49, "as with HTTP",
			tcp("c", probe.Liveness, 80, usually)).uninspected(),
		scenario("readiness + liveness, one path", twoOfThree, .66,
			"two of three answered; three of four for the fifth of pods whose two probes begin within a timeout of each other", pair...),
		scenario("readiness + liveness, two paths", 1./2, .49, "each as if it were alone", own...),
		scenario("readiness + liveness, one path, other headers", 1./2, .49, "likewise", lone[0], authorized),
		scenario("one probe, plus another pod's with host: and headers", 1./2, .49, "likewise", lone...).stranger(authorized),
		scenario("one probe with headers, plus another pod's with host: only", 1./2, .49, "likewise", authorized).stranger(lone[0]),
		scenario("one probe, a sidecar owns the listening socket", 1./2, .49, "likewise", lone...).sidecar(),
		scenario("one probe, successThreshold 3", 1./2, .48, "likewise, after three in a row were observed", threeSuccesses),
		scenario("one probe every second, timeout 30 s", 1./2, .49, "the slack is half a second", patient),
		scenario("HTTP readiness + TCP liveness, one port", 0, .35,
			"not computed: K counts both, so a short queue limits HTTP too", both...),
		scenario("startup + readiness + liveness, one path", twoOfThree, .66, "startup probes end",
			append([]probe.Spec{get("c", probe.Startup, 80, "/x", usually)}, pair...)...),
		scenario("startup every second + liveness, one path", 1./2, .49, "startup probes end, and then their period no longer counts",
			starting, get("c", probe.Liveness, 80, "/x", usually)),
		scenario("startup every second + readiness with successThreshold 3, one path", 1./2, .48, "likewise", starting, threeSuccesses),
		scenario("startup every second + liveness, one path, refresh", 1, .99, "likewise",
			starting, get("c", probe.Liveness, 80, "/x", usually)).refresh(),
		scenario("two containers", twoOfThree, .66, "each as if it were alone",
			get("c", probe.Readiness, 80, "/x", usually), get("c", probe.Liveness, 80, "/x", usually),
			get("d", probe.Readiness, 81, "/x", usually), get("d", probe.Liveness, 81, "/x", usually)),
		scenario("one to six probes, periods of 1 to 30 s", 0, 0,
			"not computed: random kinds, paths, periods, timeouts and thresholds").randomProbes(),
	}
}

// trafficScenarios have traffic as evidence for liveness probes.
func trafficScenarios() []Scenario {
	const nineOfTen = 9. / 10
	liveness := get("c", probe.Liveness, 80, "/x", usually)
	return []Scenario{
		scenario("liveness, traffic, a client each second", nineOfTen, .88, "every tenth probe is real", liveness).traffic(time.Second),
		scenario("liveness, traffic, no client", 1./2, .49, "as without traffic", liveness).traffic(0),
		scenario("liveness each second, traffic, a client each second", 0, .80, "not computed: a client may be later than the probe",
			get("c", probe.Liveness, 80, "/x", time.Second)).traffic(time.Second),
		scenario("liveness by TCP, traffic, a client each second", nineOfTen, .88, "every tenth probe is real",
			tcp("c", probe.Liveness, 80, usually)).traffic(time.Second),
		scenario("readiness + liveness, two paths, traffic, a client each second", (1./2+nineOfTen)/2, .68,
			"readiness every second time, liveness nine times of ten", own...).traffic(time.Second),
		scenario("liveness, traffic, a proxy in the pod that listens for it", nineOfTen, .88, "likewise", liveness).sidecar().traffic(time.Second),
	}
}

// policyScenarios have a longer staleness, or refresh, or both.
func policyScenarios() []Scenario {
	return []Scenario{
		scenario("one probe, staleness 1 to 5", 0, .65,
			"not computed: one observed, one answered, and five of six once it has been well for ten minutes", lone...).staleness("1-5"),
		scenario("one probe, staleness 5", 5./6, .82, "one observed, five answered", lone...).staleness("5"),
		scenario("one probe, refresh", 1, .99, "all but the first after a failure", lone...).refresh(),
		scenario("one probe, refresh, staleness 5", 1, .99, "likewise", lone...).staleness("5").refresh(),
		scenario("readiness + liveness, two paths, refresh", 1, .99, "likewise", own...).refresh(),
		scenario("HTTP readiness + TCP liveness, one port, refresh", 0, .50,
			"not computed: with each request, K answers are allowed again", both...).refresh(),
		scenario("one to six probes, refresh", 0, 0, "not computed: random as above").randomProbes().refresh(),
	}
}

// Sweep returns the scenarios of the plot: staleness from 0.5 to 5 periods.
func Sweep() []Scenario {
	var all []Scenario
	for _, kind := range []Scenario{
		scenario("one probe", 0, 0, "", lone...),
		scenario("readiness + liveness, one path", 0, 0, "", pair...),
		scenario("one probe, refresh", 0, 0, "", lone...).refresh(),
	} {
		for half := 1; half <= 10; half++ {
			periods := fmt.Sprintf("%g", float64(half)/2)
			s := kind.staleness(periods)
			s.Why = periods
			all = append(all, s)
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
