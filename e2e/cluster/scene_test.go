package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/probelet/probelet/e2e/harness/kube"
	"github.com/probelet/probelet/e2e/harness/node"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// deployed holds the values of the deployed release; nil means none.
var deployed map[string]any

// deploy deploys the chart with these values, in mode answer and with the hook under test.
func deploy(t *testing.T, values map[string]any) {
	t.Helper()
	all := map[string]any{"mode": "answer", "hook": *hook}
	for name, value := range values {
		all[name] = value
	}
	if deployed != nil && reflect.DeepEqual(deployed, all) {
		return
	}
	deployed = nil
	_, err := cluster.Deploy(t.Context(), all)
	if err != nil {
		t.Fatalf("%v\n%s", err, daemonLog())
	}
	eventually(t, "the daemon is ready", time.Minute, daemonReady)
	deployed = all
}

// daemonReady reports whether the daemon says that it is ready.
func daemonReady() bool {
	response, err := http.Get("http://127.0.0.1:9553/readyz")
	if err != nil {
		return false
	}
	_ = response.Body.Close()
	return response.StatusCode == http.StatusOK
}

// undeploy ends the daemon and leaves the node as it is.
func undeploy(t *testing.T) {
	t.Helper()
	deployed = nil
	must(t, cluster.Undeploy(t.Context()))
}

// uninstall follows the chart's instructions.
func uninstall(t *testing.T) {
	t.Helper()
	deployed = nil
	if _, err := cluster.Deploy(t.Context(), map[string]any{"uninstall": true}); err != nil {
		t.Fatalf("%v\n%s", err, daemonLog())
	}
	undeploy(t)
}

// installed reports whether the plugin is on the node.
func installed() bool {
	_, err := os.Stat(filepath.Join(kube.BinDir, "probelet"))
	return err == nil
}

// daemonLog returns the logs of the daemon's pods.
func daemonLog() string {
	files, _ := filepath.Glob("/var/log/pods/" + kube.System + "_*/*/*.log")
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
	return awaitReady(t, create(t, pod))
}

func create(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	made, err := cluster.Create(t.Context(), pod)
	must(t, err)
	t.Cleanup(func() {
		if err := cluster.Delete(context.Background(), made); err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
	})
	return made
}

func awaitReady(t *testing.T, pod *corev1.Pod) *corev1.Pod {
	t.Helper()
	pod, err := cluster.Await(t.Context(), pod, time.Minute, "ready", kube.Ready)
	if err != nil {
		t.Fatalf("%v\n%v", err, events(t, pod))
	}
	return pod
}

// patience is the timeout of probes that must not fail, for a machine that is busy with other tests. The staleness of endpoints probed
// each second does not depend on it.
const patience = 5 // seconds

// web returns a pod with two probes per second on the same path.
func web(name string) *corev1.Pod {
	c := kube.App("app", 8080)
	c.ReadinessProbe = kube.HTTP("/healthz", intstr.FromInt32(8080))
	c.ReadinessProbe.TimeoutSeconds = patience
	c.LivenessProbe = kube.HTTP("/healthz", intstr.FromInt32(8080))
	c.LivenessProbe.TimeoutSeconds = patience
	return kube.Pod(name, c)
}

// events returns the events of a pod, or of all pods.
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

// status is the part of the output of probeletctl status -o json that the tests need.
type status struct {
	Prober      *struct{ CgroupIDs []uint64 }
	Counters    map[string]int
	Attachments []attachment
}

type attachment struct {
	Pod, ContainerID, IfName, HostIfName, Hook string

	Adopted   bool
	Endpoints []endpoint
}

type endpoint struct {
	Kind, Path, State, InstanceID, Disagreement string

	Port, Hits int
	Probes     []struct {
		Container, Type string

		WorstDetectionSeconds, WorstDetectionPlainSeconds, WorstDetectionHangSeconds float64
	}
}

// of returns the attachment of a pod, or an empty one.
func (s status) of(pod string) attachment {
	for _, a := range s.Attachments {
		if a.Pod == kube.Namespace+"/"+pod {
			return a
		}
	}
	return attachment{}
}

func (s status) hits(pod string) (n int) {
	for _, e := range s.of(pod).Endpoints {
		n += e.Hits
	}
	return n
}

func ctl(t *testing.T, args ...string) string {
	t.Helper()
	out, err := node.RunCtl(filepath.Join(cluster.Bin, "probeletctl"), args...)
	must(t, err)
	return out
}

func readStatus(t *testing.T) (s status) {
	t.Helper()
	must(t, json.Unmarshal([]byte(ctl(t, "status", "-o", "json")), &s))
	return s
}

// awaitHits waits until the kernel has answered n more probes of a pod, with the hook under test.
func awaitHits(t *testing.T, pod string, n int) {
	t.Helper()
	before := readStatus(t).hits(pod)
	eventually(t, fmt.Sprintf("%d probes of %s are answered", n, pod), time.Minute, func() bool {
		return readStatus(t).hits(pod) >= before+n
	})
	if got := readStatus(t).of(pod).Hook; got != *hook {
		t.Errorf("%s is answered by hook %q", pod, got)
	}
}

func eventually(t *testing.T, what string, limit time.Duration, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(500 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("not within %s: %s\n%s\n%s", limit, what, ctl(t, "status", "-o", "wide"), daemonLog())
}

// process finds the process of a container, by the container's cgroup.
func process(t *testing.T, pod *corev1.Pod) (pid int) {
	t.Helper()
	now, err := cluster.Get(t.Context(), pod)
	must(t, err)
	_, id, _ := strings.Cut(now.Status.ContainerStatuses[0].ContainerID, "://")
	pids, err := kube.Processes("cgroup", func(text string) bool { return strings.Contains(text, id) })
	must(t, err)
	if len(pids) == 0 {
		t.Fatalf("no process of container %s", id)
	}
	return pids[0]
}

// filter adds a rule to one of the node's netfilter hooks, until the end of the test.
func filter(t *testing.T, family nftables.TableFamily, hook *nftables.ChainHook, rule ...expr.Any) {
	t.Helper()
	remove, err := node.AddRule(t.Name(), family, hook, rule...)
	must(t, err)
	t.Cleanup(func() { must(t, remove()) })
}
