package bench

import (
	"slices"
	"testing"
	"time"

	"github.com/probelet/probelet/e2e/harness/node"
)

// measurePorts repeats the scenario of Kubernetes' scale_test.go (pkg/kubelet/prober): 600 containers of one pod are probed on the
// same port every second. There the server is on loopback, where the kernel reuses the ports of sockets in TIME_WAIT; here it is
// behind a veth, as pods are.
func measurePorts(t *testing.T, s *suite) {
	containers, samples := 600, 15
	if testing.Short() {
		containers, samples = 20, 1
	}
	for _, kind := range []struct {
		name, path string
		policies   []policy
	}{
		{"TCP", "", []policy{{plain1, 1, nil}, {default1, 1, []string{}}}},
		{"HTTP", healthPath, []policy{{plain1, 1, nil}, {default1, 1, []string{}}, {refresh1, 1, []string{"--refresh", "true"}}}},
	} {
		probe := node.Probe{Port: podPort, Path: kind.path, PeriodSeconds: 1, TimeoutSeconds: 1}
		var nodes []*probedNode
		for _, p := range kind.policies {
			n := newProbedNode(t, p, slices.Repeat([]node.Probe{probe}, containers), 1, programs[0])
			n.awaitServing(t)
			nodes = append(nodes, n)
		}
		for _, n := range nodes {
			n.kubelet.probe(t, n.members[0].Probed)
		}
		most := map[variant]int{}
		for range samples {
			time.Sleep(5 * time.Second)
			for _, n := range nodes {
				onNode, _, _ := n.remains(t)
				most[n.variant] = max(most[n.variant], onNode)
			}
		}
		for _, n := range nodes {
			probes, failed := 0, 0
			for _, o := range n.kubelet.counts(t) {
				probes += o.Probes
				failed += o.Failed
			}
			n.kubelet.Stop()
			var inUse, failures *mark
			if n.flags != nil {
				inUse, failures = atMost(float64(containers)), atMost(0)
			}
			s.add("ports of the node in TIME_WAIT, 600 probes/s of one port, "+kind.name, n.variant, "", exactly(float64(most[n.variant])), "", inUse)
			s.add("failed probes, 600 probes/s of one port, "+kind.name, n.variant, "", exactly(100*float64(failed)/float64(probes)), "%", failures)
		}
	}
}
