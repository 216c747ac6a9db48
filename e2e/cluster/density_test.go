package cluster

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
)

const (
	density = 100
	// measured is shorter than a TIME_WAIT: of those that begin meanwhile none has ended.
	measured = 30 * time.Second
)

// load is what probes cost the node in a while.
type load struct {
	probes, failed, answered int
	kubelet, daemon, apps    time.Duration // CPU
	timeWait, conntracks     int           // that are new, and there at its end
}

// dense is a pod that is asked each second by HTTP and by TCP.
func dense(number int) *corev1.Pod {
	pod := web(fmt.Sprintf("dense-%d", number))
	pod.Spec.Containers[0].LivenessProbe = TCP(intstr.FromInt32(8080))
	return pod
}

// What a hundred pods with two probes each second cost the node, with probelet and without.
func TestDensity(t *testing.T) {
	trackConnections(t)
	modes := []string{"answer", "off"}
	deploy(t, map[string]any{"mode": modes[0]})
	pods := make([]*corev1.Pod, density)
	t.Cleanup(func() { deleteAll(t, pods) })
	for i := range pods {
		pod, err := cluster.Create(t.Context(), dense(i))
		must(t, err)
		pods[i] = pod
	}
	for i, pod := range pods {
		var err error
		pods[i], err = cluster.Await(t.Context(), pod, 5*time.Minute, "ready", Ready)
		must(t, err)
		if i%20 == 19 {
			say("%d of %d pods are ready", i+1, density)
		}
	}
	loads := map[string]load{}
	for _, mode := range modes {
		deploy(t, map[string]any{"mode": mode})
		begin := time.Now()
		loads[mode] = measure(t)
		if loads[mode].failed > 0 {
			sayUnhealthy(t, begin)
		}
		say("measured: %s", mode)
	}
	percent := func(d time.Duration) string { return fmt.Sprintf("%.0f %%", 100*d.Seconds()/measured.Seconds()) }
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 3, ' ', 0)
	_, _ = fmt.Fprintf(table, "%d PODS, HTTP AND TCP EACH SECOND\tPROBES/s\tANSWERED\tFAILED\tKUBELET CPU\tDAEMON CPU\tAPPS CPU\tTIME_WAIT\tCONNTRACK\n", density)
	for _, mode := range modes {
		l := loads[mode]
		_, _ = fmt.Fprintf(table, "mode %s\t%.0f\t%d %%\t%d\t%s\t%s\t%s\t%d\t%d\n", mode,
			float64(l.probes)/measured.Seconds(), 100*l.answered/max(l.probes, 1), l.failed,
			percent(l.kubelet), percent(l.daemon), percent(l.apps), l.timeWait, l.conntracks)
	}
	must(t, table.Flush())
	off, on := loads["off"], loads["answer"]
	if on.failed > off.failed || off.answered > 0 || on.answered*5 < on.probes*2 {
		t.Errorf("off %+v, answer %+v", off, on)
	}
	if off.timeWait*4 < off.probes || off.conntracks*2 < off.probes {
		t.Errorf("too few sockets to compare with: off %+v", off)
	}
	// The tracked connections of answered probes are there for 10 s, too.
	if on.timeWait*3 > off.timeWait*2 || on.conntracks*5 > off.conntracks*4 {
		t.Errorf("no fewer sockets: off %+v, answer %+v", off, on)
	}
}

// trackConnections makes the kernel track the node's connections, as it does where there are Services.
func trackConnections(t *testing.T) {
	t.Helper()
	c, err := nftables.New()
	must(t, err)
	table := c.AddTable(&nftables.Table{Name: "tracking", Family: nftables.TableFamilyINet})
	t.Cleanup(func() {
		c.DelTable(table)
		must(t, c.Flush())
	})
	chain := c.AddChain(&nftables.Chain{
		Name: "output", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter,
	})
	c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: 1}}})
	must(t, c.Flush())
	// So that at the end of a measurement those of before are gone.
	must(t, os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_time_wait", []byte(strconv.Itoa(int(measured.Seconds()))), 0o644))
}

// sayUnhealthy prints the failures of probes since begin, as the kubelet reports them.
func sayUnhealthy(t *testing.T, begin time.Time) {
	t.Helper()
	list, err := cluster.Client.CoreV1().Events(Namespace).List(t.Context(), metav1.ListOptions{})
	must(t, err)
	for _, e := range list.Items {
		if e.Reason == "Unhealthy" && e.LastTimestamp.After(begin) {
			say("%s: %s: %s", e.LastTimestamp.Format(time.TimeOnly), e.InvolvedObject.Name, e.Message)
		}
	}
}

func measure(t *testing.T) (l load) {
	t.Helper()
	before, old := total(t), timeWaits(t)
	time.Sleep(measured)
	l = total(t)
	l.probes, l.failed, l.answered = l.probes-before.probes, l.failed-before.failed, l.answered-before.answered
	l.kubelet, l.daemon, l.apps = l.kubelet-before.kubelet, l.daemon-before.daemon, l.apps-before.apps
	for socket := range timeWaits(t) {
		if !old[socket] {
			l.timeWait++
		}
	}
	_, pods, err := net.ParseCIDR(IPv4)
	must(t, err)
	entries, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET) //nolint:forbidigo // netlinksafe has none
	must(t, err)
	for _, entry := range entries {
		if pods.Contains(entry.Forward.DstIP) {
			l.conntracks++
		}
	}
	return l
}

// timeWaits are the node's sockets in TIME_WAIT, by their addresses.
func timeWaits(t *testing.T) map[string]bool {
	t.Helper()
	sockets := map[string]bool{}
	for _, file := range []string{"/proc/self/net/tcp", "/proc/self/net/tcp6"} {
		text, err := os.ReadFile(file)
		must(t, err)
		for line := range strings.Lines(string(text)) {
			if fields := strings.Fields(line); len(fields) > 3 && fields[3] == "06" {
				sockets[fields[1]+fields[2]] = true
			}
		}
	}
	return sockets
}

// total is since the beginning.
func total(t *testing.T) (l load) {
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
		l.probes += int(n)
		if !strings.Contains(line, `result="successful"`) {
			l.failed += int(n)
		}
	}
	l.kubelet, l.daemon, l.apps = cpuOf(t, "kubelet"), cpuOf(t, "probeletd"), cpuOf(t, "app")
	s := readStatus(t)
	for i := range density {
		l.answered += s.hits(fmt.Sprintf("dense-%d", i))
	}
	return l
}

// cpuOf is the CPU time that processes of a name have used.
func cpuOf(t *testing.T, name string) (used time.Duration) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/stat")
	must(t, err)
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil || !strings.Contains(string(text), "("+name+")") {
			continue
		}
		// proc(5): the 14th and 15th are ticks of a hundredth of a second, in user space and in the kernel.
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
	err := until(ctx, 5*time.Minute, func(ctx context.Context) error {
		list, err := cluster.Client.CoreV1().Pods(Namespace).List(ctx, metav1.ListOptions{})
		if err == nil && len(list.Items) > 0 {
			err = fmt.Errorf("%d pods are left", len(list.Items))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}
