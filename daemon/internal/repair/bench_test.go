package repair_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/repair"
)

// BenchmarkLook measures one look at all attachments of a node, of which there is one every 5 s:
//
//	go test ./daemon/internal/repair -run - -bench Look -benchtime 20x
func BenchmarkLook(b *testing.B) {
	bpftest.RequireRoot(b)
	for _, via := range []attach.Via{attach.ViaTCX, attach.ViaClsact} {
		for _, pods := range []int{100, 500} {
			b.Run(fmt.Sprintf("via=%s/pods=%d", via, pods), func(b *testing.B) { benchLook(b, via, pods) })
		}
	}
}

func benchLook(b *testing.B, via attach.Via, pods int) {
	node, bpfDir := bpftest.NewNode(b), bpftest.BPFDir(b)
	d, err := datapath.Ensure(b.Context(), bpfDir)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = d.Close() })
	var records []attach.Record
	for range pods {
		pod := node.AddPod(b)
		r := attach.Record{ContainerID: "of-" + pod.HostIfName, IfName: "eth0", IfIndex: pod.IfIndex, HostIfName: pod.HostIfName, PodNetns: pod.Netns}
		bpftest.Do(b, node.NS, func() error { return attach.Attach(d, bpfDir, r.ID(), r.Target(), via) })
		records = append(records, r)
	}
	time.Sleep(1100 * time.Millisecond) // pins are read again until they are older than a second
	bpftest.Do(b, node.NS, func() error {
		looker, err := repair.NewLooker(d, bpfDir)
		if err != nil {
			return err
		}
		defer looker.Close() //nolint:errcheck // a benchmark's
		looker.Look(records)
		for b.Loop() {
			report := looker.Look(records)
			for _, f := range report.Findings {
				if f.Problem != nil || report.Err != nil || report.Stray {
					return fmt.Errorf("%v, %v, stray %t", f.Problem, report.Err, report.Stray)
				}
			}
		}
		return nil
	})
	const interval = 5 * time.Second
	b.ReportMetric(100*b.Elapsed().Seconds()/float64(b.N)/interval.Seconds(), "%core")
}
