package e2e

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/probelet/probelet/e2e/harness/node"
	"github.com/probelet/probelet/e2e/harness/replies"
	"github.com/probelet/probelet/e2e/harness/role"
)

// Whatever a pod replies, the kernel answers the kubelet's prober only where the prober judged the pod's own reply a success.
func TestOnlySuccessesAreAnswered(t *testing.T) {
	const (
		pods   = 20
		each   = 60
		rounds = 5
	)
	s := newScene(t, node.PTP)
	c := &comparison{scene: s, settled: replies.Healthy}
	for range pods {
		c.addPod()
	}
	for round := range uint64(rounds) {
		c.begin(round*pods*each, each)
		c.run()
	}
	t.Logf("%d replies, %d successes, %d of them answered", pods*each*rounds, c.successes, c.answered)
	if c.answered < c.successes*3/4 {
		t.Error("most successes were not recognised")
	}
}

const replyPort = 8082

// comparison compares the prober's verdicts without probelet and with it.
type comparison struct {
	*scene
	pods      []*pod
	asked     []*asked
	settled   uint64 // seed of the last endpoint whose success shows that everything before it was observed
	successes int
	answered  int
}

// asked is an endpoint being compared.
type asked struct {
	pod    *pod
	seed   uint64
	alone  role.Result         // without probelet
	result role.Result         // of the last probe
	status node.EndpointStatus // after it
}

func (a *asked) path() string { return fmt.Sprintf("/%d", a.seed) }

func (c *comparison) addPod() {
	c.t.Helper()
	p, err := c.NewPod()
	must(c.t, err)
	must(c.t, p.Add())
	server, err := role.StartServer(p.Netns)
	must(c.t, err)
	c.t.Cleanup(server.Stop)
	must(c.t, server.ListenReplies(replyPort))
	c.pods = append(c.pods, &pod{p, server, c.scene})
}

// begin replaces the specs with endpoints that give these replies, about which nothing is known yet.
func (c *comparison) begin(first uint64, each int) {
	c.t.Helper()
	c.asked = nil
	var specs []node.Probed
	for _, p := range c.pods {
		probed := node.Probed{Pod: p.Pod}
		for range each {
			a := &asked{pod: p, seed: first}
			first++
			c.asked = append(c.asked, a)
			probed.Readiness = append(probed.Readiness, node.Probe{Port: replyPort, Path: a.path(), PeriodSeconds: 600, TimeoutSeconds: 1})
		}
		specs = append(specs, probed)
	}
	for i := range uint64(2) {
		last := &specs[len(specs)-1].Readiness
		*last = append(*last, node.Probe{Port: replyPort, Path: fmt.Sprintf("/%d", c.settled+1+i), PeriodSeconds: 600, TimeoutSeconds: 1})
	}
	must(c.t, c.WriteSpecs(specs...))
	must(c.t, c.AwaitState(c.lastPod().Pod, replyPort, fmt.Sprintf("/%d", c.settled+2), node.Unknown))
}

func (c *comparison) lastPod() *pod { return c.pods[len(c.pods)-1] }

func (c *comparison) run() {
	c.t.Helper()
	c.probe(c.other, func(a *asked, r role.Result) { a.alone = r })
	c.probe(c.prober, func(a *asked, r role.Result) { a.result = r })
	c.check()
	before := map[*asked]bool{}
	for _, a := range c.asked {
		before[a] = a.result.Failures == 0
		if before[a] {
			c.successes++
		}
	}
	c.probe(c.prober, func(a *asked, r role.Result) { a.result = r })
	c.check()
	for _, a := range c.asked {
		reply := replies.Generate(a.seed)
		succeeded := a.result.Failures == 0
		byChance := reply.Racy() || a.status.Hits == 0 && isJustInTime(reply)
		if succeeded && !before[a] && a.alone.Failures > 0 && !byChance {
			c.t.Errorf("a success, but without probelet a failure (%q):\n%s", a.alone.Messages, reply)
		}
		if succeeded && a.status.Hits > 0 {
			c.answered++
		}
	}
}

// isJustInTime reports whether a busy machine decides if the prober waits long enough for a reply.
func isJustInTime(reply replies.Reply) bool {
	var all time.Duration
	for _, p := range reply.Parts {
		all += p.Pause
	}
	return (all - time.Second).Abs() < 150*time.Millisecond
}

// probe probes each endpoint once.
func (c *comparison) probe(by *role.Client, then func(*asked, role.Result)) {
	c.t.Helper()
	const atATime = 48
	var all sync.WaitGroup
	next := make(chan *asked)
	for range atATime {
		all.Go(func() {
			for a := range next {
				result, err := by.Probe(role.Probes{
					Address: a.pod.IPv4.String(), Port: replyPort, Path: a.path(), Count: 1, Timeout: time.Second,
				})
				if err != nil {
					c.t.Error(err)
				}
				then(a, result)
			}
		})
	}
	for _, a := range c.asked {
		next <- a
	}
	close(next)
	all.Wait()
}

// check waits until the daemon has processed the last probes, and compares.
func (c *comparison) check() {
	c.t.Helper()
	c.settled++
	healthy := node.Probe{Port: replyPort, Path: fmt.Sprintf("/%d", c.settled)}
	c.lastPod().probe(healthy, c.lastPod().IPv4, 1)
	must(c.t, c.AwaitState(c.lastPod().Pod, replyPort, healthy.Path, node.Fresh))
	status, err := c.Status()
	must(c.t, err)
	endpoints := map[string]node.EndpointStatus{}
	for _, a := range status.Attachments {
		for _, e := range a.Endpoints {
			endpoints[a.Pod+e.Path] = e
		}
	}
	for _, a := range c.asked {
		a.status = endpoints[node.Namespace+"/"+a.pod.Name+a.path()]
		if a.status.State == node.Fresh && a.result.Failures > 0 {
			c.t.Errorf("would be answered, but the prober reports %q:\n%s", a.result.Messages, replies.Generate(a.seed))
		}
	}
}
