package agent

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"reflect"
	"slices"
	"sync"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/agent/metrics"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/podevents"
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
	metrics   *metrics.Metrics
	// reporter tells of pods' annotations that cannot be used; nil: nobody does.
	reporter *podevents.Reporter

	pods        []probe.Pod // that there may be an attachment of
	podsKnown   bool
	strangers   []stranger // of all pods
	reader      attach.Reader
	records     []attach.Record
	attachments map[attach.ID]*attachment
	byDevice    map[uint32][]*attachment // by ifindex
	deleted     map[string]time.Time     // by container: when a record of it disappeared
	written     *statedir.Endpoints
	describedAt time.Time
	unreadable  string // what was logged last of records
	unwritten   string // and of what is probed
	outdated    bool   // what was described last is not so any more
	unrecorded  uint64 // connections of probers that were not recorded, for want of room, as of the last look
}

// attachment is an attachment with what is known of the pod behind it.
type attachment struct {
	record    attach.Record
	pod       *probe.Pod // nil: the specs say nothing of it
	settings  probe.Settings
	tracker   *probe.Tracker
	several   []probe.EndpointSpec           // its endpoints of which one success is not enough
	events    map[probe.Endpoint][]api.Event // the last ones
	estimator *probe.Estimator               // nil: not in mode observe
	maps      *store.Pod                     // nil: not there yet, or to be opened anew
	device    datapath.DeviceKey             // of the last maps
	live      int                            // probe.Limits.Live of that device
	restored  bool                           // the maps' contents have been taken over
	pending   bool                           // the maps are not as they should be
	unwhole   bool                           // something of it is lost, so what happens to the pod may go unseen
	distrust  bool                           // answers do not arrive by its device, and that was logged
	// inconclusive are how many of its exchanges had no outcome.
	inconclusive map[evidence.Doubt]uint64
	doubtedAt    uint64 // when the last of them was
	// What was logged last: why the pod is not answered at all, by its specs, by their number or by its annotations, why
	// its maps could not be written, and why it is not attached.
	notAnswered, refused, misset, problem, unattached string

	crosschecked
}

func newDaemon(log *slog.Logger, d *datapath.Datapath, c Config, previous statedir.Endpoints, r *refresh.Refresher) *daemon {
	return &daemon{
		log: log, datapath: d, bpfDir: c.BPFDir, stateDir: c.StateDir, hook: c.Hook,
		defaults: c.Defaults, previous: previous, refresher: r, metrics: metrics.New(),
		attachments: map[attach.ID]*attachment{}, byDevice: map[uint32][]*attachment{}, deleted: map[string]time.Time{},
	}
}

func (d *daemon) setPods(pods []probe.Pod) {
	strangers := strangersAmong(pods)
	all := !reflect.DeepEqual(strangers, d.strangers)
	d.strangers, d.podsKnown = strangers, true
	d.pods = slices.DeleteFunc(pods, func(p probe.Pod) bool { return p.LeftAlone != "" })
	d.metrics.SnapshotReceived()
	d.update(all)
}

// readRecords returns whether there are attachments that there were not before.
func (d *daemon) readRecords() (added bool) {
	records, err := d.reader.Read(d.stateDir)
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
	d.update(false)
	return added
}

// wasDeleted is whether a record of the container disappeared lately.
func (d *daemon) wasDeleted(containerID string) bool {
	at, ok := d.deleted[containerID]
	return ok && time.Since(at) < beingDeleted
}

// update matches pods and attachments, and sees to those whose pod, record or maps are not what they were, or to all.
func (d *daemon) update(all bool) {
	if !d.podsKnown {
		return
	}
	pods := index(d.pods)
	current := make(map[attach.ID]*attachment, len(d.records))
	var changed []*attachment
	for _, r := range d.records {
		a, pod := d.attachments[r.ID()], pods.match(r)
		if all || a == nil || a.pending || !reflect.DeepEqual(a.pod, pod) || !reflect.DeepEqual(a.record, r) {
			a = d.renew(r, pod)
			changed = append(changed, a)
		}
		a.pod = pod // lest an old snapshot is kept
		current[r.ID()] = a
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
	for _, a := range changed {
		d.sync(a)
	}
	d.outdated = true
}

// renew returns the attachment of a record, with what its pod is asked now.
func (d *daemon) renew(r attach.Record, pod *probe.Pod) *attachment {
	a := d.attachments[r.ID()]
	if a == nil || a.record.IfIndex != r.IfIndex || !a.record.CreatedAt.Equal(r.CreatedAt) {
		a = &attachment{
			tracker: probe.NewTracker(), events: map[probe.Endpoint][]api.Event{}, inconclusive: map[evidence.Doubt]uint64{},
		}
		a.crosschecked = d.crosscheckedBefore(r.ID())
		d.log.Info("attachment", "id", r.ID(), "device", r.HostIfName, "ifindex", r.IfIndex)
	}
	a.record, a.pod = r, pod
	d.noteUnattached(a, time.Now())
	d.ask(a)
	maps.DeleteFunc(a.events, func(e probe.Endpoint, _ []api.Event) bool {
		return !slices.ContainsFunc(a.tracker.Endpoints(), func(s probe.EndpointSpec) bool { return s.Endpoint == e })
	})
	return a
}

// unfinishedLimit is how long an ADD may take before the daemon says that the pod is not attached. It writes its record
// before it attaches, so nearly every pod is unattached for a moment.
const unfinishedLimit = time.Minute

// noteUnattached logs why an attachment on record was not made, once.
func (d *daemon) noteUnattached(a *attachment, now time.Time) {
	reason := a.record.Error
	if reason == a.unattached || reason == attach.Unfinished && now.Sub(a.record.CreatedAt) < unfinishedLimit {
		return
	}
	a.unattached = reason
	if reason != "" {
		d.log.Warn("not attached", "id", a.record.ID(), "pod", a.podName(), "error", reason)
	}
}

// ask tells the policy what the attachment's pod is asked.
func (d *daemon) ask(a *attachment) {
	endpoints, now := d.endpoints(a), datapath.Now()
	d.share(a, endpoints)
	for _, c := range a.tracker.SetEndpoints(endpoints, now) {
		d.note(a, c, nil)
	}
	a.several = slices.DeleteFunc(slices.Clone(endpoints), func(s probe.EndpointSpec) bool {
		return !s.Observed || s.SuccessThreshold < 2
	})
	a.estimate(endpoints, now)
}

// estimate keeps an estimator while the pod is in mode observe.
func (a *attachment) estimate(endpoints []probe.EndpointSpec, now uint64) {
	switch {
	case a.pod == nil || a.settings.Mode != probe.Observe:
		a.estimator = nil
		return
	case a.estimator == nil:
		a.estimator = probe.NewEstimator()
	}
	a.estimator.SetEndpoints(endpoints, now)
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
		d.reporter.BadAnnotation(*a.pod, "probelet answers none of the pod's probes: "+a.settings.Problem)
	}
	a.misset = a.settings.Problem
	limits := store.Limits
	limits.Live = a.live
	endpoints, err := probe.Endpoints(*a.pod, a.settings, limits)
	if err == nil {
		a.refused = ""
	} else if err.Error() != a.refused {
		a.refused = err.Error()
		d.log.Error("pod is not answered", "pod", a.podName(), "error", err)
	}
	a.bar(endpoints)
	return endpoints
}

// podName is a pod's.
type podName struct{ Namespace, Name string }

// podIndex finds pods.
type podIndex struct {
	byName map[podName][]*probe.Pod
	byIP   map[netip.Addr][]*probe.Pod
}

func index(pods []probe.Pod) podIndex {
	x := podIndex{make(map[podName][]*probe.Pod, len(pods)), make(map[netip.Addr][]*probe.Pod, len(pods))}
	for i := range pods {
		pod := &pods[i]
		name := podName{pod.Namespace, pod.Name}
		x.byName[name] = append(x.byName[name], pod)
		for _, ip := range pod.IPs {
			x.byIP[ip] = append(x.byIP[ip], pod)
		}
	}
	return x
}

// match finds the pod of an attachment: by name if whoever attached it was told the name, otherwise by an address. A pod
// of the same name that came after it is another one.
func (x podIndex) match(r attach.Record) *probe.Pod {
	if r.PodName != "" {
		return firstOf(r, x.byName[podName{r.PodNamespace, r.PodName}])
	}
	for _, text := range r.PodIPs {
		if ip, err := netip.ParseAddr(text); err == nil {
			if pod := firstOf(r, x.byIP[ip.Unmap()]); pod != nil {
				return pod
			}
		}
	}
	return nil
}

func firstOf(r attach.Record, pods []*probe.Pod) *probe.Pod {
	i := slices.IndexFunc(pods, func(p *probe.Pod) bool { return r.PodUID == "" || p.UID == "" || r.PodUID == p.UID })
	if i < 0 {
		return nil
	}
	return pods[i]
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
		d.metrics.ReconcileFailed()
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
	for _, ask := range a.tracker.Refreshing() {
		targets = append(targets, refresh.Target{
			Endpoint: ask.Endpoint, Address: a.pod.IPs[0], Request: ask.Text, Question: ask.Question,
			Timeout: ask.Timeout, Interval: ask.Refresh,
		})
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
	if live, err := store.Live(d.datapath, a.device); err == nil && live != a.live {
		a.live, d.outdated = live, true
		d.ask(a)
	}
	d.restore(a)
}

// forget makes nothing be answered from what was known until now, once the maps are as they should be.
func (d *daemon) forget(a *attachment) {
	for _, c := range a.withdraw(func(probe.Endpoint) bool { return true }) {
		c.Cause = probe.ByRepair
		d.note(a, c, nil)
	}
}

// withdraw forgets what is known of the endpoints that are meant.
func (a *attachment) withdraw(meant func(probe.Endpoint) bool) []probe.Change {
	now := datapath.Now()
	if a.estimator != nil {
		a.estimator.Withdraw(meant, now)
	}
	return a.tracker.Withdraw(meant, now)
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
		d.noteUnattached(a, time.Now())
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
		question, known := asked[asking{s.Endpoint, s.Instance}]
		key, ok := store.Key(s.Endpoint, question)
		if !ok || !s.Observed || !known {
			continue
		}
		if record, ok := a.maps.Records()[key]; ok && record.Check == question.Check {
			a.tracker.Restore(s.Endpoint, store.Evidence(question, record), datapath.Now())
		}
	}
}

// asking is what tells evidence of two endpoints apart.
type asking struct {
	endpoint   probe.Endpoint
	instanceID string
}

// askedBefore returns the questions by which an attachment's endpoints were asked in an earlier run.
func (d *daemon) askedBefore(id attach.ID) map[asking]probe.Question {
	asked := map[asking]probe.Question{}
	for _, a := range d.previous.Attachments {
		if a.ContainerID != id.ContainerID || a.IfName != id.IfName {
			continue
		}
		for _, e := range a.Endpoints {
			if e.Observed {
				asked[asking{e.Endpoint(), e.InstanceID}] = e.Question
			}
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

// observe learns from what became of probes.
func (d *daemon) observe(observed []evidence.Observation) {
	changed := map[*attachment]bool{}
	unanswered := sync.OnceValues(d.unanswered)
	for _, o := range observed {
		for _, a := range d.byDevice[o.Device.Ifindex] {
			if a.maps == nil || a.maps.Device() != o.Device {
				continue // of an earlier pod
			}
			if d.learn(a, o.Outcome, unanswered) {
				changed[a] = true
			}
			d.judge(a, o.Outcome)
		}
	}
	for a := range changed {
		d.sync(a)
	}
}

// doubt counts exchanges that had no outcome, each of which may have been a failure.
func (d *daemon) doubt(doubtful map[evidence.Doubtful]uint64) {
	for x, n := range doubtful {
		d.metrics.Inconclusive(x.Doubt, n)
		for _, a := range d.byDevice[x.Device.Ifindex] {
			if a.device == x.Device {
				a.inconclusive[x.Doubt] += n
				a.doubtedAt = datapath.Now()
			}
		}
	}
}

// judge estimates what mode answer would have made of a probe.
func (d *daemon) judge(a *attachment, o probe.Outcome) {
	if a.estimator == nil || a.unwhole {
		return
	}
	if judged, ok := a.estimator.Observe(o, a.closedAt(o.Port), a.mostAnswered(o.Port)); ok {
		d.metrics.Estimated(judged)
	}
}

// refreshed learns from what the daemon asked by itself.
func (d *daemon) refreshed(outcomes []refresh.Outcome) {
	changed := map[*attachment]bool{}
	unanswered := sync.OnceValues(d.unanswered)
	for _, o := range outcomes {
		if a := d.attachments[o.Attachment]; a != nil && d.learn(a, o.Outcome, unanswered) {
			changed[a] = true
		}
	}
	for a := range changed {
		d.sync(a)
	}
}

// learn returns whether there was something to be learned. unanswered is the daemon's.
func (d *daemon) learn(a *attachment, o probe.Outcome, unanswered func() (map[datapath.PodPort][]uint64, error)) bool {
	if a.unwhole {
		return false
	}
	changed := len(a.several) > 0 && d.learnUnseen(a, unanswered)
	a.tally(o)
	changes := a.tracker.Observe(o)
	for _, c := range changes {
		d.outdated = d.outdated || c.From.Question != c.To.Question
		d.note(a, c, &o)
	}
	return changed || len(changes) > 0
}

// unanswered returns when connections began that a port did not answer. Where connections were not recorded, for want of room, it has
// successes counted again of all pods.
func (d *daemon) unanswered() (map[datapath.PodPort][]uint64, error) {
	unrecorded, err := d.datapath.Unrecorded()
	if err != nil {
		return nil, err
	}
	if unrecorded != d.unrecorded {
		d.unrecorded = unrecorded
		for _, a := range d.attachments {
			a.doubtedAt = datapath.Now()
		}
	}
	return d.datapath.Unanswered()
}

// sweep forgets connections that ended unseen, after it has learned which of them the pod did not answer.
func (d *daemon) sweep() error {
	unanswered := sync.OnceValues(d.unanswered)
	for _, a := range d.attachments {
		if !a.unwhole && d.learnUnseen(a, unanswered) {
			d.sync(a)
		}
	}
	return d.datapath.Sweep()
}

// learnUnseen learns of failures of which there is no outcome: connections that the pod did not answer; and of what may have been one:
// the kernel side has withdrawn what was known, or an exchange was inconclusive. It returns whether there was something to be learned.
func (d *daemon) learnUnseen(a *attachment, unanswered func() (map[datapath.PodPort][]uint64, error)) bool {
	if a.maps == nil {
		return false
	}
	var changes []probe.Change
	began, err := unanswered()
	for _, s := range a.several {
		at := max(a.withdrawnAt(s.Endpoint), a.doubtedAt)
		for _, began := range began[datapath.PodPort{Device: a.maps.Device(), Port: s.Port}] {
			at = max(at, began) // whether it has failed yet or not
		}
		if err != nil {
			at = datapath.Now()
		}
		changes = append(changes, a.tracker.Void(func(e probe.Endpoint) bool { return e == s.Endpoint }, at)...)
	}
	for to, all := range began {
		for _, at := range all {
			if to.Device == a.maps.Device() {
				changes = append(changes, a.tracker.Unanswered(to.Port, at, datapath.Now())...)
			}
		}
	}
	for _, c := range changes {
		d.note(a, c, nil)
	}
	return len(changes) > 0
}

// note lets people know of a change. outcome is what it was learned from; nil: from something else. At the usual level
// only a change of state is logged.
func (d *daemon) note(a *attachment, c probe.Change, outcome *probe.Outcome) {
	d.metrics.Changed(c, outcome)
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

// describe writes for probeletctl, and for the next daemon, what is asked of which attachment, if that changed. The next daemon
// believes evidence in the kernel's maps only by what is written here of its question and containers, so what is not written
// yet costs no more than a real probe.
func (d *daemon) describe() {
	d.outdated, d.describedAt = false, time.Now()
	description := statedir.Endpoints{}
	attached := map[string]bool{}
	for _, r := range d.records {
		a := d.attachments[r.ID()]
		described := statedir.Attachment{ContainerID: r.ContainerID, IfName: r.IfName, Pod: a.podName()}
		if a.pod != nil {
			described.Settings = statedir.SettingsOf(a.settings)
		}
		known := a.tracker.Evidence()
		for _, s := range a.tracker.Endpoints() {
			e := statedir.EndpointOf(s, known[s.Endpoint].Question)
			e.Disagreement, e.NotCompared = string(a.barred[s.Endpoint].kind), a.shared[s.Endpoint]
			described.Endpoints = append(described.Endpoints, e)
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
		d.outdated = true                                                                // to be tried again
		if word := err.Error(); word != d.unwritten && !errors.Is(err, os.ErrNotExist) { // without its directory the daemon ends
			d.unwritten = word
			d.log.Error("writing what is probed", "error", err)
		}
		return
	}
	d.written, d.unwritten = &description, ""
}
