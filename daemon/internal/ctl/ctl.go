//go:build linux

// Package ctl implements the commands of probeletctl.
package ctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
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

const rootHelp = `Shows what probelet knows and does on this node. Installed as kubectl-probelet it is a kubectl plugin, which asks the nodes.
estimate asks the API server instead, or reads a file, and needs neither root nor a daemon.

Exit codes:
  0  success
  1  doctor found a problem, or the command failed
  2  an unknown command or flag, or an invalid value
  3  the daemon is not running; status and explain have shown what is known without it
  4  the pod is not known on this node, or not attached
  5  the command needs root, or you lack a permission at the API server (estimate)`

// environment gives the commands access to the machine.
type environment struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	now            func() uint64 // ns of CLOCK_BOOTTIME
	open           func(bpfDir string) (survey.Kernel, error)
	host           doctor.Host
	// width is the maximum length of a line in characters; 0 means no limit.
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
		Short:         "Show what probelet knows and does on this node",
		Long:          rootHelp,
		Version:       version.String(),
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	root.AddCommand(statusCommand(&env), explainCommand(&env), topCommand(&env), invalidateCommand(&env), trustCommand(&env),
		doctorCommand(&env), estimateCommand(&env), logLevelCommand(&env), versioncmd.New())
	root.PersistentFlags().IntVar(&env.width, "width", env.width, "maximum `LENGTH` of a line in characters; 0: no limit (default: the terminal's width)")
	root.PersistentPreRunE = func(cmd *cobra.Command, _ []string) error {
		if cmd.Flags().Changed("namespace") && cmd.Flags().Changed("all-namespaces") {
			return errors.New("--namespace, --all-namespaces: must not both be given")
		}
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

// daemonDown returns the error that ends a command after it has shown what is known without the daemon; nil if the daemon is running.
func daemonDown(d survey.Daemon) error {
	if d.Running {
		return nil
	}
	return &status.Error{Code: status.DaemonDown, Err: api.ErrDown, Shown: true}
}

// namespaceFilter selects pods by namespace; the zero value selects all.
type namespaceFilter struct {
	namespace string
	all       bool
}

func (f *namespaceFilter) flags(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&f.namespace, "namespace", "n", "", "only pods in this `NAMESPACE`")
	cmd.Flags().BoolVarP(&f.all, "all-namespaces", "A", false, "pods in all namespaces (the default)")
}

// of returns a copy of s that has only the selected pods.
func (f namespaceFilter) of(s survey.Status) survey.Status {
	if f.namespace == "" {
		return s
	}
	other := func(pod string) bool { return !strings.HasPrefix(pod, f.namespace+"/") }
	s.Attachments = slices.DeleteFunc(slices.Clone(s.Attachments), func(a survey.Attachment) bool { return other(a.Pod) })
	s.Unattached = slices.DeleteFunc(slices.Clone(s.Unattached), other)
	return s
}

// place holds probelet's directories on this machine.
type place struct{ bpfDir, stateDir string }

func (p *place) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&p.bpfDir, "bpf-dir", datapath.DefaultDir, "`directory` in bpffs where the BPF objects are pinned")
	cmd.Flags().StringVar(&p.stateDir, "state-dir", attach.DefaultStateDir, "`directory` of attachment records and the daemon's state")
}

// read reads what is known of the node.
func (env *environment) read(where place) (survey.Status, error) {
	return where.check(env.at(where).Read)
}

// readWithNeighbours is read with the programs beside probelet's.
func (env *environment) readWithNeighbours(where place) (survey.Status, error) {
	return where.check(env.at(where).ReadWithNeighbours)
}

// check returns what read does, unless the directories are not those that probelet uses here.
func (p place) check(read func() (survey.Status, error)) (s survey.Status, err error) {
	for _, dir := range []struct{ flag, path string }{{"bpf-dir", p.bpfDir}, {"state-dir", p.stateDir}} {
		if !filepath.IsAbs(dir.path) {
			return s, status.Errorf(status.Usage, "--%s %q: must be an absolute path", dir.flag, dir.path)
		}
	}
	if s, err = read(); err != nil {
		return s, err
	}
	if _, err := os.Stat(p.stateDir); errors.Is(err, os.ErrNotExist) && s.Counters != nil {
		return s, status.Errorf(status.Failed, "--state-dir %q: no such directory, although BPF objects are loaded: probeletd uses another one", p.stateDir)
	}
	return s, nil
}

// at returns the source of what the commands show.
func (env *environment) at(where place) survey.Source {
	return survey.Source{BPFDir: where.bpfDir, StateDir: where.stateDir, Now: env.now, Open: env.open, Warn: env.warn}
}

func (env *environment) warn(err error) {
	_, _ = fmt.Fprintln(env.stderr, "probeletctl: warning:", err)
}

// fromEnvironment sets directories that were not given on the command line from the variables that configure probeletd, so that
// probeletctl needs no flags in the daemon's container.
func fromEnvironment(flags *pflag.FlagSet) error {
	return flagenv.Apply(flags, "bpf-dir", "state-dir", "cni-net-dir", "cni-bin-dir")
}
