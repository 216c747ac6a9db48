//go:build linux

package survey

import (
	"testing"

	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/store"
)

// An endpoint is called fresh exactly when the kernel may answer it.
func TestFreshIsWhatTheKernelMayAnswer(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		moment := rapid.Uint64Range(1, 5)
		record := datapath.Evidence{
			Result:     rapid.SampledFrom([]uint8{datapath.ResultUnknown, datapath.ResultSuccess, datapath.ResultFailure}).Draw(t, "result"),
			ObservedAt: moment.Draw(t, "observed"), FreshUntil: moment.Draw(t, "fresh until"),
		}
		withdrawn := datapath.Tally{WithdrawnAt: rapid.Uint64Range(0, 5).Draw(t, "withdrawn")}
		now := moment.Draw(t, "now")
		e := status.Endpoint{Evidence: store.Evidence(probe.Question{}, record), WithdrawnAt: withdrawn.WithdrawnAt}
		fresh := e.State(now) == status.StateFresh
		if may := datapath.MayAnswer(record, datapath.Tally{}, withdrawn, now, now); fresh != may {
			t.Errorf("fresh: %t, the kernel may answer: %t", fresh, may)
		}
	})
}
