package agent

import (
	"maps"
	"reflect"
	"slices"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/repair"
	"github.com/probelet/probelet/daemon/internal/store"
)

// setPods replaces the pods with those that the source lists now.
func (ag *agent) setPods(pods []probe.Pod) {
	strangers := strangersAmong(pods)
	all := !reflect.DeepEqual(strangers, ag.strangers)
	ag.strangers, ag.podsKnown = strangers, true
	ag.pods = slices.DeleteFunc(pods, func(p probe.Pod) bool { return p.LeftAlone != "" })
	ag.metrics.SnapshotReceived()
	ag.update(all)
}

// readRecords reads the records of attachments, and reports whether any were added.
func (ag *agent) readRecords() (added bool) {
	records, err := ag.reader.Read(ag.stateDir)
	known := map[attach.ID]bool{}
	for _, r := range ag.records {
		known[r.ID()] = true
	}
	for _, r := range records {
		added = added || !known[r.ID()]
		delete(known, r.ID())
	}
	maps.DeleteFunc(ag.deleted, func(_ string, at time.Time) bool { return time.Since(at) > repair.DeletionGrace })
	for id := range known {
		ag.deleted[id.ContainerID] = time.Now()
	}
	ag.records = records
	switch {
	case err == nil:
		ag.unreadable = ""
	case err.Error() != ag.unreadable:
		ag.unreadable = err.Error()
		ag.log.Error("failed to read records of attachments", "error", err)
	}
	ag.update(false)
	return added
}

// wasDeleted reports whether a record of the container disappeared within the grace of deletion.
func (ag *agent) wasDeleted(containerID string) bool {
	at, ok := ag.deleted[containerID]
	return ok && time.Since(at) < repair.DeletionGrace
}

// update matches records with pods, and brings the attachments up to date whose pod, record or maps have changed, or all of them.
func (ag *agent) update(all bool) {
	if !ag.podsKnown {
		return
	}
	pods := index(ag.pods)
	current := make(map[attach.ID]*attachment, len(ag.records))
	var changed []*attachment
	for _, r := range ag.records {
		a, pod := ag.attachments[r.ID()], pods.match(r)
		if all || a == nil || a.pending || !reflect.DeepEqual(a.pod, pod) || !reflect.DeepEqual(a.record, r) {
			a = ag.renew(r, pod)
			changed = append(changed, a)
		}
		a.pod = pod // lest the previous snapshot is retained
		current[r.ID()] = a
	}
	for id, a := range ag.attachments {
		if current[id] == nil {
			ag.log.Info("attachment gone", "id", id, "pod", a.podName())
			ag.refresher.Set(id, nil)
		}
	}
	ag.attachments = current
	clear(ag.byDevice)
	for _, a := range current {
		ag.byDevice[uint32(a.record.IfIndex)] = append(ag.byDevice[uint32(a.record.IfIndex)], a)
	}
	for _, a := range changed {
		ag.sync(a)
	}
	ag.outdated = true
}

// renew returns the attachment of a record, with what its pod is asked now.
func (ag *agent) renew(r attach.Record, pod *probe.Pod) *attachment {
	a := ag.attachments[r.ID()]
	if a == nil || a.record.IfIndex != r.IfIndex || !a.record.CreatedAt.Equal(r.CreatedAt) {
		a = newAttachment(ag.crosscheckedBefore(r.ID()))
		ag.log.Info("attachment found", "id", r.ID(), "device", r.HostIfName, "ifindex", r.IfIndex)
	}
	a.record, a.pod = r, pod
	ag.noteUnattached(a, time.Now())
	ag.ask(a)
	maps.DeleteFunc(a.events, func(e probe.Endpoint, _ []api.Event) bool {
		return !slices.ContainsFunc(a.tracker.Endpoints(), func(s probe.EndpointSpec) bool { return s.Endpoint == e })
	})
	return a
}

// unfinishedLimit is how long an ADD may take before its pod is logged as not attached. ADD writes the record first, so nearly every
// pod is unattached for a moment.
const unfinishedLimit = time.Minute

// noteUnattached logs once why an attachment on record was not made.
func (ag *agent) noteUnattached(a *attachment, now time.Time) {
	reason := a.record.Error
	if reason == a.unattached || reason == attach.Unfinished && now.Sub(a.record.CreatedAt) < unfinishedLimit {
		return
	}
	a.unattached = reason
	if reason != "" {
		ag.log.Warn("not attached", "id", a.record.ID(), "pod", a.podName(), "error", reason)
	}
}

// ask sets the endpoints of the attachment's pod.
func (ag *agent) ask(a *attachment) {
	endpoints, now := ag.endpoints(a), datapath.Now()
	ag.share(a, endpoints)
	for _, c := range a.tracker.SetEndpoints(endpoints, now) {
		ag.note(a, c, nil)
	}
	a.several = slices.DeleteFunc(slices.Clone(endpoints), func(s probe.EndpointSpec) bool {
		return !s.Observed || s.SuccessThreshold < 2
	})
	a.ranged = slices.DeleteFunc(slices.Clone(endpoints), func(s probe.EndpointSpec) bool {
		return !s.Observed || s.Staleness == s.SteadyStaleness
	})
	a.keepShadow(endpoints, now)
}

func (ag *agent) endpoints(a *attachment) []probe.EndpointSpec {
	if a.pod == nil {
		return nil
	}
	if a.notAnswered != a.pod.NotAnswered {
		a.notAnswered = a.pod.NotAnswered
		if a.notAnswered != "" {
			ag.log.Info("pod is not answered", "pod", a.podName(), "reason", a.notAnswered)
		} else {
			ag.log.Info("pod may be answered again", "pod", a.podName())
		}
	}
	a.settings = ag.defaults.Settings(a.pod.Annotations)
	if a.settings.Problem != "" && a.settings.Problem != a.misset {
		ag.log.Error("pod is not answered", "pod", a.podName(), "error", a.settings.Problem)
		ag.reporter.BadAnnotation(*a.pod, "probelet answers none of the pod's probes: "+a.settings.Problem)
	}
	a.misset = a.settings.Problem
	limits := store.Limits
	limits.Live = a.live
	endpoints, err := probe.Endpoints(*a.pod, a.settings, limits)
	if err == nil {
		a.refused = ""
	} else if err.Error() != a.refused {
		a.refused = err.Error()
		ag.log.Error("pod is not answered", "pod", a.podName(), "error", err)
	}
	a.bar(endpoints)
	return endpoints
}

// checkDevices finds devices that were attached again under the same record, and those that lost or regained trust.
func (ag *agent) checkDevices() {
	devices, err := ag.datapath.Devices()
	if err != nil {
		ag.log.Error("failed to list devices", "error", err)
		return
	}
	for _, a := range ag.attachments {
		ag.noteUnattached(a, time.Now())
		device, known := devices[uint32(a.record.IfIndex)]
		if a.maps != nil && a.maps.Device() != device.Key {
			a.maps = nil
			ag.sync(a)
		}
		if known && device.Key == a.device {
			ag.noteTrust(a, device)
		}
	}
}

// noteTrust logs changes of a device's trust.
func (ag *agent) noteTrust(a *attachment, device datapath.Device) {
	lost := device.Trust == datapath.TrustLost
	if lost == a.distrust {
		return
	}
	a.distrust = lost
	if !lost {
		ag.log.Info("trying answers by the device again", "pod", a.podName(), "device", a.record.HostIfName)
		return
	}
	ag.log.Warn("answers do not arrive, so the pod is no longer answered; probeletctl doctor names other programs on the device",
		"pod", a.podName(), "device", a.record.HostIfName, "noticed", device.Loss)
}
