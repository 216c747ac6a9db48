// Package source says which pods there are and what they are probed for.
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

// Source yields snapshots, each complete: a pod that is missing from one is gone.
type Source interface {
	// Run sends a snapshot as soon as there is one and after every change, until ctx ends. While a source cannot be read
	// it sends none, so what it last said stays in force. An error means that there will be no more.
	Run(ctx context.Context, snapshots chan<- []probe.Pod) error
	// Failing is how the source fails at present; empty if it does not. It may be called at any time.
	Failing() string
	// Delivery is how containers' states come in at present. It may be called at any time.
	Delivery() Delivery
	// Refresh says that there is a pod that the last snapshot may not have had. It does not wait, and may do nothing
	// where changes come by themselves.
	Refresh()
}

// Delivery is how containers' states come in.
type Delivery struct {
	// Pushed: the source hears of each change when it happens. Otherwise Why says why not.
	Pushed bool
	Why    string
}

// changesSettle is how long after a change a snapshot is made: one change of a pod is several of its object.
const changesSettle = 20 * time.Millisecond

// gather lets further changes come.
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

// publisher sends snapshots of a node's pods that differ from the one before, whatever order they came in.
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
	if !send(ctx, snapshots, slices.Clone(pods)) { // what was sent is the receiver's
		return false
	}
	p.last, p.known = pods, true
	return true
}

// health logs when a source fails and when it is well again, not each time in between.
type health struct {
	log     *slog.Logger
	failing atomic.Value // string: the kind of the failure that was logged last
}

// Failing implements Source.
func (h *health) Failing() string {
	kind, _ := h.failing.Load().(string)
	return kind
}

// set takes the kind of failure, empty for none. Errors of one kind may differ each time: in ports, or in offsets.
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
