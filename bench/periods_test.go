package bench

import (
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/e2e/harness/node"
	"github.com/probelet/probelet/e2e/harness/role"
)

// measurePeriods compares policies on nodes that work at the same time and have the same pods and clients. CPU is measured by
// cgroup, so that the machine's speed, which varies, is the same for all of them.
func measurePeriods(t *testing.T, s *suite) {
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
	pods, windows, window, settled := 10, 9, 20*time.Second, 25*time.Second
	if testing.Short() {
		pods, windows, window, settled = 2, 2, time.Second, 3*time.Second
	}
	var nodes []*probedNode
	var addresses []string
	for _, p := range policies {
		if testing.Short() && p.period > 2 {
			continue
		}
		n := newProbedNode(t, p, p.probes(), pods, programs...)
		nodes = append(nodes, n)
		for _, m := range n.members {
			addresses = append(addresses, m.address())
		}
		s.progress("  %d pods created", len(addresses))
	}
	for _, n := range nodes {
		n.awaitServing(t)
	}
	client, err := role.Start(workerRole, "", machine.CgroupPath(node.OtherCgroup), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Stop)
	if err := client.Call("Visit", Visits{addresses, servedPath, 400 * time.Millisecond}, &struct{}{}); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		for _, m := range n.members {
			n.kubelet.probe(t, m.Probed)
		}
	}
	time.Sleep(settled)
	s.comparePolicies(t, nodes, windows, window)
	s.compareDetection(t, nodes)
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

// comparePolicies measures what probing costs the nodes during some windows.
func (s *suite) comparePolicies(t *testing.T, nodes []*probedNode, windows int, window time.Duration) {
	before := map[variant]census{}
	used := map[variant][]map[string]float64{} // per window, in % of a core
	for _, n := range nodes {
		before[n.variant] = n.census(t)
	}
	began := time.Now()
	for i := range windows {
		start := map[variant]map[string]float64{}
		for _, n := range nodes {
			start[n.variant] = n.cpu(t)
		}
		begin := time.Now()
		time.Sleep(window)
		took := time.Since(begin).Seconds() * 1000
		for _, n := range nodes {
			now := n.cpu(t)
			for name, ms := range start[n.variant] {
				now[name] = 100 * (now[name] - ms) / took
			}
			used[n.variant] = append(used[n.variant], now)
		}
		s.progress("  window %d of %d", i+1, windows)
	}
	took := time.Since(began).Seconds()
	total := map[variant][]float64{}
	timeWait := map[variant]float64{}
	for _, n := range nodes {
		after, once := n.census(t), func(measure string, value float64, unit string) { s.cell(measure, n.variant, exactly(value), unit) }
		if n.period > 0 {
			failed := after.failed - before[n.variant].failed
			if failed > 0 {
				s.progress("  %s: %d probes failed", n.variant, failed)
			}
			once("probes", float64(after.probes-before[n.variant].probes)/took, "/s")
			once("connections to pods", float64(after.connections-before[n.variant].connections)/took, "/s")
			once("lines in access logs", float64(after.logged-before[n.variant].logged)/took, "/s")
			onNode, inPods, tracked := n.remains(t)
			once("TIME_WAIT on the node", float64(onNode), "")
			once("TIME_WAIT in pods", float64(inPods), "")
			once("conntrack entries", float64(tracked), "")
			timeWait[n.variant] = float64(onNode + inPods)
		}
		names := []string{kubeletCgroup, daemonCgroup}
		for _, p := range programs {
			names = append(names, p.name)
		}
		sums := make([]float64, windows)
		for _, name := range names {
			each := make([]float64, windows)
			for i := range each {
				each[i] = used[n.variant][i][name] - used[unprobed][i][name]
				sums[i] += each[i]
			}
			s.cell("CPU, "+name, n.variant, medianOf(each), "%")
		}
		total[n.variant] = sums
		s.cell(nodeCPU, n.variant, medianOf(sums), "%")
		for _, p := range programs {
			tcp := after.tcp[p.name] - before[n.variant].tcp[p.name]
			answered := after.answeredTCP[p.name] - before[n.variant].answeredTCP[p.name]
			if n.variant != default1 {
				continue
			}
			var m *mark
			if p.name != "Python" {
				m = atLeast(85)
			}
			s.add("TCP probes answered, "+p.name, n.variant, "", exactly(100*float64(answered)/float64(tcp)), "%", m)
		}
	}
	for _, c := range []struct {
		v, against variant
		m          *mark
	}{
		{default1, plain1, nil}, {default1, plain2, atMost(1)}, {stale1, plain1, nil}, {refresh1, plain1, atMost(1)}, {traffic1, plain1, nil},
	} {
		s.add(nodeCPU, c.v, c.against, medianOf(quotients(total[c.v], total[c.against])), ratio, c.m)
	}
	s.add("TIME_WAIT on the node and in pods", default1, plain1, exactly(timeWait[default1]/timeWait[plain1]), ratio, nil)
	s.add("TIME_WAIT on the node and in pods", refresh1, plain1, exactly(timeWait[refresh1]/timeWait[plain1]), ratio, atMost(0.05))
}

// compareDetection lets all pods fail at the same moment, in which each is in another phase of its probes.
func (s *suite) compareDetection(t *testing.T, nodes []*probedNode) {
	failure := func(i int) string { return []string{stopped, erring}[i%2] }
	limit := 0.0
	for _, n := range nodes {
		if n.period > 0 {
			bound := n.stated(t)
			limit = max(limit, bound)
			s.cell(stated, n.variant, exactly(bound), "s")
		}
	}
	failed := map[*member]time.Time{}
	for _, n := range nodes {
		for i, m := range n.members {
			var err error
			failed[m] = time.Now()
			if failure(i) == stopped {
				err = m.cmd.Process.Signal(unix.SIGSTOP)
			} else {
				err = m.fail(m)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	s.progress("  all pods have failed")
	time.Sleep(time.Duration(limit*float64(time.Second)) + 10*time.Second)
	worst := map[string]map[variant]float64{stopped: {}, erring: {}}
	for _, n := range nodes {
		if n.period == 0 {
			continue
		}
		verdicts := n.kubelet.verdicts(t)
		for i, m := range n.members {
			at, ok := verdicts[Container{m.Pod.Name, httpContainer}]
			if !ok {
				t.Errorf("%s, %s: %s", n.variant, m.program.name, "not: "+failure(i))
				continue
			}
			worst[failure(i)][n.variant] = max(worst[failure(i)][n.variant], at.Sub(failed[m]).Seconds())
		}
		for _, f := range []string{stopped, erring} {
			s.cell(f, n.variant, exactly(worst[f][n.variant]), "s")
		}
	}
	for _, f := range []string{stopped, erring} {
		s.add(f, default1, plain2, exactly(worst[f][default1]/worst[f][plain2]), ratio, below(1))
	}
}
