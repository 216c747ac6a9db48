package repair

import (
	"context"
	"log/slog"
	"slices"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/daemon/internal/adopt"
	"github.com/probelet/probelet/daemon/internal/logtest"
	"github.com/probelet/probelet/daemon/internal/repair/repairtest"
)

// fixture is a node that is looked at and repaired step by step.
type fixture struct {
	*repairtest.Node
	t        testing.TB
	log      *logtest.Log
	looker   *Looker
	repairer *Repairer
	promoter *Promoter
	records  []attach.Record // as last read
	pods     []adopt.Pod     // known to the source
	deleted  []string        // containers whose DEL is recent
	// Results of the looks.
	broken  int // attachments newly found broken, at all looks
	again   bool
	repairs map[Action]int
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	f := &fixture{Node: repairtest.New(t), t: t, log: &logtest.Log{}, repairs: map[Action]int{}}
	f.start()
	return f
}

func (f *fixture) config() Config {
	return Config{
		Datapath: f.Datapath, BPFDir: f.BPFDir, StateDir: f.StateDir, Hook: attach.HookTC, Adopt: f.Adopt(),
		Log: slog.New(slog.NewTextHandler(f.log, nil)),
	}
}

// start replaces repairer, looker and promoter with those of a daemon that has just started.
func (f *fixture) start() {
	f.t.Helper()
	f.repairer, f.promoter = NewRepairer(f.config()), NewPromoter(f.config())
	f.In(func() (err error) {
		f.looker, err = NewLooker(f.Datapath, f.BPFDir)
		return err
	})
	looker := f.looker
	f.t.Cleanup(func() { _ = looker.Close() })
}

// run adds a pod that was started before probelet, and is known to the source.
func (f *fixture) run() *bpftest.Pod {
	f.t.Helper()
	p := f.Run()
	f.pods = append(f.pods, repairtest.PodOf(p))
	return p
}

// adopted adds a pod of run that is attached.
func (f *fixture) adopted() *bpftest.Pod {
	f.t.Helper()
	p := f.run()
	f.look(1)
	f.WantWhole(p)
	return p
}

// del does what the plugin does at DEL.
func (f *fixture) del(p *bpftest.Pod) error {
	f.deleted = append(f.deleted, repairtest.ID(p).ContainerID)
	return f.DEL(p)
}

// look looks and repairs a number of times, and returns whether the last time changed records.
func (f *fixture) look(times int) (changed bool) {
	f.t.Helper()
	for range times {
		f.readRecords()
		f.In(func() (err error) {
			changed, err = f.repair(f.t.Context(), f.looker.Look(f.records))
			return err
		})
	}
	return changed
}

func (f *fixture) readRecords() {
	f.t.Helper()
	records, err := attach.ReadRecords(f.StateDir)
	if err != nil {
		f.t.Fatal(err)
	}
	f.records = records
}

// repair does what a report calls for, in the node's network namespace.
func (f *fixture) repair(ctx context.Context, report Report) (changed bool, err error) {
	if report.Err != nil {
		return false, report.Err
	}
	assessment := f.repairer.Assess(report, f.records)
	f.broken += len(assessment.Broken)
	f.promoter.Offer(assessment.Promotable)
	unattached := slices.DeleteFunc(slices.Clone(f.pods), func(p adopt.Pod) bool {
		return slices.ContainsFunc(f.records, func(r attach.Record) bool { return r.PodName == p.Name })
	})
	result := f.repairer.Repair(ctx, assessment, Known{
		Records: f.records, Unattached: unattached,
		Deleted: func(container string) bool { return slices.Contains(f.deleted, container) },
	})
	for _, r := range result.Repairs {
		f.repairs[r.Action]++
	}
	f.again = result.Again
	return result.RecordsChanged, result.Err
}

func (f *fixture) wantRepairs(action Action, want int) {
	f.t.Helper()
	if got := f.repairs[action]; got != want || f.log.Count("attachment "+string(action)) != want {
		f.t.Errorf("%s %d times, want %d\n%s", action, got, want, f.log)
	}
}

// promoting runs the promoter until stop, which may be called more than once.
func (f *fixture) promoting() (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = f.NS.Do(func(ns.NetNS) error { f.promoter.Run(ctx); return nil })
	}()
	stop = func() { cancel(); <-done }
	f.t.Cleanup(stop)
	return stop
}

// eventually looks until something is so.
func (f *fixture) eventually(what string, ok func() bool) {
	f.t.Helper()
	for range 1000 {
		if ok() {
			return
		}
		time.Sleep(5 * time.Millisecond)
		f.look(1)
	}
	f.t.Fatalf("never: %s\n%s", what, f.log)
}
