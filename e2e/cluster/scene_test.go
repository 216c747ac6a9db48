package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// deploy has the chart's pod run with these values, besides that probes are answered.
func deploy(t *testing.T, values map[string]any) {
	t.Helper()
	all := map[string]any{"mode": "answer"}
	for name, value := range values {
		all[name] = value
	}
	_, err := cluster.Deploy(t.Context(), all)
	if err != nil {
		t.Fatalf("%v\n%s", err, daemonLog())
	}
}

// daemonLog is what the daemon's pods have written.
func daemonLog() string {
	files, _ := filepath.Glob("/var/log/pods/" + System + "_*/*/*.log")
	var all strings.Builder
	for _, file := range files {
		text, _ := os.ReadFile(file)
		fmt.Fprintf(&all, "%s\n%s", strings.TrimPrefix(file, "/var/log/pods/"), text)
	}
	return all.String()
}

// run creates a pod that is deleted at the end of the test, and waits until it is Ready.
func run(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	pod = create(t, pod)
	return awaitReady(t, pod)
}

func create(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	made, err := cluster.Create(t.Context(), pod)
	must(t, err)
	t.Cleanup(func() {
		if err := cluster.Delete(context.Background(), made); err != nil {
			t.Error(err)
		}
	})
	return made
}

func awaitReady(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	pod, err := cluster.Await(t.Context(), pod, time.Minute, "ready", Ready)
	if err != nil {
		t.Fatalf("%v\n%v", err, events(t, pod))
	}
	return pod
}

// web is a pod that is asked each second, by two probes on one path.
func web(name string) *corev1.Pod {
	c := App("app", 8080)
	c.ReadinessProbe = HTTP("/healthz", intstr.FromInt32(8080))
	c.LivenessProbe = HTTP("/healthz", intstr.FromInt32(8080))
	return Pod(name, c)
}

// events are those of pods, of warnings.
func events(t *testing.T, of *corev1.Pod) string {
	t.Helper()
	list, err := cluster.Client.CoreV1().Events(metav1.NamespaceAll).List(context.Background(), metav1.ListOptions{})
	must(t, err)
	var all strings.Builder
	for _, e := range list.Items {
		if of == nil || e.InvolvedObject.Name == of.Name {
			fmt.Fprintf(&all, "%s %s: %s: %s\n", e.Type, e.InvolvedObject.Name, e.Reason, e.Message)
		}
	}
	return all.String()
}

// status is what the tests want of probeletctl status -o json.
type status struct {
	Attachments []struct {
		Pod, ContainerID, IfName, HostIfName string

		Adopted   bool
		Endpoints []struct {
			State  string
			Hits   int
			Probes []struct{ Container, Type string }
		}
	}
}

func (s status) hits(pod string) (n int) {
	for _, a := range s.Attachments {
		if a.Pod == Namespace+"/"+pod {
			for _, e := range a.Endpoints {
				n += e.Hits
			}
		}
	}
	return n
}

func ctl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := exec.Command(filepath.Join(cluster.Bin, "probeletctl"), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("probeletctl %s: %v: %s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

func readStatus(t *testing.T) (s status) {
	t.Helper()
	must(t, json.Unmarshal([]byte(ctl(t, "status", "-o", "json")), &s))
	return s
}

// awaitHits waits until so many probes of a pod were answered in the kernel, from now on.
func awaitHits(t *testing.T, pod string, n int) {
	t.Helper()
	before := readStatus(t).hits(pod)
	eventually(t, fmt.Sprintf("%d probes of %s are answered", n, pod), time.Minute, func() bool {
		return readStatus(t).hits(pod) >= before+n
	})
}

func eventually(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within %s: %s\n%s\n%s", limit, what, ctl(t, "status", "-o", "wide"), daemonLog())
}

// steady watches pods that are well: that they stay Ready, are not restarted, and that no probe of theirs fails.
type steady struct {
	t      *testing.T
	pods   []*corev1.Pod
	failed map[string]int // probes that had failed before
	cancel context.CancelFunc
	done   sync.WaitGroup
	mu     sync.Mutex
	wrong  []string
}

func watchSteady(t *testing.T, pods ...*corev1.Pod) *steady {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	s := &steady{t: t, pods: pods, cancel: cancel, failed: map[string]int{}}
	for _, pod := range pods {
		s.failed[pod.Name] = failures(t, pod)
	}
	watch, err := cluster.Client.CoreV1().Pods(Namespace).Watch(ctx, metav1.ListOptions{})
	must(t, err)
	t.Cleanup(cancel)
	s.done.Go(func() {
		for e := range watch.ResultChan() {
			if pod, ok := e.Object.(*corev1.Pod); ok {
				s.look(pod)
			}
		}
	})
	return s
}

func (s *steady) look(pod *corev1.Pod) {
	for _, p := range s.pods {
		if p.Name == pod.Name && p.UID == pod.UID && (!Ready(pod) || Restarts(pod) > 0) {
			s.mu.Lock()
			s.wrong = append(s.wrong, fmt.Sprintf("%s: ready %v, restarts %d", pod.Name, Ready(pod), Restarts(pod)))
			s.mu.Unlock()
		}
	}
}

// failures is how many probes of a pod have failed, to the kubelet's count.
func failures(t *testing.T, pod *corev1.Pod) (failed int) {
	t.Helper()
	for _, c := range pod.Spec.Containers {
		counts, err := cluster.ProbeCounts(context.Background(), pod.Name, c.Name)
		must(t, err)
		for _, count := range counts {
			failed += count.Failed
		}
	}
	return failed
}

// end says what went wrong. The kubelet's counts begin anew when it is restarted, and then mean nothing here.
func (s *steady) end(countProbes bool) {
	s.t.Helper()
	for _, pod := range s.pods {
		now, err := cluster.Get(context.Background(), pod)
		must(s.t, err)
		s.look(now)
		if failed := failures(s.t, pod); countProbes && failed != s.failed[pod.Name] {
			s.t.Errorf("%d probes of %s failed: %s", failed-s.failed[pod.Name], pod.Name, events(s.t, pod))
		}
	}
	s.cancel()
	s.done.Wait()
	if len(s.wrong) > 0 {
		s.t.Errorf("%s\n%s\n%s", strings.Join(s.wrong, "\n"), events(s.t, s.pods[0]), daemonLog())
	}
}

// client asks a pod all the while, as a process of the host's network that is not the kubelet.
type client struct {
	t      *testing.T
	pod    *corev1.Pod
	before int64
	sent   int64
	stop   chan struct{}
	done   sync.WaitGroup
}

func startClient(t *testing.T, pod *corev1.Pod) *client {
	t.Helper()
	seen, err := SeenBy(t.Context(), pod, 8080)
	must(t, err)
	c := &client{t: t, pod: pod, before: seen.Others, stop: make(chan struct{})}
	c.done.Go(func() {
		for {
			select {
			case <-c.stop:
				return
			case <-time.After(20 * time.Millisecond):
			}
			text, err := Ask(context.Background(), pod, 8080, "/healthz")
			c.sent++
			if err != nil || !strings.Contains(string(text), "says the program") {
				t.Errorf("a request that is not a probe: %q, %v", text, err)
				return
			}
		}
	})
	return c
}

// end says what did not reach the pod.
func (c *client) end() {
	c.t.Helper()
	close(c.stop)
	c.done.Wait()
	seen, err := SeenBy(context.Background(), c.pod, 8080)
	must(c.t, err)
	if got := seen.Others - c.before; got != c.sent || c.sent < 10 {
		c.t.Errorf("of %d requests that are no probes %d reached the pod", c.sent, got)
	}
}

// process finds the process of a container, by the container's cgroup.
func process(t *testing.T, pod *corev1.Pod) (pid int) {
	t.Helper()
	now, err := cluster.Get(t.Context(), pod)
	must(t, err)
	_, id, _ := strings.Cut(now.Status.ContainerStatuses[0].ContainerID, "://")
	files, err := filepath.Glob("/proc/[0-9]*/cgroup")
	must(t, err)
	for _, file := range files {
		if text, err := os.ReadFile(file); err == nil && strings.Contains(string(text), id) {
			_, err := fmt.Sscanf(file, "/proc/%d/cgroup", &pid)
			must(t, err)
			return pid
		}
	}
	t.Fatalf("no process of container %s", id)
	return 0
}
