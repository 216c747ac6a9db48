package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/probelet/probelet/e2e/harness/kube"
)

// busy returns a pod with 2 % of a core and a liveness probe each second.
func busy(name string, annotations map[string]string) *corev1.Pod {
	c := kube.App("app", 8080, 8081)
	c.LivenessProbe = kube.HTTP("/healthz", intstr.FromInt32(8080))
	c.LivenessProbe.FailureThreshold = 3
	c.Resources.Limits = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse("20m")}
	pod := kube.Pod(name, c)
	pod.Annotations = annotations
	return pod
}

// clientLoad keeps a pod busy. Each of its clients sends one request after another, and together they need more CPU time than the pod
// has.
type clientLoad struct {
	cancel  context.CancelFunc
	clients sync.WaitGroup
	served  atomic.Int64
	last    atomic.Int64 // when the last of them was served, in nanoseconds of Unix time
}

func startLoad(t *testing.T, pod *corev1.Pod) *clientLoad {
	t.Helper()
	l := &clientLoad{}
	ctx, cancel := context.WithCancel(t.Context())
	l.cancel = cancel
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: 30 * time.Second}
	for range 10 {
		l.clients.Go(func() {
			for ctx.Err() == nil {
				if err := l.ask(ctx, client, "http://"+net.JoinHostPort(pod.Status.PodIP, "8080")+"/work?cpu=5ms"); err != nil {
					time.Sleep(100 * time.Millisecond) // it is being restarted
				}
			}
		})
	}
	t.Cleanup(l.stop)
	return l
}

func (l *clientLoad) ask(ctx context.Context, client *http.Client, url string) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return err
	}
	response, err := client.Do(request)
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, response.Body)
	if response.StatusCode == http.StatusOK {
		l.served.Add(1)
		l.last.Store(time.Now().UnixNano())
	}
	return errors.Join(err, response.Body.Close())
}

func (l *clientLoad) stop() {
	l.cancel()
	l.clients.Wait()
}

// awaitVerdict waits until the kubelet has decided to restart the pod's container, and returns when it did so. Its events have a
// resolution of a second, so that may be up to a second too early.
func awaitVerdict(t *testing.T, pod *corev1.Pod, begin time.Time, limit time.Duration) (decided time.Time) {
	t.Helper()
	eventually(t, "the kubelet decides to restart "+pod.Name, limit, func() bool {
		list, err := cluster.Client.CoreV1().Events(pod.Namespace).List(t.Context(), metav1.ListOptions{})
		must(t, err)
		return slices.ContainsFunc(list.Items, func(e corev1.Event) bool {
			decided = e.LastTimestamp.Time
			return e.InvolvedObject.Name == pod.Name && e.Reason == "Killing" && !decided.Before(begin.Truncate(time.Second))
		})
	})
	return decided
}

// A pod that is busy serving is restarted again and again; with liveness: traffic it never is, until it is stopped or serves only
// errors. Then the kubelet decides within the stated bound to restart it; the restart itself takes longer.
func TestBusyPodsLive(t *testing.T) {
	deploy(t, nil)
	without := run(t, busy("busy", map[string]string{"probelet.dev/mode": "off"}))
	with := run(t, busy("busy-traffic", map[string]string{"probelet.dev/liveness": "traffic"}))
	awaitHits(t, with.Name, 2)
	start := time.Now()
	loads := []*clientLoad{startLoad(t, without), startLoad(t, with)}
	const watched = 5 * time.Minute
	for time.Since(start) < watched {
		time.Sleep(5 * time.Second)
		if now, err := cluster.Get(t.Context(), with); err != nil || kube.Restarts(now) > 0 {
			t.Fatalf("restarted after %s: %v\n%s\n%s", time.Since(start), err, events(t, with), ctl(t, "explain", kube.Namespace+"/"+with.Name))
		}
	}
	plain, err := cluster.Get(t.Context(), without)
	must(t, err)
	if kube.Restarts(plain) < 2 {
		t.Errorf("restarted %d times without probelet, want at least 2: the pod is not busy enough", kube.Restarts(plain))
	}
	fmt.Printf("A BUSY POD, FIVE MINUTES   RESTARTS   REQUESTS SERVED   PROBES FAILED\n")
	for i, p := range []*corev1.Pod{plain, with} {
		now, err := cluster.Get(t.Context(), p)
		must(t, err)
		fmt.Printf("%-26s %-10d %-17d %d\n", p.Name, kube.Restarts(now), loads[i].served.Load(), failures(t, p))
	}

	loads[0].stop()
	for i, failure := range []struct {
		name string
		act  act
	}{{"is stopped", signal(syscall.SIGSTOP)}, {"serves errors only", set("status=500")}} {
		mustBeDetected(t, with, loads[1], failure.name, failure.act)
		loads[1].stop() // so that it can start
		_, err = cluster.Await(t.Context(), with, time.Minute, "running again", func(now *corev1.Pod) bool { return kube.Restarts(now) == i+1 })
		must(t, err)
		with = awaitReady(t, with)
		awaitHits(t, with.Name, 2)
		loads[1] = startLoad(t, with)
		time.Sleep(10 * time.Second) // until it is as busy as before
	}
}

// mustBeDetected lets a busy pod fail, and waits until the kubelet has decided to restart it. All that probelet adds to the delay is that
// probes are still answered for a while. They are counted, because the rest depends on how fast the kubelet and the machine are.
func mustBeDetected(t *testing.T, pod *corev1.Pod, load *clientLoad, name string, fail act) {
	t.Helper()
	probe := readStatus(t).of(pod.Name).Endpoints[0].Probes[0]
	stated, window := seconds(probe.WorstDetectionHangSeconds), seconds(probe.WorstDetectionHangSeconds-probe.WorstDetectionPlainSeconds)
	begin := time.Now()
	fail(t, pod)
	counted, then := time.Now(), successes(t, pod)
	decided := awaitVerdict(t, pod, begin, stated+slack)
	answered := successes(t, pod) - then

	// It takes a busy pod some time to do as it is told. So its failure begins after the last request that it served.
	if last := time.Unix(0, load.last.Load()); last.After(begin) {
		begin = last
	}
	after := decided.Sub(begin).Round(100 * time.Millisecond)
	fmt.Printf("%s %s: the kubelet decided after %s (stated: %s); %d probes were answered meanwhile\n", pod.Name, name, after, stated, answered)
	period := time.Duration(pod.Spec.Containers[0].LivenessProbe.PeriodSeconds) * time.Second
	if most := int(max(0, begin.Add(window).Sub(counted))/period) + 1; answered > most {
		t.Errorf("%s: %d probes were answered within %s after the failure, want at most %d", name, answered, window, most)
	}
	if after <= 0 || after > stated+slack {
		t.Errorf("%s: decided after %s, stated %s\n%s", name, after, stated, events(t, pod))
	}
}

// successes returns how many liveness probes of a pod have succeeded according to the kubelet.
func successes(t *testing.T, pod *corev1.Pod) int {
	t.Helper()
	counts, err := cluster.ProbeCounts(t.Context(), pod)
	must(t, err)
	return counts[pod.Spec.Containers[0].Name]["liveness"].Successful
}
