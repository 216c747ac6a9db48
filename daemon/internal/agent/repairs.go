package agent

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/adopt"
	"github.com/probelet/probelet/daemon/internal/repair"
)

// errReplaced ends the daemon. Restarted, in a pod with the current mounts, it finds what is there.
var errReplaced = errors.New("the BPF objects in use are no longer those that are pinned (was another BPF file system mounted?); the daemon must be restarted")

// lookAgain is when the next look follows one that left something to be done.
const lookAgain = 500 * time.Millisecond

// repairs has a repairer, which works in the loop, and a looker and a promoter, which run beside it.
type repairs struct {
	repairer *repair.Repairer
	looker   *repair.Looker
	promoter *repair.Promoter
	looking  bool // a report is due
	again    bool // something is left to be done soon
}

// newRepairs must be called in the network namespace whose attachments are to be repaired.
func newRepairs(c repair.Config) (*repairs, error) {
	looker, err := repair.NewLooker(c.Datapath, c.BPFDir)
	if err != nil {
		return nil, err
	}
	return &repairs{repairer: repair.NewRepairer(c), looker: looker, promoter: repair.NewPromoter(c)}, nil
}

// reports returns the looker's reports. If attachments are not repaired, r is nil and there are none.
func (r *repairs) reports() <-chan repair.Report {
	if r == nil {
		return nil
	}
	return r.looker.Reports()
}

func (ag *agent) repairConfig(hook attach.Hook, node adopt.Node) repair.Config {
	return repair.Config{Datapath: ag.datapath, BPFDir: ag.bpfDir, StateDir: ag.stateDir, Hook: hook, Adopt: node, Log: ag.log}
}

// look checks devices, sweeps connections, and requests a look at the attachments.
func (ag *agent) look() error {
	ag.checkDevices()
	ag.noteUnmaintained(ag.sweep())
	if !repair.SameBPFFS(ag.bpfDir) {
		return errReplaced
	}
	if ag.repairs == nil {
		if current, err := ag.datapath.Current(); err == nil && !current {
			return errReplaced
		}
		return nil
	}
	ag.requestLook()
	return nil
}

// requestLook requests a look, unless one is in progress.
func (ag *agent) requestLook() {
	if ag.podsKnown && !ag.repairs.looking {
		ag.repairs.looking = true
		ag.repairs.looker.Request(slices.Clone(ag.records))
	}
}

// looked takes the report of a look. Its only error is errReplaced.
func (ag *agent) looked(ctx context.Context, report repair.Report) error {
	if report.Replaced {
		return errReplaced
	}
	ag.repairs.looking = false
	changed, err := ag.repair(ctx, report)
	if changed {
		ag.readRecords()
		ag.checkDevices()
	}
	ag.noteUnmaintained(err)
	return nil
}

// repair stops answering for attachments that a report found broken, has those repaired that stay so, and reports whether records
// have changed.
func (ag *agent) repair(ctx context.Context, report repair.Report) (changed bool, err error) {
	if report.Err != nil {
		return false, report.Err
	}
	assessment := ag.repairs.repairer.Assess(report, ag.records)
	for _, id := range assessment.Whole {
		if a := ag.attachments[id]; a != nil {
			a.broken = false
		}
	}
	for _, f := range assessment.Broken {
		ag.suspend(f)
	}
	ag.repairs.promoter.Offer(assessment.Promotable)
	result := ag.repairs.repairer.Repair(ctx, assessment, repair.Known{Records: ag.records, Unattached: ag.adoptable(), Deleted: ag.wasDeleted})
	for _, r := range result.Repairs {
		ag.metrics.Repaired(r.Action)
		if a := ag.attachments[r.ID]; a != nil {
			a.maps, a.pending = nil, true // what was attached before had others
		}
	}
	ag.repairs.again = result.Again
	return result.RecordsChanged, result.Err
}

// suspend stops answering for a pod whose attachment is broken: its failures may go unseen, and its probes unanswered.
func (ag *agent) suspend(f repair.Finding) {
	r := f.Record
	a := ag.attachments[r.ID()]
	if a == nil || r.Error != "" {
		return
	}
	if !f.Gone { // or else, most likely, the pod is going
		ag.log.Warn("attachment is broken", "id", r.ID(), "pod", a.podName(), "device", r.HostIfName, "because", f.Problem)
	}
	a.broken = true
	ag.forget(a)
	ag.sync(a)
}

// adoptable returns the pods that should be attached and have no record.
func (ag *agent) adoptable() (pods []adopt.Pod) {
	for _, pod := range ag.unattached(nil) {
		if len(pod.IPs) > 0 && pod.NotAnswered == "" {
			pods = append(pods, adopt.Pod{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, IPs: pod.IPs})
		}
	}
	return pods
}

// noteUnmaintained logs once what keeps attachments from being looked after.
func (ag *agent) noteUnmaintained(err error) {
	if err == nil {
		ag.unmaintained = ""
	} else if text := err.Error(); text != ag.unmaintained {
		ag.unmaintained = text
		ag.log.Error("failed to look after attachments", "error", err)
	}
}
