package cluster

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// everything is a pod with all kinds of probes that are answered.
func everything(name string) *corev1.Pod {
	first := App("first", 8080, 8081)
	first.Ports = []corev1.ContainerPort{{Name: "web", ContainerPort: 8080}}
	first.StartupProbe = HTTP("/healthz", intstr.FromString("web"))
	first.ReadinessProbe = HTTP("/healthz", intstr.FromString("web"))
	first.LivenessProbe = HTTP("/live?full=1", intstr.FromInt32(8081))
	second := App("second", 9090)
	second.ReadinessProbe = TCP(intstr.FromInt32(9090))
	second.LivenessProbe = TCP(intstr.FromInt32(9090))
	sidecar := App("sidecar", 7070)
	always := corev1.ContainerRestartPolicyAlways
	sidecar.RestartPolicy = &always
	sidecar.StartupProbe = HTTP("/", intstr.FromInt32(7070))
	sidecar.ReadinessProbe = HTTP("/", intstr.FromInt32(7070))
	pod := Pod(name, first, second)
	pod.Spec.InitContainers = []corev1.Container{sidecar}
	return pod
}

// All kinds of probes, with and without probelet: the same for Kubernetes, less for the pod.
func TestProbesAreAnswered(t *testing.T) {
	deploy(t, nil)
	type seen struct {
		pod     *corev1.Pod
		ready   []time.Duration // of some pods
		server  int64           // HTTP probes that reached the programs
		probes  int             // that the kubelet has sent
		failed  int
		answers int
	}
	all := []*seen{{}, {}}
	for i := range 3 {
		for j, mode := range []string{"off", "answer"} {
			pod := everything(fmt.Sprintf("all-%s-%d", mode, i))
			pod.Annotations = map[string]string{"probelet.dev/mode": mode}
			start := time.Now()
			all[j].pod = run(t, pod)
			all[j].ready = append(all[j].ready, time.Since(start).Round(100*time.Millisecond))
		}
	}
	client := startClient(t, all[1].pod)
	time.Sleep(20 * time.Second)
	client.end()
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	_, _ = fmt.Fprintln(table, "MODE\tREADY AFTER\tPROBES SENT\tFAILED\tANSWERED\tHTTP REACHED THE POD\tRESTARTS")
	for i, mode := range []string{"off", "answer"} {
		s := all[i]
		for _, c := range []string{"first", "second", "sidecar"} {
			counts, err := cluster.ProbeCounts(t.Context(), s.pod.Name, c)
			must(t, err)
			for _, count := range counts {
				s.probes += count.Successful + count.Failed
				s.failed += count.Failed
			}
		}
		for _, port := range []int{8080, 7070} {
			reached, err := SeenBy(t.Context(), s.pod, port)
			must(t, err)
			s.server += reached.Probes
		}
		s.answers = readStatus(t).hits(s.pod.Name)
		now, err := cluster.Get(t.Context(), s.pod)
		must(t, err)
		_, _ = fmt.Fprintf(table, "%s\t%v\t%d\t%d\t%d\t%d\t%d\n", mode, s.ready, s.probes, s.failed, s.answers, s.server, Restarts(now))
		if Restarts(now) != 0 || !Ready(now) || s.probes < 80 {
			t.Errorf("%s: restarts %d, ready %v, %d probes", mode, Restarts(now), Ready(now), s.probes)
		}
	}
	must(t, table.Flush())
	off, on := all[0], all[1]
	if off.answers != 0 || on.answers*3 < on.probes {
		t.Errorf("answered: %d of %d when off, %d of %d\n%s", off.answers, off.probes, on.answers, on.probes, ctl(t, "status", "-o", "wide"))
	}
	if on.server*3 > off.server*2 {
		t.Errorf("%d HTTP probes reached the pod, %d the one without probelet", on.server, off.server)
	}
	// The first ones of a container that has not begun to listen yet.
	if on.failed > off.failed+3 {
		t.Errorf("%d probes failed, %d without probelet", on.failed, off.failed)
	}
}

// bound is the worst case for a probe, as probelet states it.
func bound(t *testing.T, pod *corev1.Pod, kind string) time.Duration {
	t.Helper()
	text := ctl(t, "explain", Namespace+"/"+pod.Name)
	for line := range strings.Lines(text) {
		if _, rest, ok := strings.Cut(line, "app/"+kind); ok {
			_, within, ok := strings.Cut(rest, "detected within ")
			if !ok {
				break
			}
			d, err := time.ParseDuration(strings.Fields(within)[0])
			must(t, err)
			return d
		}
	}
	t.Fatalf("no bound of %s in\n%s", kind, text)
	return 0
}

// slack is what the kubelet needs to act, and to tell the API server, and a busy machine to come round to it.
const slack = 10 * time.Second

// Whatever happens to the program, Kubernetes knows within the stated bound, and nothing is wrong afterwards.
func TestFailuresAreDetected(t *testing.T) {
	deploy(t, nil)
	notReady := func(pod *corev1.Pod) bool { return !Ready(pod) }
	set := func(query string) func(*testing.T, *corev1.Pod) {
		return func(t *testing.T, pod *corev1.Pod) {
			t.Helper()
			_, err := Ask(t.Context(), pod, 8081, "/set?"+query)
			if err != nil && !strings.Contains(query, "exit") {
				t.Fatal(err)
			}
		}
	}
	signal := func(s syscall.Signal) func(*testing.T, *corev1.Pod) {
		return func(t *testing.T, pod *corev1.Pod) {
			t.Helper()
			must(t, syscall.Kill(process(t, pod), s))
		}
	}
	for name, test := range map[string]struct {
		liveness   bool
		fail, mend func(*testing.T, *corev1.Pod)
	}{
		"status":        {false, set("status=500"), set("status=200")},
		"hang":          {false, signal(syscall.SIGSTOP), signal(syscall.SIGCONT)},
		"port":          {false, set("close=8080"), set("open=8080")},
		"crash":         {true, set("exit=1"), nil},
		"killed":        {true, signal(syscall.SIGKILL), nil},
		"live-status":   {true, set("status=500"), nil},
		"live-hang":     {true, signal(syscall.SIGSTOP), nil},
		"live-port":     {true, set("close=8080"), nil},
		"status-passes": {false, set("hang=10s"), func(*testing.T, *corev1.Pod) {}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			c := App("app", 8080, 8081)
			c.ReadinessProbe = HTTP("/healthz", intstr.FromInt32(8080))
			kind := "readiness"
			if test.liveness {
				c.LivenessProbe = HTTP("/healthz", intstr.FromInt32(8080))
				kind = "liveness"
			}
			pod := run(t, Pod("fails-"+name, c))
			awaitHits(t, pod.Name, 3)
			limit := bound(t, pod, kind) + slack
			test.fail(t, pod)
			if test.liveness {
				restarted := func(pod *corev1.Pod) bool { return Restarts(pod) == 1 }
				_, err := cluster.Await(t.Context(), pod, limit, "restarted", restarted)
				must(t, err)
			} else {
				_, err := cluster.Await(t.Context(), pod, limit, "not ready", notReady)
				must(t, err)
				test.mend(t, pod)
			}
			pod = awaitReady(t, pod)
			restarts := Restarts(pod)
			awaitHits(t, pod.Name, 3)
			now, err := cluster.Get(t.Context(), pod)
			must(t, err)
			if !Ready(now) || Restarts(now) != restarts {
				t.Errorf("afterwards: ready %v, restarts %d\n%s", Ready(now), Restarts(now), events(t, now))
			}
		})
	}
}
