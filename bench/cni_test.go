package bench

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/containernetworking/plugins/pkg/testutils"

	"github.com/probelet/probelet/bpf/bpftest"
)

// chain is a network configuration: ptp with addresses of both families, optionally followed by another plugin.
type chain struct {
	name string
	dir  string // of the configuration file
	node *bpftest.Node
}

func newChain(t testing.TB, n *bpftest.Node, name string, plugins ...map[string]any) *chain {
	t.Helper()
	c := &chain{name: name, dir: t.TempDir(), node: n}
	ptp := map[string]any{"type": "ptp", "ipam": map[string]any{
		"type": "host-local", "dataDir": filepath.Join(c.dir, "addresses"),
		"ranges": [][]map[string]string{{{"subnet": "10.99.0.0/24"}}, {{"subnet": "fd00:99::/64"}}},
	}}
	text, err := json.Marshal(map[string]any{"cniVersion": "1.0.0", "name": name, "plugins": append([]map[string]any{ptp}, plugins...)})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(c.dir, name+".conflist"), text, 0o644); err != nil {
		t.Fatal(err)
	}
	noDAD(t, n.NS)
	return c
}

// noDAD disables duplicate address detection, for which ptp waits longer than everything else takes.
func noDAD(t testing.TB, n ns.NetNS) {
	t.Helper()
	bpftest.Do(t, n, func() error { return os.WriteFile("/proc/sys/net/ipv6/conf/default/accept_dad", []byte("0"), 0o644) })
}

// run executes the chain with cnitool and returns how long that took, in ms.
func (c *chain) run(t testing.TB, verb string, pod ns.NetNS) float64 {
	t.Helper()
	cmd := exec.Command(filepath.Join(machine.Bin, "cnitool"), verb, c.name, pod.Path())
	cmd.Env = append(os.Environ(), "CNI_PATH="+machine.Bin, "NETCONFPATH="+c.dir,
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=pod")
	var took time.Duration
	bpftest.Do(t, c.node.NS, func() error {
		start := time.Now()
		out, err := cmd.CombinedOutput()
		took = time.Since(start)
		if err != nil {
			return fmt.Errorf("%s %s: %w: %s", verb, c.name, err, out)
		}
		return nil
	})
	return float64(took.Microseconds()) / 1000
}

// addDel adds a new pod and deletes it.
func (c *chain) addDel(t testing.TB) (add, del float64) {
	t.Helper()
	pod, err := testutils.NewNS()
	if err != nil {
		t.Fatal(err)
	}
	noDAD(t, pod)
	add, del = c.run(t, "add", pod), c.run(t, "del", pod)
	if err := errors.Join(pod.Close(), testutils.UnmountNS(pod)); err != nil {
		t.Fatal(err)
	}
	return add, del
}

const (
	alone     variant = "ptp alone"
	bandwidth variant = "bandwidth"
)

// measureCNI compares the time that probelet adds to ptp with the time that bandwidth, a plugin of the CNI project, adds.
func measureCNI(t *testing.T, s *suite) {
	k := newKernel(t)
	plugins := map[variant][]map[string]any{
		alone:     nil,
		bandwidth: {{"type": "bandwidth", "ingressRate": 1 << 30, "ingressBurst": 1 << 30, "egressRate": 1 << 30, "egressBurst": 1 << 30}},
	}
	for _, v := range hooks {
		plugins[v] = []map[string]any{k.pluginConf(t.TempDir(), v)}
	}
	chains := map[variant]*chain{}
	order := append([]variant{alone, bandwidth}, hooks...)
	for i, v := range order {
		chains[v] = newChain(t, bpftest.NewNode(t), fmt.Sprintf("chain%d", i), plugins[v]...)
		chains[v].addDel(t) // the first run loads the programs
	}
	adds, dels := times{}, times{}
	for range rounds(60) {
		rand.Shuffle(len(order), func(i, j int) { order[i], order[j] = order[j], order[i] })
		for _, v := range order {
			add, del := chains[v].addDel(t)
			adds[v], dels[v] = append(adds[v], add), append(dels[v], del)
		}
	}
	for _, verb := range []struct {
		name string
		took times
	}{{"CNI ADD", adds}, {"CNI DEL", dels}} {
		s.addPrice(verb.name, verb.took)
	}
}

// addPrice adds the rows for the time that plugins add to ptp.
func (s *suite) addPrice(verb string, took times) {
	added := func(v variant, picked []int) float64 {
		return median(differences(pick(took[v], picked), pick(took[alone], picked)))
	}
	rounds := len(took[alone])
	for _, v := range hooks {
		of := bootstrap(rounds, func(picked []int) float64 { return added(v, picked) / added(bandwidth, picked) })
		s.add(verb+", time added by probelet", v, bandwidth, of, ratio, v.mark(atMost(1)))
	}
	for _, v := range append([]variant{bandwidth}, hooks...) {
		of := bootstrap(rounds, func(picked []int) float64 { return added(v, picked) })
		s.add(verb+", time added to ptp", v, alone, of, "ms", nil)
	}
	s.add(verb, alone, "", medianOf(took[alone]), "ms", nil)
}
