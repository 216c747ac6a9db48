package cluster

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/probelet/probelet/e2e/harness/kube"
)

// everything returns a pod with all kinds of probes that can be answered.
func everything(name string) *corev1.Pod {
	first := kube.App("first", 8080, 8081)
	first.Ports = []corev1.ContainerPort{{Name: "web", ContainerPort: 8080}}
	first.StartupProbe = kube.HTTP("/healthz", intstr.FromString("web"))
	first.ReadinessProbe = kube.HTTP("/healthz", intstr.FromString("web"))
	first.LivenessProbe = kube.HTTP("/live?full=1", intstr.FromInt32(8081))
	second := kube.App("second", 9090)
	second.Ports = []corev1.ContainerPort{{Name: "store", ContainerPort: 9090}}
	second.StartupProbe = kube.TCP(intstr.FromInt32(9090))
	second.ReadinessProbe = kube.TCP(intstr.FromString("store"))
	second.LivenessProbe = kube.TCP(intstr.FromInt32(9090))
	sidecar := kube.App("sidecar", 7070)
	always := corev1.ContainerRestartPolicyAlways
	sidecar.RestartPolicy = &always
	sidecar.StartupProbe = kube.HTTP("/", intstr.FromInt32(7070))
	sidecar.ReadinessProbe = kube.HTTP("/", intstr.FromInt32(7070))
	sidecar.LivenessProbe = kube.HTTP("/", intstr.FromInt32(7070))
	for _, c := range []corev1.Container{first, second, sidecar} {
		for _, p := range []*corev1.Probe{c.StartupProbe, c.ReadinessProbe, c.LivenessProbe} {
			p.TimeoutSeconds = patience
		}
	}
	pod := kube.Pod(name, first, second)
	pod.Spec.InitContainers = []corev1.Container{sidecar}
	return pod
}

// account sums up one endpoint of all pods that are alike.
type account struct {
	succeeded int // probes, according to the kubelet
	answered  int // in the kernel
	logged    int // in the app's access log
}

// accounts returns the accounts of pods by endpoint. Each pod's must add up.
func accounts(t *testing.T, pods []*corev1.Pod) map[string]account {
	t.Helper()
	all := map[string]account{}
	for _, pod := range pods {
		endpoints := readStatus(t).of(pod.Name).Endpoints
		if len(endpoints) != 4 {
			t.Errorf("%s has %d endpoints\n%s", pod.Name, len(endpoints), ctl(t, "status", "-o", "wide"))
		}
		counts, err := cluster.ProbeCounts(t.Context(), pod)
		must(t, err)
		for _, e := range endpoints {
			one := account{answered: e.Hits, logged: logged(t, pod, e)}
			for _, p := range e.Probes {
				one.succeeded += counts[p.Container][p.Type].Successful
			}
			name := fmt.Sprintf("%s %d%s", e.Kind, e.Port, e.Path)
			// The sources are not read at the same moment, and there are up to three probes per second.
			if difference := one.succeeded - one.answered - one.logged; max(difference, -difference) > 3 || one.logged == 0 {
				t.Errorf("%s, %s: %+v", pod.Name, name, one)
			}
			sum := all[name]
			all[name] = account{sum.succeeded + one.succeeded, sum.answered + one.answered, sum.logged + one.logged}
		}
	}
	return all
}

// logged returns how many probes of an endpoint are in the access log of its app.
func logged(t *testing.T, pod *corev1.Pod, e endpoint) (n int) {
	t.Helper()
	lines, err := kube.AccessLog(pod, e.Probes[0].Container, 0)
	must(t, err)
	prefix := fmt.Sprintf("%d GET %s kube-probe/", e.Port, e.Path)
	if e.Path == "" {
		prefix = fmt.Sprintf("%d no request", e.Port)
	}
	for _, line := range lines {
		if strings.HasPrefix(line, prefix) {
			n++
		}
	}
	return n
}

// Probes of all kinds look the same to Kubernetes with and without probelet, and fewer reach the pod.
func TestProbesAreAnswered(t *testing.T) {
	measureWithout(t)
	deploy(t, nil)
	off, readyOff := runAlike(t, "off", map[string]string{"probelet.dev/mode": "off"})
	on, readyOn := runAlike(t, "answer", nil)
	watch := watchSteady(t, slices.Concat(off, on)...)
	client := startClient(t, on[0])
	time.Sleep(20 * time.Second)
	client.end()
	watch.end()

	table := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	_, _ = fmt.Fprintf(table, "%d PODS\tREADY AFTER\n", alike)
	_, _ = fmt.Fprintf(table, "without probelet\t%v\nmode off\t%v\nmode answer\t%v\n", withoutProbelet, readyOff, readyOn)
	must(t, table.Flush())
	// Shown but not asserted: a busy machine distorts times.

	_, _ = fmt.Fprintf(table, "ENDPOINT\tMODE\tPROBES\tANSWERED\tIN THE ACCESS LOG\n")
	accountsOff, accountsOn := accounts(t, off), accounts(t, on)
	for name, plain := range accountsOff {
		a := accountsOn[name]
		_, _ = fmt.Fprintf(table, "%s\toff\t%d\t%d\t%d\n", name, plain.succeeded, plain.answered, plain.logged)
		_, _ = fmt.Fprintf(table, "\tanswer\t%d\t%d\t%d\n", a.succeeded, a.answered, a.logged)
		if plain.answered != 0 || a.answered*3 < a.succeeded {
			t.Errorf("%s: off %+v, answer %+v", name, plain, a)
		}
	}
	must(t, table.Flush())
}
