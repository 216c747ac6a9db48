// Command probeletctl shows what probelet knows and does on this node.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
)

const statusHelp = `Shows every attachment on this node and every endpoint that is probed behind it. The daemon need not run.

  STATE  fresh    a success was observed and may be answered, unless the last column says otherwise; where that says
                  "mode observe", it would be, and so would as many probes as it says
         stale    a success was observed; it has expired, or was withdrawn, or is never answered
         failed   the last probe failed; probes reach the pod until one succeeds
         unknown  nothing conclusive was observed
  AGE    time since that observation
  BOUND  how long after its observation a success is answered
  HITS   probes answered in the kernel

Below the table are the pods that are not answered because answers did not arrive by their device, and the programs of others
on it; and how many connections of the prober reached pods but taught nothing, and why.

With -o wide also HOOK, where answers are made, TRUST, whether they are known to arrive (proven, unproven: not tried yet, or
lost), and for each of PROBES:

  DETECTED WITHIN  the longest time from the beginning of a failure to the prober's verdict, and after the slash what it
                   would be without probelet: failureThreshold × period + timeout (the timeout where that is longer
                   than the period). With probelet a success may be answered for the BOUND before that begins; in mode
                   observe, it would be
  LISTENER         of ports with a TCP probe: how many probes were answered in a row, and after the slash how many may be
                   before one must have been accepted by the pod; and what last kept one from being answered that was fresh:
                   no_listener, queue_long, head_old, special, real_due (as many as may be had been answered) or unanswered
  SETTINGS         mode and staleness, where they are not the default, and who said so

With -o json, the fields are those of docs/status.schema.json.`

// environment is what the commands reach of the machine.
type environment struct {
	stdout, stderr io.Writer
	now            func() uint64 // ns of CLOCK_BOOTTIME
	open           func(bpfDir string) (kernel, error)
	host           host
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	env := environment{stdout: os.Stdout, stderr: os.Stderr, now: datapath.Now, open: openKernel, host: thisHost()}
	if err := execute(ctx, env, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "probeletctl:", err)
		os.Exit(1)
	}
}

func execute(ctx context.Context, env environment, args []string) error {
	root := &cobra.Command{
		Use:           "probeletctl",
		Short:         "Shows what probelet knows and does on this node",
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(statusCommand(env), explainCommand(env), topCommand(env), invalidateCommand(env), trustCommand(env),
		doctorCommand(env))
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error { return fromEnvironment(cmd.Flags()) }
	root.SetArgs(args)
	root.SetOut(env.stdout)
	root.SetErr(env.stderr)
	return root.ExecuteContext(ctx)
}

// formats are the values of -o.
var formats = map[string]func(io.Writer, Status) error{
	"table": func(w io.Writer, s Status) error { return printTable(w, s, false) },
	"wide":  func(w io.Writer, s Status) error { return printTable(w, s, true) },
	"json":  printJSON[Status],
}

func formatNames() string {
	names := make([]string, 0, len(formats))
	for name := range formats {
		names = append(names, name)
	}
	slices.Sort(names)
	return strings.Join(names, "|")
}

func statusCommand(env environment) *cobra.Command {
	var output string
	var where place
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show attachments, endpoints, and what is answered",
		Long:  statusHelp,
		Args:  cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			show, ok := formats[output]
			if !ok {
				return fmt.Errorf("--output %q: must be one of %s", output, formatNames())
			}
			status, err := survey(env, where)
			if err != nil {
				return err
			}
			return show(env.stdout, status)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "`format`: "+formatNames())
	where.flags(cmd)
	return cmd
}

// place is where probelet is on this machine.
type place struct{ bpfDir, stateDir string }

// fromEnvironment sets the directories that were not given from the variables that probeletd has them from, so that nothing needs
// to be said in its container.
func fromEnvironment(flags *pflag.FlagSet) error {
	for _, name := range []string{"bpf-dir", "state-dir", "cni-net-dir", "cni-bin-dir"} {
		variable := "PROBELET_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
		value, set := os.LookupEnv(variable)
		if f := flags.Lookup(name); f == nil || f.Changed || !set {
			continue
		}
		if err := flags.Set(name, value); err != nil {
			return fmt.Errorf("$%s: %w", variable, err)
		}
	}
	return nil
}

func (p *place) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&p.bpfDir, "bpf-dir", datapath.DefaultDir, "`directory` in bpffs where the BPF objects are pinned")
	cmd.Flags().StringVar(&p.stateDir, "state-dir", attach.DefaultStateDir, "`directory` of attachment records and the daemon's state")
}

func printJSON[T any](w io.Writer, s T) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(s)
}

// kernel is what the kernel side tells. Its errors are those of package datapath.
type kernel interface {
	Prober() (datapath.Prober, error)
	Counters() (map[string]uint64, error)
	// Watched reports whether listening sockets that close are noticed.
	Watched() bool
	SeesListeners() bool
	// Pod returns what is known of an attachment's pod.
	Pod(attach.ID) (podMaps, error)
	// AttachedDevice returns the device of an attachment.
	AttachedDevice(attach.ID) (datapath.Device, error)
	// Neighbours returns the programs of others at a device's hooks.
	Neighbours(ifindex int) ([]attach.Neighbour, error)
	// TrustAgain has the programs try again whether answers arrive by a device.
	TrustAgain(datapath.DeviceKey) error
	Close() error
}

type podMaps interface {
	Get(datapath.EndpointKey) (datapath.Evidence, datapath.Tally, error)
}

type openedKernel struct {
	*datapath.Datapath
	bpfDir  string
	checker *attach.Checker // nil: not needed yet
}

func (k *openedKernel) Pod(id attach.ID) (podMaps, error) {
	return attach.OpenPod(k.Datapath, k.bpfDir, id)
}

func (k *openedKernel) AttachedDevice(id attach.ID) (datapath.Device, error) {
	key, err := attach.Device(k.bpfDir, id)
	if err != nil {
		return datapath.Device{}, err
	}
	return k.Device(key)
}

func (k *openedKernel) Neighbours(ifindex int) (_ []attach.Neighbour, err error) {
	if k.checker == nil {
		if k.checker, err = attach.NewChecker(k.Datapath, k.bpfDir); err != nil {
			return nil, err
		}
	}
	return k.checker.Neighbours(ifindex)
}

// openKernel returns nil if nothing is loaded.
func openKernel(bpfDir string) (kernel, error) {
	d, err := datapath.Open(bpfDir)
	if errors.Is(err, datapath.ErrNotLoaded) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &openedKernel{Datapath: d, bpfDir: bpfDir}, nil
}
