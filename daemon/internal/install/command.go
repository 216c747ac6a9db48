package install

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
)

const installHelp = `Puts the CNI plugin onto the node: its binary into the plugins' directory, and then the plugin into the chain of the
network that the runtime takes, which is the first file in the directory of network configurations. If there is none yet, it
waits. No file of somebody else's is edited, and whatever is there at any moment is whole.

The plugin joins (--chain)

  dropin  by a file of its own, <net-dir>/<network>/10-probelet.conf, which libcni 1.3 and newer adds to the network
  copy    by a copy of the network's configuration, under a name that sorts first; "probeletd run --cni-net-dir" keeps it as its
          original is
  auto    by the first if the runtime's process tells that it has such a libcni, and is not CRI-O; otherwise by the second

Pods that run already are not attached by this; the daemon adopts them.`

const uninstallHelp = `Takes probelet off the node: the plugin leaves the chain; when the runtime has had the time to notice, everything is
detached from the pods, what is pinned and recorded is removed, and the plugin's binary last. Running pods stay as they are,
and their probes reach them. The daemon must have ended.

Plugins that the runtime runs by the configuration of before are waited for (--in-flight). Nothing is taken any more before anything
is detached, and connections that were handed over have the time to end (--drain). It can be run again, whenever it was
interrupted.`

func (o *Options) flags(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&o.NetDir, "cni-net-dir", "/etc/cni/net.d", "`directory` of network configurations")
	flags.StringVar(&o.BinDir, "cni-bin-dir", "/opt/cni/bin", "`directory` of CNI plugins")
	flags.StringVar(&o.BPFDir, "bpf-dir", datapath.DefaultDir, "`directory` in bpffs where the BPF objects are pinned")
	flags.StringVar(&o.StateDir, "state-dir", attach.DefaultStateDir, "`directory` of attachment records and the daemon's state")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		return errors.Join(CheckDirs(cmd.Flags()), checkDurations(cmd.Flags()))
	}
}

// CheckDirs returns an error that names flag and value of each directory that the plugin would refuse, or not find: where the chain
// names such a one, no pod can start, or none can be deleted.
func CheckDirs(flags *pflag.FlagSet) error {
	var errs []error
	for _, name := range []string{"cni-net-dir", "cni-bin-dir", "bpf-dir", "state-dir"} {
		switch dir := flags.Lookup(name).Value.String(); {
		case dir == "" && flags.Lookup(name).DefValue == "": // not asked for
		case !filepath.IsAbs(dir):
			errs = append(errs, fmt.Errorf("--%s %q: must be an absolute path", name, dir))
		case name == "bpf-dir" && strings.Contains(filepath.Base(dir), "."):
			errs = append(errs, fmt.Errorf("--%s %q: must have no dot in its name, which a BPF file system does not take", name, dir))
		}
	}
	return errors.Join(errs...)
}

// checkDurations returns an error that names flag and value of each negative duration.
func checkDurations(flags *pflag.FlagSet) error {
	var errs []error
	flags.VisitAll(func(f *pflag.Flag) {
		if d, err := flags.GetDuration(f.Name); err == nil && d < 0 {
			errs = append(errs, fmt.Errorf("--%s %s: must not be negative", f.Name, d))
		}
	})
	return errors.Join(errs...)
}

// Command returns the command that installs.
func Command(stderr io.Writer) *cobra.Command {
	var o Options
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put the CNI plugin onto the node and into the chain",
		Long:  installHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Log = slog.New(slog.NewTextHandler(stderr, nil))
			return Install(cmd.Context(), o)
		},
	}
	o.flags(cmd)
	cmd.Flags().StringVar(&o.Chain, "chain", "auto", "how to join the chain: `auto|dropin|copy`")
	HookFlag(cmd.Flags(), &o.Hook)
	cmd.Flags().StringVar(&o.Plugin, "plugin", "", "`FILE` of the plugin's binary (default: probelet beside this one)")
	return cmd
}

// UninstallCommand returns the command that uninstalls.
func UninstallCommand(stderr io.Writer) *cobra.Command {
	var o Options
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take probelet off the node",
		Long:  uninstallHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Log = slog.New(slog.NewTextHandler(stderr, nil))
			return Uninstall(cmd.Context(), o)
		},
	}
	o.flags(cmd)
	cmd.Flags().DurationVar(&o.Settle, "settle", 5*time.Second, "how long the runtime may take to notice a change of its configuration")
	cmd.Flags().DurationVar(&o.InFlight, "in-flight", 4*time.Minute, "how long plugins are waited for that the runtime ran by the configuration of before")
	cmd.Flags().DurationVar(&o.ForDaemon, "wait-for-daemon", 0, "how long the daemon may take to end; 0: it must have ended")
	cmd.Flags().DurationVar(&o.Drain, "drain", 10*time.Second, "how long connections that were handed over are waited for")
	return cmd
}

// hookValue is the value of --hook.
type hookValue struct{ hook *attach.Hook }

// HookFlag adds --hook.
func HookFlag(flags *pflag.FlagSet, hook *attach.Hook) {
	*hook = attach.HookTC
	flags.Var(hookValue{hook}, "hook", "where the answers to pods that are attached from now on are made: `tc|xdp` (xdp slows a pod's bulk traffic down to two thirds or less)")
}

// String implements pflag.Value.
func (v hookValue) String() string {
	if v.hook == nil { // pflag compares with the zero value
		return ""
	}
	return string(*v.hook)
}

// Type implements pflag.Value.
func (hookValue) Type() string { return "hook" }

// Set implements pflag.Value.
func (v hookValue) Set(text string) error {
	hook, err := attach.ParseHook(text)
	if err == nil {
		*v.hook = hook
	}
	return err
}
