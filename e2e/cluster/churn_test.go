package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/probelet/probelet/e2e/harness/kube"
)

// churn creates and deletes pods until it is stopped.
type churn struct {
	t      *testing.T
	prefix string // for the names of pods
	stop   context.CancelFunc
	done   sync.WaitGroup

	mu     sync.Mutex
	whole  []time.Time // creation times of pods that were created and deleted
	broken error
}

// churners is the number of pods at a time.
const churners = 2

func startChurn(t *testing.T, name string) *churn {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c := &churn{t: t, prefix: "churn-" + name + "-", stop: cancel}
	for i := range churners {
		c.done.Go(func() {
			for n := 0; ctx.Err() == nil; n++ {
				c.one(fmt.Sprintf("%s%d-%d", c.prefix, i, n))
			}
		})
	}
	t.Cleanup(func() {
		cancel()
		c.done.Wait()
	})
	return c
}

// one ignores cancellation, so that it deletes what it created.
func (c *churn) one(name string) {
	ctx, begin := context.Background(), time.Now()
	pod, err := cluster.Create(ctx, web(name))
	if err == nil {
		_, err = cluster.Await(ctx, pod, time.Minute, "ready", kube.Ready)
		err = errors.Join(err, cluster.Delete(ctx, pod))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.broken = errors.Join(c.broken, fmt.Errorf("churn pod %s: %w", name, err))
		c.stop()
		return
	}
	c.whole = append(c.whole, begin)
}

// during calls do, and checks that pods were created and deleted meanwhile.
func (c *churn) during(what string, do func()) {
	c.t.Helper()
	begin := time.Now()
	c.done.Go(func() { c.one(fmt.Sprintf("%sduring-%d", c.prefix, begin.UnixNano())) }) // the others may be slow
	do()
	end := time.Now()
	// Wait for pods that were created meanwhile; some phases are shorter than a pod takes to become ready.
	count := func() (n int) {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, created := range c.whole {
			if created.After(begin) && created.Before(end) {
				n++
			}
		}
		return n
	}
	n := count()
	for limit := end.Add(30 * time.Second); n == 0 && time.Now().Before(limit); n = count() {
		time.Sleep(500 * time.Millisecond)
	}
	say("%s: %d pods were created meanwhile, then deleted", what, n)
	if n == 0 {
		c.t.Errorf("no pod was created and deleted during: %s", what)
	}
}

// failedPlugin returns the type of the failed plugin that libcni names in an event's message, empty if none.
func failedPlugin(message string) string {
	_, after, _ := strings.Cut(message, `plugin type="`)
	plugin, _, _ := strings.Cut(after, `" failed`)
	return plugin
}

// end reports what went wrong. Failures of the primary plugin, such as duplicate address detection on a busy machine, are
// counted separately: the runtime retries, and probelet is not involved.
func (c *churn) end() {
	c.t.Helper()
	c.stop()
	c.done.Wait()
	if c.broken != nil {
		c.t.Error(c.broken)
	}
	list, err := cluster.Client.CoreV1().Events(kube.Namespace).List(context.Background(), metav1.ListOptions{})
	must(c.t, err)
	primary, retried := map[string]int{}, map[string]bool{}
	byPrimary := func(message string) (string, bool) {
		plugin := failedPlugin(message)
		return plugin, plugin != "" && plugin != "probelet"
	}
	for _, e := range list.Items {
		if plugin, is := byPrimary(e.Message); is {
			primary[plugin+": "+e.Reason]++
			retried[e.InvolvedObject.Name] = true
		}
	}
	for _, e := range list.Items {
		pod := e.InvolvedObject.Name
		if _, is := byPrimary(e.Message); is || !strings.HasPrefix(pod, c.prefix) {
			continue
		}
		switch {
		case e.Reason == "SandboxChanged" && retried[pod]:
		case slices.Contains([]string{"FailedCreatePodSandBox", "FailedKillPod", "NetworkNotReady", "SandboxChanged"}, e.Reason):
			c.t.Errorf("%s: %s: %s", pod, e.Reason, e.Message)
		}
	}
	say("failures of plugins that run before probelet: %v", primary)
}

func TestFailedPlugin(t *testing.T) {
	const prefix = `Failed to create pod sandbox: rpc error: code = Unknown desc = failed to setup network for sandbox "1f0": `
	for message, want := range map[string]string{
		prefix + `plugin type="ptp" failed (add): failed to add IPv6 route: permission denied`:      "ptp",
		prefix + `plugin type="probelet" failed (add): attaching to veth1: no space left on device`: "probelet",
		prefix + `cni plugin not initialized`:                                                       "",
		"":                                                                                          "",
	} {
		if got := failedPlugin(message); got != want {
			t.Errorf("%q: %q, want %q", message, got, want)
		}
	}
}
