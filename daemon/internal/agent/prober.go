package agent

import (
	"fmt"
	"log/slog"
	"reflect"
	"time"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/prober"
)

const (
	// proberInterval is how often the prober is looked up.
	proberInterval = 500 * time.Millisecond
	// setAgain is how long a prober that the kernel refused is not set again: loading a program costs more than finding the prober.
	setAgain = 30 * time.Second
)

// proberFollower keeps the kernel informed of who the prober is: the kubelet restarts, its cgroup is recreated, other processes
// enter it. While the prober is unknown, or cannot be told from others, there is none, and nothing is answered.
type proberFollower struct {
	log     *slog.Logger
	finder  prober.Finder
	set     func(datapath.Prober) error // in the kernel
	who     datapath.Prober
	refused refusal // the last one
	lost    string  // why there is no prober, as logged; empty if there is one
}

// refusal is a prober that the kernel did not accept.
type refusal struct {
	who datapath.Prober
	err error
	at  time.Time
}

// followProber looks the prober up for the first time. The previous prober stays set if it is still the one: without any for a moment,
// a failure that it found then would go unseen, and the success before it would still be answered.
func followProber(d *datapath.Datapath, finder prober.Finder, log *slog.Logger) (*proberFollower, error) {
	who, err := d.Prober()
	if err != nil {
		return nil, fmt.Errorf("reading the previous prober: %w", err)
	}
	f := &proberFollower{log: log, finder: finder, set: d.SetProber, who: who}
	f.follow()
	return f, nil
}

func (f *proberFollower) follow() {
	who, err := f.finder.Find()
	if err == nil && reflect.DeepEqual(who, f.who) {
		return
	}
	if err == nil {
		err = f.trySet(who)
	}
	if err == nil {
		f.who, f.lost = who, ""
		f.log.Info("prober found", "host", who.AnyLocal, "cgroups", who.CgroupIDs, "process", who.Process)
		return
	}
	if !reflect.DeepEqual(f.who, datapath.Prober{}) {
		if err := f.set(datapath.Prober{}); err != nil {
			f.log.Error("failed to clear the prober", "error", err)
			return
		}
		f.who = datapath.Prober{}
	}
	if f.lost != err.Error() {
		f.log.Warn("no prober found; nothing is answered", "error", err)
	}
	f.lost = err.Error()
}

func (f *proberFollower) trySet(who datapath.Prober) error {
	if r := f.refused; reflect.DeepEqual(who, r.who) && time.Since(r.at) < setAgain {
		return r.err
	}
	err := f.set(who)
	if err != nil {
		f.refused = refusal{who, err, time.Now()}
	}
	return err
}
