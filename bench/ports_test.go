package bench

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/probelet/probelet/e2e/harness/node"
)

// measurePorts repeats the scenario of Kubernetes' scale_test.go (pkg/kubelet/prober): 600 containers of one pod are probed on the
// same port every second. There the server is on loopback, where the kernel reuses the ports of sockets in TIME_WAIT; here it is
// behind a veth, as pods are. Readiness probes go on whatever their outcomes, unlike liveness probes.
func measurePorts(t *testing.T, s *suite) {
	// Count only after the first sockets have left TIME_WAIT (60 s).
	containers, settled, counted := 600, 65*time.Second, 25*time.Second
	if testing.Short() {
		containers, settled, counted = 20, time.Second, time.Second
	}
	for _, kind := range []struct {
		name, path string
		variants   []variant
	}{
		{"TCP", "", []variant{plain1, default1}},
		{"HTTP", healthPath, []variant{plain1, default1, refresh1}},
	} {
		probe := node.Probe{Port: podPort, Path: kind.path, PeriodSeconds: 1, TimeoutSeconds: 1}
		var nodes []*probedNode
		for _, p := range policiesOf(kind.variants...) {
			n := newProbedNode(t, p, node.Probed{Readiness: slices.Repeat([]node.Probe{probe}, containers)}, 1, programs[0])
			n.awaitServing(t)
			nodes = append(nodes, n)
		}
		for _, n := range nodes {
			n.kubelet.probe(t, n.members[0].Probed)
		}
		time.Sleep(settled)
		before := map[variant]Outcomes{}
		for _, n := range nodes {
			before[n.variant] = n.kubelet.total(t)
		}
		time.Sleep(counted)
		for _, n := range nodes {
			after, was := n.kubelet.total(t), before[n.variant]
			onNode, _, _ := n.remains(t)
			n.kubelet.Stop()
			var inUse, failures *mark
			if n.flags != nil {
				inUse, failures = atMost(float64(containers)), atMost(0)
			}
			measure := fmt.Sprintf("%d probes/s of one port by %s", containers, kind.name)
			s.progress("  %s, %s: %.0f probes/s", measure, n.variant, float64(after.Probes-was.Probes)/counted.Seconds())
			s.add(measure+", ports in TIME_WAIT", n.variant, "", exactly(float64(onNode)), "", inUse)
			s.add(measure+", failed", n.variant, "", exactly(100*float64(after.Failed-was.Failed)/float64(after.Probes-was.Probes)), "%", failures)
		}
	}
}
