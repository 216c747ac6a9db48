package bench

import (
	"fmt"
	"net/netip"
	"os"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/e2e/harness/node"
)

// crowd is a node with a number of attached pods. All but one of them are only devices.
type crowd struct {
	node     *bpftest.Node
	k        *kernel
	devices  int
	stateDir string
	pod      *bpftest.Pod // has a server and answered endpoints
	chain    *chain
	alone    *chain // without probelet
	prober   *worker
}

const (
	fewPods, manyPods = 10, 1000
	batchPods         = 50
)

// adopted is how the daemon attaches pods that existed before it.
var adopted = way{"auto", attach.ViaAuto, false}

var uncrowded = variant(fmt.Sprintf("%d pods", fewPods))

func inCrowd(v variant) variant { return variant(fmt.Sprintf("%s, %d pods", v, manyPods)) }

// way is a way to attach a pod by tc.
type way struct {
	name    string
	via     attach.Via
	promote bool
}

// ways are those in use: what ADD attaches, what the daemon replaces it with for the rest of the pod's life, and what ADD
// attaches if an ingress qdisc may follow.
var ways = []way{{"clsact", attach.ViaClsact, false}, {"promoted", attach.ViaClsact, true}, {"tcx", attach.ViaTCX, false}}

// measureScale compares a node with few pods and one with many, side by side, and measures the memory of the many as they are
// added.
func measureScale(t *testing.T, s *suite) {
	hook := hooks[0]
	few := newCrowd(t)
	few.attach(t, hook, adopted, fewPods)
	many := newCrowd(t)
	maps := many.k.mapBytes(t)
	batches := map[way][]memory{}
	for range rounds(manyPods / batchPods / len(ways)) {
		for _, w := range ways {
			batches[w] = append(batches[w], many.attach(t, hook, w, batchPods))
		}
		s.progress("  %d pods attached", many.devices)
	}
	if rest := rounds(manyPods) - many.devices; rest > 0 {
		many.attach(t, hook, adopted, rest)
	}
	s.addMemory(hook, batches, maps)

	few.populate(t, hook, 1)
	many.populate(t, hook, 2)
	s.compareADD(t, hook, few, many)
	s.compareAnswers(t, hook, few, many)
}

func newCrowd(t *testing.T) *crowd {
	t.Helper()
	return &crowd{node: bpftest.NewNode(t), k: newKernel(t), stateDir: t.TempDir()}
}

// attach creates a number of devices and attaches them, with four endpoints each. It returns by how much the kernel's memory
// grew, excluding the devices themselves.
func (c *crowd) attach(t *testing.T, hook variant, w way, pods int) memory {
	t.Helper()
	type device struct {
		id      attach.ID
		ifindex int
	}
	var devices []device
	bpftest.Do(t, c.node.NS, func() error {
		// No traffic reaches them, so they need no addresses.
		if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0o644); err != nil {
			return err
		}
		for range pods {
			c.devices++
			veth := &netlink.Veth{PeerName: fmt.Sprintf("peer%d", c.devices)}
			veth.Name = fmt.Sprintf("crowd%d", c.devices)
			if err := netlink.LinkAdd(veth); err != nil {
				return err
			}
			devices = append(devices, device{attach.ID{ContainerID: veth.Name, IfName: "eth0"}, veth.Index})
		}
		return os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("0"), 0o644)
	})
	before := kernelMemory(t, c.k)
	bpftest.Do(t, c.node.NS, func() error {
		for _, d := range devices {
			netns := uint32(d.ifindex) // not the number of any namespace, and unique
			if err := c.k.attachDevice(d.id, d.ifindex, netns, hook, w.via); err != nil {
				return err
			}
			if w.promote {
				if err := attach.Promote(c.k.d, c.k.dir, d.id); err != nil {
					return err
				}
			}
			c.k.arm(t, d.id, d.id.ContainerID, podPort)
		}
		return nil
	})
	after := kernelMemory(t, c.k)
	for _, d := range devices {
		c.k.record(t, c.stateDir, d.id, d.ifindex)
	}
	for kind, o := range after {
		after[kind] = objects{o.count - before[kind].count, o.size}
	}
	return after
}

// populate adds a pod that the prober probes, and the chains to add more pods. number distinguishes the crowds.
func (c *crowd) populate(t *testing.T, hook variant, number int) {
	t.Helper()
	noDAD(t, c.node.NS)
	c.pod = c.node.AddPod(t)
	serveHTTP(t, c.pod)
	c.k.put(t, c.pod, hook)
	c.k.armPod(t, c.pod)
	c.prober = startWorker(t, c.node.NS, node.ProberCgroup)
	c.chain = newChain(t, c.node, fmt.Sprintf("crowd%d", number), c.k.pluginConf(c.stateDir, hook))
	c.alone = newChain(t, c.node, fmt.Sprintf("alone%d", number))
}

// compareADD adds and deletes pods on both nodes alternately.
func (s *suite) compareADD(t *testing.T, hook variant, few, many *crowd) {
	var adds, dels, aloneAdds []float64
	for round := range rounds(60) {
		crowds := []*crowd{few, many}
		if round%2 == 1 {
			crowds = []*crowd{many, few}
		}
		add, del, aloneAdd := map[*crowd]float64{}, map[*crowd]float64{}, map[*crowd]float64{}
		for _, c := range crowds {
			add[c], del[c] = c.chain.addDel(t)
			aloneAdd[c], _ = c.alone.addDel(t)
		}
		adds = append(adds, add[many]/add[few])
		dels = append(dels, del[many]/del[few])
		aloneAdds = append(aloneAdds, aloneAdd[many]/aloneAdd[few])
	}
	s.add("CNI ADD", inCrowd(hook), uncrowded, medianOf(adds), ratio, hook.mark(atMost(1.1)))
	s.add("CNI ADD", inCrowd(alone), uncrowded, medianOf(aloneAdds), ratio, nil)
	s.add("CNI DEL", inCrowd(hook), uncrowded, medianOf(dels), ratio, nil)
}

// compareAnswers probes one pod on each node alternately.
func (s *suite) compareAnswers(t *testing.T, hook variant, few, many *crowd) {
	for _, kind := range []struct{ measure, kind string }{{"answered HTTP probe", "http"}, {"answered TCP probe", "tcp"}} {
		var ratios []float64
		for round := range rounds(100) {
			crowds := []*crowd{few, many}
			if round%2 == 1 {
				crowds = []*crowd{many, few}
			}
			took := map[*crowd]float64{}
			for _, c := range crowds {
				before := c.k.counters(t)
				p := Plan{Rounds: 1, Burst: 15}
				took[c] = ask(t, c.prober, kind.kind, healthPath, p, map[variant]netip.AddrPort{hook: netip.AddrPortFrom(c.pod.IPv4, portFor(kind.kind))})[hook][0]
				checkAnswered(t, kind.measure, kind.kind, c.k.counters(t).answered-before.answered, p.Burst)
			}
			ratios = append(ratios, took[many]/took[few])
		}
		s.add(kind.measure, inCrowd(hook), uncrowded, medianOf(ratios), ratio, hook.mark(atMost(1.1)))
	}
}
