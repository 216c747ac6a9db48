package agent

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"reflect"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/fsnotify/fsnotify"
	"k8s.io/client-go/rest"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/install/chain"
	"github.com/probelet/probelet/daemon/internal/kubeapi"
	"github.com/probelet/probelet/daemon/internal/podevents"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/prober"
	"github.com/probelet/probelet/daemon/internal/refresh"
	"github.com/probelet/probelet/daemon/internal/repair"
	"github.com/probelet/probelet/daemon/internal/source"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

const (
	// loadDeadline is how long the loading of BPF objects by another process is waited for.
	loadDeadline = 5 * time.Second
	// retryAfter is when maps that were not there, or not writable, are tried again: records are written before maps.
	retryAfter = 200 * time.Millisecond
	// resyncInterval is how often maps are compared with those that are known, and records are read if their directory
	// has been replaced, of which nobody tells.
	resyncInterval = 5 * time.Second
	// proberInterval is how often a prober's cgroup is looked up, lest it was made anew.
	proberInterval = 500 * time.Millisecond
	// setAgain is how long after a prober could not be set it is tried again.
	setAgain = 30 * time.Second
	// recordsSettle is how long after a change of records they are read: a change is several events.
	recordsSettle = 10 * time.Millisecond
	// recordsGather is how long records are left to gather.
	recordsGather = 50 * time.Millisecond
	// describeInterval is the shortest time between two writings of what is probed: that takes as long as there are pods.
	describeInterval = time.Second
)

// Config is what the daemon is told by its flags.
type Config struct {
	Source, Prober       string
	Specs                string // file
	Kubelet              source.KubeletConfig
	Kubeconfig, NodeName string // API server
	BPFDir, StateDir     string
	Hook                 attach.Hook // of pods that are adopted
	Defaults             probe.Defaults
	Repair               bool          // keep attachments as the node is
	CNICacheDir          string        // libcni's, for that
	Crosscheck           time.Duration // between looks at the kubelet's verdicts; 0: none
	// FollowChain keeps the plugin in the chain until ctx ends, and says after each look what keeps it out; nil: somebody else
	// sees to the chain.
	FollowChain   func(ctx context.Context, looked func(error)) error
	MetricsListen string
	MetricsPerPod bool
	API           APIConfig
	LogLevel      *slog.LevelVar
	Events        bool // about pods, at the API server

	openSocket openFunc // for the daemon's own requests; nil: in the daemon's network namespace
}

// APIConfig is for controllers on other machines; empty: they are not served.
type APIConfig struct{ Listen, CertFile, KeyFile, ClientCAFile string }

// Run runs the daemon until ctx ends, which is no error.
func Run(ctx context.Context, c Config, log *slog.Logger) (err error) {
	if c.openSocket == nil {
		c.openSocket = openSocket
	}
	if c.Prober == "" && c.sourceName() != "file" {
		c.Prober = "kubelet"
	}
	finder, err := prober.Parse(c.Prober)
	if err != nil {
		return err
	}
	if _, err := finder.Find(); err != nil && !finder.Kubelet { // that may start later
		return err
	}
	if err := os.MkdirAll(attach.RecordsDir(c.StateDir), 0o700); err != nil {
		return err
	}
	held, err := statedir.Lock(c.StateDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, held.Release()) }()
	specs, err := openSource(c, log)
	if err != nil {
		return err
	}
	if file, ok := specs.(*source.File); ok {
		defer file.Close() //nolint:errcheck // nothing is lost
	}

	loading, cancel := context.WithTimeout(ctx, loadDeadline)
	defer cancel()
	d, err := datapath.Ensure(loading, c.BPFDir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	release, err := statedir.ClaimPins(c.BPFDir)
	if err != nil {
		return fmt.Errorf("--bpf-dir %s: %w", c.BPFDir, err)
	}
	defer release()
	// The prober of before stays it if it still is. Were nobody the prober for a moment, a failure that it finds then would go unseen,
	// and the success before it would still be answered.
	who, err := d.Prober()
	if err != nil {
		return fmt.Errorf("the prober of before: %w", err)
	}
	l := &loop{log: log, prober: finder, who: who, set: d.SetProber, held: held.Check, calls: make(chan func())}
	l.followProber()
	return l.serve(ctx, c, d, specs)
}

// openSource opens the source that the flags ask for.
func openSource(c Config, log *slog.Logger) (source.Source, error) {
	name := c.sourceName()
	if (name == "file") != (c.Specs != "") {
		return nil, fmt.Errorf("--source %s, --specs %q: a file, and only a file, needs --specs", name, c.Specs)
	}
	var s source.Source
	var err error
	switch name {
	case "file":
		s, err = source.NewFile(c.Specs, log)
	case "kubelet":
		s, err = source.NewKubelet(c.Kubelet, log)
	case "apiserver":
		s, err = source.NewAPIServer(c.Kubeconfig, c.NodeName, log)
	default:
		return nil, fmt.Errorf("--source %q: must be kubelet, apiserver or file", name)
	}
	if err != nil {
		return nil, fmt.Errorf("--source %s: %w", name, err)
	}
	return s, nil
}

func (c Config) sourceName() string {
	switch {
	case c.Source != "":
		return c.Source
	case c.Specs != "":
		return "file"
	}
	return "kubelet"
}

// serve starts the inputs, and runs the loop.
func (l *loop) serve(ctx context.Context, c Config, d *datapath.Datapath, specs source.Source) error {
	previous, err := statedir.ReadEndpoints(c.StateDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		l.log.Warn("evidence of an earlier run is not used", "error", err)
	}

	// In this order: what is watched before it is read is not missed.
	ctx, cancel := context.WithCancel(ctx)
	in, err := watch(ctx, c.StateDir, d, specs, l.log)
	if err != nil {
		cancel()
		return err
	}
	defer in.all.Wait()
	defer cancel()
	l.daemon = newDaemon(l.log, d, c, previous, nil)
	if l.refresher, err = refresh.New(ownSockets{d, c.openSocket, l.metrics.OwnConnection}, datapath.Now); err != nil {
		return err
	}
	defer l.refresher.Close()
	l.refresh, l.failing, l.delivery = specs.Refresh, specs.Failing, specs.Delivery
	if c.Repair {
		if l.keeper, err = newKeeper(c.CNICacheDir); err != nil {
			l.log.Warn("attachments are not looked after, and pods that had their network before are not adopted", "reason", err)
		} else {
			if l.keeper.looker, err = repair.New(d, c.BPFDir); err != nil {
				return err
			}
			in.all.Go(func() { l.keeper.promoter.run(ctx, l.daemon) })
			in.all.Go(func() {
				l.keeper.looker.Run(ctx)
				_ = l.keeper.looker.Close() // it only listened
			})
		}
	}
	if l.reporter = newReporter(c, l.log); l.reporter != nil {
		in.all.Go(func() { l.reporter.Run(ctx) })
	}
	if err := l.listen(ctx, c, in); err != nil {
		return err
	}
	if err := l.crosscheck(ctx, c, in); err != nil {
		return err
	}
	if c.FollowChain != nil {
		l.chain = &atomic.Pointer[chainState]{}
		in.all.Go(func() { in.fail(c.FollowChain(ctx, func(err error) { l.chain.Store(&chainState{err}) })) })
	}
	l.log.Info("running", "source", c.sourceName(), "prober", c.Prober, "bpf", d.Dir(), "state", c.StateDir)
	err = l.run(ctx, in)
	l.log.Info("ended; evidence is left to expire")
	return err
}

// newReporter returns nil where there is no API server to be told, as for a daemon that is not one of a cluster's pods.
func newReporter(c Config, log *slog.Logger) *podevents.Reporter {
	if !c.Events || c.sourceName() == "file" {
		return nil
	}
	config, err := kubeapi.Config(c.Kubeconfig)
	if err == nil {
		var client rest.Interface
		if client, err = kubeapi.Core(config); err == nil {
			return podevents.New(client, c.NodeName, log)
		}
	}
	log.Info("no events are written about pods", "reason", err)
	return nil
}

// listen begins to serve those who ask the daemon something.
func (l *loop) listen(ctx context.Context, c Config, in *inputs) error {
	serve := func(listener net.Listener, handler http.Handler) {
		in.all.Go(func() { in.fail(api.Serve(ctx, listener, handler, l.log)) })
	}
	metrics := l.metrics.Handler(l.datapath, l.gauges, c.MetricsPerPod)
	monitored, err := api.ListenMetrics(c.StateDir)
	if err != nil {
		return fmt.Errorf("listening on %s: %w", statedir.MetricsSocketPath(c.StateDir), err)
	}
	serve(monitored, api.Health(l, metrics))
	local, err := api.Listen(c.StateDir)
	if err != nil {
		return fmt.Errorf("listening on %s: %w", statedir.SocketPath(c.StateDir), err)
	}
	serve(local, api.Local(l, metrics, c.LogLevel))
	if c.MetricsListen != "" {
		listener, err := net.Listen("tcp", c.MetricsListen)
		if err != nil {
			return fmt.Errorf("--metrics-listen %s: %w", c.MetricsListen, err)
		}
		serve(listener, api.Health(l, metrics))
	}
	if c.API == (APIConfig{}) {
		return nil
	}
	if c.API.Listen == "" || c.API.CertFile == "" || c.API.KeyFile == "" || c.API.ClientCAFile == "" {
		return errors.New("--api-listen, --api-cert-file, --api-key-file and --api-client-ca-file: all of them are needed, or none")
	}
	config, err := api.TLSConfig(c.API.CertFile, c.API.KeyFile, c.API.ClientCAFile)
	if err != nil {
		return fmt.Errorf("--api-listen %s: %w", c.API.Listen, err)
	}
	listener, err := tls.Listen("tcp", c.API.Listen, config)
	if err != nil {
		return fmt.Errorf("--api-listen %s: %w", c.API.Listen, err)
	}
	serve(listener, api.Controls(l))
	return nil
}

// inputs are what the loop reacts to.
type inputs struct {
	snapshots chan []probe.Pod
	records   chan struct{} // they changed
	observed  chan observed
	failed    chan error // the first of those that cannot go on
	// recordsReplaced is whether their directory is not the one that is watched.
	recordsReplaced func() bool
	all             sync.WaitGroup // of goroutines, which end after ctx
}

// watch starts a goroutine for each input.
func watch(ctx context.Context, stateDir string, d *datapath.Datapath, specs source.Source, log *slog.Logger) (*inputs, error) {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	if err := watcher.Add(attach.RecordsDir(stateDir)); err != nil {
		return nil, errors.Join(fmt.Errorf("watching %s: %w", attach.RecordsDir(stateDir), err), watcher.Close())
	}
	watched, err := os.Stat(attach.RecordsDir(stateDir))
	if err != nil {
		return nil, errors.Join(err, watcher.Close())
	}
	reader, err := d.Records()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("records of connections: %w", err), watcher.Close())
	}
	in := &inputs{
		recordsReplaced: func() bool {
			current, err := os.Stat(attach.RecordsDir(stateDir))
			return err != nil || !os.SameFile(watched, current)
		},
		snapshots: make(chan []probe.Pod),
		records:   make(chan struct{}, 1),
		observed:  make(chan observed),
		failed:    make(chan error, 1),
	}
	in.all.Go(func() { in.fail(specs.Run(ctx, in.snapshots)) })
	in.all.Go(func() { in.fail(in.watchRecords(ctx, watcher, log)) })
	in.all.Go(func() { in.fail(in.readProbes(ctx, reader)) })
	// A reader that waits is woken by closing it.
	context.AfterFunc(ctx, func() { _ = reader.Close() })
	return in, nil
}

func (in *inputs) fail(err error) {
	if err == nil {
		return
	}
	select {
	case in.failed <- err:
	default:
	}
}

func (in *inputs) watchRecords(ctx context.Context, watcher *fsnotify.Watcher, log *slog.Logger) error {
	defer watcher.Close() //nolint:errcheck // nothing is lost
	var due <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-watcher.Events:
			if !ok {
				return fmt.Errorf("watching records: %w", os.ErrClosed)
			}
			if due == nil {
				due = time.After(recordsSettle)
			}
		case err := <-watcher.Errors:
			log.Warn("watching records of attachments", "error", err)
			due = time.After(recordsSettle)
		case <-due:
			due = nil
			select {
			case in.records <- struct{}{}:
			default: // one is waiting already
			}
		}
	}
}

// observed is what became of probes, and how many exchanges there were of which that is not certain.
type observed struct {
	probes   []evidence.Observation
	doubtful map[evidence.Doubtful]uint64
}

// readProbes reads as many records as there are at a time, and then lets some more come: to wake up for each would cost
// more than all the rest. What must have an effect at once the kernel side does by itself.
func (in *inputs) readProbes(ctx context.Context, reader *datapath.RecordReader) error {
	assembler := evidence.NewAssembler()
	for {
		o, err := readBatch(reader, assembler)
		switch {
		case ctx.Err() != nil:
			return nil
		case err != nil:
			return fmt.Errorf("reading records of connections: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case in.observed <- o:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(recordsGather):
		}
	}
}

// readBatch waits for records and returns what became of the probes that end with those there are, at most 1,024.
func readBatch(reader *datapath.RecordReader, assembler *evidence.Assembler) (o observed, err error) {
	const most = 1024
	var record datapath.Record
	for first := true; (first || reader.Pending()) && len(o.probes) < most; first = false {
		if err := reader.Next(&record); err != nil {
			return o, err
		}
		if observation, ok := assembler.Add(record); ok {
			o.probes = append(o.probes, observation)
		}
	}
	o.doubtful = assembler.TakeDoubtful()
	return o, nil
}

// loop is the one goroutine in which everything is decided.
type loop struct {
	*daemon
	log    *slog.Logger
	prober prober.Finder
	who    datapath.Prober
	set    func(datapath.Prober) error
	held   func() error // reports whether this is the one daemon of the state directory
	// refresh tells the source of a new attachment; failing is how it fails, and delivery how containers' states come in.
	refresh  func()
	failing  func() string
	delivery func() source.Delivery
	calls    chan func() // of others, to be run between two decisions
	refused  refusal     // the last one
	lost     string      // why nobody is the prober, as it was logged; empty: somebody is
	keeper   *keeper     // nil: attachments are as others leave them
	// chain is how the plugin is in the chain, as of the last look; nil: the daemon does not look after it.
	chain *atomic.Pointer[chainState]
	// unrepaired is what was logged last of what keeps the keeper from its work.
	unrepaired string
}

// chainState is what a look at the chain found: nil if the plugin is in it.
type chainState struct{ err error }

// misplaced is why the daemon keeps the plugin out of the chain; nil if it does not.
func (l *loop) misplaced() error {
	if l.chain == nil {
		return nil
	}
	if state := l.chain.Load(); state != nil && errors.Is(state.err, chain.ErrMisplaced) {
		return state.err
	}
	return nil
}

func (l *loop) run(ctx context.Context, in *inputs) error {
	defer func() {
		if l.outdated {
			l.describe()
		}
	}()
	l.readRecords()
	// Probes mean nothing, and records of endpoints would be taken for superfluous, until it is known what is probed.
	var probes <-chan observed
	var retry <-chan time.Time
	prober := time.NewTicker(proberInterval)
	defer prober.Stop()
	resync := time.NewTicker(resyncInterval)
	defer resync.Stop()
	var again, describe <-chan time.Time
	var reports <-chan repair.Report
	if l.keeper != nil {
		reports = l.keeper.looker.Reports()
	}
	for {
		var lookErr error
		select {
		case <-ctx.Done():
			return nil
		case err := <-in.failed:
			return err
		case pods := <-in.snapshots:
			first := !l.podsKnown
			probes = in.observed
			l.setPods(pods)
			if first {
				lookErr = l.look()
				debug.FreeOSMemory() // starting takes several times the memory that going on does
			}
		case <-in.records:
			if err := l.held(); err != nil {
				return err
			}
			if l.readRecords() {
				l.refresh()
			}
		case o := <-probes:
			l.doubt(o.doubtful)
			l.observe(o.probes)
		case call := <-l.calls:
			call()
		case <-l.refresher.C:
			l.refreshed(l.refresher.Take())
		case <-retry:
			retry = nil
			l.retry()
		case <-resync.C:
			if err := l.held(); err != nil {
				return err
			}
			if in.recordsReplaced() || l.unreadable != "" {
				l.readRecords()
			}
			lookErr = l.look()
		case report := <-reports:
			lookErr = l.repair(ctx, report)
			if l.keeper.again {
				again = time.After(lookAgain)
			}
		case <-again:
			again = nil
			l.keeper.request(l.daemon)
		case <-prober.C:
			l.followProber()
		case <-describe:
			describe = nil
			l.describe()
		}
		if lookErr != nil {
			return lookErr
		}
		if l.outdated && describe == nil {
			describe = time.After(time.Until(l.describedAt.Add(describeInterval)))
		}
		if retry == nil && l.pending() {
			retry = time.After(retryAfter)
		}
	}
}

// followProber keeps to the prober when its cgroup is made anew, the kubelet starts in another, or something else comes into it. Until
// it is known who the prober is, and can be told from others, nobody is.
func (l *loop) followProber() {
	who, err := l.prober.Find()
	if err == nil && reflect.DeepEqual(who, l.who) {
		return
	}
	if err == nil {
		err = l.setProber(who)
	}
	if err == nil {
		l.who, l.lost = who, ""
		l.log.Info("the prober", "host", who.AnyLocal, "cgroups", who.CgroupIDs, "process", who.Process)
		return
	}
	if !reflect.DeepEqual(l.who, datapath.Prober{}) {
		if err := l.set(datapath.Prober{}); err != nil {
			l.log.Error("setting the prober", "error", err)
			return
		}
		l.who = datapath.Prober{}
	}
	if l.lost != err.Error() {
		l.log.Warn("no prober, so nothing is answered", "error", err)
	}
	l.lost = err.Error()
}

// refusal is of a prober that the kernel side could not be told.
type refusal struct {
	who datapath.Prober
	err error
	at  time.Time
}

// setProber tells the kernel side. What it refused is not tried again at once: loading a program costs more than looking.
func (l *loop) setProber(who datapath.Prober) error {
	if r := l.refused; reflect.DeepEqual(who, r.who) && time.Since(r.at) < setAgain {
		return r.err
	}
	err := l.set(who)
	if err != nil {
		l.refused = refusal{who, err, time.Now()}
	}
	return err
}
