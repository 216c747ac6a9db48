// Package source reads which pods there are, and how they are probed.
package source

import (
	"cmp"
	"context"
	"log/slog"
	"reflect"
	"slices"
	"sync/atomic"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// Source yields complete snapshots: a pod that is missing from one is gone.
type Source interface {
	// Run sends a snapshot as soon as it has one and after every change, until ctx ends. While a source cannot be read it
	// sends none, so the last snapshot stays in force. If Run returns an error, there will be no more snapshots.
	Run(ctx context.Context, snapshots chan<- []probe.Pod) error
	// Failing describes how the source currently fails; empty if it does not. It is safe for concurrent use.
	Failing() string
	// Delivery returns how container states currently arrive. It is safe for concurrent use.
	Delivery() Delivery
	// Refresh tells the source that the last snapshot may lack a new pod. It does not block, and does nothing if the
	// source is notified of changes.
	Refresh()
}

// Delivery describes how container states arrive.
type Delivery struct {
	// Pushed: the source is notified of each change. Otherwise Why explains why not.
	Pushed bool
	Why    string
}

// changesSettle is the delay between a change and a snapshot, because a change of a pod comes as several changes of its
// object.
const changesSettle = 20 * time.Millisecond

// gather waits for further changes.
func gather(ctx context.Context) {
	select {
	case <-ctx.Done():
	case <-time.After(changesSettle):
	}
}

func send(ctx context.Context, snapshots chan<- []probe.Pod, pods []probe.Pod) bool {
	select {
	case <-ctx.Done():
		return false
	case snapshots <- pods:
		return true
	}
}

// publisher sends snapshots that differ from the previous one, regardless of the order of pods.
type publisher struct {
	last  []probe.Pod
	known bool
}

func (p *publisher) send(ctx context.Context, snapshots chan<- []probe.Pod, pods []probe.Pod) bool {
	slices.SortFunc(pods, func(a, b probe.Pod) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	if p.known && reflect.DeepEqual(p.last, pods) {
		return true
	}
	if !send(ctx, snapshots, slices.Clone(pods)) { // the receiver owns what was sent
		return false
	}
	p.last, p.known = pods, true
	return true
}

// health logs when a source begins to fail and when it recovers, but not repeated failures.
type health struct {
	log     *slog.Logger
	failing atomic.Value // string: the kind of failure logged last
}

// Failing implements Source.
func (h *health) Failing() string {
	kind, _ := h.failing.Load().(string)
	return kind
}

// set records the kind of failure, or empty for success. Errors of the same kind may differ each time, for example in
// ports or offsets.
func (h *health) set(kind string, err error) {
	switch kind {
	case h.Failing():
		return
	case "":
		h.log.Info("source of specs recovered")
	default:
		h.log.Error("source of specs "+kind+"; keeping the previous specs", "error", err)
	}
	h.failing.Store(kind)
}
