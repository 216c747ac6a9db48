package agent

import (
	"context"
	"runtime/debug"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
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
	reports := ag.repairs.reports()
	prober := time.NewTicker(proberInterval)
	defer prober.Stop()
	resync := time.NewTicker(resyncInterval)
	defer resync.Stop()
	var due timers
	for {
		var err error
		select {
		case <-ctx.Done():
			return nil
		case err = <-in.failed:
		case pods := <-in.snapshots:
			exchanges = in.exchanges
			err = ag.takePods(pods)
		case <-in.records:
			err = ag.recordsChanged()
		case b := <-exchanges:
			ag.doubt(b.doubtful)
			ag.observe(b.observations)
		case call := <-ag.calls:
			call()
		case <-ag.refresher.C:
			ag.refreshed(ag.refresher.Take())
		case <-resync.C:
			err = ag.resync(in)
		case report := <-reports:
			err = ag.looked(ctx, report)
			if ag.repairs.again {
				due.look = time.After(lookAgain)
			}
		case <-prober.C:
			ag.prober.follow()
		case <-due.retry:
			due.retry = nil
			ag.retry()
		case <-due.look:
			due.look = nil
			ag.requestLook()
		case <-due.describe:
			due.describe = nil
			ag.describe()
		}
		if err != nil {
			return err
		}
		due.arm(ag)
	}
}

// timers fire once each, when what was put off is due. One that is not armed is nil.
type timers struct {
	retry    <-chan time.Time // maps that are missing or not writable
	look     <-chan time.Time // attachments that the last look left with something to be done
	describe <-chan time.Time // a description that is out of date
}

// arm arms the timers of what is yet to be written, unless they are armed already.
func (due *timers) arm(ag *agent) {
	if due.describe == nil && ag.outdated {
		due.describe = time.After(time.Until(ag.describedAt.Add(describeInterval)))
	}
	if due.retry == nil && ag.pending() {
		due.retry = time.After(retryAfter)
	}
}

// takePods takes the pods that the source lists. The first list is followed by a look at the attachments.
func (ag *agent) takePods(pods []probe.Pod) error {
	first := !ag.podsKnown
	ag.setPods(pods)
	if !first {
		return nil
	}
	err := ag.look()
	debug.FreeOSMemory() // starting takes several times the memory of running
	return err
}

// recordsChanged reads the records. For new attachments, the source is asked for their pods.
func (ag *agent) recordsChanged() error {
	if err := ag.held(); err != nil {
		return err
	}
	if ag.readRecords() {
		ag.source.Refresh()
	}
	return nil
}

// resync does what nothing notifies the loop of: it looks at the attachments, and reads the records where a change may have been
// missed.
func (ag *agent) resync(in *inputs) error {
	if err := ag.held(); err != nil {
		return err
	}
	if in.recordsReplaced() || ag.unreadable != "" {
		ag.readRecords()
	}
	return ag.look()
}
