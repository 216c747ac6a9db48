package e2e

import (
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/probelet/probelet/e2e/harness/node"
)

// Whatever state a pod is in, DEL leaves nothing of it behind, and its neighbour is not affected.
func TestDelLeavesNothing(t *testing.T) {
	probes := []node.Probe{longHTTP, longTCP}
	for _, test := range []struct {
		name   string
		before func(t *testing.T, s *scene, p *pod)
	}{
		{"nothing observed", func(*testing.T, *scene, *pod) {}},
		{"fresh", func(_ *testing.T, _ *scene, p *pod) { p.makeFresh(probes...) }},
		{"a connection observed", func(t *testing.T, s *scene, p *pod) {
			s.dial(t, s.prober, p.address(httpPort))
		}},
		{"a connection accepted", func(t *testing.T, s *scene, p *pod) {
			p.makeFresh(probes...)
			s.dial(t, s.prober, p.address(httpPort))
		}},
		{"a connection handed over", func(t *testing.T, s *scene, p *pod) {
			p.makeFresh(probes...)
			conn := s.dial(t, s.prober, p.address(httpPort))
			must(t, send("GET /other HTTP/1.1\r\nHost: pod\r\n\r\n")(conn))
			_, err := io.ReadFull(conn, make([]byte, len("HTTP/1.1 404")))
			must(t, err)
		}},
		{"daemon dead", func(_ *testing.T, s *scene, p *pod) {
			p.makeFresh(probes...)
			s.daemon.Kill()
		}},
		{"sandbox gone", func(t *testing.T, _ *scene, p *pod) {
			p.makeFresh(probes...)
			p.Stop() // the server holds the namespace
			must(t, p.Remove())
		}},
		{"record lost", func(t *testing.T, s *scene, p *pod) { must(t, os.Remove(recordOf(t, s, p))) }},
		{"record damaged", func(t *testing.T, s *scene, p *pod) {
			must(t, os.WriteFile(recordOf(t, s, p), []byte("{"), 0o600))
		}},
		{"pins lost", func(t *testing.T, s *scene, p *pod) {
			name := strings.TrimSuffix(filepath.Base(recordOf(t, s, p)), ".json")
			pins, err := filepath.Glob(filepath.Join(s.BPFDir, "*", "attachments", name))
			must(t, err)
			must(t, os.RemoveAll(pins[0]))
		}},
		{"already deleted", func(t *testing.T, _ *scene, p *pod) { must(t, p.Del()) }},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t, node.PTP)
			neighbour := s.newFreshPod(probes...)
			before, neighbours := remains(t, s), pinned(t, s)
			p := s.newPod()
			must(t, s.WriteSpecs(node.Probed{Pod: neighbour.Pod, Readiness: probes}, node.Probed{Pod: p.Pod, Readiness: probes}))
			objects := pinned(t, s)
			maps.DeleteFunc(objects, func(o node.Object, _ bool) bool { return neighbours[o] })
			test.before(t, s, p)
			must(t, p.Del())
			must(t, p.Del())
			expectRemains(t, s, before)
			expectDead(t, objects)
			hits := neighbour.hits(longHTTP)
			neighbour.probe(longHTTP, neighbour.IPv4, 1)
			if neighbour.hits(longHTTP) != hits+1 {
				t.Error("the neighbour is no longer answered")
			}
		})
	}
}

func remains(t *testing.T, s *scene) []string {
	t.Helper()
	found, err := s.Remains()
	must(t, err)
	return found
}

func pinned(t *testing.T, s *scene) map[node.Object]bool {
	t.Helper()
	objects, err := s.Pinned()
	must(t, err)
	return objects
}

// recordOf returns the path of the pod's record.
func recordOf(t *testing.T, s *scene, p *pod) string {
	t.Helper()
	records, err := filepath.Glob(filepath.Join(s.StateDir, "attachments", "*.json"))
	must(t, err)
	for _, file := range records {
		text, err := os.ReadFile(file)
		must(t, err)
		if strings.Contains(string(text), `"`+p.HostDevice+`"`) {
			return file
		}
	}
	t.Fatalf("no record of %s", p.HostDevice)
	return ""
}

// expectRemains polls, because the kernel removes the devices of a namespace some time after its end.
func expectRemains(t *testing.T, s *scene, want []string) {
	t.Helper()
	var got []string
	within(deadline, func() bool { got = remains(t, s); return slices.Equal(got, want) })
	for _, r := range got {
		if !slices.Contains(want, r) {
			t.Errorf("left behind: %s", r)
		}
	}
	for _, r := range want {
		if !slices.Contains(got, r) {
			t.Errorf("removed, but not the pod's: %s", r)
		}
	}
}

// expectDead polls, because the kernel frees objects some time after their last use.
func expectDead(t *testing.T, objects map[node.Object]bool) {
	t.Helper()
	alive := maps.Clone(objects)
	within(deadline, func() bool {
		maps.DeleteFunc(alive, func(o node.Object, _ bool) bool {
			exists, err := o.Exists()
			must(t, err)
			return !exists
		})
		return len(alive) == 0
	})
	for o := range alive {
		t.Errorf("alive in the kernel: %s %d", o.Kind, o.ID)
	}
}

// A node starts and stops fifty pods at once; the first of them load the programs. No daemon is needed.
func TestConcurrentAddAndDel(t *testing.T) {
	n, err := machine.NewNode(node.PTP)
	must(t, err)
	s := &scene{Node: n, t: t}
	t.Cleanup(s.explain)
	var pods []*node.Pod
	for range 75 {
		p, err := n.NewPod()
		must(t, err)
		pods = append(pods, p)
	}
	first, later := pods[:50], pods[50:]
	before := remains(t, s)
	forAll(t, first, (*node.Pod).Add)
	forAll(t, first, (*node.Pod).Check)
	count := len(pinned(t, s))

	// Half of the pods are deleted while as many are added.
	var both sync.WaitGroup
	both.Go(func() { forAll(t, first[:25], (*node.Pod).Del) })
	both.Go(func() { forAll(t, later, (*node.Pod).Add) })
	both.Wait()
	left := pods[25:]
	forAll(t, left, (*node.Pod).Check)
	objects := pinned(t, s)
	if len(objects) != count {
		t.Errorf("%d objects are pinned for 50 pods, want %d", len(objects), count)
	}

	forAll(t, left, (*node.Pod).Del)
	expectDead(t, objects)
	shared := func(r string) bool {
		return strings.HasPrefix(r, n.BPFDir) && !strings.Contains(r, "/attachments/") || r == n.StateDir+"/attachments"
	}
	for _, r := range slices.DeleteFunc(remains(t, s), shared) {
		if !slices.Contains(before, r) {
			t.Errorf("left behind: %s", r)
		}
	}
}

func forAll(t *testing.T, pods []*node.Pod, do func(*node.Pod) error) {
	var all sync.WaitGroup
	for _, p := range pods {
		all.Go(func() {
			if err := do(p); err != nil {
				t.Errorf("%s: %v", p.Name, err)
			}
		})
	}
	all.Wait()
}
