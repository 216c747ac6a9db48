package cluster

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/probelet/probelet/e2e/harness/kube"
)

// The components of a node can be restarted without failing a probe.
func TestComponentsRestart(t *testing.T) {
	deploy(t, nil)
	pod := run(t, web("steady"))
	awaitHits(t, pod.Name, 3)
	client := startClient(t, pod)

	t.Run("daemon rollout", func(t *testing.T) {
		watch := watchSteady(t, pod)
		deploy(t, map[string]any{"podAnnotations": map[string]any{"release": "2"}})
		awaitHits(t, pod.Name, 3)
		watch.end()
	})
	t.Run("daemon killed", func(t *testing.T) {
		watch := watchSteady(t, pod)
		must(t, killDaemon())
		awaitHits(t, pod.Name, 10)
		watch.end()
	})
	t.Run("daemon absent when a pod is created", func(t *testing.T) {
		watch := watchSteady(t, pod)
		undeploy(t)
		later := run(t, web("later"))
		deploy(t, nil)
		awaitHits(t, later.Name, 3)
		if readStatus(t).of("later").Adopted {
			t.Error("the pod was adopted instead of attached at ADD")
		}
		watch.end()
	})
	for _, source := range []string{"apiserver", "kubelet"} {
		t.Run("API server down, probes from the "+source, func(t *testing.T) {
			deploy(t, map[string]any{"source": source})
			awaitHits(t, pod.Name, 3)
			watch := watchSteady(t, pod)
			start := stopAPIServer(t)
			down := time.Now()
			awaitHits(t, pod.Name, 5)
			must(t, killDaemon())
			if source == "kubelet" {
				awaitHits(t, pod.Name, 5)
			}
			time.Sleep(time.Until(down.Add(15 * time.Second)))
			start()
			awaitHits(t, pod.Name, 3)
			watch.end()
		})
	}
	t.Run("kubelet restarted", func(t *testing.T) {
		watch := watchSteady(t, pod)
		for _, signal := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			old := readStatus(t).Prober.CgroupIDs
			watch.kubeletEnds()
			must(t, cluster.Stop("kubelet", signal))
			must(t, cluster.StartKubelet())
			eventually(t, "the new kubelet's cgroup is taken for the prober", time.Minute, func() bool {
				now := readStatus(t).Prober.CgroupIDs
				return len(now) == 1 && !slices.Equal(now, old)
			})
			eventually(t, "the kubelet sends probes", time.Minute, func() bool {
				counts, err := cluster.ProbeCounts(t.Context(), pod)
				return err == nil && counts["app"]["liveness"].Successful > 3
			})
			awaitHits(t, pod.Name, 3)
			watch.end()
		}
	})
	client.end()
}

// stopAPIServer kills the API server. It runs again after start, and at the end of the test.
func stopAPIServer(t *testing.T) (start func()) {
	t.Helper()
	must(t, cluster.Stop("kube-apiserver", syscall.SIGKILL))
	start = sync.OnceFunc(func() {
		must(t, cluster.StartAPIServer())
		must(t, cluster.AwaitAPIServer(context.Background()))
		must(t, cluster.RestartControllers(context.Background()))
	})
	t.Cleanup(start)
	return start
}

// killDaemon kills the daemon's process in its pod.
func killDaemon() error {
	pids, err := kube.Processes("cmdline", func(text string) bool { return strings.HasPrefix(text, "/usr/local/bin/probeletd\x00run") })
	if err != nil || len(pids) != 1 {
		return fmt.Errorf("processes of the daemon: %v, %w", pids, err)
	}
	return syscall.Kill(pids[0], syscall.SIGKILL)
}
