package agent

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

// Probes that were answered, but failed according to the kubelet, are no longer answered: not after a restart of the container or the
// daemon, but when the probes change.
func TestTheKubeletsVerdict(t *testing.T) {
	n := newNode(t)
	k := newKubelet(t)
	n.config.Specs, n.config.Source, n.config.Prober = "", "kubelet", "cgroup:"+ownCgroup(t)
	n.config.Kubelet.URL, n.config.Kubelet.Poll = k.URL+"/pods", 100*time.Millisecond
	n.config.Crosscheck = 300 * time.Millisecond
	count := n.keepLog()
	pod := n.podOf("first", 1)
	k.tells(t, pod)
	n.attachNamed("first")
	stop := n.start()
	healthz := n.makeFresh()
	k.succeeded.Add(1)
	looked := func() { t.Helper(); n.looked(k) }
	looked()
	for range 3 {
		n.want("/healthz", 200, true)
		k.succeeded.Add(1)
	}
	looked()
	if e := n.endpoint(); e.NotAnswered != "" {
		t.Fatalf("they agree: %+v", e)
	}

	if status, text := do(t, n.local(), http.MethodPost, "http://probeletd/v1/invalidate", `{"namespace": "shop", "pod": "web"}`); status != 200 {
		t.Fatal(status, text)
	}
	n.want("/healthz", 200, false)
	k.failed.Add(1)
	n.eventually("fresh", n.open(8080))
	n.want("/healthz", 200, true)
	k.failed.Add(1)
	never := func() {
		t.Helper()
		n.eventually("not answered", func() bool { return strings.Contains(n.endpoint().NotAnswered, "the kubelet's verdict differs") })
		n.eventually("closed", not(n.open(8080)))
		for range 3 {
			before := datapath.Now()
			n.want("/healthz", 200, false)
			k.failed.Add(1)
			n.eventually("observed", func() bool { return n.records()[healthz].ObservedAt > before })
		}
	}
	for range 2 {
		never()
		looked()
	}
	n.wantMetrics(map[string]string{
		`probelet_disagreements_total{kind="failed"}`: "1", `probelet_disagreements_total{kind="discarded"}`: "0",
		`probelet_withdrawn_endpoints_total{cause="verdict"}`: "1",
	})
	if count("the kubelet's verdict differs") != 1 {
		t.Error("not logged once")
	}
	pod = n.podOf("first", 2)
	k.tells(t, pod)
	n.eventually("the container is known", func() bool { return n.instance() == "c=containerd://cc#1" })
	never()
	stop()
	n.start()
	n.eventually("the endpoint is known", n.has(healthz))
	never()

	readiness := pod["spec"].(fields)["containers"].([]any)[0].(fields)["readinessProbe"].(fields)
	readiness["periodSeconds"] = 299
	k.tells(t, pod)
	n.eventually("answered again", func() bool { _, byKernel := n.ask("/healthz"); return byKernel })
}

// While another pod's probe asks the same, neither is answered: that one's timeout and bound are others.
func TestSharedEndpointReachesThePod(t *testing.T) {
	n := newNode(t)
	k := newKubelet(t)
	n.config.Specs, n.config.Source, n.config.Prober = "", "kubelet", "cgroup:"+ownCgroup(t)
	n.config.Kubelet.URL, n.config.Kubelet.Poll = k.URL+"/pods", 100*time.Millisecond
	pod, agent := n.podOf("first", 1), n.podOf("second", 1)
	agent["metadata"].(fields)["name"] = "agent"
	agent["spec"].(fields)["hostNetwork"] = true
	container := agent["spec"].(fields)["containers"].([]any)[0].(fields)
	container["readinessProbe"].(fields)["httpGet"].(fields)["host"] = n.pod.IPv4.String()
	agent["status"].(fields)["podIP"] = "192.0.2.1"
	k.tells(t, pod)
	n.attachNamed("first")
	n.start()
	n.makeFresh()
	k.tells(t, pod, agent)
	n.eventually("not answered", func() bool {
		return n.endpoint().NotAnswered == "answering it would also answer c/readiness of pod shop/agent"
	})
	for range 3 {
		n.want("/healthz", 200, false)
	}
	k.tells(t, pod)
	n.eventually("answered again", func() bool { _, byKernel := n.ask("/healthz"); return byKernel })
}

// looked waits until the kubelet's verdicts have been compared.
func (n *node) looked(k *kubelet) {
	n.t.Helper()
	before := k.looks.Load()
	n.eventually("the kubelet was asked", func() bool { return k.looks.Load() > before+2 })
}

// endpoint returns the description of the only endpoint, up to date if the daemon is running.
func (n *node) endpoint() statedir.Endpoint {
	_, _ = api.NewClient(n.config.StateDir).Endpoints(n.t.Context())
	e, err := statedir.ReadEndpoints(n.config.StateDir)
	if err != nil || len(e.Attachments) != 1 || len(e.Attachments[0].Endpoints) != 1 {
		return statedir.Endpoint{}
	}
	return e.Attachments[0].Endpoints[0]
}
