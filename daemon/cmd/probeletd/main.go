// Command probeletd decides which probes the kernel may answer: it knows what is probed, learns from the outcomes of
// the probes that reach the pods, and writes evidence and its bounds into the pods' maps.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
)

const runHelp = `Runs the daemon in the foreground.

Specs (--specs) are a YAML file of pods, with probes as in a pod spec:

  pods:
  - name: web
    namespace: shop          # default: default
    ips: [10.0.0.7]          # needed where the runtime did not tell the plugin the pod's name
    annotations: {probelet.dev/staleness: "2", probelet.dev/mode: answer}   # as on a pod; see below
    containers:
    - name: server
      ports: [{name: http, containerPort: 8080}]
      readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 5}

The file is read again when it changes. One that cannot be used is logged, and the last good one stays in force.

The prober (--prober) is whose connections are probes:

  cgroup:PATH  the processes of the cgroup v2 directory PATH itself (not of those below it): the kubelet's, for example
               cgroup:/sys/fs/cgroup/system.slice/kubelet.service
  host         every process of the host's network namespace. For trying things by hand, not for production: a
               connection of any local process would be taken for a probe, such as one of a hostNetwork ingress or of a
               client that came by a NodePort. Its requests would be answered by the kernel, not by the pod, and where
               the server speaks first both sides would wait: the client for the server, which has not been told.

The mode (--mode, or the pod's annotation probelet.dev/mode) says what is done for a pod:

  answer   probes are observed, and answered while what was observed is fresh
  observe  probes are observed, and none is answered
  off      neither

The staleness (--staleness, or the pod's annotation probelet.dev/staleness) says for how long after its observation a
success is answered, in periods of the shortest probe of the same endpoint: a number from 0.5 to 5. With +timeout after
it, as in the default 1+timeout, the smallest timeout of these probes is added, so that a probe that is due after just so
many periods is surely answered. No pod exceeds --staleness-ceiling, whatever its annotation says. What was
observed already is not answered for longer when the staleness grows; only the next success is.

An annotation that cannot be used is logged and shown by probeletctl status, and of its pod nothing is answered: whoever
wrote it did not want the defaults.

On SIGTERM and SIGINT the daemon ends and leaves everything as it is: evidence expires by itself.`

type config struct {
	specs, prober    string
	bpfDir, stateDir string
	defaults         probe.Defaults
	logLevel         slog.Level
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if err := execute(ctx, os.Args[1:], os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "probeletd:", err)
		os.Exit(1)
	}
}

func execute(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	root := &cobra.Command{
		Use:           "probeletd",
		Short:         "Decides which probes the kernel may answer",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(runCommand(stderr))
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	return root.ExecuteContext(ctx)
}

func runCommand(stderr io.Writer) *cobra.Command {
	var c config
	cmd := &cobra.Command{
		Use:   "run --specs FILE --prober cgroup:PATH|host",
		Short: "Run the daemon in the foreground",
		Long:  runHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log := slog.New(slog.NewTextHandler(stderr, &slog.HandlerOptions{Level: c.logLevel}))
			return run(cmd.Context(), c, log)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&c.specs, "specs", "", "YAML `FILE` of pods and their probes")
	flags.StringVar(&c.prober, "prober", "", "whose connections are probes: `cgroup:PATH|host`")
	flags.StringVar(&c.bpfDir, "bpf-dir", datapath.DefaultDir, "`directory` in bpffs where the BPF objects are pinned")
	flags.StringVar(&c.stateDir, "state-dir", attach.DefaultStateDir, "`directory` of attachment records and the daemon's state")
	defaults := probe.NewDefaults()
	flags.TextVar(&c.defaults.Mode, "mode", defaults.Mode, "what is done for pods without an annotation: answer|observe|off")
	flags.TextVar(&c.defaults.Staleness, "staleness", defaults.Staleness, "for how many `periods` a success is answered")
	flags.TextVar(&c.defaults.Ceiling, "staleness-ceiling", defaults.Ceiling, "most `periods` that an annotation can ask for")
	flags.TextVar(&c.logLevel, "log-level", slog.LevelInfo, "least `level` that is logged: debug, info, warn, error")
	for _, name := range []string{"specs", "prober"} {
		if err := cmd.MarkFlagRequired(name); err != nil {
			panic(err) // no such flag
		}
	}
	return cmd
}
