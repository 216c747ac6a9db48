package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

// Namespace is the namespace of the tests' pods.
const Namespace = "default"

// App returns a container of the test app that listens on ports.
func App(name string, ports ...int) corev1.Container {
	var list []string
	for _, p := range ports {
		list = append(list, strconv.Itoa(p))
	}
	return corev1.Container{
		Name: name, Image: AppImage, ImagePullPolicy: corev1.PullNever,
		Command: []string{"/app", "-listen", strings.Join(list, ",")},
	}
}

// HTTP returns a probe with a period of one second.
func HTTP(path string, port intstr.IntOrString) *corev1.Probe {
	return &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Path: path, Port: port}}}
}

// TCP returns a probe with a period of one second.
func TCP(port intstr.IntOrString) *corev1.Probe {
	return &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: port}}}
}

// Pod returns a pod without a grace period.
func Pod(name string, containers ...corev1.Container) *corev1.Pod {
	none := int64(0)
	no := false
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: Namespace},
		Spec: corev1.PodSpec{
			Containers:                    containers,
			TerminationGracePeriodSeconds: &none, AutomountServiceAccountToken: &no,
		},
	}
}

// Create creates a pod.
func (c *Cluster) Create(ctx context.Context, pod *corev1.Pod) (*corev1.Pod, error) {
	return c.Client.CoreV1().Pods(pod.Namespace).Create(ctx, pod, metav1.CreateOptions{})
}

// Get returns the current state of a pod.
func (c *Cluster) Get(ctx context.Context, pod *corev1.Pod) (*corev1.Pod, error) {
	return c.Client.CoreV1().Pods(pod.Namespace).Get(ctx, pod.Name, metav1.GetOptions{})
}

// Await waits until the pod satisfies wanted, and returns it.
func (c *Cluster) Await(ctx context.Context, pod *corev1.Pod, limit time.Duration, what string, wanted func(*corev1.Pod) bool) (*corev1.Pod, error) {
	var now *corev1.Pod
	err := Until(ctx, limit, func(ctx context.Context) (err error) {
		if now, err = c.Get(ctx, pod); err != nil {
			return err
		}
		if !wanted(now) {
			status, _ := json.Marshal(now.Status)
			return fmt.Errorf("%s is not %s: %s", pod.Name, what, status)
		}
		return nil
	})
	return now, err
}

// Ready reports whether a pod is Ready.
func Ready(pod *corev1.Pod) bool {
	for _, condition := range pod.Status.Conditions {
		if condition.Type == corev1.PodReady {
			return condition.Status == corev1.ConditionTrue
		}
	}
	return false
}

// Restarts returns the number of restarts of all containers.
func Restarts(pod *corev1.Pod) (n int) {
	for _, list := range [][]corev1.ContainerStatus{pod.Status.InitContainerStatuses, pod.Status.ContainerStatuses} {
		for _, status := range list {
			n += int(status.RestartCount)
		}
	}
	return n
}

// Delete deletes a pod and waits until it is gone.
func (c *Cluster) Delete(ctx context.Context, pod *corev1.Pod) error {
	err := c.Client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{})
	if err != nil {
		return err
	}
	return Until(ctx, time.Minute, func(ctx context.Context) error {
		_, err := c.Get(ctx, pod)
		if apierrors.IsNotFound(err) {
			return nil
		}
		return fmt.Errorf("%s still exists: %w", pod.Name, err)
	})
}

// Seen counts what reached the test app; it mirrors the type of command app.
type Seen struct{ Probes, Others, Empty int64 }

// Asked counts what a client sent; it mirrors the type of command app.
type Asked struct {
	Requests, Connections int64
	Failed, ByKernel      int64
	Failure               string
}

// Ask sends a request to the app in a pod, from the node but not as the prober.
func Ask(ctx context.Context, pod *corev1.Pod, port int, path string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second) // some tests keep their pods busy
	defer cancel()
	url := "http://" + net.JoinHostPort(pod.Status.PodIP, strconv.Itoa(port)) + path
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return nil, err
	}
	request.Close = true
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		return nil, err
	}
	defer response.Body.Close() //nolint:errcheck // read only
	text, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s: %s: %s", url, response.Status, text)
	}
	return text, err
}

// SeenBy asks a pod what has reached it.
func SeenBy(ctx context.Context, pod *corev1.Pod, port int) (seen Seen, err error) {
	text, err := Ask(ctx, pod, port, "/seen")
	if err != nil {
		return seen, err
	}
	return seen, json.Unmarshal(text, &seen)
}

// ProbeCount counts the kubelet's probes of a container.
type ProbeCount struct{ Successful, Failed int }

// ProbeCounts returns the kubelet's counts (prober_probe_total in /metrics/probes), by container and probe type.
func (c *Cluster) ProbeCounts(ctx context.Context, pod *corev1.Pod) (map[string]map[string]ProbeCount, error) {
	text, err := c.Kubelet(ctx, "/metrics/probes")
	if err != nil {
		return nil, err
	}
	counts := map[string]map[string]ProbeCount{}
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "prober_probe_total{") || !strings.Contains(line, fmt.Sprintf("pod_uid=%q", pod.UID)) {
			continue
		}
		var value float64
		fields := strings.Fields(line)
		if _, err := fmt.Sscan(fields[len(fields)-1], &value); err != nil {
			return nil, fmt.Errorf("%s: %w", line, err)
		}
		container, kind := Label(line, "container"), strings.ToLower(Label(line, "probe_type"))
		if counts[container] == nil {
			counts[container] = map[string]ProbeCount{}
		}
		count := counts[container][kind]
		if Label(line, "result") == "successful" {
			count.Successful += int(value)
		} else {
			count.Failed += int(value)
		}
		counts[container][kind] = count
	}
	return counts, nil
}

// Label returns the value of a label in a line of metrics.
func Label(line, name string) string {
	_, rest, _ := strings.Cut(line, name+`="`)
	value, _, _ := strings.Cut(rest, `"`)
	return value
}

// AccessLog returns the lines that a container logged, from the kubelet's log files. Instance 0 is the one before any
// restart.
func AccessLog(pod *corev1.Pod, container string, instance int) ([]string, error) {
	file := fmt.Sprintf("/var/log/pods/%s_%s_%s/%s/%d.log", pod.Namespace, pod.Name, pod.UID, container, instance)
	text, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	var lines []string
	for line := range strings.Lines(string(text)) {
		// The runtime prefixes each line with the time, the stream and a tag.
		if parts := strings.SplitN(strings.TrimSpace(line), " ", 4); len(parts) == 4 {
			lines = append(lines, parts[3])
		}
	}
	return lines, nil
}
