package cluster

import (
	"context"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/probelet/probelet/e2e/harness/kube"
	"github.com/probelet/probelet/e2e/harness/node"
)

const (
	density = 100
	rounds  = 2 // of each mode, alternating, because the machine's speed varies
	// measured is shorter than TIME_WAIT, so that none of the sockets that enter it meanwhile leaves it.
	measured = 30 * time.Second
)

// load is the cost of probes to the node during a period.
type load struct {
	http, tcp, failed         int // probes
	answeredHTTP, answeredTCP int
	kubelet, daemon, apps     time.Duration // CPU
	timeWait, conntracks      int           // new ones, at the end of the period
}

// plus returns l + sign * other.
func (l load) plus(sign int, other load) load {
	d := time.Duration(sign)
	return load{
		l.http + sign*other.http, l.tcp + sign*other.tcp, l.failed + sign*other.failed,
		l.answeredHTTP + sign*other.answeredHTTP, l.answeredTCP + sign*other.answeredTCP,
		l.kubelet + d*other.kubelet, l.daemon + d*other.daemon, l.apps + d*other.apps,
		l.timeWait + sign*other.timeWait, l.conntracks + sign*other.conntracks,
	}
}

func (l load) cpu() time.Duration { return l.kubelet + l.daemon + l.apps }

// answered returns the percentages of probes that were answered: of all, of HTTP and of TCP.
func (l load) answered() (all, http, tcp int) {
	return 100 * (l.answeredHTTP + l.answeredTCP) / max(l.http+l.tcp, 1), 100 * l.answeredHTTP / max(l.http, 1), 100 * l.answeredTCP / max(l.tcp, 1)
}

// server is a kind of server to measure density with.
type server struct {
	name, process string
	serve         func(c *corev1.Container, p *corev1.PodSpec)
}

// Python's server is the one in its library, with the listen backlog of common servers (128 in aiohttp, 2,048 in uvicorn and
// gunicorn): with its own backlog of 5, only every second TCP probe is answered.
var servers = []server{
	{"Go", "app", func(*corev1.Container, *corev1.PodSpec) {}},
	{"Python", "python3", func(c *corev1.Container, p *corev1.PodSpec) {
		c.Command = []string{"/usr/bin/python3", "-c", `
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "3")
        self.end_headers()
        self.wfile.write(b"ok\n")

ThreadingHTTPServer.request_queue_size = 128
ThreadingHTTPServer(("", 8080), Healthy).serve_forever()
`}
		// The image contains only the app: use the node's interpreter.
		for path, on := range map[string]string{"/usr": "/usr", "/lib": "/usr/lib", "/lib64": "/usr/lib64"} {
			name := strings.ReplaceAll("node"+path, "/", "-")
			c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: name, MountPath: path, ReadOnly: true})
			p.Volumes = append(p.Volumes, corev1.Volume{Name: name, VolumeSource: corev1.VolumeSource{
				HostPath: &corev1.HostPathVolumeSource{Path: on},
			}})
		}
	}},
}

// dense returns a pod that is probed once per second by HTTP and by TCP.
func dense(s server, number int) *corev1.Pod {
	pod := web(fmt.Sprintf("dense-%d", number))
	liveness := kube.TCP(intstr.FromInt32(8080))
	liveness.FailureThreshold = 60 // all start at once, and none should be restarted for being slow
	liveness.TimeoutSeconds = patience
	pod.Spec.Containers[0].LivenessProbe = liveness
	s.serve(&pod.Spec.Containers[0], &pod.Spec)
	return pod
}

// The cost to the node of a hundred pods with two probes per second each, with and without probelet.
func TestDensity(t *testing.T) {
	trackConnections(t)
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	_, _ = fmt.Fprintf(table, "%d PODS, HTTP AND TCP EACH SECOND\tPROBES/s\tANSWERED\tHTTP\tTCP\tFAILED\tKUBELET CPU\tDAEMON CPU\tAPPS CPU\tALL CPU\tTIME_WAIT\tCONNTRACK\n", density)
	for _, s := range servers {
		t.Run(s.name, func(t *testing.T) {
			off, on := compareDensity(t, s)
			say("measuring: %s", s.name)
			writeLoad(table, s.name+", mode off", off, off)
			writeLoad(table, s.name+", mode answer", on, off)
			checkDensity(t, off, on)
		})
	}
	must(t, table.Flush())
}

// compareDensity measures the cost of probing a hundred pods in the modes off and answer.
func compareDensity(t *testing.T, s server) (off, on load) {
	t.Helper()
	deploy(t, map[string]any{"mode": "answer"})
	pods := make([]*corev1.Pod, density)
	t.Cleanup(func() { deleteAll(t, pods) })
	for i := range pods {
		pod, err := cluster.Create(t.Context(), dense(s, i))
		must(t, err)
		pods[i] = pod
	}
	for i, pod := range pods {
		var err error
		pods[i], err = cluster.Await(t.Context(), pod, 5*time.Minute, "ready", kube.Ready)
		must(t, err)
		if i%20 == 19 {
			say("%s: %d of %d pods are ready", s.name, i+1, density)
		}
	}
	for range rounds {
		on = on.plus(1, measure(t, s, "answer"))
		off = off.plus(1, measure(t, s, "off"))
	}
	return off, on
}

// writeLoad writes a row of the table. Total CPU is shown relative to the load without answers.
func writeLoad(table io.Writer, name string, l, plain load) {
	percent := func(d time.Duration) string {
		return fmt.Sprintf("%.1f %%", 100*d.Seconds()/(rounds*measured).Seconds())
	}
	all, http, tcp := l.answered()
	_, _ = fmt.Fprintf(table, "%s\t%.0f\t%d %%\t%d %%\t%d %%\t%d\t%s\t%s\t%s\t%.2f×\t%d\t%d\n", name,
		float64(l.http+l.tcp)/(rounds*measured).Seconds(), all, http, tcp, l.failed,
		percent(l.kubelet), percent(l.daemon), percent(l.apps), l.cpu().Seconds()/plain.cpu().Seconds(), l.timeWait/rounds, l.conntracks/rounds)
}

// checkDensity compares the loads with the marks. CPU is only shown, because it varies too much on a busy machine.
func checkDensity(t *testing.T, off, on load) {
	t.Helper()
	all, _, tcp := on.answered()
	if on.failed > off.failed || off.answeredHTTP+off.answeredTCP > 0 || all < 70 || tcp < 85 {
		t.Errorf("off %+v, answer %+v", off, on)
	}
	if off.timeWait*4 < off.http+off.tcp || off.conntracks*2 < off.http+off.tcp {
		t.Errorf("too few sockets to compare with: off %+v", off)
	}
	// The tracked connections of answered probes exist for 10 s as well.
	if on.timeWait*5 > off.timeWait*2 || on.conntracks*5 > off.conntracks*4 {
		t.Errorf("no fewer sockets: off %+v, answer %+v", off, on)
	}
}

// trackConnections makes the kernel track the node's connections, as Services do.
func trackConnections(t *testing.T) {
	t.Helper()
	stop, err := node.TrackConnections()
	must(t, err)
	t.Cleanup(func() { must(t, stop()) })
	// By the end of a measurement, connections from before it have expired.
	must(t, os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait", []byte(strconv.Itoa(int(measured.Seconds()))), 0o644))
}

// sayUnhealthy prints the probe failures since begin that the kubelet reported.
func sayUnhealthy(t *testing.T, begin time.Time) {
	t.Helper()
	list, err := cluster.Client.CoreV1().Events(kube.Namespace).List(t.Context(), metav1.ListOptions{})
	must(t, err)
	for _, e := range list.Items {
		if e.Reason == "Unhealthy" && e.LastTimestamp.After(begin) {
			say("%s: %s: %s", e.LastTimestamp.Format(time.TimeOnly), e.InvolvedObject.Name, e.Message)
		}
	}
}

// measure switches to a mode and returns the cost of probes in it.
func measure(t *testing.T, s server, mode string) load {
	t.Helper()
	deploy(t, map[string]any{"mode": mode})
	time.Sleep(3 * time.Second) // until each endpoint was probed and the daemon has finished starting
	begin := time.Now()
	before, old := total(t, s), timeWaits(t)
	time.Sleep(measured)
	l := total(t, s).plus(-1, before)
	for socket := range timeWaits(t) {
		if !old[socket] {
			l.timeWait++
		}
	}
	var err error
	l.conntracks, err = node.Tracked(netip.MustParsePrefix(kube.IPv4))
	must(t, err)
	if l.failed > 0 {
		sayUnhealthy(t, begin)
	}
	return l
}

// timeWaits returns the node's sockets in TIME_WAIT.
func timeWaits(t *testing.T) map[node.Connection]bool {
	t.Helper()
	sockets, err := node.TimeWaitWhere(os.Getpid(), func(netip.AddrPort) bool { return true })
	must(t, err)
	return sockets
}

// total returns the load since the start of the processes.
func total(t *testing.T, s server) (l load) {
	t.Helper()
	text, err := cluster.Kubelet(t.Context(), "/metrics/probes")
	must(t, err)
	for line := range strings.Lines(string(text)) {
		if !strings.HasPrefix(line, "prober_probe_total{") || !strings.Contains(line, `pod="dense-`) {
			continue
		}
		fields := strings.Fields(line)
		n, err := strconv.ParseFloat(fields[len(fields)-1], 64)
		must(t, err)
		if kube.Label(line, "probe_type") == "Liveness" {
			l.tcp += int(n)
		} else {
			l.http += int(n)
		}
		if kube.Label(line, "result") != "successful" {
			l.failed += int(n)
		}
	}
	l.kubelet, l.daemon, l.apps = cpuOf(t, "kubelet"), cpuOf(t, "probeletd"), cpuOf(t, s.process)
	now := readStatus(t)
	for i := range density {
		for _, e := range now.of(fmt.Sprintf("dense-%d", i)).Endpoints {
			if e.Kind == "TCP" {
				l.answeredTCP += e.Hits
			} else {
				l.answeredHTTP += e.Hits
			}
		}
	}
	return l
}

// cpuOf returns the CPU time of the processes with a name.
func cpuOf(t *testing.T, name string) (used time.Duration) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	must(t, err)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(text), "("+name+")") {
			continue
		}
		// proc(5): fields 14 and 15 are the user and kernel time in ticks of a hundredth of a second.
		_, rest, _ := strings.Cut(string(text), ") ")
		fields := strings.Fields(rest)
		for _, field := range fields[11:13] {
			ticks, err := strconv.Atoi(field)
			must(t, err)
			used += time.Duration(ticks) * 10 * time.Millisecond
		}
	}
	return used
}

func deleteAll(t *testing.T, pods []*corev1.Pod) {
	t.Helper()
	ctx := context.Background()
	for _, pod := range pods {
		if pod == nil {
			continue
		}
		err := cluster.Client.CoreV1().Pods(pod.Namespace).Delete(ctx, pod.Name, metav1.DeleteOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			t.Error(err)
		}
	}
	err := kube.Until(ctx, 5*time.Minute, func(ctx context.Context) error {
		list, err := cluster.Client.CoreV1().Pods(kube.Namespace).List(ctx, metav1.ListOptions{})
		if err == nil && len(list.Items) > 0 {
			err = fmt.Errorf("%d pods still exist", len(list.Items))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
