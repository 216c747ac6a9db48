package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/refresh"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

var churned = flag.Int("churn", 4000, "how many pods come and go in TestChurn")

// noSockets are never there.
type noSockets struct{}

func (noSockets) Open(int) (int, uint64, error) { return 0, 0, errors.New("no sockets in this test") }
func (noSockets) Done(uint64)                   {}

// churn is a daemon whose pods are replaced again and again; none is attached, so that it needs no kernel.
type churn struct {
	*daemon
	t    *testing.T
	next int
	live []int
}

func newChurn(t *testing.T) *churn {
	t.Helper()
	refresher, err := refresh.New(noSockets{}, datapath.Now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(refresher.Close)
	c := config{stateDir: filepath.Join(t.TempDir(), "state"), defaults: probe.NewDefaults()}
	c.defaults.Refresh.On = true
	if err := os.MkdirAll(attach.RecordsDir(c.stateDir), 0o700); err != nil {
		t.Fatal(err)
	}
	return &churn{daemon: newDaemon(slog.New(slog.DiscardHandler), nil, c, statedir.Endpoints{}, refresher), t: t}
}

func (c *churn) record(n int) attach.Record {
	return attach.Record{
		ContainerID: fmt.Sprintf("%064d", n), IfName: "eth0", PodNamespace: "shop", PodName: fmt.Sprint("pod-", n), PodUID: fmt.Sprint(n),
		CreatedAt: time.Unix(int64(n), 0),
	}
}

func podNumber(n int) probe.Pod {
	spec := probe.Spec{
		Container: "c", Instance: fmt.Sprint(n), Type: probe.Readiness, Kind: probe.HTTP, Port: 80, Path: "/x",
		Period: time.Second, Timeout: time.Second,
	}
	other := spec
	other.Type, other.Path = probe.Liveness, "/y"
	return probe.Pod{
		Namespace: "shop", Name: fmt.Sprint("pod-", n), UID: fmt.Sprint(n), IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(n >> 8), byte(n)})},
		Probes: []probe.Spec{spec, other},
	}
}

// replace replaces pods: the oldest go, new ones come, and each of these is probed. So many live at a time.
func (c *churn) replace(n, live int) {
	c.t.Helper()
	for range n {
		if len(c.live) == live {
			if err := attach.RemoveRecord(c.stateDir, c.record(c.live[0]).ID()); err != nil {
				c.t.Fatal(err)
			}
			c.live = c.live[1:]
		}
		if err := attach.WriteRecord(c.stateDir, c.record(c.next)); err != nil {
			c.t.Fatal(err)
		}
		c.live = append(c.live, c.next)
		c.next++
	}
	pods := make([]probe.Pod, 0, live)
	for _, n := range c.live {
		pods = append(pods, podNumber(n))
	}
	c.readRecords()
	c.setPods(pods)
	for _, a := range c.attachments {
		c.probe(a)
	}
	c.refreshed(c.refresher.Take())
	c.describe()
	for id := range c.deleted { // as if it had been a while ago
		c.deleted[id] = c.deleted[id].Add(-beingDeleted)
	}
}

// probe makes each endpoint of an attachment's pod known to succeed, so that it is refreshed.
func (c *churn) probe(a *attachment) {
	c.t.Helper()
	for _, path := range []string{"/x", "/y"} {
		text := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s:80\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n", path, a.pod.IPs[0])
		request, err := probe.ParseRequest([]byte(text))
		if err != nil {
			c.t.Fatal(err)
		}
		o := probe.Outcome{
			Port: 80, Kind: probe.HTTP, Request: request, Question: probe.Question{Hash: uint64(len(text)), Check: uint64(path[1])}, Text: []byte(text),
			Event: probe.Answered, Status: 200, ObservedAt: datapath.Now(), Duration: time.Nanosecond,
		}
		if c.learn(a, o, c.unanswered) {
			c.sync(a)
		}
	}
	if len(a.tracker.Refreshing()) != 2 {
		c.t.Fatalf("%s is not refreshed: %+v", a.podName(), a.tracker.Evidence())
	}
}

type usage struct{ heap, goroutines, files, deleted int }

func (c *churn) usage() usage {
	c.t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		c.t.Fatal(err)
	}
	var m runtime.MemStats
	for range 2 { // what pools keep is freed by the second one
		runtime.GC()
	}
	runtime.ReadMemStats(&m)
	return usage{int(m.HeapAlloc), runtime.NumGoroutine(), len(files), len(c.deleted)}
}

// However many pods have come and gone, the daemon is as large as its living ones make it:
//
//	make churn
func TestChurn(t *testing.T) {
	const live, atATime = 100, 50
	c := newChurn(t)
	c.replace(live, live)
	for c.next < *churned/4 {
		c.replace(atATime, live)
	}
	before := c.usage()
	for c.next < *churned {
		c.replace(atATime, live)
	}
	after := c.usage()
	t.Logf("after %d pods: %+v; after %d: %+v", *churned/4, before, c.next, after)
	// Both are as of 100 living pods, so a tenth and half a MiB are for the runtime.
	if after.heap > before.heap+before.heap/10+1<<19 || after.goroutines > before.goroutines || after.files > before.files || after.deleted > before.deleted {
		t.Errorf("it grew: %+v, then %+v", before, after)
	}
	if len(c.attachments) != live || len(c.byDevice) > live || len(c.records) != live {
		t.Errorf("%d attachments, %d devices, %d records", len(c.attachments), len(c.byDevice), len(c.records))
	}
}
