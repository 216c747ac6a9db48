package agent

import (
	"context"
	"runtime/debug"
	"time"

	"github.com/probelet/probelet/daemon/internal/repair"
)

const (
	// retryAfter is when maps that are missing or not writable are retried. Records are written before maps exist.
	retryAfter = 200 * time.Millisecond
	// resyncInterval is how often attachments are looked at, and records read if their directory was replaced, which nothing
	// notifies us of.
	resyncInterval = 5 * time.Second
)

// run is the loop: it takes one input after the other until ctx ends, or until the daemon cannot go on.
func (ag *agent) run(ctx context.Context, in *inputs) error {
	defer func() {
		if ag.outdated {
			ag.describe()
		}
	}()
	ag.readRecords()
	// Until the pods are known, probes mean nothing, and evidence in the maps would seem superfluous.
	var exchanges <-chan batch
	var retry, again, describe <-chan time.Time
	prober := time.NewTicker(proberInterval)
	defer prober.Stop()
	resync := time.NewTicker(resyncInterval)
	defer resync.Stop()
	var reports <-chan repair.Report
	if ag.repairs != nil {
		reports = ag.repairs.looker.Reports()
	}
	for {
		var lookErr error
		select {
		case <-ctx.Done():
			return nil
		case err := <-in.failed:
			return err
		case pods := <-in.snapshots:
			first := !ag.podsKnown
			exchanges = in.exchanges
			ag.setPods(pods)
			if first {
				lookErr = ag.look()
				debug.FreeOSMemory() // starting takes several times the memory of running
			}
		case <-in.records:
			if err := ag.held(); err != nil {
				return err
			}
			if ag.readRecords() {
				ag.source.Refresh()
			}
		case b := <-exchanges:
			ag.doubt(b.doubtful)
			ag.observe(b.observations)
		case call := <-ag.calls:
			call()
		case <-ag.refresher.C:
			ag.refreshed(ag.refresher.Take())
		case <-retry:
			retry = nil
			ag.retry()
		case <-resync.C:
			if err := ag.held(); err != nil {
				return err
			}
			if in.recordsReplaced() || ag.unreadable != "" {
				ag.readRecords()
			}
			lookErr = ag.look()
		case report := <-reports:
			lookErr = ag.looked(ctx, report)
			if ag.repairs.again {
				again = time.After(lookAgain)
			}
		case <-again:
			again = nil
			ag.requestLook()
		case <-prober.C:
			ag.prober.follow()
		case <-describe:
			describe = nil
			ag.describe()
		}
		if lookErr != nil {
			return lookErr
		}
		if ag.outdated && describe == nil {
			describe = time.After(time.Until(ag.describedAt.Add(describeInterval)))
		}
		if retry == nil && ag.pending() {
			retry = time.After(retryAfter)
		}
	}
}
