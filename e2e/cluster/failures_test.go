package cluster

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/probelet/probelet/e2e/harness/kube"
)

// slack allows the kubelet to act and to update the API server, even on a busy machine.
const slack = 5 * time.Second

// act does something to a pod.
type act func(*testing.T, *corev1.Pod)

// set changes the behaviour of the app.
func set(query string) act {
	return func(t *testing.T, pod *corev1.Pod) {
		t.Helper()
		_, err := kube.Ask(t.Context(), pod, 8081, "/set?"+query)
		if err != nil && !strings.Contains(query, "exit") {
			t.Fatal(err)
		}
	}
}

// signal sends a signal to the app's process.
func signal(s syscall.Signal) act {
	return func(t *testing.T, pod *corev1.Pod) {
		t.Helper()
		must(t, syscall.Kill(process(t, pod), s))
	}
}

// failure is a way to fail that is detected by readiness, or by liveness and then cured by the restart.
type failure struct {
	name          string
	liveness, tcp bool
	exits         bool // the container ends by itself, so the kubelet restarts it without a probe
	fail, mend    act
}

// pod returns a pod with these probes on port 8080.
func (f failure) pod(mode string) *corev1.Pod {
	probe := kube.HTTP("/healthz", intstr.FromInt32(8080))
	if f.tcp {
		probe = kube.TCP(intstr.FromInt32(8080))
	}
	c := kube.App("app", 8080, 8081)
	c.ReadinessProbe = probe
	if f.liveness {
		c.LivenessProbe = probe
	}
	pod := kube.Pod("fails-"+f.name+"-"+mode, c)
	pod.Annotations = map[string]string{"probelet.dev/mode": mode}
	return pod
}

func notReady(pod *corev1.Pod) bool { return !kube.Ready(pod) }

func restarted(pod *corev1.Pod) bool { return kube.Restarts(pod) == 1 }

// bounds returns how long a failure of a pod may go undetected according to probelet, and without probelet.
func bounds(t *testing.T, pod *corev1.Pod, kind string) (stated, plain time.Duration) {
	t.Helper()
	for _, e := range readStatus(t).of(pod.Name).Endpoints {
		for _, p := range e.Probes {
			if p.Type == kind {
				return seconds(p.WorstDetectionSeconds), seconds(p.WorstDetectionPlainSeconds)
			}
		}
	}
	t.Fatalf("%s has no %s probe\n%s", pod.Name, kind, ctl(t, "status", "-o", "wide"))
	return 0, 0
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

// Whatever happens to the app, Kubernetes notices within the stated bound, and the pod recovers. Each pod has a twin without
// probelet.
func TestFailuresAreDetected(t *testing.T) {
	deploy(t, nil)
	var mu sync.Mutex
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	_, _ = fmt.Fprintln(table, "FAILURE\tFOUND OUT AFTER\tBOUND\tWITHOUT PROBELET\tBOUND")
	t.Run("all", func(t *testing.T) {
		for _, f := range []failure{
			{name: "status", fail: set("status=500"), mend: set("status=200")},
			{name: "status-passes", fail: set("hang=10s"), mend: func(*testing.T, *corev1.Pod) {}},
			{name: "hang", fail: signal(syscall.SIGSTOP), mend: signal(syscall.SIGCONT)},
			{name: "port", fail: set("close=8080"), mend: set("open=8080")},
			{name: "tcp-port", tcp: true, fail: set("close=8080"), mend: set("open=8080")},
			{name: "crash", liveness: true, exits: true, fail: set("exit=1")},
			{name: "killed", liveness: true, exits: true, fail: signal(syscall.SIGKILL)},
			{name: "tcp-killed", liveness: true, tcp: true, exits: true, fail: signal(syscall.SIGKILL)},
			{name: "live-status", liveness: true, fail: set("status=500")},
			{name: "live-hang", liveness: true, fail: signal(syscall.SIGSTOP)},
			{name: "live-port", liveness: true, fail: set("close=8080")},
			{name: "live-tcp-port", liveness: true, tcp: true, fail: set("close=8080")},
		} {
			t.Run(f.name, func(t *testing.T) {
				t.Parallel()
				line := f.test(t)
				mu.Lock()
				defer mu.Unlock()
				_, _ = fmt.Fprintf(table, "%s\t%s\n", f.name, line)
			})
		}
	})
	must(t, table.Flush())
}

func (f failure) test(t *testing.T) (line string) {
	pod, twin := create(t, f.pod("answer")), create(t, f.pod("off"))
	pod, twin = awaitReady(t, pod), awaitReady(t, twin)
	awaitHits(t, pod.Name, 3)
	kind, wanted := "readiness", notReady
	if f.liveness {
		kind, wanted = "liveness", restarted
	}
	stated, plain := bounds(t, pod, kind)
	both := []*corev1.Pod{pod, twin}
	begin := time.Now()
	for _, p := range both {
		f.fail(t, p)
	}
	limit, verdicts := stated+slack, []time.Duration(nil)
	if f.liveness && !f.exits {
		verdicts = verdictsOn(t, both, begin, limit)
		limit = time.Minute // ending and starting the containers is no part of the detection
	}
	times := timesUntil(t, begin, both, limit, kind+" found out", wanted)
	if verdicts != nil {
		times = verdicts
	}
	if f.mend != nil {
		mustBeFailed(t, pod)
		for _, p := range both {
			f.mend(t, p)
		}
	}
	for i, p := range both {
		both[i] = awaitReady(t, p)
	}
	if f.liveness {
		mustHaveBeenProbed(t, pod)
	}
	watch := watchSteady(t, both...)
	awaitHits(t, pod.Name, 3)
	watch.end()
	return fmt.Sprintf("%s\t%s\t%s\t%s", times[0], stated, times[1], plain)
}

// verdictsOn returns how long after begin the kubelet decided to restart each of the pods' containers, which must be within the limit.
func verdictsOn(t *testing.T, pods []*corev1.Pod, begin time.Time, limit time.Duration) (after []time.Duration) {
	t.Helper()
	for _, pod := range pods {
		decided := awaitVerdict(t, pod, begin, limit).Sub(begin).Round(100 * time.Millisecond)
		if decided > limit {
			t.Errorf("%s: decided after %s, want within %s\n%s", pod.Name, decided, limit, events(t, pod))
		}
		after = append(after, decided)
	}
	return after
}

// mustBeFailed compares the views of the kubelet and of probelet on a pod that is not Ready.
func mustBeFailed(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	endpoints := readStatus(t).of(pod.Name).Endpoints
	if len(endpoints) != 1 || endpoints[0].State == "fresh" {
		t.Errorf("%s is not Ready, but its endpoints are %+v", pod.Name, endpoints)
	}
	if failed := failures(t, pod); failed == 0 {
		t.Errorf("%s is not Ready, but none of its probes failed", pod.Name)
	}
	eventually(t, "the kubelet's event", slack, func() bool { return strings.Contains(events(t, pod), "Unhealthy") })
}

// mustHaveBeenProbed checks that a restarted app is Ready because it was probed, not because of evidence about its
// predecessor.
func mustHaveBeenProbed(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	lines, err := kube.AccessLog(pod, "app", 1)
	must(t, err)
	if text := strings.Join(lines, "\n"); !strings.Contains(text, "kube-probe/") && !strings.Contains(text, "no request") {
		t.Errorf("%s was restarted and is Ready, but was not probed: %q", pod.Name, lines)
	}
}

// An app that is slow to start becomes Ready at the same time with and without probelet, and is not restarted.
func TestSlowStart(t *testing.T) {
	deploy(t, nil)
	const closed = 6 * time.Second
	var pods []*corev1.Pod
	begin := time.Now()
	for _, mode := range []string{"answer", "off"} {
		f := failure{name: "slow", liveness: true}
		pod := f.pod(mode)
		c := &pod.Spec.Containers[0]
		c.Command = append(c.Command, "-startup", closed.String())
		c.StartupProbe = kube.HTTP("/healthz", intstr.FromInt32(8080))
		c.StartupProbe.FailureThreshold = 30
		pods = append(pods, create(t, pod))
	}
	times := timesUntil(t, begin, pods, time.Minute, "ready", kube.Ready)
	var took [2]time.Duration // from the start of the container
	for i, pod := range pods {
		now, err := cluster.Get(t.Context(), pod)
		must(t, err)
		took[i] = begin.Add(times[i]).Sub(now.Status.ContainerStatuses[0].State.Running.StartedAt.Time)
	}
	const resolution = time.Second // of StartedAt
	if times[0] < closed || took[0] > took[1]+2*time.Second+resolution {
		t.Errorf("ready after %s, without probelet %s, with a port closed for %s", took[0], took[1], closed)
	}
	watch := watchSteady(t, pods...)
	awaitHits(t, pods[0].Name, 3)
	watch.end()
}
