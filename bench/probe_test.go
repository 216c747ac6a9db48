package bench

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/e2e/harness/node"
)

// loopback is the least that a server can do: accept, reply and close, without a pod in between.
const (
	loopback     = variant("loopback server")
	loopbackPort = 7000
)

// times holds the median time of each round, in µs.
type times map[variant][]float64

// compareTimes adds rows that compare each hook with another variant.
func (s *suite) compareTimes(measure string, took times, against variant, m *mark) {
	for _, v := range hooks {
		s.add(measure, v, against, medianOf(quotients(took[v], took[against])), ratio, v.mark(m))
	}
}

// addTimes adds rows for the times themselves.
func (s *suite) addTimes(measure string, took times, variants ...variant) {
	for _, v := range variants {
		s.add(measure, v, "", medianOf(took[v]), "µs", nil)
	}
}

// probed creates pods that differ only in what is attached, each with a server and answered endpoints.
func probed(t *testing.T, n *bpftest.Node, k *kernel) map[variant]*bpftest.Pod {
	t.Helper()
	pods := map[variant]*bpftest.Pod{}
	for _, v := range noneAndHooks() {
		pods[v] = n.AddPod(t)
		serveHTTP(t, pods[v])
		k.put(t, pods[v], v)
		if v != none {
			k.armPod(t, pods[v])
		}
	}
	return pods
}

// ask times requests of one kind. hosts contains the address of each variant.
func ask(t *testing.T, prober *worker, kind, path string, p Plan, hosts map[variant]netip.AddrPort) times {
	t.Helper()
	var variants []variant
	for v, at := range hosts {
		variants = append(variants, v)
		p.Targets = append(p.Targets, Target{Kind: kind, Host: at.Addr().String(), Port: int(at.Port()), Path: path})
	}
	took := times{}
	for i, rounds := range prober.latencies(t, p) {
		took[variants[i]] = rounds
	}
	return took
}

// measureLatency compares the latency of answered probes with that of a pod that answers itself.
func measureLatency(t *testing.T, s *suite) {
	n := bpftest.NewNode(t)
	k := newKernel(t)
	local := netip.MustParseAddrPort(fmt.Sprintf("127.0.0.1:%d", loopbackPort))
	startWorker(t, n.NS, node.OtherCgroup).serve(t, Server{Protocol: "canned", Address: local.String()})
	pods := probed(t, n, k)
	prober := startWorker(t, n.NS, node.ProberCgroup)

	for _, kind := range []struct {
		measure, kind       string
		pod, loopbackServer *mark
	}{
		{"answered HTTP probe", "http", atMost(0.40), atMost(0.50)},
		{"answered TCP probe", "tcp", atMost(0.40), atMost(0.50)},
		{"answered HTTP request on a bare socket", "socket", atMost(0.28), nil},
	} {
		p := Plan{Rounds: rounds(200), Burst: 15}
		hosts := map[variant]netip.AddrPort{loopback: local}
		for v, pod := range pods {
			hosts[v] = netip.AddrPortFrom(pod.IPv4, portFor(kind.kind))
		}
		before := k.counters(t)
		took := ask(t, prober, kind.kind, healthPath, p, hosts)
		checkAnswered(t, kind.measure, kind.kind, k.counters(t).answered-before.answered, p.Rounds*p.Burst*len(hooks))
		s.compareTimes(kind.measure, took, none, kind.pod)
		s.compareTimes(kind.measure, took, loopback, kind.loopbackServer)
		s.add(kind.measure, hookTC, hookXDP, medianOf(quotients(took[hookTC], took[hookXDP])), ratio, below(1))
		s.addTimes(kind.measure, took, append(noneAndHooks(), loopback)...)
	}
}

const handoverMark = 1.25

// measureHandover sends requests that cannot be answered to a port on which the kernel accepts connections.
func measureHandover(t *testing.T, s *suite) {
	n := bpftest.NewNode(t)
	k := newKernel(t)
	v4, v6 := map[variant]netip.AddrPort{}, map[variant]netip.AddrPort{}
	for v, pod := range probed(t, n, k) {
		v4[v], v6[v] = netip.AddrPortFrom(pod.IPv4, podPort), netip.AddrPortFrom(pod.IPv6, podPort)
	}
	prober := startWorker(t, n.NS, node.ProberCgroup)
	for _, kind := range []struct {
		measure, kind string
		hosts         map[variant]netip.AddrPort
	}{
		{"handed-over GET, IPv4", "http", v4},
		{"handed-over GET, IPv6", "http", v6},
		{"handed-over POST of 300 kB, IPv4", "post", v4},
		{"handed-over POST of 300 kB, IPv6", "post", v6},
	} {
		before := k.counters(t)
		took := ask(t, prober, kind.kind, otherPath, Plan{Rounds: rounds(200), Burst: 5, Limit: 8 * time.Second}, kind.hosts)
		if got, want := k.counters(t).handedOver-before.handedOver, 5*len(took[none])*len(hooks); got != want {
			t.Fatalf("%s: %d of %d were handed over", kind.measure, got, want)
		}
		s.compareTimes(kind.measure, took, none, atMost(handoverMark))
		s.addTimes(kind.measure, took, noneAndHooks()...)
	}
	s.measureFirst(t, n, k, prober)
}

// measureFirst sends the first request to pods created a moment ago, whose neighbour entries are not resolved yet.
func (s *suite) measureFirst(t *testing.T, n *bpftest.Node, k *kernel, prober *worker) {
	server := startWorker(t, n.NS, node.OtherCgroup) // shared by all, because starting a process takes time
	took := times{}
	began := time.Now()
	for range rounds(25) {
		if time.Since(began) > 20*time.Second {
			break
		}
		pods := map[variant]*bpftest.Pod{}
		for _, v := range noneAndHooks() {
			pods[v] = n.AddPod(t)
			server.serve(t, Server{Protocol: "http", Address: fmt.Sprintf(":%d", podPort), Netns: pods[v].NS.Path()})
			k.put(t, pods[v], v)
			if v != none {
				k.armPod(t, pods[v])
			}
		}
		order := noneAndHooks()
		rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for _, v := range order {
			first := ask(t, prober, "http", otherPath, Plan{Rounds: 1, Burst: 1}, map[variant]netip.AddrPort{v: netip.AddrPortFrom(pods[v].IPv6, podPort)})
			took[v] = append(took[v], first[v]...)
		}
	}
	const measure = "handed-over GET, IPv6, pod just started"
	s.compareTimes(measure, took, none, atMost(handoverMark))
	s.addTimes(measure, took, noneAndHooks()...)
}
