package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/refresh"
	"github.com/probelet/probelet/daemon/internal/store"
)

// The path of an exchange, from top to bottom:
//
//	readExchanges  takes the kernel's records of it from the ring buffer; package evidence puts them together and judges them
//	observe        finds the attachment of the device that it went by; what the daemon asked itself begins at refreshed instead
//	learn          tells the attachment's tracker (package probe), which decides what is known from now on
//	note           counts, logs and remembers what has changed
//	sync           writes what is known into the kernel's maps (package store), which answer the next probe

// recordsGather is how long records are left to gather before they are read: waking up for each would cost more than all the rest.
// Whatever must take effect at once, the kernel does on its own.
const recordsGather = 50 * time.Millisecond

// batch has the outcomes of exchanges, and counts those without a certain one.
type batch struct {
	observations []evidence.Observation
	doubtful     map[evidence.Doubtful]uint64
}

// readExchanges sends batches of judged exchanges until ctx ends.
func readExchanges(ctx context.Context, reader *datapath.RecordReader, out chan<- batch) error {
	assembler := evidence.NewAssembler()
	for {
		b, err := readBatch(reader, assembler)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("reading records of connections: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case out <- b:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(recordsGather):
		}
	}
}

// readBatch waits for records, and returns the outcomes of the exchanges that end with those available, at most 1,024.
func readBatch(reader *datapath.RecordReader, assembler *evidence.Assembler) (b batch, err error) {
	const most = 1024
	var record datapath.Record
	for first := true; (first || reader.Pending()) && len(b.observations) < most; first = false {
		if err := reader.Next(&record); err != nil {
			return b, err
		}
		if observation, ok := assembler.Add(record); ok {
			b.observations = append(b.observations, observation)
		}
	}
	b.doubtful = assembler.TakeDoubtful()
	return b, nil
}

// observe learns from probes that reached their pods.
func (ag *agent) observe(observations []evidence.Observation) {
	changed := map[*attachment]bool{}
	unanswered := sync.OnceValues(ag.unanswered)
	for _, o := range observations {
		for _, a := range ag.byDevice[o.Device.Ifindex] {
			if a.maps == nil || a.maps.Device() != o.Device {
				continue // of an earlier pod
			}
			if ag.learn(a, o.Outcome, unanswered) {
				changed[a] = true
			}
			ag.judge(a, o.Outcome)
		}
	}
	for a := range changed {
		ag.sync(a)
	}
}

// doubt counts exchanges without a certain outcome. Each of them may have been a failure.
func (ag *agent) doubt(doubtful map[evidence.Doubtful]uint64) {
	for x, n := range doubtful {
		ag.metrics.Inconclusive(x.Doubt, n)
		for _, a := range ag.byDevice[x.Device.Ifindex] {
			if a.device == x.Device {
				a.inconclusive[x.Doubt] += n
				a.doubtedAt = datapath.Now()
			}
		}
	}
}

// judge counts what mode answer would have made of a probe.
func (ag *agent) judge(a *attachment, o probe.Outcome) {
	if a.shadow == nil || a.broken {
		return
	}
	if judged, ok := a.shadow.Observe(o, a.closedAt(o.Port), a.mostAnswered(o.Port)); ok {
		ag.metrics.Judged(judged)
	}
}

// refreshed learns from the daemon's own requests.
func (ag *agent) refreshed(outcomes []refresh.Outcome) {
	changed := map[*attachment]bool{}
	unanswered := sync.OnceValues(ag.unanswered)
	for _, o := range outcomes {
		if a := ag.attachments[o.Attachment]; a != nil && ag.learn(a, o.Outcome, unanswered) {
			changed[a] = true
		}
	}
	for a := range changed {
		ag.sync(a)
	}
}

// unansweredFunc returns agent.unanswered, called once for a batch.
type unansweredFunc func() (map[datapath.PodPort][]uint64, error)

// learn learns from an outcome, and reports whether anything has changed.
func (ag *agent) learn(a *attachment, o probe.Outcome, unanswered unansweredFunc) bool {
	if a.broken {
		return false
	}
	changed := len(a.several) > 0 && ag.learnUnseen(a, unanswered)
	a.tally(o)
	for _, s := range a.ranged {
		a.tracker.Falter(s.Endpoint, a.withdrawnAt(s.Endpoint)) // a listening socket that closed, perhaps unnoticed by probes
	}
	changes := a.tracker.Observe(o)
	for _, c := range changes {
		ag.outdated = ag.outdated || c.From.Question != c.To.Question
		ag.note(a, c, &o)
	}
	return changed || len(changes) > 0
}

// unanswered returns when connections began that ports have not answered. If connections went unrecorded for want of room, it makes
// all attachments count their successes from the start.
func (ag *agent) unanswered() (map[datapath.PodPort][]uint64, error) {
	unrecorded, err := ag.datapath.Unrecorded()
	if err != nil {
		return nil, err
	}
	if unrecorded != ag.unrecorded {
		ag.unrecorded = unrecorded
		for _, a := range ag.attachments {
			a.doubtedAt = datapath.Now()
		}
	}
	return ag.datapath.Unanswered()
}

// learnUnseen learns of failures without an outcome, that is connections that the pod did not answer, and of what may have been one:
// a withdrawal by the kernel, an inconclusive exchange. It reports whether anything has changed.
func (ag *agent) learnUnseen(a *attachment, unanswered unansweredFunc) bool {
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
		ag.note(a, c, nil)
	}
	return len(changes) > 0
}

// sweep expires connections whose end was not seen, after learning which of them the pod did not answer. It also ends the look at the
// traffic of pods that are gone or no longer ask for it.
func (ag *agent) sweep() error {
	unanswered := sync.OnceValues(ag.unanswered)
	for _, a := range ag.attachments {
		if !a.broken && ag.learnUnseen(a, unanswered) {
			ag.sync(a)
		}
	}
	var traffic []datapath.PodPort
	for _, a := range ag.attachments {
		if a.maps != nil {
			traffic = append(traffic, a.maps.TrafficPorts()...)
		}
	}
	return errors.Join(ag.datapath.WantTrafficOnly(traffic), ag.datapath.Sweep())
}

// note counts, logs and remembers a change. outcome is what it was learned from; nil if it was no outcome. By default only changes
// of the result are logged.
func (ag *agent) note(a *attachment, c probe.Change, outcome *probe.Outcome) {
	ag.metrics.Changed(c, outcome)
	var took *time.Duration
	if outcome != nil {
		took = &outcome.Duration
	}
	a.remember(c, took)
	level := slog.LevelInfo
	if c.From.Result == c.To.Result {
		level = slog.LevelDebug
	}
	if !ag.log.Enabled(context.Background(), level) { // saves most outcomes the attributes
		return
	}
	attributes := []any{"pod", a.podName(), "endpoint", c.Endpoint, "by", c.Cause, "status", c.To.Status}
	if took != nil {
		attributes = append(attributes, "took", *took)
	}
	ag.log.Log(context.Background(), level, "endpoint "+c.To.Result.String(), attributes...)
}

// sync brings the attachment's maps, and its refresh, up to what is known.
func (ag *agent) sync(a *attachment) {
	ag.refresher.Set(a.record.ID(), a.targets())
	if a.record.Error != "" || a.record.IfIndex == 0 {
		a.pending = false
		return
	}
	err := ag.publish(a)
	a.pending = err != nil
	if a.pending && !errors.Is(err, os.ErrNotExist) {
		ag.metrics.ReconcileFailed()
	}
	switch {
	case err == nil:
		a.problem = ""
	case errors.Is(err, os.ErrNotExist):
		ag.log.Debug("not attached yet, or no longer", "pod", a.podName(), "error", err)
	case err.Error() != a.problem:
		a.problem = err.Error()
		ag.log.Error("failed to write evidence", "pod", a.podName(), "device", a.record.HostIfName, "error", err)
	}
}

// publish writes what is known into the attachment's maps.
func (ag *agent) publish(a *attachment) error {
	if a.maps == nil {
		pod, err := attach.OpenPod(ag.datapath, ag.bpfDir, a.record.ID())
		if err != nil {
			return err
		}
		if a.maps, err = store.Open(pod); err != nil {
			return err
		}
		ag.adjust(a)
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

// pending reports whether the maps of any attachment are out of date.
func (ag *agent) pending() bool {
	for _, a := range ag.attachments {
		if a.pending {
			return true
		}
	}
	return false
}

func (ag *agent) retry() {
	for _, a := range ag.attachments {
		if a.pending {
			ag.sync(a)
		}
	}
}

// adjust adapts what is known of an attachment to maps that have just been opened. If the device was attached again, the kernel has
// forgotten what it had withdrawn, and failures may have gone unseen.
func (ag *agent) adjust(a *attachment) {
	if a.device != a.maps.Device() {
		if a.device != (datapath.DeviceKey{}) {
			ag.forget(a)
		}
		a.broken = false // it has just been attached
	}
	a.device = a.maps.Device()
	if live, err := store.Live(ag.datapath, a.device); err == nil && live != a.live {
		a.live, ag.outdated = live, true
		ag.ask(a)
	}
	ag.restore(a)
}

// forget withdraws everything that is known of an attachment's pod, because it was not observed all the time.
func (ag *agent) forget(a *attachment) {
	for _, c := range a.withdraw(func(probe.Endpoint) bool { return true }) {
		c.Cause = probe.ByRepair
		ag.note(a, c, nil)
	}
}

// restore takes over what a previous daemon observed, for endpoints that are still asked the same.
func (ag *agent) restore(a *attachment) {
	if a.restored {
		return
	}
	a.restored = true
	asked := ag.askedBefore(a.record.ID())
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
