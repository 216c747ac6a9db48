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
	"time"

	"k8s.io/client-go/rest"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/adopt"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/kubeapi"
	"github.com/probelet/probelet/daemon/internal/podevents"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/prober"
	"github.com/probelet/probelet/daemon/internal/refresh"
	"github.com/probelet/probelet/daemon/internal/repair"
	"github.com/probelet/probelet/daemon/internal/source"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

// loadDeadline is how long to wait for another process to load the BPF objects.
const loadDeadline = 5 * time.Second

// Config configures the daemon.
type Config struct {
	Source               string // kubelet, apiserver or file; empty: file with Specs, otherwise kubelet
	Specs                string // file
	Kubelet              source.KubeletConfig
	Kubeconfig, NodeName string // for the API server
	Prober               string // as prober.Parse takes it; empty: the kubelet, except for specs from a file
	BPFDir, StateDir     string
	Hook                 attach.Hook // of adopted pods
	Defaults             probe.Defaults
	Repair               bool          // repair attachments, and adopt pods
	CNICacheDir          string        // libcni's, which has the pods to adopt
	Crosscheck           time.Duration // between looks at the kubelet's verdicts; 0: never
	// FollowChain keeps the plugin in the chain until ctx ends. After each look it reports what keeps the plugin out, or nil.
	// If FollowChain is nil, the chain is not maintained.
	FollowChain   func(ctx context.Context, looked func(error)) error
	MetricsListen string // address; empty: none
	MetricsPerPod bool
	API           APIConfig
	LogLevel      *slog.LevelVar
	Events        bool // write Events about pods with invalid annotations

	openSocket openFunc // opens sockets for refresh; nil: openSocket
}

// APIConfig configures the API for controllers on other machines. It is not served if all fields are empty.
type APIConfig struct{ Listen, CertFile, KeyFile, ClientCAFile string }

func (c Config) sourceName() string {
	switch {
	case c.Source != "":
		return c.Source
	case c.Specs != "":
		return "file"
	}
	return "kubelet"
}

// Run runs the daemon until ctx ends, which is not an error.
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
	if _, err := finder.Find(); err != nil && !finder.Kubelet { // the kubelet may start later
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
		return fmt.Errorf("--bpf-dir %s: %w", c.BPFDir, err)
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	release, err := statedir.ClaimPins(c.BPFDir)
	if err != nil {
		return fmt.Errorf("--bpf-dir %s: %w", c.BPFDir, err)
	}
	defer release()
	if err := d.IgnoreTraffic(); err != nil {
		return err
	}
	follower, err := followProber(d, finder, log)
	if err != nil {
		return err
	}
	previous, err := statedir.ReadEndpoints(c.StateDir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		log.Warn("failed to read what the previous daemon knew; its evidence is not used", "error", err)
	}
	ag := newAgent(log, d, c, previous, nil)
	ag.prober, ag.held, ag.source = follower, held.Check, specs
	return ag.serve(ctx, c)
}

// openSource opens the source of specs.
func openSource(c Config, log *slog.Logger) (source.Source, error) {
	name := c.sourceName()
	if (name == "file") != (c.Specs != "") {
		return nil, fmt.Errorf("--source %s, --specs %q: --specs is required with --source file, and only then", name, c.Specs)
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

// serve starts everything that runs beside the loop, and runs the loop.
func (ag *agent) serve(ctx context.Context, c Config) error {
	// In this order: what is watched before it is read is not missed.
	ctx, cancel := context.WithCancel(ctx)
	in, err := watch(ctx, c.StateDir, ag.datapath, ag.source, ag.log)
	if err != nil {
		cancel()
		return err
	}
	defer in.all.Wait()
	defer cancel()
	if ag.refresher, err = refresh.New(ownSockets{ag.datapath, c.openSocket, ag.metrics.OwnConnection}, datapath.Now); err != nil {
		return err
	}
	defer ag.refresher.Close()
	if err := ag.startRepairs(ctx, c, in); err != nil {
		return err
	}
	if ag.reporter = newReporter(c, ag.log); ag.reporter != nil {
		in.all.Go(func() { ag.reporter.Run(ctx) })
	}
	if err := ag.listen(ctx, c, in); err != nil {
		return err
	}
	if err := ag.startCrosscheck(ctx, c, in); err != nil {
		return err
	}
	if c.FollowChain != nil {
		ag.chain = &chainStatus{}
		in.all.Go(func() { in.fail(c.FollowChain(ctx, ag.chain.looked)) })
	}
	ag.log.Info("running", "source", c.sourceName(), "prober", c.Prober, "bpf", ag.datapath.Dir(), "state", c.StateDir)
	err = ag.run(ctx, in)
	ag.log.Info("ended; evidence is left to expire")
	return err
}

func (ag *agent) startRepairs(ctx context.Context, c Config, in *inputs) (err error) {
	if !c.Repair {
		return nil
	}
	if err := repair.SeesHost(); err != nil {
		ag.log.Warn("attachments are not repaired, and pods that were started before probelet are not adopted", "reason", err)
		return nil
	}
	if ag.repairs, err = newRepairs(ag.repairConfig(c.Hook, adopt.Node{Root: "/proc/1/root", CacheDir: c.CNICacheDir})); err != nil {
		return err
	}
	in.all.Go(func() { ag.repairs.promoter.Run(ctx) })
	in.all.Go(func() {
		ag.repairs.looker.Run(ctx)
		_ = ag.repairs.looker.Close() // it only listened
	})
	return nil
}

// newReporter returns nil if there is no API server to write to, as for a daemon that does not run in a cluster.
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
	log.Info("no Events are written about pods", "reason", err)
	return nil
}

// listen starts the servers.
func (ag *agent) listen(ctx context.Context, c Config, in *inputs) error {
	serve := func(listener net.Listener, handler http.Handler) {
		in.all.Go(func() { in.fail(api.Serve(ctx, listener, handler, ag.log)) })
	}
	metrics := ag.metrics.Handler(ag.datapath, ag.gauges, c.MetricsPerPod)
	monitored, err := api.ListenMetrics(c.StateDir)
	if err != nil {
		return fmt.Errorf("listening on %s: %w", statedir.MetricsSocketPath(c.StateDir), err)
	}
	serve(monitored, api.Health(ag, metrics))
	local, err := api.Listen(c.StateDir)
	if err != nil {
		return fmt.Errorf("listening on %s: %w", statedir.SocketPath(c.StateDir), err)
	}
	serve(local, api.Local(ag, metrics, c.LogLevel))
	if c.MetricsListen != "" {
		listener, err := net.Listen("tcp", c.MetricsListen)
		if err != nil {
			return fmt.Errorf("--metrics-listen %s: %w", c.MetricsListen, err)
		}
		serve(listener, api.Health(ag, metrics))
	}
	if c.API == (APIConfig{}) {
		return nil
	}
	if c.API.Listen == "" || c.API.CertFile == "" || c.API.KeyFile == "" || c.API.ClientCAFile == "" {
		return errors.New("--api-listen, --api-cert-file, --api-key-file and --api-client-ca-file: set all of them, or none")
	}
	config, err := api.TLSConfig(c.API.CertFile, c.API.KeyFile, c.API.ClientCAFile)
	if err != nil {
		return err
	}
	listener, err := tls.Listen("tcp", c.API.Listen, config)
	if err != nil {
		return fmt.Errorf("--api-listen %s: %w", c.API.Listen, err)
	}
	serve(listener, api.Controls(ag))
	return nil
}
