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

const installHelp = `Installs the CNI plugin on the node: copies its binary into the plugin directory, then adds it to the chain of the
network that the runtime uses, which is the first file in the directory of network configurations. If there is no network
yet, install waits for one. It never edits another component's file, and it replaces its own files atomically.

How the plugin joins the chain (--chain):

  dropin  a file of its own, <net-dir>/<network>/10-probelet.conf, which libcni 1.3 and later adds to the network
  copy    a copy of the network's configuration under a name that sorts first; "probeletd run --cni-net-dir" keeps the copy
          in step with the original
  auto    dropin if the runtime's binary was built with libcni 1.3 or later and the runtime is not CRI-O, copy otherwise

Pods that are already running are not attached by install; the daemon adopts them.`

const uninstallHelp = `Removes probelet from the node: takes the plugin out of the chain, gives the runtime time to notice, detaches all pods, and
removes the pins, the state and, last, the plugin's binary. Running pods are not disturbed, and their probes reach them
again. The daemon must not be running.

Uninstall waits for plugins that the runtime started with the previous configuration (--in-flight). Before it detaches
anything it stops new connections from being answered and lets connections that were handed over finish (--drain). If it is
interrupted, run it again.`

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

// CheckDirs returns an error that names the flag and value of each directory that the plugin would reject or not find. With such a
// directory in the chain no pod could start or be deleted.
func CheckDirs(flags *pflag.FlagSet) error {
	var errs []error
	for _, name := range []string{"cni-net-dir", "cni-bin-dir", "bpf-dir", "state-dir"} {
		switch dir := flags.Lookup(name).Value.String(); {
		case dir == "" && flags.Lookup(name).DefValue == "": // optional and not set
		case !filepath.IsAbs(dir):
			errs = append(errs, fmt.Errorf("--%s %q: must be an absolute path", name, dir))
		case name == "bpf-dir" && strings.Contains(filepath.Base(dir), "."):
			errs = append(errs, fmt.Errorf("--%s %q: must not have a dot in its last element: BPF file systems do not allow it", name, dir))
		}
	}
	return errors.Join(errs...)
}

// checkDurations returns an error that names the flag and value of each negative duration.
func checkDurations(flags *pflag.FlagSet) error {
	var errs []error
	flags.VisitAll(func(f *pflag.Flag) {
		if d, err := flags.GetDuration(f.Name); err == nil && d < 0 {
			errs = append(errs, fmt.Errorf("--%s %s: must not be negative", f.Name, d))
		}
	})
	return errors.Join(errs...)
}

// Command returns the install command.
func Command(stderr io.Writer) *cobra.Command {
	var o Options
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Install the CNI plugin on the node and add it to the chain",
		Long:  installHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Log = slog.New(slog.NewTextHandler(stderr, nil))
			return Install(cmd.Context(), o)
		},
	}
	o.flags(cmd)
	cmd.Flags().StringVar(&o.Chain, "chain", "auto", "how the plugin joins the chain: `auto|dropin|copy`")
	HookFlag(cmd.Flags(), &o.Hook)
	cmd.Flags().StringVar(&o.Plugin, "plugin", "", "`FILE` of the plugin's binary (default: probelet, next to this binary)")
	return cmd
}

// UninstallCommand returns the uninstall command.
func UninstallCommand(stderr io.Writer) *cobra.Command {
	var o Options
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Remove probelet from the node",
		Long:  uninstallHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			o.Log = slog.New(slog.NewTextHandler(stderr, nil))
			return Uninstall(cmd.Context(), o)
		},
	}
	o.flags(cmd)
	cmd.Flags().DurationVar(&o.Settle, "settle", 5*time.Second, "how long to give the runtime to notice the change of its configuration")
	cmd.Flags().DurationVar(&o.InFlight, "in-flight", 4*time.Minute, "how long to wait for plugins that the runtime started with the previous configuration")
	cmd.Flags().DurationVar(&o.ForDaemon, "wait-for-daemon", 0, "how long to wait for the daemon to exit; 0: fail if it is running")
	cmd.Flags().DurationVar(&o.Drain, "drain", 10*time.Second, "how long to wait for connections that were handed over to finish")
	return cmd
}

// hookValue implements pflag.Value for --hook.
type hookValue struct{ hook *attach.Hook }

// HookFlag adds --hook, with HookTC as its default.
func HookFlag(flags *pflag.FlagSet, hook *attach.Hook) {
	*hook = attach.HookTC
	flags.Var(hookValue{hook}, "hook", "where probes of newly attached pods are answered: `tc|xdp` (xdp cuts a pod's bulk throughput to two thirds or less)")
}

// String implements pflag.Value.
func (v hookValue) String() string {
	if v.hook == nil { // pflag calls it on the zero value
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
