// Package crosscheck compares the kubelet's own verdicts on its probes with what was observed of them. Where the kubelet
// says otherwise, what was observed is not what the kubelet sees, and must not be answered with.
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

// Endpoint is an endpoint that nobody but its workers asks, with what was observed of their probes.
type Endpoint struct {
	Workers []Worker // whose probes ask it
	Period  time.Duration
	// Discards: the kubelet may discard the outcome of a probe, as it does with HTTP probes only.
	Discards bool
	Counts
}

// Counts are how many probes of an endpoint were answered in the kernel, and of how many the pod's answer was observed: as
// a success, or as anything else. Each only grows while what counts it stays. Requests that are not the prober's are in none.
type Counts struct{ Answered, Succeeded, Other uint64 }

// claimed is how many probes must have been successes for the kubelet too.
func (c Counts) claimed() uint64 { return c.Answered + c.Succeeded }

func (c Counts) below(d Counts) bool {
	return c.Answered < d.Answered || c.Succeeded < d.Succeeded || c.Other < d.Other
}

// Look is a look at the kubelet's verdicts, and at what was observed a while before and a while after it: long enough for
// what either side counted of a probe to be in the other side's counts too.
type Look struct {
	At            time.Time
	Before, After map[ID]Endpoint
	Kubelet       map[Worker]Verdicts
	// Restarted: it may be another kubelet than at the last look.
	Restarted bool
}

// point is what a look found of an endpoint.
type point struct {
	at            time.Time
	before, after Counts
	kubelet       Verdicts // of all workers
}

// Kind is how the kubelet's verdict differs.
type Kind string

// Kinds.
const (
	// Failed: the kubelet counted failures of probes that were observed, or answered, as successes.
	Failed Kind = "failed"
	// Discarded: it counted no verdict at all on such probes.
	Discarded Kind = "discarded"
)

// Kinds are all of them.
var Kinds = []Kind{Failed, Discarded}

// Disagreement is how many probes of an endpoint the kubelet did not count as the successes that they were taken for.
type Disagreement struct {
	ID
	Kind   Kind
	Probes uint64 // at least
}

const (
	// certain is how many probes make a disagreement. A single one may be of a kubelet that came to read an answer in time
	// only after its own timeout.
	certain = 2
	// remembered is how many points are kept of an endpoint: as many looks, or of slower probes as many periods.
	remembered = 10
)

// compare returns how the kubelet's verdicts differ from what was observed between two points. Every probe that was
// counted as a success after the first point and before the second must be among the kubelet's successes between its own
// counts; and every failure among these must have been observed as something else than a success, unless it never came
// as far as to be observed, in which case it was not claimed to be one either.
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

// History is what is remembered of looks.
type History struct {
	endpoints map[ID]*track
	kubelet   map[Worker]Verdicts // of the last look
}

type track struct {
	workers []Worker
	last    point
	points  []point
}

// Add returns the disagreements that a look shows, compared with those before it. What led to one is forgotten.
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
			continue // perhaps it counts under another name
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

// leadsTo reports whether all counts went on since the last look.
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
