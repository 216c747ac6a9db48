package bench

import (
	"context"
	"encoding/json"
	"maps"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes/fake"
	"k8s.io/client-go/tools/record"
	"k8s.io/component-base/metrics/legacyregistry"
	"k8s.io/klog/v2"
	_ "k8s.io/kubernetes/pkg/apis/core/install" // the prober refers to pods in events
	kubepod "k8s.io/kubernetes/pkg/kubelet/pod"
	"k8s.io/kubernetes/pkg/kubelet/prober"
	proberesults "k8s.io/kubernetes/pkg/kubelet/prober/results"
	"k8s.io/kubernetes/pkg/kubelet/status"
	statustest "k8s.io/kubernetes/pkg/kubelet/status/testing"
	kubeletutil "k8s.io/kubernetes/pkg/kubelet/util"

	"github.com/probelet/probelet/e2e/harness/node"
	"github.com/probelet/probelet/e2e/harness/role"
)

// kubelet is the part of the kubelet that probes (pkg/kubelet/prober), in a process and a cgroup of its own. It is set up as in
// Kubernetes' own scale_test.go of that package.
type kubelet struct{ *role.Process }

const kubeletRole = "kubelet"

func startKubelet(t testing.TB, cgroup string) *kubelet {
	t.Helper()
	p, err := role.Start(kubeletRole, "", cgroup, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return &kubelet{p}
}

// probe starts to probe pods, which are running.
func (k *kubelet) probe(t testing.TB, pods ...node.Probed) {
	t.Helper()
	for _, p := range pods {
		text, err := json.Marshal(running(p))
		if err == nil {
			err = k.Call("Probe", text, &struct{}{})
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

// running returns the pod as the API server has it.
func running(p node.Probed) *v1.Pod {
	pod := &v1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: node.Namespace, Name: p.Pod.Name, UID: types.UID(p.Pod.Name)},
		Spec:       v1.PodSpec{Containers: p.Containers()},
		Status:     v1.PodStatus{Phase: v1.PodRunning, PodIP: p.Pod.IPv4.String(), PodIPs: []v1.PodIP{{IP: p.Pod.IPv4.String()}}},
	}
	started := true
	for _, c := range pod.Spec.Containers {
		pod.Status.ContainerStatuses = append(pod.Status.ContainerStatuses, v1.ContainerStatus{
			Name: c.Name, ContainerID: "containerd://" + Container{p.Pod.Name, c.Name}.id(), Started: &started,
			State: v1.ContainerState{Running: &v1.ContainerStateRunning{StartedAt: metav1.Now()}},
		})
	}
	return pod
}

// Container is a container of a pod, both by name.
type Container struct{ Pod, Name string }

func (c Container) id() string { return c.Pod + "/" + c.Name }

func containerOf(id string) Container {
	pod, name, _ := strings.Cut(id, "/")
	return Container{pod, name}
}

// Outcomes counts the probes of a container.
type Outcomes struct{ Probes, Failed int }

// counts returns the outcomes by container.
func (k *kubelet) counts(t testing.TB) map[Container]Outcomes {
	t.Helper()
	var counts map[Container]Outcomes
	if err := k.Call("Counts", struct{}{}, &counts); err != nil {
		t.Fatal(err)
	}
	return counts
}

// total returns the outcomes of all containers.
func (k *kubelet) total(t testing.TB) (sum Outcomes) {
	t.Helper()
	for _, o := range k.counts(t) {
		sum.Probes += o.Probes
		sum.Failed += o.Failed
	}
	return sum
}

// verdicts returns when the kubelet decided to restart containers.
func (k *kubelet) verdicts(t testing.TB) map[Container]time.Time {
	t.Helper()
	var verdicts map[Container]time.Time
	if err := k.Call("Verdicts", struct{}{}, &verdicts); err != nil {
		t.Fatal(err)
	}
	return verdicts
}

// probing is the service in the kubelet's process.
type probing struct {
	start   sync.Once
	pods    status.Manager
	manager prober.Manager

	mu       sync.Mutex
	verdicts map[Container]time.Time
}

func (p *probing) setUp() {
	legacyregistry.MustRegister(prober.ProberResults, prober.ProberDuration) // as the kubelet does: counting costs CPU
	p.pods = status.NewManager(
		&fake.Clientset{}, kubepod.NewBasicPodManager(), &statustest.FakePodDeletionSafetyProvider{}, kubeletutil.NewPodStartupLatencyTracker(),
	)
	liveness, readiness, startup := proberesults.NewManager(), proberesults.NewManager(), proberesults.NewManager()
	p.verdicts = map[Container]time.Time{}
	go func() {
		for u := range liveness.Updates() {
			if u.Result == proberesults.Failure {
				p.mu.Lock()
				p.verdicts[containerOf(u.ContainerID.ID)] = time.Now()
				p.mu.Unlock()
			}
		}
	}()
	go func() {
		for range readiness.Updates() { //nolint:revive // the manager waits until they are taken
		}
	}()
	p.manager = prober.NewManager(p.pods, liveness, readiness, startup, nil, &record.FakeRecorder{})
}

func (p *probing) Probe(text []byte, _ *struct{}) error {
	p.start.Do(p.setUp)
	var pod v1.Pod
	if err := json.Unmarshal(text, &pod); err != nil {
		return err
	}
	p.pods.SetPodStatus(klog.Background(), &pod, pod.Status)
	p.manager.AddPod(context.Background(), &pod)
	return nil
}

func (p *probing) Verdicts(_ struct{}, verdicts *map[Container]time.Time) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	*verdicts = maps.Clone(p.verdicts)
	return nil
}

func (p *probing) Counts(_ struct{}, counts *map[Container]Outcomes) error {
	families, err := legacyregistry.DefaultGatherer.Gather()
	if err != nil {
		return err
	}
	*counts = map[Container]Outcomes{}
	for _, family := range families {
		if family.GetName() != "prober_probe_total" {
			continue
		}
		for _, m := range family.GetMetric() {
			labels := map[string]string{}
			for _, l := range m.GetLabel() {
				labels[l.GetName()] = l.GetValue()
			}
			at, n := Container{labels["pod"], labels["container"]}, int(m.GetCounter().GetValue())
			c := (*counts)[at]
			c.Probes += n
			if labels["result"] != "successful" {
				c.Failed += n
			}
			(*counts)[at] = c
		}
	}
	return nil
}
