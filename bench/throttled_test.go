package bench

import (
	"errors"
	"fmt"
	"net/netip"
	"testing"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/e2e/harness/node"
	"github.com/probelet/probelet/internal/polltest"
)

// measureThrottled probes pods that have 1 % of a core, and clients that need more.
func measureThrottled(t *testing.T, s *suite) {
	const measure, connections = "HTTP probe of a busy pod with 1 % of a core", 64
	// Such a pod takes 300 ms or more, as a median: three of the periods in which the kernel grants CPU. An answer may take 1 ms.
	quick := atMost(rounded(1. / 300))
	n := bpftest.NewNode(t)
	k := newKernel(t)
	hosts := map[variant]netip.AddrPort{}
	for _, v := range []variant{none, hookTC} {
		pod := n.AddPod(t)
		server := serveHTTP(t, pod)
		k.put(t, pod, v)
		if v != none {
			k.armPod(t, pod)
		}
		hosts[v] = netip.AddrPortFrom(pod.IPv4, podPort)
		client := startWorker(t, n.NS, node.OtherCgroup)
		client.start(t, Load{Address: hosts[v].String(), Path: largePath, Connections: connections, KeepAlive: true})
		awaitAccepted(t, server, connections) // probes are not answered while a connection waits for long
		err := machine.LimitCPU(server.Pid(), "throttled-"+pod.HostIfName, 1)
		if errors.Is(err, node.ErrUnsuited) {
			t.Skip(err)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	prober := startWorker(t, n.NS, node.ProberCgroup)
	before := k.counters(t)
	p := Plan{Rounds: rounds(60), Burst: 1, Timeout: timeout}
	took := ask(t, prober, "http", healthPath, p, hosts)
	checkAnswered(t, measure, "http", k.counters(t).answered-before.answered, p.Rounds)
	s.add(measure, hookTC, none, medianOf(quotients(took[hookTC], took[none])), ratio, quick)
	for _, v := range []variant{none, hookTC} {
		s.add(measure, v, "", medianOf(took[v]), "µs", nil)
	}
	for _, v := range []variant{none, hookTC} {
		late := 0
		for _, us := range took[v] {
			if us >= float64(timeout.Microseconds()) {
				late++
			}
		}
		s.add(measure+", timeouts", v, "", exactly(100*float64(late)/float64(len(took[v]))), "%", v.mark(atMost(0)))
	}
}

// awaitAccepted waits until a pod's server has accepted that many connections.
func awaitAccepted(t *testing.T, server *worker, connections int) {
	t.Helper()
	polltest.Eventually(t, fmt.Sprintf("%d connections are accepted", connections), func() bool {
		established, err := node.AcceptedIn(server.Pid())
		waiting, more := node.Unaccepted(server.Pid(), podPort)
		if err = errors.Join(err, more); err != nil {
			t.Fatal(err)
		}
		return established >= connections && waiting == 0
	})
}
