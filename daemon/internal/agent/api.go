package agent

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// Alive implements api.Node.
func (ag *agent) Alive(ctx context.Context) error { return ag.call(ctx, func() {}) }

// Unready implements api.Node.
func (ag *agent) Unready(ctx context.Context) (missing []string, err error) {
	err = ag.call(ctx, func() {
		if !ag.podsKnown {
			missing = append(missing, "the pods are not known yet")
		}
		if ag.prober.lost != "" {
			missing = append(missing, "no prober was found, so nothing is answered: "+ag.prober.lost)
		}
		if err := ag.chain.misplaced(); err != nil {
			missing = append(missing, "new pods are not attached: "+err.Error())
		}
		if ag.unreadable != "" {
			missing = append(missing, "records of attachments cannot be read: "+ag.unreadable)
		}
	})
	return missing, err
}

// Invalidate implements api.Node. Once it returns, the kernel answers nothing from what was known.
func (ag *agent) Invalidate(ctx context.Context, r api.InvalidateRequest) (reply api.InvalidateReply, err error) {
	called := ag.call(ctx, func() { reply, err = ag.invalidate(r) })
	return reply, errors.Join(called, err)
}

func (ag *agent) invalidate(r api.InvalidateRequest) (api.InvalidateReply, error) {
	name := r.Namespace + "/" + r.Pod
	reply := api.InvalidateReply{Pod: name, Withdrawn: []string{}}
	attachments := ag.ofPod(name)
	if len(attachments) == 0 && !ag.knows(name) {
		return reply, api.NotFound("pod %s is not known on this node", name)
	}
	var asked []string
	for _, a := range attachments {
		for _, s := range a.tracker.Endpoints() {
			asked = append(asked, s.String())
		}
		changes := a.withdraw(func(e probe.Endpoint) bool {
			return (r.Port == 0 || r.Port == e.Port) && (r.Path == "" || r.Path == e.Path)
		})
		if len(changes) == 0 {
			continue
		}
		for _, c := range changes {
			ag.note(a, c, nil)
			reply.Withdrawn = append(reply.Withdrawn, c.Endpoint.String())
		}
		if ag.sync(a); a.pending && a.problem != "" {
			return reply, fmt.Errorf("pod %s: failed to withdraw evidence from the kernel: %s", name, a.problem)
		}
	}
	ag.log.Info("invalidated", "pod", name, "port", r.Port, "path", r.Path, "endpoints", len(reply.Withdrawn))
	if len(reply.Withdrawn) == 0 && (r.Port != 0 || r.Path != "") {
		slices.Sort(asked)
		return reply, api.NotFound("pod %s has no such endpoint; it has: %s", name, strings.Join(slices.Compact(asked), ", "))
	}
	return reply, nil
}

// Events implements api.Node.
func (ag *agent) Events(ctx context.Context, namespace, pod string) (reply api.EventsReply, err error) {
	reply = api.EventsReply{Pod: namespace + "/" + pod, Events: []api.Event{}}
	called := ag.call(ctx, func() {
		attachments := ag.ofPod(reply.Pod)
		if len(attachments) == 0 && !ag.knows(reply.Pod) {
			err = api.NotFound("pod %s is not known on this node", reply.Pod)
		}
		for _, a := range attachments {
			for _, events := range a.events {
				reply.Events = append(reply.Events, events...)
			}
		}
	})
	slices.SortFunc(reply.Events, func(a, b api.Event) int { return a.Time.Compare(b.Time) })
	return reply, errors.Join(called, err)
}

// Endpoints implements api.Node.
func (ag *agent) Endpoints(ctx context.Context) (reply api.EndpointsReply, err error) {
	reply.Endpoints, reply.Inconclusive = []api.Endpoint{}, []api.Inconclusive{}
	return reply, ag.call(ctx, func() {
		if ag.outdated {
			ag.describe() // callers read it next
		}
		for _, a := range ag.attachments {
			reply.Endpoints = append(reply.Endpoints, a.known()...)
			if len(a.inconclusive) == 0 {
				continue
			}
			described := api.Inconclusive{ContainerID: a.record.ContainerID, IfName: a.record.IfName, Reasons: map[string]uint64{}}
			for doubt, n := range a.inconclusive {
				described.Reasons[string(doubt)] = n
			}
			reply.Inconclusive = append(reply.Inconclusive, described)
		}
	})
}

// Source implements api.Node.
func (ag *agent) Source() api.SourceReply {
	d := ag.source.Delivery()
	return api.SourceReply{Pushed: d.Pushed, Why: d.Why}
}

// known describes what is known of the attachment's observed endpoints.
func (a *attachment) known() []api.Endpoint {
	var all []api.Endpoint
	var counts map[probe.Endpoint]probe.ShadowCounts // nil unless in mode observe
	if a.shadow != nil {
		counts = a.shadow.Counts()
	}
	for e, known := range a.tracker.Evidence() {
		described := api.Endpoint{
			ContainerID: a.record.ContainerID, IfName: a.record.IfName,
			Kind: e.Kind, Port: e.Port, Path: e.Path, HeadersID: e.Headers,
			Result: known.Result.String(), Status: known.Status, ObservedAt: known.ObservedAt,
		}
		if of, ok := counts[e]; ok {
			described.WouldAnswer = &api.WouldAnswer{Answered: of.Answered, Hidden: of.Hidden, Passed: of.Passed}
		}
		all = append(all, described)
	}
	return all
}

// eventsKept is how many events of each endpoint are kept.
const eventsKept = 16

// remember adds an event to the last ones of an endpoint. One that repeats the previous event is counted instead.
func (a *attachment) remember(c probe.Change, took *time.Duration) {
	event := api.Event{
		Time: time.Now(), Count: 1, Kind: c.Endpoint.Kind, Port: c.Endpoint.Port, Path: c.Endpoint.Path, HeadersID: c.Endpoint.Headers,
		Result: c.To.Result.String(), Status: c.To.Status, Cause: c.Cause, Took: took,
	}
	events := a.events[c.Endpoint]
	if n := len(events); n > 0 {
		last := &events[n-1]
		if last.Result == event.Result && last.Status == event.Status && last.Cause == event.Cause {
			event.Count += last.Count
			*last = event
			return
		}
	}
	if len(events) == eventsKept {
		events = slices.Delete(events, 0, 1)
	}
	a.events[c.Endpoint] = append(events, event)
}
