package agent

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// BenchmarkSnapshot measures what a snapshot of 500 pods with two probes each costs the loop, by how many of them have another
// container. Nothing is attached, so no maps are written.
//
//	go test ./daemon/internal/agent -run - -bench Snapshot
func BenchmarkSnapshot(b *testing.B) {
	for _, changed := range []int{1, 3, 500} {
		b.Run(fmt.Sprintf("changed=%d", changed), func(b *testing.B) {
			d := unattached(b, b.TempDir())
			pods := benchPods(500, d)
			d.setPods(slices.Clone(pods))
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				for p := range changed {
					pod := &pods[(i*changed+p)%len(pods)]
					pod.Probes = slices.Clone(pod.Probes)
					for q := range pod.Probes {
						pod.Probes[q].Instance = fmt.Sprintf("containerd://%d", i)
					}
				}
				d.setPods(slices.Clone(pods))
			}
		})
	}
}

// benchPods returns so many pods, which the daemon has records of.
func benchPods(n int, d *agent) []probe.Pod {
	var pods []probe.Pod
	for i := range n {
		pod := probe.Pod{
			Namespace: "default", Name: fmt.Sprintf("web-%03d", i), UID: fmt.Sprintf("uid-%d", i),
			IPs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(i / 250), byte(i % 250)})},
		}
		for _, kind := range []probe.Type{probe.Readiness, probe.Liveness} {
			pod.Probes = append(pod.Probes, probe.Spec{
				Container: "web", Type: kind, Kind: probe.HTTP, Port: 8080, Path: "/" + string(kind),
				Period: time.Second, Timeout: time.Second, FailureThreshold: 3, SuccessThreshold: 1,
			})
		}
		pods = append(pods, pod)
		d.records = append(d.records, attach.Record{
			ContainerID: fmt.Sprintf("container-%d", i), IfName: "eth0",
			PodNamespace: pod.Namespace, PodName: pod.Name, PodUID: pod.UID, CreatedAt: time.Unix(0, 0).UTC(),
		})
	}
	return pods
}
