package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/probelet/probelet/e2e/harness/kube"
)

// clientPort is where a client tells what it has sent.
const clientPort = 9100

// client is a pod of the host's network that asks another one all the while: what it sends is a probe but for who sends it.
type client struct {
	t          *testing.T
	self, pod  *corev1.Pod
	before     kube.Seen
	handedOver int
}

// startClient asks port 8080 of a pod whose probes of the program there are all HTTP.
func startClient(t *testing.T, pod *corev1.Pod) *client {
	t.Helper()
	c := &client{t: t, pod: pod, handedOver: readStatus(t).Counters["handed_over"]}
	var err error
	c.before, err = kube.SeenBy(t.Context(), pod, 8080)
	must(t, err)
	program := kube.App("client", clientPort)
	program.Command = append(program.Command, "-ask", net.JoinHostPort(pod.Status.PodIP, "8080"))
	self := kube.Pod("client", program)
	self.Spec.HostNetwork = true
	c.self = run(t, self)
	return c
}

// end says what was answered by somebody else than the pod, or failed.
func (c *client) end() {
	c.t.Helper()
	text, err := kube.Ask(context.Background(), c.self, clientPort, "/asked")
	must(c.t, err)
	var asked kube.Asked
	must(c.t, json.Unmarshal(text, &asked))
	if asked.Failed > 0 || asked.ByKernel > 0 || asked.Requests < 10 {
		c.t.Errorf("a client that is no prober: %+v", asked)
	}
	// The program counts a connection when it notices that it has ended.
	err = kube.Until(context.Background(), 5*time.Second, func(ctx context.Context) error {
		seen, err := kube.SeenBy(ctx, c.pod, 8080)
		if err == nil && (seen.Others-c.before.Others != asked.Requests || seen.Empty-c.before.Empty != asked.Connections) {
			err = fmt.Errorf("a client that is no prober: %+v; the pod saw %+v, and %+v before", asked, seen, c.before)
		}
		return err
	})
	if err != nil {
		c.t.Error(err)
	}
	if now := readStatus(c.t).Counters["handed_over"]; now != c.handedOver {
		c.t.Errorf("%d connections were handed over: somebody's that sends more than probes was taken", now-c.handedOver)
	}
	must(c.t, cluster.Delete(context.Background(), c.self))
}
