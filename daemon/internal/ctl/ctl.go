//go:build linux

// Package ctl implements the commands of probeletctl.
package ctl

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/doctor"
	"github.com/probelet/probelet/daemon/internal/flagenv"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/table"
	"github.com/probelet/probelet/daemon/internal/versioncmd"
	"github.com/probelet/probelet/internal/version"
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

On a narrow terminal the table leaves out columns; -o wide never does. If the daemon does not run, the last lines say what is still
answered until when, and the command ends with 3.

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

const rootHelp = `Shows what probelet knows and does on this node. Under the name kubectl-probelet it is a plugin of kubectl, which asks the nodes.

Exit codes:
  0  all is well
  1  doctor found a problem, or the command failed
  2  an unknown command or flag, or a value that it does not take
  3  the daemon does not run; status and explain have shown what is known without it
  4  the pod is not known on this node, or not attached
  5  the command needs root`

// environment is what the commands reach of the machine.
type environment struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	now            func() uint64 // ns of CLOCK_BOOTTIME
	open           func(bpfDir string) (survey.Kernel, error)
	host           doctor.Host
	// width is how many characters a line may have; 0: any number.
	width int
}

// Main runs probeletctl with the arguments of the process and returns its exit code.
func Main(ctx context.Context, args []string) int {
	env := environment{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, now: datapath.Now, open: survey.OpenKernel, host: doctor.ThisHost(), width: table.WidthOf(os.Stdout),
	}
	return status.Exit(os.Stderr, "probeletctl", execute(ctx, env, args[1:]))
}

func execute(ctx context.Context, env environment, args []string) error {
	root := &cobra.Command{
		Use:           "probeletctl",
		Short:         "Shows what probelet knows and does on this node",
		Long:          rootHelp,
		Version:       version.String(),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(statusCommand(&env), explainCommand(&env), topCommand(&env), invalidateCommand(&env), trustCommand(&env),
		doctorCommand(&env), estimateCommand(&env), logLevelCommand(&env), versioncmd.New())
	root.PersistentFlags().IntVar(&env.width, "width", env.width, "longest `LINE` in characters, of tables and text; 0: any (default: the terminal's)")
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if env.width < 0 {
			return fmt.Errorf("--width %d: must not be negative", env.width)
		}
		return fromEnvironment(cmd.Flags())
	}
	root.SetArgs(args)
	root.SetOut(env.stdout)
	root.SetErr(env.stderr)
	err := status.Execute(ctx, root)
	var coded *status.Error
	switch {
	case err == nil, errors.As(err, &coded):
	case errors.Is(err, os.ErrPermission):
		return &status.Error{Code: status.NotAllowed, Err: fmt.Errorf("%w; run this as root", err)}
	case errors.Is(err, api.ErrDown):
		return &status.Error{Code: status.DaemonDown, Err: err}
	case errors.Is(err, api.ErrNotFound):
		return &status.Error{Code: status.NotFound, Err: err}
	}
	return err
}

// formats are the values of -o.
var formats = map[string]func(*environment, survey.Status) error{
	"table": func(env *environment, s survey.Status) error { return printTable(env, s, false) },
	"wide":  func(env *environment, s survey.Status) error { return printTable(env, s, true) },
	"json":  func(env *environment, s survey.Status) error { return printJSON(env.stdout, s) },
}

func formatNames() string {
	names := make([]string, 0, len(formats))
	for name := range formats {
		names = append(names, name)
	}
	slices.Sort(names)
	return strings.Join(names, "|")
}

func statusCommand(env *environment) *cobra.Command {
	var output string
	var summary bool
	var where place
	var only namespaceFilter
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show attachments, endpoints, and what is answered",
		Long:  statusHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			show, ok := formats[output]
			if !ok {
				return status.Errorf(status.Usage, "--output %q: must be one of %s", output, formatNames())
			}
			if summary {
				return summarize(cmd.Context(), env, where, output == "json")
			}
			s, err := env.at(where).ReadAll()
			if err != nil {
				return err
			}
			if err := show(env, only.of(s)); err != nil {
				return err
			}
			return daemonDown(s.Daemon)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "table", "`format`: "+formatNames())
	cmd.Flags().BoolVar(&summary, "summary", false, "only numbers of the node, and the pods that are not attached")
	only.flags(cmd)
	where.flags(cmd)
	return cmd
}

// daemonDown is the error after all has been shown that is known without a daemon; nil if one runs.
func daemonDown(d survey.Daemon) error {
	if d.Running {
		return nil
	}
	return &status.Error{Code: status.DaemonDown, Err: api.ErrDown, Shown: true}
}

// namespaceFilter chooses pods; empty: all.
type namespaceFilter struct {
	namespace string
	all       bool
}

func (f *namespaceFilter) flags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.namespace, "namespace", "n", "", "only pods of this `NAMESPACE`")
	cmd.Flags().BoolVarP(&f.all, "all-namespaces", "A", false, "pods of all namespaces (the default)")
	cmd.MarkFlagsMutuallyExclusive("namespace", "all-namespaces")
}

func (f namespaceFilter) of(s survey.Status) survey.Status {
	if f.namespace == "" {
		return s
	}
	other := func(pod string) bool { return !strings.HasPrefix(pod, f.namespace+"/") }
	s.Attachments = slices.DeleteFunc(slices.Clone(s.Attachments), func(a survey.Attachment) bool { return other(a.Pod) })
	s.Unattached = slices.DeleteFunc(slices.Clone(s.Unattached), other)
	return s
}

// place is where probelet is on this machine.
type place struct{ bpfDir, stateDir string }

// at is what is read from a place.
func (env *environment) at(where place) survey.Source {
	return survey.Source{
		BPFDir: where.bpfDir, StateDir: where.stateDir, Now: env.now, Open: env.open, Warn: func(err error) { warn(env, err) },
	}
}

func warn(env *environment, err error) { _, _ = fmt.Fprintln(env.stderr, "probeletctl: warning:", err) }

// fromEnvironment sets the directories that were not given from the variables that configure probeletd, so that probeletctl needs no
// flags in its container.
func fromEnvironment(flags *pflag.FlagSet) error {
	return flagenv.Apply(flags, "bpf-dir", "state-dir", "cni-net-dir", "cni-bin-dir")
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
