package source

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/probelet/probelet/daemon/internal/podspec"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// The corpus: pods as the kubelet lists them, each with a file that says which endpoints it has and whether they may be
// answered.
func TestCorpus(t *testing.T) {
	files, err := filepath.Glob("testdata/pods/*.yaml")
	if err != nil || len(files) < 40 {
		t.Fatalf("%d pods, %v; want at least 40", len(files), err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".yaml"), func(t *testing.T) {
			want := readFile(t, strings.TrimSuffix(file, ".yaml")+".endpoints")
			if got := described(t, podOf(t, file)); got != want {
				t.Errorf("got:\n%swant:\n%s", got, want)
			}
		})
	}
}

func podOf(t *testing.T, file string) *corev1.Pod {
	t.Helper()
	var pod corev1.Pod
	if err := yaml.Unmarshal([]byte(readFile(t, file)), &pod); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
	return &pod
}

func readFile(t *testing.T, path string) string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// described describes the conversion of a pod, with one line per endpoint.
func described(t *testing.T, p *corev1.Pod) string {
	t.Helper()
	pod, matters := podspec.OnNode(p)
	if pod.LeftAlone != "" {
		text := "skipped: " + pod.LeftAlone + "\n"
		for _, s := range slices.Concat(pod.Probes, pod.Hooks) {
			text += fmt.Sprintf("asks others: %s %s\n", s.Asker(), probe.Endpoint{Port: s.Port, Kind: s.Kind, Path: s.Path, Host: s.Host})
		}
		if matters != strings.Contains(text, "asks others") {
			t.Errorf("matters: %v\n%s", matters, text)
		}
		return text
	}
	endpoints, err := probe.Endpoints(pod, probe.NewDefaults().Settings(pod.Annotations), probe.Limits{Request: 1024, Records: 64})
	if err != nil {
		t.Fatal(err)
	}
	var lines strings.Builder
	lines.WriteString("ips")
	for _, ip := range pod.IPs {
		lines.WriteString(" " + ip.String())
	}
	for _, e := range endpoints {
		fmt.Fprintf(&lines, "\n%s", e.Endpoint)
		verdict := "may be answered"
		if e.Reason.Text != "" {
			verdict = "never: " + e.Reason.Text
		}
		fmt.Fprintf(&lines, " %v every %s, timeout %s: %s", e.Askers, e.Period, e.Timeout, verdict)
	}
	for _, h := range pod.Hooks {
		fmt.Fprintf(&lines, "\n%s %s :%d%s at %q with", h.Asker(), h.Kind, h.Port, h.Path, h.Host)
		for _, header := range h.Headers {
			fmt.Fprintf(&lines, " %s=%s", header.Name, header.Value)
		}
	}
	lines.WriteString("\n")
	return lines.String()
}

// Pods and containers are distinguished from others of the same name.
func TestIdentity(t *testing.T) {
	running := corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}
	pod := podOf(t, "testdata/pods/lone-readiness.yaml")
	pod.UID = "of the API server"
	container := pod.Spec.Containers[0].Name
	for _, test := range []struct {
		annotations  map[string]string
		status       corev1.ContainerStatus
		uid, running string
	}{
		{nil, corev1.ContainerStatus{Name: container, ContainerID: "containerd://1", RestartCount: 2, State: running},
			"of the API server", "containerd://1#2"},
		{nil, corev1.ContainerStatus{Name: container, ContainerID: "containerd://1", RestartCount: 2}, "of the API server", ""},
		{nil, corev1.ContainerStatus{Name: "another", ContainerID: "containerd://1", State: running}, "of the API server", ""},
		{map[string]string{corev1.MirrorPodAnnotationKey: "of the file"}, corev1.ContainerStatus{}, "of the file", ""},
	} {
		pod.Annotations = test.annotations
		pod.Status.ContainerStatuses = []corev1.ContainerStatus{test.status}
		stripped, err := strip(pod)
		if err != nil {
			t.Fatal(err)
		}
		for _, p := range []*corev1.Pod{pod, stripped.(*corev1.Pod)} {
			got, matters := podspec.OnNode(p)
			if !matters || len(got.Probes) == 0 {
				t.Fatalf("%s, %d probes", got.LeftAlone, len(got.Probes))
			}
			if got.UID != test.uid || got.Probes[0].Instance != test.running {
				t.Errorf("uid %q, instance %q; want %q, %q", got.UID, got.Probes[0].Instance, test.uid, test.running)
			}
		}
	}
}
