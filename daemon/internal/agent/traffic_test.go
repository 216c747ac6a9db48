package agent

import (
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// A pod's traffic is looked at only while it is evidence: under every daemon, and no longer than the pod wants.
func TestTrafficIsLookedAtOnlyWhileItIsEvidence(t *testing.T) {
	n := newNode(t)
	n.config.Defaults.Liveness = probe.LivenessByTraffic
	n.container("livenessProbe: {httpGet: {path: /healthz, port: 8080}, " + long + "}")
	n.attach()
	stop := n.start()
	n.makeFresh()
	// isNoted makes the pod serve another request, and reports whether that was noted.
	isNoted := func() bool {
		time.Sleep(30 * time.Millisecond) // packets in quick succession are noted once
		servedAt := func() uint64 {
			known, err := attach.OpenPod(n.d, n.config.BPFDir, n.idOf(n.pod))
			if err != nil {
				t.Fatal(err)
			}
			tally, err := known.Tally(datapath.PortKey(8080))
			if err != nil {
				t.Fatal(err)
			}
			return tally.ServedAt
		}
		before := servedAt()
		n.want("/other", 200, false)
		return servedAt() != before
	}
	n.eventually("noted", isNoted)
	stop()
	n.start()
	n.eventually("noted under the next daemon", isNoted)
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.eventually("no longer noted", not(isNoted))
}
