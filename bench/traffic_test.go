package bench

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/e2e/harness/node"
)

const bulkPort = 5201

// settle is how long the side effects of attaching last.
const settle = 20 * time.Millisecond

// traffic is a load on pods that continues while what is attached to them changes.
type traffic struct {
	measure  string
	kernel   *kernel
	pods     []*bpftest.Pod // the attached ones
	receiver *worker
}

// pairs returns how often each variant is measured next to none. Hook tc has marks, and thus more pairs.
var pairs = map[variant]int{hookTC: 60, hookXDP: 12, empty: 12}

// compare measures each variant against none, in pairs with either one first equally often, all variants mixed.
func (s *suite) compare(t *testing.T, m *mark, f traffic) {
	variants := emptyAndHooks()
	var turns []variant
	for _, v := range variants {
		for range rounds(pairs[v]) {
			turns = append(turns, v)
		}
	}
	rand.Shuffle(len(turns), func(i, j int) { turns[i], turns[j] = turns[j], turns[i] })
	ratios := map[variant][]float64{}
	for i, v := range turns {
		order := []variant{none, v}
		if len(ratios[v])%2 == 1 {
			order = []variant{v, none}
		}
		rates := map[variant]float64{}
		for _, v := range order {
			for _, pod := range f.pods {
				f.kernel.put(t, pod, v)
			}
			time.Sleep(settle)
			rates[v] = f.receiver.rate(t, window())
		}
		ratios[v] = append(ratios[v], rates[v]/rates[none])
		if i%20 == 19 {
			s.progress("  %s: %d of %d pairs", f.measure, i+1, len(turns))
		}
	}
	for _, v := range variants {
		s.add(f.measure, v, none, medianOf(ratios[v]), ratio, v.mark(m))
	}
}

// measureBulk streams as fast as possible over one connection that lives through all variants.
func measureBulk(t *testing.T, s *suite) {
	n := bpftest.NewNode(t)
	routed := []*bpftest.Pod{n.AddPod(t), n.AddPod(t)}
	bridged := []*bpftest.Pod{n.AddPod(t), n.AddPod(t)}
	n.Bridge(t, bridged...)
	forward(t, n, routed...)
	k := newKernel(t)
	servers := map[*bpftest.Pod]*worker{}
	for _, pod := range []*bpftest.Pod{routed[0], bridged[0]} {
		servers[pod] = startWorker(t, pod.NS, node.OtherCgroup).pin(t)
		servers[pod].serve(t, Server{Protocol: "bulk", Address: fmt.Sprintf(":%d", bulkPort)})
	}
	host := startWorker(t, n.NS, node.OtherCgroup).pin(t)
	for _, f := range []struct {
		measure  string
		client   *worker
		pods     []*bpftest.Pod
		download bool
	}{
		{"bulk throughput, pod to host", host, routed[:1], true},
		{"bulk throughput, host to pod", host, routed[:1], false},
		{"bulk throughput, pod to pod, routed", startWorker(t, routed[1].NS, node.OtherCgroup).pin(t), routed, true},
		{"bulk throughput, pod to pod, bridged", startWorker(t, bridged[1].NS, node.OtherCgroup).pin(t), bridged, true},
	} {
		server := servers[f.pods[0]]
		receiver := f.client
		if !f.download {
			receiver = server
		}
		f.client.start(t, Load{Bulk: true, Download: f.download, Address: addrPort(f.pods[0].IPv4, bulkPort)})
		s.compare(t, atLeast(0.97), traffic{f.measure, k, f.pods, receiver})
		f.client.stop(t)
	}
}

// forward makes the node route between pods, as ptp does.
func forward(t *testing.T, n *bpftest.Node, pods ...*bpftest.Pod) {
	t.Helper()
	bpftest.Do(t, n.NS, func() error { return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0o644) })
	for _, pod := range pods {
		bpftest.Do(t, pod.NS, func() error {
			return netlink.RouteAdd(&netlink.Route{Gw: pod.HostIPv4.AsSlice()})
		})
	}
}

// measureHTTP sends requests to the pod's server from the host.
func measureHTTP(t *testing.T, s *suite) {
	n := bpftest.NewNode(t)
	pod := n.AddPod(t)
	k := newKernel(t)
	serveHTTP(t, pod).pin(t)
	client := startWorker(t, n.NS, node.OtherCgroup).pin(t)
	for _, l := range []struct {
		measure, path string
		keepAlive     bool
	}{
		{"HTTP responses per second, small, keep-alive", smallPath, true},
		{"HTTP responses per second, small, new connections", smallPath, false},
		{"HTTP responses per second, 100 kB, keep-alive", largePath, true},
		{"HTTP responses per second, 100 kB, new connections", largePath, false},
	} {
		client.start(t, Load{Address: addrPort(pod.IPv4, podPort), Path: l.path, Connections: 8, KeepAlive: l.keepAlive})
		s.compare(t, atLeast(0.97), traffic{l.measure, k, []*bpftest.Pod{pod}, client})
		client.stop(t)
	}
}

// serveHTTP starts a server in the pod, as a separate process.
func serveHTTP(t testing.TB, pod *bpftest.Pod) *worker {
	t.Helper()
	w := startWorker(t, pod.NS, node.OtherCgroup)
	for _, port := range []int{podPort, tcpPort} {
		w.serve(t, Server{Protocol: "http", Address: fmt.Sprintf(":%d", port)})
	}
	return w
}

func addrPort(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }
