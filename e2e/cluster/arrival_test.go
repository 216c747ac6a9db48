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

// These tests are the first ones, by this file's name: what is measured and seen without probelet is of a node that it has
// never been on.

// withoutProbelet is after how long pods with all kinds of probes were Ready.
var withoutProbelet []time.Duration

// measureWithout makes withoutProbelet.
func measureWithout(t *testing.T) {
	t.Helper()
	if withoutProbelet != nil {
		return
	}
	if installed() {
		uninstall(t)
	}
	// The first pods of a node are ready sooner than any after them, so they are no measure.
	for range 2 {
		t.Run("without", func(t *testing.T) { _, withoutProbelet = runAlike(t, "without", nil) })
	}
}

// alike is of how many pods a median is taken.
const alike = 3

// runAlike runs pods with all kinds of probes, together, and says after how long they were Ready.
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

// timesUntil says after how long each pod was as wanted.
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

// Onto a node with pods, first to observe, then to answer, and off it again: nobody notices, and nothing is left.
func TestInstallUpgradeUninstall(t *testing.T) {
	if installed() {
		uninstall(t)
	}
	measureWithout(t)
	for _, way := range []string{"copy", "dropin"} {
		t.Run(way, func(t *testing.T) { testComingAndGoing(t, way) })
	}
	mustBeAs(t, pristine)
}

func testComingAndGoing(t *testing.T, way string) {
	mustBeAs(t, pristine) // the devices of pods that have ended are gone
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
		eventually(t, "it is adopted and observed", time.Minute, func() bool {
			a := readStatus(t).of(pod.Name)
			return a.Adopted && len(a.Endpoints) > 0 && a.Endpoints[0].State != "unknown"
		})
	})
	if hits := readStatus(t).hits(pod.Name); hits > 0 {
		t.Errorf("%d probes were answered that were only to be observed", hits)
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

// Where an attachment leaves something.
const (
	pinsDir    = kube.BPFFS + "/probelet/v5/attachments"
	recordsDir = stateDir + "/attachments"
)

// A pod of before, deleted while probelet is there, leaves nothing.
func TestAdoptedIsDeleted(t *testing.T) {
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
	if !remains(pinsDir) || !remains(recordsDir) {
		t.Fatalf("%s is not pinned, or not on record", name)
	}
	must(t, cluster.Delete(t.Context(), old))
	eventually(t, "nothing of it is left", 10*time.Second, func() bool { return !remains(pinsDir) && !remains(recordsDir) })
}

// A node that is well is called so, by a process of the host and by one of the daemon's pod; and one that is not, not.
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
		t.Fatalf("%d pods of the daemon", len(daemons))
	}
	_, id, _ := strings.Cut(daemons[0].Status.ContainerStatuses[0].ContainerID, "://")
	must(t, cluster.Ctr("tasks", "exec", "--exec-id", "doctor", id, "/usr/local/bin/probeletctl", "doctor"))

	// Off again, it is a preflight, which this node passes.
	uninstall(t)
	text = ctl(t, "doctor")
	for _, want := range []string{"note     probelet      is not installed", "ok       prober        the kubelet, cgroup", "would    chain         write " + kube.NetDir, "would    plugin        put it at " + kube.BinDir} {
		if !strings.Contains(text, want) {
			t.Errorf("no %q:\n%s", want, text)
		}
	}
}
