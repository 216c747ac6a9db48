package cluster

import (
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/probelet/probelet/e2e/harness/kube"
)

// The kubelet notifies the daemon of a restarted container. Here, another container of the pod, which keeps running, owns the
// probed port.
func TestRestartedContainerIsReported(t *testing.T) {
	if _, err := os.Stat("/var/lib/kubelet/pods-api/pods-api.sock"); err != nil {
		t.Skip("this kubelet lacks the pods API: ", err)
	}
	deploy(t, map[string]any{"config": map[string]any{"kubelet-poll": "1h"}})
	if !strings.Contains(daemonLog(), "pod watch established") {
		t.Fatal(daemonLog())
	}
	app, proxy := kube.App("app", 8081), kube.App("proxy", 8080)
	app.ReadinessProbe = kube.HTTP("/healthz", intstr.FromInt32(8080))
	pod := run(t, kube.Pod("behind-proxy", app, proxy))
	awaitHits(t, pod.Name, 2)
	instance := func() string { return readStatus(t).of(pod.Name).Endpoints[0].InstanceID }
	before := instance()
	signal(unix.SIGKILL)(t, pod)
	eventually(t, "the restarted container is known", time.Minute, func() bool {
		now := instance()
		return now != before && now != ""
	})
	awaitHits(t, pod.Name, 2)
}

// A firewall on the node changes every reply to probes of a pod to status 500, after the point where probelet observes and
// answers. Only the kubelet sees the failure, and its verdict prevails.
func TestKubeletVerdictPrevails(t *testing.T) {
	deploy(t, map[string]any{"config": map[string]any{"crosscheck": "5s"}})
	other := run(t, web("unspoilt"))
	c := kube.App("app", 8080)
	c.ReadinessProbe = kube.HTTP("/healthz", intstr.FromInt32(8080))
	pod := run(t, kube.Pod("spoilt", c))
	awaitHits(t, pod.Name, 2)
	watch := watchSteady(t, other)
	spoil(t, pod)
	disagreement := func() string { return readStatus(t).of(pod.Name).Endpoints[0].Disagreement }
	eventually(t, "the kubelet's verdict is known", time.Minute, func() bool { return disagreement() == "failed" })
	before := readStatus(t).hits(pod.Name)
	eventually(t, "the pod is not ready", time.Minute, func() bool {
		now, err := cluster.Get(t.Context(), pod)
		return err == nil && notReady(now)
	})
	if explained := ctl(t, "explain", kube.Namespace+"/"+pod.Name); !strings.Contains(explained, "the kubelet's verdict differs") {
		t.Error(explained)
	}
	if after := readStatus(t).hits(pod.Name); after != before {
		t.Errorf("%d probes were answered", after-before)
	}
	awaitHits(t, other.Name, 5)
	watch.end()
}

// spoil changes status 200 to 500 in replies of a pod, until the end of the test.
func spoil(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	now, err := cluster.Get(t.Context(), pod)
	must(t, err)
	const status, inner = "HTTP/1.1 200", expr.PayloadBase(unix.NFT_PAYLOAD_INNER_HEADER) // after the TCP header
	filter(t, nftables.TableFamilyIPv4, nftables.ChainHookPrerouting,
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: netip.MustParseAddr(now.Status.PodIP).AsSlice()},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(8080)},
		&expr.Payload{DestRegister: 1, Base: inner, Len: uint32(len(status))},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(status)},
		&expr.Immediate{Register: 1, Data: []byte("500")},
		&expr.Payload{OperationType: expr.PayloadWrite, SourceRegister: 1, Base: inner, Offset: 9, Len: 3},
	)
}
