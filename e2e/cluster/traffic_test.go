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
	}
	return errors.Join(err, response.Body.Close())
}

func (l *clientLoad) stop() {
	l.cancel()
	l.clients.Wait()
}

// verdictAfter returns how long after begin the kubelet decided to restart the pod's container. Its events have a resolution of a second,
// so that may be up to a second too little.
func verdictAfter(t *testing.T, pod *corev1.Pod, begin time.Time) (after time.Duration) {
	t.Helper()
	eventually(t, "the kubelet reports its decision", 10*time.Second, func() bool {
		list, err := cluster.Client.CoreV1().Events(pod.Namespace).List(t.Context(), metav1.ListOptions{})
		must(t, err)
		return slices.ContainsFunc(list.Items, func(e corev1.Event) bool {
			after = e.LastTimestamp.Sub(begin).Round(100 * time.Millisecond)
			return e.InvolvedObject.Name == pod.Name && e.Reason == "Killing" && after > -time.Second
		})
	})
	return after
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
		e := readStatus(t).of(with.Name).Endpoints[0]
		bound := seconds(e.Probes[0].WorstDetectionHangSeconds)
		begin := time.Now()
		failure.act(t, with)
		times := timesUntil(t, begin, []*corev1.Pod{with}, bound+slack, failure.name, func(pod *corev1.Pod) bool { return kube.Restarts(pod) == i+1 })
		decided := verdictAfter(t, with, begin)
		fmt.Printf("%s %s: the kubelet decided after %s (stated: %s), and the container ran again after %s\n", with.Name, failure.name, decided, bound, times[0])
		if decided > bound {
			t.Errorf("%s: decided after %s, stated %s\n%s", failure.name, decided, bound, events(t, with))
		}
		loads[1].stop()
		with = awaitReady(t, with)
		awaitHits(t, with.Name, 2)
		loads[1] = startLoad(t, with)
		time.Sleep(10 * time.Second) // until it is as busy as before
	}
}
