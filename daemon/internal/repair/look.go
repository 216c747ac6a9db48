package repair

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
)

// Finding is the state of an attachment on record.
type Finding struct {
	Record attach.Record
	// Problem describes what is broken; nil if nothing is, as far as a look can tell.
	Problem error
	// Gone is set if the device is gone, or its index belongs to another device by now.
	Gone bool
	// Promotable is set for attachments made by clsact.
	Promotable bool
}

// Report has the findings of a look.
type Report struct {
	Findings []Finding // one for each record, in their order
	// Stray is set if the programs know devices that belong to no attachment on record.
	Stray bool
	// Replaced is set if the pinned BPF objects are no longer those that the daemon uses.
	Replaced bool
	Err      error // the look failed, or is incomplete
}

// Looker finds out whether attachments are as they were made. It changes nothing.
type Looker struct {
	datapath  *datapath.Datapath
	inspector *attach.Inspector
	requests  chan []attach.Record
	reports   chan Report
}

// NewLooker returns a looker for the network namespace that it is called in. It must be closed.
func NewLooker(d *datapath.Datapath, bpfDir string) (*Looker, error) {
	inspector, err := attach.NewInspector(d, bpfDir)
	if err != nil {
		return nil, err
	}
	return &Looker{d, inspector, make(chan []attach.Record, 1), make(chan Report)}, nil
}

// Close releases the looker's resources. Run must have returned.
func (l *Looker) Close() error { return l.inspector.Close() }

// Run serves requests until ctx ends. It must be called in the same network namespace as NewLooker.
func (l *Looker) Run(ctx context.Context) {
	for {
		var records []attach.Record
		select {
		case <-ctx.Done():
			return
		case records = <-l.requests:
		}
		select {
		case <-ctx.Done():
			return
		case l.reports <- l.Look(records):
		}
	}
}

// Request asks for a look at the attachments of records. The next request must wait until its report was received from Reports.
func (l *Looker) Request(records []attach.Record) { l.requests <- records }

// Reports returns the channel that reports are sent on.
func (l *Looker) Reports() <-chan Report { return l.reports }

// Look compares the attachments of records with what the kernel has.
func (l *Looker) Look(records []attach.Record) Report {
	current, err := l.datapath.Current()
	if err != nil || !current {
		return Report{Replaced: err == nil, Err: err}
	}
	checker, err := l.inspector.Begin()
	if err != nil {
		return Report{Err: err}
	}
	report := Report{Findings: make([]Finding, 0, len(records))}
	for _, r := range records {
		f := Finding{Record: r}
		f.Gone, f.Problem = inspect(checker, r, l.inspector.Links())
		f.Promotable = f.Problem == nil && l.inspector.Promotable(r.ID())
		report.Findings = append(report.Findings, f)
	}
	report.Stray = !l.inspector.Accounted(checker)
	return report
}

// inspect returns what is broken about an attachment on record, and whether its device is gone.
func inspect(checker *attach.Checker, r attach.Record, links map[int]attach.Link) (gone bool, problem error) {
	if r.IfIndex == 0 {
		return false, nil // never attached; the record has the reason
	}
	link, present := links[r.IfIndex]
	// In a state directory that outlives a reboot, records may name devices that now belong to other pods.
	if !present || link.Name != r.HostIfName {
		gone, problem = true, fmt.Errorf("device %d, %s, is gone", r.IfIndex, r.HostIfName)
	}
	switch {
	case !present, gone && r.Error != "":
		return gone, problem
	case r.Passing, r.Error != "" && r.Adopted:
		return false, errors.New("it was not attached")
	case r.Error != "":
		return false, nil // the record has the reason, or an ADD is in progress
	}
	err := checker.Check(r.ID(), r.IfIndex)
	if errors.Is(err, attach.ErrIncomplete) || errors.Is(err, attach.ErrNotAttached) {
		return gone, cmp.Or(problem, err)
	}
	return false, nil // as far as a look can tell
}
