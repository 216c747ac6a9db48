package bench

import (
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/probelet/probelet/e2e/harness/node"
	"github.com/probelet/probelet/e2e/harness/role"
)

// measurePolicies compares policies on nodes that work at the same time and have the same pods and clients. CPU is measured by
// cgroup, so that the machine's speed, which varies, is the same for all of them.
func measurePolicies(t *testing.T, s *suite) {
	needs(t, "nginx", "/usr/bin/python3")
	stop, err := node.TrackConnections()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	pods, windows, each, settled := 10, 9, 20*time.Second, 25*time.Second
	if testing.Short() {
		pods, windows, each, settled = 2, 2, time.Second, 3*time.Second
	}
	var nodes []*probedNode
	for _, p := range policies {
		if testing.Short() && p.period > 2 {
			continue
		}
		nodes = append(nodes, newProbedNode(t, p, node.Probed{Liveness: p.probes()}, pods, programs...))
		s.progress("  %d nodes created", len(nodes))
	}
	for _, n := range nodes {
		n.awaitServing(t)
	}
	visit(t, nodes)
	for _, n := range nodes {
		for _, m := range n.members {
			n.kubelet.probe(t, m.Probed)
		}
	}
	time.Sleep(settled)
	probed := slices.DeleteFunc(slices.Clone(nodes), func(n *probedNode) bool { return n.period == 0 })
	before := map[variant]census{}
	for _, n := range probed {
		before[n.variant] = n.census(t)
	}
	cpu := s.watchCPU(t, nodes, windows, each)
	s.addCensus(t, probed, before)
	s.addCPU(probed, cpu)
	s.compareDetection(t, probed)
}

// visit gives all pods a client.
func visit(t *testing.T, nodes []*probedNode) {
	t.Helper()
	v := Visits{Path: servedPath, Every: 400 * time.Millisecond}
	for _, n := range nodes {
		for _, m := range n.members {
			v.Addresses = append(v.Addresses, m.address())
		}
	}
	client, err := role.Start(workerRole, "", machine.CgroupPath(node.OtherCgroup), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Stop)
	if err := client.Call("Visit", v, &struct{}{}); err != nil {
		t.Fatal(err)
	}
}

// needs skips the test unless these commands are installed.
func needs(t *testing.T, commands ...string) {
	t.Helper()
	for _, command := range commands {
		_, err := exec.LookPath(command)
		if err != nil && os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		if err != nil {
			t.Skip(err)
		}
	}
}

// watchCPU returns what the cgroups of each node use, by their names, in % of a core: a value per window.
func (s *suite) watchCPU(t *testing.T, nodes []*probedNode, windows int, each time.Duration) map[variant]map[string][]float64 {
	t.Helper()
	used := map[variant]map[string][]float64{}
	for _, n := range nodes {
		used[n.variant] = map[string][]float64{}
	}
	for i := range windows {
		start := map[variant]map[string]float64{}
		for _, n := range nodes {
			start[n.variant] = n.cpu(t)
		}
		begin := time.Now()
		time.Sleep(each)
		took := float64(time.Since(begin).Milliseconds())
		for _, n := range nodes {
			for name, ms := range n.cpu(t) {
				used[n.variant][name] = append(used[n.variant][name], 100*(ms-start[n.variant][name])/took)
			}
		}
		s.progress("  window %d of %d", i+1, windows)
	}
	return used
}

// addCPU adds what probing costs the nodes: what they use, less what the node without probes does.
func (s *suite) addCPU(nodes []*probedNode, used map[variant]map[string][]float64) {
	total := map[variant][]float64{}
	for _, n := range nodes {
		total[n.variant] = make([]float64, len(used[n.variant][kubeletCgroup]))
		for _, name := range cgroupsFor(programs) {
			cost := differences(used[n.variant][name], used[unprobed][name])
			for i := range cost {
				total[n.variant][i] += cost[i]
			}
			s.cell("CPU, "+name, n.variant, medianOf(cost), "%")
		}
		s.cell(nodeCPU, n.variant, medianOf(total[n.variant]), "%")
	}
	for _, c := range []struct {
		v, against variant
		m          *mark
	}{
		{default1, plain1, nil}, {default1, plain2, atMost(1)}, {stale1, plain1, nil}, {refresh1, plain1, atMost(1)}, {traffic1, plain1, nil},
	} {
		s.add(nodeCPU, c.v, c.against, medianOf(quotients(total[c.v], total[c.against])), ratio, c.m)
	}
}

// addCensus adds what probes have done to the nodes since an earlier census, and what they leave behind.
func (s *suite) addCensus(t *testing.T, nodes []*probedNode, before map[variant]census) {
	t.Helper()
	const left = "TIME_WAIT on the node and in pods"
	timeWait := map[variant]float64{}
	for _, n := range nodes {
		c := n.census(t).since(before[n.variant])
		add := func(measure string, value float64, unit string) { s.cell(measure, n.variant, exactly(value), unit) }
		add("probes", float64(c.probes)/c.seconds, "/s")
		add("failed probes", float64(c.failed), "")
		if c.failed > 0 {
			t.Errorf("%s: %d probes of healthy servers failed", n.variant, c.failed)
		}
		add(connections, float64(c.connections)/c.seconds, "/s")
		add("lines in access logs", float64(c.logged)/c.seconds, "/s")
		onNode, inPods, tracked := n.remains(t)
		add("TIME_WAIT on the node", float64(onNode), "")
		add("TIME_WAIT in pods", float64(inPods), "")
		add("conntrack entries", float64(tracked), "")
		timeWait[n.variant] = float64(onNode + inPods)
		if n.variant == default1 {
			s.addAnswered(t, n, c)
		}
	}
	s.add(left, default1, plain1, exactly(timeWait[default1]/timeWait[plain1]), ratio, nil)
	s.add(left, refresh1, plain1, exactly(timeWait[refresh1]/timeWait[plain1]), ratio, atMost(0.05))
}

// addAnswered adds the share of TCP probes that were answered, for each program.
func (s *suite) addAnswered(t *testing.T, n *probedNode, c census) {
	t.Helper()
	for _, p := range programs {
		probes, answered := c.tcp[p.name], c.answeredTCP[p.name]
		// The kubelet's count was read a moment earlier than the kernel's, so each pod may have been asked once in between.
		if pods := len(n.members) / len(programs); answered > probes+pods {
			t.Errorf("%s, %s: %d of %d TCP probes were answered", n.variant, p.name, answered, probes)
		}
		s.add("TCP probes answered, "+p.name, n.variant, "", exactly(100*min(1, float64(answered)/float64(probes))), "%", p.tcpMark)
	}
}

// compareDetection lets all pods fail at the same moment, at any phase of their probes: half of the servers are stopped, and the others
// answer healthPath with an error.
func (s *suite) compareDetection(t *testing.T, nodes []*probedNode) {
	failure := func(i int) string { return []string{stopped, erring}[i%2] }
	failed, bounds := map[*member]time.Time{}, map[variant]map[string]float64{}
	wait := 0.0
	for _, n := range nodes {
		bounds[n.variant] = n.stated(t)
		for _, f := range []string{stopped, erring} {
			wait = max(wait, bounds[n.variant][f])
			s.cell(f+stated, n.variant, exactly(bounds[n.variant][f]), "s")
		}
		for i, m := range n.members {
			failed[m] = time.Now()
			fail := map[string]func(*member) error{stopped: (*member).stop, erring: m.fail}[failure(i)]
			if err := fail(m); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.progress("  all pods have failed")
	verdicts := awaitVerdicts(t, nodes, time.Duration(wait*float64(time.Second))+10*time.Second)
	took := map[string]map[variant]float64{stopped: {}, erring: {}}
	for _, n := range nodes {
		for i, m := range n.members {
			at, ok := verdicts[m]
			switch {
			case !ok:
				t.Errorf("%s, %s: not found: %s", n.variant, m.name, failure(i))
			case at.Before(failed[m]):
				t.Errorf("%s, %s: to be restarted before it failed", n.variant, m.name)
			}
			took[failure(i)][n.variant] = max(took[failure(i)][n.variant], at.Sub(failed[m]).Seconds())
		}
	}
	for _, f := range []string{stopped, erring} {
		for _, n := range nodes {
			s.cell(f+longest, n.variant, exactly(took[f][n.variant]), "s")
			if n.flags != nil {
				s.add(f+longest, n.variant, "", exactly(took[f][n.variant]), "s", atMost(bounds[n.variant][f]))
			}
		}
		s.add(f+longest, default1, plain2, exactly(took[f][default1]/took[f][plain2]), ratio, below(1))
	}
}

// awaitVerdicts returns when each kubelet decided to restart each server. It returns once all have decided, or after the given
// time.
func awaitVerdicts(t *testing.T, nodes []*probedNode, most time.Duration) map[*member]time.Time {
	t.Helper()
	for deadline := time.Now().Add(most); ; time.Sleep(100 * time.Millisecond) {
		found, all := map[*member]time.Time{}, 0
		for _, n := range nodes {
			verdicts := n.kubelet.verdicts(t)
			all += len(n.members)
			for _, m := range n.members {
				if at, ok := verdicts[Container{m.Pod.Name, httpContainer}]; ok {
					found[m] = at
				}
			}
		}
		if len(found) == all || time.Now().After(deadline) {
			return found
		}
	}
}
