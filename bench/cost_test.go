package bench

import (
	"net/netip"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/e2e/harness/node"
)

// usage is the kernel's count of a program's runs, and their total time in ns. The time includes 40 to 90 ns per run for the
// counting itself, which is why an empty program is measured next to each program (struct bpf_prog_stats,
// include/linux/filter.h).
type usage struct{ runs, ns float64 }

func (u usage) perRun() float64 { return u.ns / max(u.runs, 1) }

// use returns the usage of each program during a call.
func use(t *testing.T, programs []*ebpf.Program, meanwhile func()) []usage {
	t.Helper()
	read := func() (all []usage) {
		for _, p := range programs {
			stats, err := p.Stats()
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, usage{float64(stats.RunCount), float64(stats.Runtime.Nanoseconds())})
		}
		return all
	}
	before := read()
	meanwhile()
	after := read()
	for i, u := range before {
		after[i].runs -= u.runs
		after[i].ns -= u.ns
	}
	return after
}

// costed is a pod, what is attached to it, and the programs that its packets run.
type costed struct {
	pod             *bpftest.Pod
	k               *kernel
	egress, ingress []*ebpf.Program
}

func (c costed) programs() []*ebpf.Program {
	return append(c.egress[:len(c.egress):len(c.egress)], c.ingress...)
}

// measureCost measures the time in the programs, minus the time in empty ones on another pod with the same traffic in the
// same round.
func measureCost(t *testing.T, s *suite) {
	n := bpftest.NewNode(t)
	pods := map[variant]costed{}
	for _, v := range emptyAndHooks() {
		c := costed{pod: n.AddPod(t), k: newKernel(t)} // separate programs, which only this pod's packets run
		serveHTTP(t, c.pod)
		c.k.put(t, c.pod, v)
		c.egress, c.ingress = []*ebpf.Program{c.k.out}, []*ebpf.Program{c.k.in}
		if v != empty {
			c.k.armPod(t, c.pod)
			c.egress, c.ingress = c.k.egress(), c.k.ingress()
		}
		pods[v] = c
	}
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		t.Fatal(err)
	}
	defer stats.Close() //nolint:errcheck // the process exits anyway
	s.measureOthersPackets(t, n, pods)
	s.measureProbes(t, n, pods)
}

// measureOthersPackets sends requests to the pods from a client other than the prober.
func (s *suite) measureOthersPackets(t *testing.T, n *bpftest.Node, pods map[variant]costed) {
	client := startWorker(t, n.NS, node.OtherCgroup)
	toPod, fromPod := times{}, times{}
	for round := range rounds(30) {
		path := []string{smallPath, largePath}[round%2]
		for _, v := range emptyAndHooks() {
			c := pods[v]
			used := use(t, c.programs(), func() {
				client.start(t, Load{Address: addrPort(c.pod.IPv4, podPort), Path: path, Connections: 4, KeepAlive: true})
				client.rate(t, window())
				client.stop(t)
			})
			toPod[v] = append(toPod[v], sumPerRun(used[:len(c.egress)]))
			fromPod[v] = append(fromPod[v], sumPerRun(used[len(c.egress):]))
		}
	}
	for _, v := range hooks {
		s.add("BPF time, packet to the pod from another client", v, empty, medianOf(differences(toPod[v], toPod[empty])), "ns", v.mark(atMost(30)))
		s.add("BPF time, packet from the pod", v, empty, medianOf(differences(fromPod[v], fromPod[empty])), "ns", v.mark(atMost(25)))
	}
	s.add("BPF time, packet to the pod from another client", empty, "", medianOf(toPod[empty]), "ns", nil)
}

func sumPerRun(used []usage) (sum float64) {
	for _, u := range used {
		sum += u.perRun()
	}
	return sum
}

// measureProbes sums up all runs of all programs for an answered probe.
func (s *suite) measureProbes(t *testing.T, n *bpftest.Node, pods map[variant]costed) {
	count := 100 * rounds(3)
	prober := startWorker(t, n.NS, node.ProberCgroup)
	for _, kind := range []struct {
		measure, kind string
		mark          *mark
	}{
		{"BPF time, answered HTTP probe, all packets", "http", atMost(1500)},
		{"BPF time, answered TCP probe, all packets", "tcp", atMost(900)},
	} {
		took := times{}
		for range rounds(30) {
			perRun := 0.0
			for _, v := range emptyAndHooks() {
				c := pods[v]
				before := c.k.counters(t)
				used := use(t, c.programs(), func() {
					ask(t, prober, kind.kind, healthPath, Plan{Rounds: 1, Burst: count}, map[variant]netip.AddrPort{v: netip.AddrPortFrom(c.pod.IPv4, portFor(kind.kind))})
					time.Sleep(settle) // the last packets of a connection follow its probe
				})
				all := usage{}
				for _, u := range used {
					all.runs += u.runs
					all.ns += u.ns
				}
				if v == empty {
					perRun = all.perRun()
					continue
				}
				checkAnswered(t, kind.measure, kind.kind, c.k.counters(t).answered-before.answered, count)
				took[v] = append(took[v], (all.ns-perRun*all.runs)/float64(count))
			}
		}
		for _, v := range hooks {
			s.add(kind.measure, v, empty, medianOf(took[v]), "ns", v.mark(kind.mark))
		}
	}
}
