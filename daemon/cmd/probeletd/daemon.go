package main

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/refresh"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/store"
)

// daemon brings together what is probed, what is attached and what was observed. It is not safe for concurrent use.
type daemon struct {
	log      *slog.Logger
	datapath *datapath.Datapath
	bpfDir   string
	stateDir string
	hook     attach.Hook // of pods that are adopted
	defaults probe.Defaults
	previous statedir.Endpoints // as an earlier run left them
	// refresher asks by itself; nil: nobody does.
	refresher *refresh.Refresher
	metrics   *metrics

	pods        []probe.Pod
	podsKnown   bool
	records     []attach.Record
	attachments map[attach.ID]*attachment
	byDevice    map[uint32][]*attachment // by ifindex
	deleted     map[string]time.Time     // by container: when a record of it disappeared
	written     *statedir.Endpoints
	unreadable  string // what was logged last of records
}

// attachment is an attachment with what is known of the pod behind it.
type attachment struct {
	record   attach.Record
	pod      *probe.Pod // nil: the specs say nothing of it
	settings probe.Settings
	tracker  *probe.Tracker
	events   map[probe.Endpoint][]api.Event // the last ones
	maps     *store.Pod                     // nil: not there yet, or to be opened anew
	device   datapath.DeviceKey             // of the last maps
	restored bool                           // the maps' contents have been taken over
	pending  bool                           // the maps are not as they should be
	unwhole  bool                           // something of it is lost, so what happens to the pod may go unseen
	distrust bool                           // answers do not arrive by its device, and that was logged
	// What was logged last: why the pod is not answered at all, by its specs, by their number or by its annotations, and
	// why its maps could not be written.
	notAnswered, refused, misset, problem string
}

func newDaemon(log *slog.Logger, d *datapath.Datapath, c config, previous statedir.Endpoints, r *refresh.Refresher) *daemon {
	return &daemon{
		log: log, datapath: d, bpfDir: c.bpfDir, stateDir: c.stateDir, hook: c.hook,
		defaults: c.defaults, previous: previous, refresher: r, metrics: newMetrics(),
		attachments: map[attach.ID]*attachment{}, byDevice: map[uint32][]*attachment{}, deleted: map[string]time.Time{},
	}
}

func (d *daemon) setPods(pods []probe.Pod) {
	d.pods, d.podsKnown = pods, true
	d.metrics.snapshots.Inc()
	d.metrics.lastSnapshot.SetToCurrentTime()
	d.update()
}

// readRecords returns whether there are attachments that there were not before.
func (d *daemon) readRecords() (added bool) {
	records, err := attach.ReadRecords(d.stateDir)
	known := map[attach.ID]bool{}
	for _, r := range d.records {
		known[r.ID()] = true
	}
	for _, r := range records {
		added = added || !known[r.ID()]
		delete(known, r.ID())
	}
	maps.DeleteFunc(d.deleted, func(_ string, at time.Time) bool { return time.Since(at) > beingDeleted })
	for id := range known {
		d.deleted[id.ContainerID] = time.Now()
	}
	d.records = records
	switch {
	case err == nil:
		d.unreadable = ""
	case err.Error() != d.unreadable:
		d.unreadable = err.Error()
		d.log.Error("reading records of attachments", "error", err)
	}
	d.update()
	return added
}

// wasDeleted is whether a record of the container disappeared lately.
func (d *daemon) wasDeleted(containerID string) bool {
	at, ok := d.deleted[containerID]
	return ok && time.Since(at) < beingDeleted
}

// update matches pods and attachments anew.
func (d *daemon) update() {
	if !d.podsKnown {
		return
	}
	current := map[attach.ID]*attachment{}
	for _, r := range d.records {
		current[r.ID()] = d.renew(r)
	}
	for id, a := range d.attachments {
		if current[id] == nil {
			d.log.Info("attachment gone", "id", id, "pod", a.podName())
			d.refresher.Set(id, nil)
		}
	}
	d.attachments = current
	clear(d.byDevice)
	for _, a := range current {
		d.byDevice[uint32(a.record.IfIndex)] = append(d.byDevice[uint32(a.record.IfIndex)], a)
	}
	for _, a := range current {
		d.sync(a)
	}
	d.describe()
}

// renew returns the attachment of a record, with what its pod is asked now.
func (d *daemon) renew(r attach.Record) *attachment {
	a := d.attachments[r.ID()]
	if a == nil || a.record.IfIndex != r.IfIndex || !a.record.CreatedAt.Equal(r.CreatedAt) {
		a = &attachment{tracker: probe.NewTracker(), events: map[probe.Endpoint][]api.Event{}}
		d.log.Info("attachment", "id", r.ID(), "device", r.HostIfName, "ifindex", r.IfIndex)
	}
	if r.Error != "" && r.Error != a.record.Error {
		d.log.Warn("not attached", "id", r.ID(), "error", r.Error)
	}
	a.record, a.pod = r, match(r, d.pods)
	for _, c := range a.tracker.SetEndpoints(d.endpoints(a), datapath.Now()) {
		d.note(a, c, nil)
	}
	maps.DeleteFunc(a.events, func(e probe.Endpoint, _ []api.Event) bool {
		return !slices.ContainsFunc(a.tracker.Endpoints(), func(s probe.EndpointSpec) bool { return s.Endpoint == e })
	})
	return a
}

func (d *daemon) endpoints(a *attachment) []probe.EndpointSpec {
	if a.pod == nil {
		return nil
	}
	if a.notAnswered != a.pod.NotAnswered {
		a.notAnswered = a.pod.NotAnswered
		d.log.Info("pod answered", "pod", a.podName(), "may", a.notAnswered == "", "reason", a.notAnswered)
	}
	a.settings = d.defaults.Settings(a.pod.Annotations)
	if a.settings.Problem != "" && a.settings.Problem != a.misset {
		d.log.Error("pod is not answered", "pod", a.podName(), "error", a.settings.Problem)
	}
	a.misset = a.settings.Problem
	endpoints, err := probe.Endpoints(*a.pod, a.settings, store.Limits)
	if err == nil {
		a.refused = ""
	} else if err.Error() != a.refused {
		a.refused = err.Error()
		d.log.Error("pod is not answered", "pod", a.podName(), "error", err)
	}
	return endpoints
}

// match finds the pod of an attachment: by name if whoever attached it was told the name, otherwise by an address. A pod
// of the same name that came after it is another one.
func match(r attach.Record, pods []probe.Pod) *probe.Pod {
	for i, pod := range pods {
		if r.PodUID != "" && pod.UID != "" && r.PodUID != pod.UID {
			continue
		}
		if r.PodName != "" {
			if r.PodName == pod.Name && r.PodNamespace == pod.Namespace {
				return &pods[i]
			}
			continue
		}
		if slices.ContainsFunc(r.PodIPs, func(ip string) bool { return hasIP(pod, ip) }) {
			return &pods[i]
		}
	}
	return nil
}

func hasIP(pod probe.Pod, text string) bool {
	ip, err := netip.ParseAddr(text)
	return err == nil && slices.Contains(pod.IPs, ip.Unmap())
}

func (a *attachment) podName() string {
	if a.pod == nil {
		return ""
	}
	return a.pod.String()
}

// sync brings the attachment's maps, and what is asked of it besides, to what is known.
func (d *daemon) sync(a *attachment) {
	d.refresher.Set(a.record.ID(), a.targets())
	if a.record.Error != "" || a.record.IfIndex == 0 {
		a.pending = false
		return
	}
	err := d.publish(a)
	a.pending = err != nil
	if a.pending && !errors.Is(err, os.ErrNotExist) {
		d.metrics.reconcileErrors.Inc()
	}
	switch {
	case err == nil:
		a.problem = ""
	case errors.Is(err, os.ErrNotExist):
		d.log.Debug("not attached yet, or not any more", "pod", a.podName(), "error", err)
	case err.Error() != a.problem:
		a.problem = err.Error()
		d.log.Error("writing evidence", "pod", a.podName(), "device", a.record.HostIfName, "error", err)
	}
}

// targets are what the daemon is to ask the attachment's pod by itself.
func (a *attachment) targets() []refresh.Target {
	if a.record.Error != "" || a.pod == nil || len(a.pod.IPs) == 0 {
		return nil
	}
	var targets []refresh.Target
	for _, s := range a.tracker.Refreshing() {
		targets = append(targets, refresh.TargetOf(s, a.pod.IPs[0]))
	}
	return targets
}

func (d *daemon) publish(a *attachment) error {
	if a.maps == nil {
		pod, err := attach.OpenPod(d.datapath, d.bpfDir, a.record.ID())
		if err != nil {
			return err
		}
		if a.maps, err = store.Open(pod); err != nil {
			return err
		}
		d.adjust(a)
	}
	want, err := store.Desired(a.tracker)
	if err == nil {
		err = a.maps.Sync(want)
	}
	if err != nil {
		a.maps = nil
	}
	return err
}

// adjust brings what is known of an attachment in line with maps that have just been opened. If the device was attached
// again, the kernel has forgotten when evidence was voided, and what happened to the pod meanwhile may have gone unseen.
func (d *daemon) adjust(a *attachment) {
	if a.device != a.maps.Device() {
		if a.device != (datapath.DeviceKey{}) {
			d.forget(a)
		}
		a.unwhole = false // whoever attached it has just made it whole
	}
	a.device = a.maps.Device()
	d.restore(a)
}

// forget makes nothing be answered from what was known until now, once the maps are as they should be.
func (d *daemon) forget(a *attachment) {
	for _, c := range a.tracker.Withdraw(func(probe.Endpoint) bool { return true }, datapath.Now()) {
		c.Cause = probe.ByRepair
		d.note(a, c, nil)
	}
}

// suspend stops answering for the pod of an attachment that is not whole: what happens to the pod may go unseen, and what is
// taken for it may go unanswered.
func (d *daemon) suspend(r attach.Record, problem error, gone bool) {
	a := d.attachments[r.ID()]
	if a == nil || r.Error != "" {
		return
	}
	if !gone { // such as with the pod
		d.log.Warn("attachment is not whole", "id", r.ID(), "pod", a.podName(), "device", r.HostIfName, "because", problem)
	}
	a.unwhole = true
	d.forget(a)
	d.sync(a)
}

// resume ends what suspend began: the attachment is whole.
func (d *daemon) resume(id attach.ID) {
	if a := d.attachments[id]; a != nil {
		a.unwhole = false
	}
}

// checkDevices finds devices that were attached again under an unchanged record, and those that lost trust or got it back.
func (d *daemon) checkDevices() {
	devices, err := d.datapath.Devices()
	if err != nil {
		d.log.Error("listing devices", "error", err)
		return
	}
	for _, a := range d.attachments {
		device, known := devices[uint32(a.record.IfIndex)]
		if a.maps != nil && a.maps.Device() != device.Key {
			a.maps = nil
			d.sync(a)
		}
		if known && device.Key == a.device {
			d.noteTrust(a, device)
		}
	}
}

// noteTrust logs a change of it.
func (d *daemon) noteTrust(a *attachment, device datapath.Device) {
	lost := device.Trust == datapath.TrustLost
	if lost == a.distrust {
		return
	}
	a.distrust = lost
	if !lost {
		d.log.Info("answers by the device are tried again", "pod", a.podName(), "device", a.record.HostIfName)
		return
	}
	d.log.Warn("answers do not arrive, so the pod is not answered any more; probeletctl doctor names who else is on the device",
		"pod", a.podName(), "device", a.record.HostIfName, "noticed", device.Loss)
}

// restore takes over what an earlier run observed, of the endpoints that it asked the same.
func (d *daemon) restore(a *attachment) {
	if a.restored {
		return
	}
	a.restored = true
	asked := d.askedBefore(a.record.ID())
	for _, s := range a.tracker.Endpoints() {
		key, ok := store.Key(s.Endpoint)
		if !ok || !s.Observed || !asked[question{s.Endpoint, s.Headers, s.Instance}] {
			continue
		}
		if record, ok := a.maps.Records()[key]; ok {
			a.tracker.Restore(s.Endpoint, store.Evidence(record), datapath.Now())
		}
	}
}

// question is what tells evidence of two endpoints apart.
type question struct {
	endpoint              probe.Endpoint
	headersID, instanceID string
}

func (d *daemon) askedBefore(id attach.ID) map[question]bool {
	asked := map[question]bool{}
	for _, a := range d.previous.Attachments {
		if a.ContainerID != id.ContainerID || a.IfName != id.IfName {
			continue
		}
		for _, e := range a.Endpoints {
			asked[question{e.Endpoint(), e.HeadersID, e.InstanceID}] = e.Observed
		}
	}
	return asked
}

// pending is whether maps of an attachment are not as they should be.
func (d *daemon) pending() bool {
	for _, a := range d.attachments {
		if a.pending {
			return true
		}
	}
	return false
}

func (d *daemon) retry() {
	for _, a := range d.attachments {
		if a.pending {
			d.sync(a)
		}
	}
}

// observe learns from outcomes that the kernel reports.
func (d *daemon) observe(outcomes []datapath.Outcome) {
	changed := map[*attachment]bool{}
	for _, o := range outcomes {
		for _, a := range d.byDevice[o.Device.Ifindex] {
			if a.maps == nil || a.maps.Device() != o.Device {
				continue // of an earlier pod
			}
			if outcome, ok := store.Outcome(o, a.tracker.Endpoints()); ok && d.learn(a, outcome) {
				changed[a] = true
			}
		}
	}
	for a := range changed {
		d.sync(a)
	}
}

// refreshed learns from what the daemon asked by itself.
func (d *daemon) refreshed(o refresh.Outcome) {
	if a := d.attachments[o.Attachment]; a != nil && d.learn(a, o.Outcome) {
		d.sync(a)
	}
}

// learn returns whether there was something to be learned.
func (d *daemon) learn(a *attachment, o probe.Outcome) bool {
	if a.unwhole {
		return false
	}
	changes := a.tracker.Observe(o)
	for _, c := range changes {
		d.note(a, c, &o)
	}
	return len(changes) > 0
}

// note lets people know of a change. outcome is what it was learned from; nil: from something else. At the usual level
// only a change of state is logged.
func (d *daemon) note(a *attachment, c probe.Change, outcome *probe.Outcome) {
	d.metrics.changed(c, outcome)
	var took *time.Duration
	if outcome != nil {
		took = &outcome.Duration
	}
	a.remember(c, took)
	level := slog.LevelInfo
	if c.From.Result == c.To.Result {
		level = slog.LevelDebug
	}
	if !d.log.Enabled(context.Background(), level) { // as with most outcomes
		return
	}
	attributes := []any{"pod", a.podName(), "endpoint", c.Endpoint, "by", c.Cause, "status", c.To.Status}
	if took != nil {
		attributes = append(attributes, "took", *took)
	}
	d.log.Log(context.Background(), level, "endpoint "+c.To.Result.String(), attributes...)
}

// describe writes for probeletctl what is asked of which attachment, if that changed.
func (d *daemon) describe() {
	description := statedir.Endpoints{}
	attached := map[string]bool{}
	for _, r := range d.records {
		a := d.attachments[r.ID()]
		described := statedir.Attachment{ContainerID: r.ContainerID, IfName: r.IfName, Pod: a.podName()}
		if a.pod != nil {
			described.Settings = statedir.SettingsOf(a.settings)
		}
		for _, s := range a.tracker.Endpoints() {
			described.Endpoints = append(described.Endpoints, statedir.EndpointOf(s))
		}
		attached[described.Pod] = true
		description.Attachments = append(description.Attachments, described)
	}
	for _, pod := range d.pods {
		if !attached[pod.String()] {
			description.Unattached = append(description.Unattached, pod.String())
		}
	}
	if d.written != nil && reflect.DeepEqual(*d.written, description) {
		return
	}
	if err := statedir.WriteEndpoints(d.stateDir, description); err != nil {
		d.log.Error("writing what is probed", "error", err)
		return
	}
	d.written = &description
}
