package agent

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/crosscheck"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// kubelet serves the node's pods like the kubelet's read-only port, and its counts of one probe.
type kubelet struct {
	*httptest.Server
	answer                   atomic.Value // string
	succeeded, failed, looks atomic.Int32
}

func newKubelet(t *testing.T) *kubelet {
	k := &kubelet{}
	k.says(`{"kind":"PodList","items":[]}`)
	k.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != crosscheck.Path {
			_, _ = w.Write([]byte(k.answer.Load().(string)))
			return
		}
		const line = `prober_probe_total{container="c",namespace="shop",pod="web",pod_uid="first",probe_type="Readiness",result=%q} %d` + "\n"
		_, _ = fmt.Fprintf(w, line+line, "successful", k.succeeded.Load(), "failed", k.failed.Load())
		k.looks.Add(1)
	}))
	t.Cleanup(k.Close)
	return k
}

func (k *kubelet) says(text string) { k.answer.Store(text) }

// tells sets the pods that the kubelet lists.
func (k *kubelet) tells(t *testing.T, pods ...map[string]any) {
	t.Helper()
	text, err := json.Marshal(map[string]any{"kind": "PodList", "items": pods})
	if err != nil {
		t.Fatal(err)
	}
	k.says(string(text))
}

type fields = map[string]any

// podOf returns the node's pod, whose container c has been started a number of times.
func (n *node) podOf(uid string, starts int) fields {
	return fields{
		"metadata": fields{"name": "web", "namespace": "shop", "uid": uid},
		"spec": fields{"containers": []any{fields{
			"name": "c",
			"readinessProbe": fields{
				"httpGet": fields{"path": "/healthz", "port": 8080}, "periodSeconds": 300, "timeoutSeconds": 30,
			},
		}}},
		"status": fields{
			"podIP": n.pod.IPv4.String(), "phase": "Running",
			"containerStatuses": []any{fields{
				"name": "c", "containerID": "containerd://" + strings.Repeat("c", starts), "restartCount": starts - 1,
				"state": fields{"running": fields{}},
			}},
		},
	}
}

// attachNamed does what the plugin does if the runtime passes the pod's name and UID.
func (n *node) attachNamed(uid string) {
	n.t.Helper()
	record := attach.Record{
		ContainerID: "of-" + uid, IfName: "eth0", IfIndex: n.pod.IfIndex, HostIfName: n.pod.HostIfName,
		PodNamespace: "shop", PodName: "web", PodUID: uid, CreatedAt: time.Now(),
	}
	if err := attach.WriteRecord(n.config.StateDir, record); err != nil {
		n.t.Fatal(err)
	}
	n.attachMaps(n.pod, record.ID())
}

// The kubelet's list leads to answers in the kernel, and ends them: with another container, the pod's deletion, or another pod with the
// same name. Malformed lists change nothing.
func TestWithTheKubeletsPods(t *testing.T) {
	n := newNode(t)
	k := newKubelet(t)
	n.config.Specs, n.config.Source = "", "kubelet"
	n.config.Kubelet.URL, n.config.Kubelet.Poll = k.URL+"/pods", 100*time.Millisecond
	n.attachNamed("first")
	n.start()

	k.tells(t, n.podOf("first", 1))
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))
	fresh := func() {
		t.Helper()
		n.want("/healthz", 200, false)
		n.eventually("fresh", n.open(8080))
		n.want("/healthz", 200, true)
	}
	fresh()
	healthz := n.key("/healthz")

	for _, nonsense := range []string{"", "{", `{"kind":"Status"}`, `{"kind":"PodList","items":[{"metadata":{"name":1}}]}`} {
		k.says(nonsense)
		time.Sleep(3 * n.config.Kubelet.Poll)
		n.want("/healthz", 200, true)
	}

	k.tells(t, n.podOf("first", 2))
	n.eventually("nothing is known of the new container", func() bool { return n.records()[healthz].ObservedAt == 0 })
	n.eventually("the port is closed", not(n.open(8080)))
	fresh()

	ended := n.podOf("first", 2)
	ended["status"].(fields)["containerStatuses"] = []any{fields{"name": "c", "state": fields{"terminated": fields{}}}}
	k.tells(t, ended)
	n.eventually("nothing is known of what has ended", func() bool { return n.records()[healthz].ObservedAt == 0 })
	k.tells(t, n.podOf("first", 3))
	n.eventually("the container is known", func() bool { return n.instance() == "c=containerd://ccc#2" })
	fresh()

	deleted := n.podOf("first", 3)
	deleted["metadata"].(fields)["deletionTimestamp"] = "2026-01-02T03:04:05Z"
	k.tells(t, deleted)
	n.eventually("a pod that is being deleted is not answered", not(n.open(8080)))
	n.want("/healthz", 200, false)

	// Its successor has the same name and address, but not this attachment.
	k.tells(t, n.podOf("second", 1))
	n.eventually("the attachment has no pod", not(n.has(datapath.PortKey(8080))))
	n.want("/healthz", 200, false)
}

// instance returns the instance ID of the only endpoint.
func (n *node) instance() string { return n.endpoint().InstanceID }

// Evidence of a container does not apply to one that was started while the daemon was down.
func TestRestartedContainerOverARestart(t *testing.T) {
	n := newNode(t)
	k := newKubelet(t)
	n.config.Specs, n.config.Source = "", "kubelet"
	n.config.Kubelet.URL, n.config.Kubelet.Poll = k.URL+"/pods", 100*time.Millisecond
	k.tells(t, n.podOf("first", 1))
	n.attachNamed("first")
	stop := n.start()
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))
	n.want("/healthz", 200, false)
	n.eventually("fresh", n.open(8080))
	healthz := n.key("/healthz")
	stop()
	stop = n.start()
	n.eventually("taken over", func() bool { return n.instance() != "" && n.open(8080)() })
	n.want("/healthz", 200, true)
	stop()
	k.tells(t, n.podOf("first", 2))
	n.start()
	n.eventually("forgotten", func() bool { return n.records()[healthz].ObservedAt == 0 })
	n.eventually("closed", not(n.open(8080)))
}

// An annotation of the pod turns refresh on if the node allows it.
func TestRefreshByAnnotation(t *testing.T) {
	n := newNode(t)
	n.config.Defaults.RefreshByAnnotation = true
	k := newKubelet(t)
	n.config.Specs, n.config.Source = "", "kubelet"
	n.config.Kubelet.URL, n.config.Kubelet.Poll = k.URL+"/pods", 100*time.Millisecond
	pod := n.podOf("first", 1)
	pod["metadata"].(fields)["annotations"] = fields{probe.AnnotationRefresh: "100ms"}
	k.tells(t, pod)
	n.attachNamed("first")
	n.start()
	n.eventually("the probe's port is known", n.has(datapath.PortKey(8080)))
	n.want("/healthz", 200, false)
	n.eventually("asked again and again", func() bool { return n.served.Load() > 5 })
}
