package agent

import (
	"fmt"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// BenchmarkObserve measures what an observed probe costs the loop: a batch of recordsGather, of 40 pods with two HTTP probes each, into
// the kernel's maps.
//
//	go test ./daemon/internal/agent -run - -bench Observe
func BenchmarkObserve(b *testing.B) {
	k := newKept(b)
	batch := observable(k, 40)
	k.observe(renewed(batch))
	if n := len(k.attachments); n != 40 {
		b.Fatalf("%d attachments", n)
	}
	b.ReportAllocs()
	began := ownCPU(b)
	for b.Loop() {
		k.observe(renewed(batch))
	}
	b.ReportMetric(float64(ownCPU(b)-began)/float64(b.N*len(batch)), "cpu-ns/probe")
}

// ownCPU is what this process has taken of all cores, its own and the kernel's for it.
func ownCPU(t testing.TB) time.Duration {
	t.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		t.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// observable attaches so many pods, and returns a success of each of their probes.
func observable(k *kept, pods int) (batch []evidence.Observation) {
	k.t.Helper()
	for range pods {
		p := k.run()
		pod := &k.pods[len(k.pods)-1]
		pod.Probes = nil
		for _, kind := range []probe.Type{probe.Readiness, probe.Liveness} {
			pod.Probes = append(pod.Probes, probe.Spec{
				Container: "c", Type: kind, Kind: probe.HTTP, Port: 80, Path: "/" + string(kind), SuccessThreshold: 1, FailureThreshold: 3,
				Period: time.Second, Timeout: time.Second,
			})
		}
		k.FinishADD(p, k.BeginADD(p))
		for i, path := range []string{"/readiness", "/liveness"} {
			text := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s:80\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n", path, p.IPv4)
			request, err := probe.ParseRequest([]byte(text))
			if err != nil {
				k.t.Fatal(err)
			}
			question := probe.Question{Hash: uint64(p.IfIndex)<<8 | uint64(i+1), Check: 1}
			batch = append(batch, evidence.Observation{Device: k.Device(p), Outcome: probe.Outcome{
				Port: 80, Kind: probe.HTTP, Request: request, Question: question, Text: []byte(text), Event: probe.Answered, Status: 200,
			}})
		}
	}
	k.readRecords()
	k.setPods(k.pods)
	k.checkDevices()
	return batch
}

// renewed returns observations of now.
func renewed(batch []evidence.Observation) []evidence.Observation {
	now := datapath.Now()
	for i := range batch {
		batch[i].ObservedAt, batch[i].Duration = now, time.Microsecond
	}
	return batch
}
