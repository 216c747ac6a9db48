// Package repair looks whether a node's attachments are as they were made. It changes nothing, and knows nothing of the daemon:
// what it finds is for others to act on.
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
	// Problem is what is wrong with it; nil: nothing, as far as can be seen.
	Problem error
	// Gone: its device is gone, or is another one by now.
	Gone bool
	// Promotable: it was made by clsact.
	Promotable bool
}

// Report is what a look found.
type Report struct {
	Findings []Finding // of all records, in their order
	// Stray: the programs know devices that belong to no attachment on record.
	Stray bool
	// Replaced: the BPF objects that are pinned are not those that the daemon uses.
	Replaced bool
	Err      error // it could not look, or not at everything
}

// Action is what a repair did about an attachment.
type Action string

// Actions of repairs.
const (
	Reattached Action = "reattached" // part of it was lost
	Removed    Action = "removed"    // its device is gone
	Adopted    Action = "adopted"    // the pod was started before probelet
)

// Actions lists all of them.
var Actions = []Action{Reattached, Removed, Adopted}

// Looker looks at attachments.
type Looker struct {
	datapath  *datapath.Datapath
	inspector *attach.Inspector
	requests  chan []attach.Record
	reports   chan Report
}

// New returns a looker of the network namespace that it is called in. It must be closed.
func New(d *datapath.Datapath, bpfDir string) (*Looker, error) {
	inspector, err := attach.NewInspector(d, bpfDir)
	if err != nil {
		return nil, err
	}
	return &Looker{d, inspector, make(chan []attach.Record, 1), make(chan Report)}, nil
}

// Close frees what the looker holds, once nothing runs of it any more.
func (l *Looker) Close() error { return l.inspector.Close() }

// Run looks at what Request asks for until ctx ends, in the same network namespace as New.
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

// Request asks for a look. The report comes by Reports; until it has been taken no other may be asked for.
func (l *Looker) Request(records []attach.Record) { l.requests <- records }

// Reports has the report of what was requested.
func (l *Looker) Reports() <-chan Report { return l.reports }

// Look looks at the attachments of the records.
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
		f.Gone, f.Problem = wrong(checker, r, l.inspector.Links())
		f.Promotable = f.Problem == nil && l.inspector.Promotable(r.ID())
		report.Findings = append(report.Findings, f)
	}
	report.Stray = !l.inspector.Accounted(checker)
	return report
}

// wrong returns what is wrong with an attachment on record, and whether its device is gone.
func wrong(checker *attach.Checker, r attach.Record, links map[int]attach.Link) (gone bool, problem error) {
	if r.IfIndex == 0 {
		return false, nil // never attached; the record says why
	}
	link, present := links[r.IfIndex]
	// A state directory that outlives the machine's run has records whose devices are now other pods'.
	if !present || link.Name != r.HostIfName {
		gone, problem = true, fmt.Errorf("device %d, %s, is gone", r.IfIndex, r.HostIfName)
	}
	switch {
	case !present, gone && r.Error != "":
		return gone, problem
	case r.Passing, r.Error != "" && r.Adopted:
		return false, errors.New("it was not attached")
	case r.Error != "":
		return false, nil // the record says why, or an ADD is under way
	}
	err := checker.Check(r.ID(), r.IfIndex)
	if errors.Is(err, attach.ErrIncomplete) || errors.Is(err, attach.ErrNotAttached) {
		return gone, cmp.Or(problem, err)
	}
	return false, nil // as far as can be seen
}
