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

// clientPort is the port on which a client reports what it sent.
const clientPort = 9100

// client is a hostNetwork pod that keeps sending requests to another pod. They differ from probes only in their sender.
type client struct {
	t          *testing.T
	self, pod  *corev1.Pod
	before     kube.Seen
	handedOver int
}

// startClient sends requests to port 8080 of a pod, on which the app must have HTTP probes only.
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

// end checks that every request succeeded and was answered by the pod.
func (c *client) end() {
	c.t.Helper()
	text, err := kube.Ask(context.Background(), c.self, clientPort, "/asked")
	must(c.t, err)
	var asked kube.Asked
	must(c.t, json.Unmarshal(text, &asked))
	if asked.Failed > 0 || asked.ByKernel > 0 || asked.Requests < 10 {
		c.t.Errorf("a client other than the prober: %+v", asked)
	}
	// The app counts a connection when it notices that it was closed.
	err = kube.Until(context.Background(), 5*time.Second, func(ctx context.Context) error {
		seen, err := kube.SeenBy(ctx, c.pod, 8080)
		if err == nil && (seen.Others-c.before.Others != asked.Requests || seen.Empty-c.before.Empty != asked.Connections) {
			err = fmt.Errorf("a client other than the prober: %+v; the pod saw %+v, before that %+v", asked, seen, c.before)
		}
		return err
	})
	if err != nil {
		c.t.Error(err)
	}
	if now := readStatus(c.t).Counters["handed_over"]; now != c.handedOver {
		c.t.Errorf("%d connections were handed over: the kernel accepted connections of a client other than the prober", now-c.handedOver)
	}
	must(c.t, cluster.Delete(context.Background(), c.self))
}
