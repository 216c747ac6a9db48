package agent

import (
	"errors"
	"flag"
	"fmt"
	"net/netip"
	"os"
	"runtime"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/crosscheck"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/refresh"
	"github.com/probelet/probelet/daemon/internal/repair"
)

const (
	churnPods  = 100 // at a time
	churnedOff = 20  // of these, replaced by each wave
)

var churned = flag.Int("churn", 6000, "how many pods come and go in TestChurn")

// Pods come and go without leaving anything behind, neither in memory nor in the cost of the next ones.
func TestChurn(t *testing.T) {
	c := newChurn(t)
	waves := *churned / churnedOff
	c.run(waves / 4) // until all pools, maps and buffers have grown to the size needed
	before := c.usage()
	c.run(waves - waves/4)
	after := c.usage()
	t.Logf("before %+v, after %+v", before, after)
	for what, n := range after.kept {
		if n > before.kept[what] {
			t.Errorf("%d %s, %d before", n, what, before.kept[what])
		}
	}
	if after.heap > before.heap+128<<10 {
		t.Errorf("a heap of %d bytes, %d before", after.heap, before.heap)
	}
	if most := before.perWave + before.perWave/10; after.perWave > most {
		t.Errorf("a wave allocates %d bytes, %d before", after.perWave, before.perWave)
	}
}

// churn is a daemon whose pods come and go. None is attached in the kernel; outcomes are made from simulated records.
type churn struct {
	t         *testing.T
	d         *agent
	assembler *evidence.Assembler
	history   crosscheck.History
	pods      []probe.Pod
	records   []attach.Record
	made      int
	now       uint64
	allocated uint64 // by the thriftiest of the last ten waves, in bytes: a collection in one of the others may have emptied a pool
}

func newChurn(t *testing.T) *churn {
	r, err := refresh.New(noSockets{}, datapath.Now)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.Close)
	d := unattached(t, t.TempDir())
	d.refresher, d.defaults.Refresh.On = r, true
	return &churn{t: t, d: d, assembler: evidence.NewAssembler(), now: datapath.Now()}
}

// noSockets fails every request of the refresher for want of sockets.
type noSockets struct{}

func (noSockets) Open(int) (int, uint64, error) { return -1, 0, errors.New("no sockets") }
func (noSockets) Done(uint64)                   {}

// run replaces pods in a number of waves.
func (c *churn) run(waves int) {
	c.t.Helper()
	for wave := range waves {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		c.wave()
		runtime.ReadMemStats(&after)
		if allocated := after.TotalAlloc - before.TotalAlloc; wave <= max(waves-10, 0) || allocated < c.allocated {
			c.allocated = allocated
		}
	}
}

func (c *churn) wave() {
	c.t.Helper()
	stay := min(len(c.pods), churnPods-churnedOff)
	c.pods, c.records = c.pods[len(c.pods)-stay:], c.records[len(c.records)-stay:]
	for len(c.pods) < churnPods {
		c.add()
	}
	err := attach.WriteRecord(c.d.stateDir, c.records[len(c.records)-1])
	for id := range c.d.deleted {
		c.d.deleted[id] = time.Now().Add(-repair.DeletionGrace - time.Second) // time passes
	}
	c.d.readRecords()
	if err := errors.Join(err, attach.RemoveRecord(c.d.stateDir, c.records[len(c.records)-1].ID())); err != nil {
		c.t.Fatal(err)
	}
	c.d.records = append([]attach.Record(nil), c.records...)
	c.d.setPods(append([]probe.Pod(nil), c.pods...))
	var outcomes []refresh.Outcome
	for i, r := range c.records {
		for _, o := range c.exchange(r, c.pods[i].IPs[0]) {
			outcomes = append(outcomes, refresh.Outcome{Attachment: r.ID(), Outcome: o.Outcome})
		}
	}
	if len(outcomes) != len(c.records) {
		c.t.Fatalf("%d outcomes of %d pods", len(outcomes), len(c.records))
	}
	c.d.refreshed(outcomes)
	for _, o := range outcomes {
		c.d.judge(c.d.attachments[o.Attachment], o.Outcome)
	}
	c.d.doubt(c.assembler.TakeDoubtful())
	c.look()
	c.d.describe()
	c.d.refresher.Take()
}

// add adds a pod with a record.
func (c *churn) add() {
	c.made++
	ip := netip.AddrFrom4([4]byte{10, byte(c.made >> 16), byte(c.made >> 8), byte(c.made)})
	pod := probe.Pod{Namespace: "churn", Name: fmt.Sprintf("pod-%d", c.made), UID: fmt.Sprintf("uid-%d", c.made), IPs: []netip.Addr{ip}}
	if c.made%2 == 0 {
		pod.Annotations = map[string]string{probe.AnnotationMode: string(probe.Observe)}
	}
	pod.Probes = []probe.Spec{{
		Container: "c", Type: probe.Readiness, Kind: probe.HTTP, Port: 80, Path: "/ready", Period: time.Second, Timeout: time.Second,
		FailureThreshold: 3, SuccessThreshold: 1,
	}}
	c.pods = append(c.pods, pod)
	c.records = append(c.records, attach.Record{
		ContainerID: fmt.Sprintf("container-%d", c.made), IfName: "eth0", IfIndex: 1000 + c.made,
		PodNamespace: pod.Namespace, PodName: pod.Name, PodUID: pod.UID, CreatedAt: time.Now().Truncate(0).UTC(),
	})
}

// exchange returns the observations made from the records of a probe.
func (c *churn) exchange(r attach.Record, ip netip.Addr) (all []evidence.Observation) {
	const response = "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
	c.now += uint64(600 * time.Millisecond) // a minute in a wave
	request := fmt.Sprintf("GET /ready HTTP/1.1\r\nHost: %s:80\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n", ip)
	one := func(fromPod bool, flags uint8, offset int, text string, asked bool) {
		record := datapath.Record{
			Owner: 1, StartedAt: c.now, ObservedAt: c.now + 1000, Device: datapath.DeviceKey{Ifindex: uint32(r.IfIndex), Generation: 1},
			Port: 80, FromPod: fromPod, TCPFlags: flags, Offset: uint32(offset), Len: uint32(len(text)), Payload: []byte(text),
		}
		if asked {
			record.Question = datapath.Question{Hash: uint64(r.IfIndex), Check: 1}
		}
		if o, ok := c.assembler.Add(record); ok {
			all = append(all, o)
		}
	}
	one(true, datapath.FlagSYN|datapath.FlagACK, 0, "", false)
	one(false, datapath.FlagACK, 0, request, true)
	one(true, datapath.FlagACK, 0, response, true)
	if r.IfIndex%10 == 0 { // one that never ends
		c.now++
		one(true, datapath.FlagSYN|datapath.FlagACK, 0, "", false)
		c.now--
	}
	one(false, datapath.FlagFIN|datapath.FlagACK, len(request), "", false)
	return all
}

// look compares the kubelet's verdicts.
func (c *churn) look() {
	l := crosscheck.Look{At: time.Unix(0, int64(c.now)), Kubelet: map[crosscheck.Worker]crosscheck.Verdicts{}}
	l.Before = map[crosscheck.ID]crosscheck.Endpoint{}
	for id, a := range c.d.attachments {
		for _, s := range a.tracker.Endpoints() {
			workers := a.workers(s)
			l.Before[crosscheck.ID{Attachment: id, Endpoint: s.Endpoint}] = crosscheck.Endpoint{Workers: workers, Period: s.Period, Counts: a.counts[s.Endpoint]}
			for _, w := range workers {
				l.Kubelet[w] = crosscheck.Verdicts{Succeeded: 1}
			}
		}
	}
	l.After = l.Before
	c.history.Add(l)
}

// usage is what the daemon uses.
type usage struct {
	kept          map[string]int // counts of whatever pods may leave behind
	heap, perWave uint64         // bytes
}

func (c *churn) usage() usage {
	c.t.Helper()
	runtime.GC()
	runtime.GC() // pools are emptied by the second
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	descriptors, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		c.t.Fatal(err)
	}
	return usage{
		map[string]int{
			"attachments": len(c.d.attachments), "devices": len(c.d.byDevice), "deleted": len(c.d.deleted),
			"descriptors": len(descriptors), "goroutines": runtime.NumGoroutine(),
		},
		m.HeapAlloc, c.allocated,
	}
}
