// Package agent is the daemon. It knows what is probed, learns from the probes that reach their pods, and writes into the kernel's
// maps what may be answered, and until when.
//
// Everything is decided in one goroutine, the loop (loop.go). The way of an exchange from the kernel's ring buffer to the evidence
// that answers the next probe is exchange.go, from top to bottom.
package agent

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/agent/metrics"
	"github.com/probelet/probelet/daemon/internal/podevents"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/refresh"
	"github.com/probelet/probelet/daemon/internal/source"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

// agent brings together what is probed, what is attached and what was observed. It belongs to the goroutine of the loop; others
// go through call.
type agent struct {
	log              *slog.Logger
	datapath         *datapath.Datapath
	bpfDir, stateDir string
	defaults         probe.Defaults
	previous         statedir.Endpoints // as the previous daemon left them
	metrics          *metrics.Metrics

	source    source.Source
	prober    *proberFollower
	refresher *refresh.Refresher
	reporter  *podevents.Reporter // nil: no Events are written
	repairs   *repairs            // nil: attachments are not repaired
	chain     *chainStatus        // nil: the chain is not maintained
	held      func() error        // fails once the state directory is no longer this daemon's
	calls     chan func()         // of other goroutines, run between two decisions

	pods        []probe.Pod // except those that probelet leaves alone
	podsKnown   bool
	strangers   []stranger // of all pods
	reader      attach.Reader
	records     []attach.Record
	attachments map[attach.ID]*attachment
	byDevice    map[uint32][]*attachment // by ifindex
	deleted     map[string]time.Time     // by container: when a record of it disappeared

	description  *statedir.Endpoints // as written last
	describedAt  time.Time
	outdated     bool   // the description
	unrecorded   uint64 // connections of probers not recorded for want of room, at the last look
	unreadable   string // the error logged last about reading records,
	unwritten    string // about writing the description,
	unmaintained string // and about repairs
}

func newAgent(log *slog.Logger, d *datapath.Datapath, c Config, previous statedir.Endpoints, r *refresh.Refresher) *agent {
	return &agent{
		log: log, datapath: d, bpfDir: c.BPFDir, stateDir: c.StateDir,
		defaults: c.Defaults, previous: previous, refresher: r, metrics: metrics.New(), calls: make(chan func()),
		attachments: map[attach.ID]*attachment{}, byDevice: map[uint32][]*attachment{}, deleted: map[string]time.Time{},
	}
}

// call runs f in the loop, between two decisions.
func (ag *agent) call(ctx context.Context, f func()) error {
	done := make(chan struct{})
	select {
	case <-ctx.Done():
		return fmt.Errorf("the daemon is busy: %w", ctx.Err())
	case ag.calls <- func() { defer close(done); f() }:
	}
	<-done
	return nil
}
