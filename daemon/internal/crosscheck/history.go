// Package crosscheck compares the kubelet's own verdicts on its probes with what was observed of them. If they differ, the kubelet sees
// something else than was observed, which must therefore not be used to answer.
package crosscheck

import (
	"slices"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// ID identifies an endpoint on the node.
type ID struct {
	Attachment attach.ID
	probe.Endpoint
}

// Endpoint is an endpoint that only its workers ask, with what was observed of their probes.
type Endpoint struct {
	Workers []Worker
	Period  time.Duration
	// Discards is set if the kubelet may discard the outcome of a probe, which it only does with HTTP probes.
	Discards bool
	Counts
}

// Counts counts the probes of an endpoint that were answered in the kernel, and those whose response by the pod was observed as a success
// or as something else. Counts only grow as long as whatever counts them is not replaced. They exclude requests that are not the prober's.
type Counts struct{ Answered, Succeeded, Other uint64 }

// claimed counts the probes that must have been successes for the kubelet, too.
func (c Counts) claimed() uint64 { return c.Answered + c.Succeeded }

func (c Counts) below(d Counts) bool {
	return c.Answered < d.Answered || c.Succeeded < d.Succeeded || c.Other < d.Other
}

// Look has the kubelet's verdicts at one moment, and what was observed a while before and a while after it: long enough for whatever one
// side has counted to be in the other side's counts, too.
type Look struct {
	At            time.Time
	Before, After map[ID]Endpoint
	Kubelet       map[Worker]Verdicts
	// Restarted is set if the kubelet may have restarted since the last look.
	Restarted bool
}

// point is what a look shows of an endpoint.
type point struct {
	at            time.Time
	before, after Counts
	kubelet       Verdicts // of all workers
}

// Kind is the way in which the kubelet's verdicts differ.
type Kind string

// Kinds.
const (
	// Failed means that the kubelet counted probes as failures that were observed, or answered, as successes.
	Failed Kind = "failed"
	// Discarded means that it did not count such probes at all.
	Discarded Kind = "discarded"
)

// Kinds lists all of them.
var Kinds = []Kind{Failed, Discarded}

// Disagreement is an endpoint with probes that were taken for successes, and not counted as such by the kubelet.
type Disagreement struct {
	ID
	Kind   Kind
	Probes uint64 // at least that many
}

const (
	// certain is how many probes make a disagreement. A single one may be due to a kubelet that got around to reading a timely response
	// only after its timeout.
	certain = 2
	// remembered is how many points are kept of an endpoint, one per look, or one per period if that is longer.
	remembered = 10
)

// compare returns how the kubelet's verdicts differ from what was observed between two points. Every probe counted as a success after the
// first point and before the second must be among the kubelet's successes between its own counts. Every failure among the kubelet's must
// have been observed as something else than a success, unless it was not observed at all, but then it was not claimed as one either.
func compare(from, to point, discards bool) (Kind, uint64) {
	missing := grown(from.after.claimed(), to.before.claimed()) - grown(from.kubelet.Succeeded, to.kubelet.Succeeded)
	unexplained := grown(from.kubelet.Failed, to.kubelet.Failed) - grown(from.before.Other, to.after.Other)
	switch {
	case missing < certain:
		return "", 0
	case unexplained > 0:
		return Failed, uint64(missing)
	case discards:
		return Discarded, uint64(missing)
	}
	return "", 0
}

func grown(from, to uint64) int64 { return int64(to - from) }

// History remembers looks.
type History struct {
	endpoints map[ID]*track
	kubelet   map[Worker]Verdicts // of the last look
}

type track struct {
	workers []Worker
	last    point
	points  []point
}

// Add returns the disagreements that a look reveals, compared with the previous ones. The points that led to one are forgotten.
func (h *History) Add(l Look) []Disagreement {
	if l.Restarted {
		h.endpoints = nil
	}
	var all []Disagreement
	tracks := map[ID]*track{}
	for id, after := range l.After {
		before, known := l.Before[id]
		if !known {
			continue
		}
		now := point{at: l.At, before: before.Counts, after: after.Counts}
		restarted := false
		for _, w := range after.Workers {
			now.kubelet = now.kubelet.plus(l.Kubelet[w])
			restarted = restarted || l.Kubelet[w].below(h.kubelet[w])
		}
		if now.kubelet == (Verdicts{}) {
			continue // perhaps the kubelet counts under another name
		}
		t := h.endpoints[id]
		if t == nil || restarted || !t.leadsTo(now, after.Workers) {
			tracks[id] = &track{after.Workers, now, []point{now}}
			continue
		}
		if kind, probes := t.compare(now, after.Discards); kind != "" {
			all = append(all, Disagreement{id, kind, probes})
			continue
		}
		t.keep(now, after.Period)
		tracks[id] = t
	}
	h.endpoints, h.kubelet = tracks, l.Kubelet
	return all
}

// leadsTo reports whether all counts continue those of the last look.
func (t *track) leadsTo(now point, workers []Worker) bool {
	return slices.Equal(t.workers, workers) && !now.before.below(t.last.after) && !now.after.below(now.before)
}

func (t *track) compare(now point, discards bool) (Kind, uint64) {
	for _, from := range t.points {
		if kind, probes := compare(from, now, discards); kind != "" {
			return kind, probes
		}
	}
	return "", 0
}

func (t *track) keep(now point, period time.Duration) {
	t.last = now
	if now.at.Sub(t.points[len(t.points)-1].at) < period {
		return
	}
	if len(t.points) == remembered {
		t.points = slices.Delete(t.points, 0, 1)
	}
	t.points = append(t.points, now)
}
