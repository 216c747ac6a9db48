package cluster

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/probelet/probelet/e2e/harness/kube"
)

// These tests run first, because of this file's name: the measurements and snapshots without probelet need a node that it has
// never run on.

// withoutProbelet is how long pods with all kinds of probes took to become Ready.
var withoutProbelet []time.Duration

// measureWithout sets withoutProbelet.
func measureWithout(t *testing.T) {
	t.Helper()
	if withoutProbelet != nil {
		return
	}
	if installed() {
		uninstall(t)
	}
	// The first pods on a node become ready sooner than later ones, so they do not count.
	for range 2 {
		t.Run("without", func(t *testing.T) { _, withoutProbelet = runAlike(t, "without", nil) })
	}
}

// alike is the number of pods to take a median of.
const alike = 3

// runAlike runs pods with all kinds of probes at the same time, and returns how long each took to become Ready.
func runAlike(t *testing.T, name string, annotations map[string]string) (pods []*corev1.Pod, ready []time.Duration) {
	t.Helper()
	begin := time.Now()
	for i := range alike {
		pod := everything(fmt.Sprintf("%s-%d", name, i))
		pod.Annotations = annotations
		pods = append(pods, create(t, pod))
	}
	ready = timesUntil(t, begin, pods, time.Minute, "ready", kube.Ready)
	for i := range pods {
		pods[i] = awaitReady(t, pods[i])
	}
	return pods, ready
}

// timesUntil returns how long each pod took to satisfy wanted.
func timesUntil(t *testing.T, begin time.Time, pods []*corev1.Pod, limit time.Duration, what string, wanted func(*corev1.Pod) bool) []time.Duration {
	t.Helper()
	times := make([]time.Duration, len(pods))
	for slices.Contains(times, 0) {
		for i, pod := range pods {
			if times[i] != 0 {
				continue
			}
			now, err := cluster.Get(t.Context(), pod)
			must(t, err)
			if wanted(now) {
				times[i] = time.Since(begin).Round(100 * time.Millisecond)
			} else if time.Since(begin) > limit {
				t.Fatalf("%s is not %s within %s: %v\n%s", pod.Name, what, limit, now.Status, events(t, now))
			}
		}
		time.Sleep(50 * time.Millisecond)
	}
	return times
}

// Installing on a node with pods, upgrading from observe to answer and uninstalling disturbs nothing and leaves nothing
// behind.
func TestInstallUpgradeUninstall(t *testing.T) {
	if installed() {
		uninstall(t)
	}
	measureWithout(t)
	for _, way := range []string{"copy", "dropin"} {
		t.Run(way, func(t *testing.T) { testInstallCycle(t, way) })
	}
	mustBeAs(t, pristine)
}

func testInstallCycle(t *testing.T, way string) {
	mustBeAs(t, pristine) // wait until the devices of deleted pods are gone
	pod := run(t, web("before"))
	before := takeSnapshot(t)
	watch := watchSteady(t, pod)
	client := startClient(t, pod)
	churn := startChurn(t, way)
	release := func(mode string) map[string]any {
		return map[string]any{"mode": mode, "cni": map[string]any{"chain": way}}
	}

	churn.during("install", func() {
		deploy(t, release("observe"))
		eventually(t, "the pod is adopted and observed", time.Minute, func() bool {
			a := readStatus(t).of(pod.Name)
			return a.Adopted && len(a.Endpoints) > 0 && a.Endpoints[0].State != "unknown"
		})
	})
	if hits := readStatus(t).hits(pod.Name); hits > 0 {
		t.Errorf("%d probes were answered in mode observe", hits)
	}
	churn.during("upgrade", func() {
		deploy(t, release("answer"))
		awaitHits(t, pod.Name, 5)
	})
	links := pinnedLinks(t)
	churn.during("uninstall", func() { uninstall(t) })

	churn.end()
	client.end()
	watch.end()
	mustBeAs(t, before)
	mustBeGone(t, links)
}

// recordsDir has a file for each attachment.
const recordsDir = stateDir + "/attachments"

// pinsDir returns the directory that has a directory for each attachment.
func pinsDir(t *testing.T) string {
	t.Helper()
	dirs, err := filepath.Glob(kube.BPFFS + "/probelet/v*/attachments")
	must(t, err)
	if len(dirs) != 1 {
		t.Fatalf("directories of attachments: %q, want one", dirs)
	}
	return dirs[0]
}

// A pod that existed before probelet leaves nothing behind when it is deleted.
func TestAdoptedPodIsDeleted(t *testing.T) {
	if installed() {
		uninstall(t)
	}
	old := run(t, web("adopted"))
	deploy(t, nil)
	awaitHits(t, old.Name, 3)
	name := attachmentOf(t, old)
	remains := func(dir string) bool {
		files, err := filepath.Glob(filepath.Join(dir, name+"*"))
		must(t, err)
		return len(files) > 0
	}
	if !remains(pinsDir(t)) || !remains(recordsDir) {
		t.Fatalf("%s is not pinned or has no record", name)
	}
	must(t, cluster.Delete(t.Context(), old))
	eventually(t, "pins and record are removed", time.Minute, func() bool { return !remains(pinsDir(t)) && !remains(recordsDir) })
}

// doctor reports a healthy node as healthy, both on the host and in the daemon's pod, and an unhealthy one as unhealthy.
func TestDoctor(t *testing.T) {
	deploy(t, nil)
	pod := run(t, web("well"))
	awaitHits(t, pod.Name, 3)
	text := ctl(t, "doctor")
	if !strings.Contains(text, "the kubelet, cgroup") || !strings.Contains(text, "containerd v") {
		t.Error(text)
	}
	daemons, err := cluster.DaemonPods(t.Context())
	must(t, err)
	if len(daemons) != 1 {
		t.Fatalf("%d daemon pods, want 1", len(daemons))
	}
	_, id, _ := strings.Cut(daemons[0].Status.ContainerStatuses[0].ContainerID, "://")
	must(t, cluster.Ctr("tasks", "exec", "--exec-id", "doctor", id, "/usr/local/bin/probeletctl", "doctor"))

	// After uninstalling, doctor is a preflight check, which this node passes.
	uninstall(t)
	text = ctl(t, "doctor")
	for _, want := range []string{"note     probelet      is not installed", "ok       prober        the kubelet, cgroup", "would    chain         write " + kube.NetDir, "would    plugin        put it at " + kube.BinDir} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q:\n%s", want, text)
		}
	}
}
