package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/adopt"
	"github.com/probelet/probelet/daemon/internal/install/chain"
	"github.com/probelet/probelet/daemon/internal/install/runtimes"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/store"
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

// installation is what install and uninstall are told.
type installation struct {
	node             chain.Node
	way              string
	plugin           string
	bpfDir, stateDir string
	hook             attach.Hook
	// How long is waited: for the runtime to notice, for plugins that it runs, for connections, for the daemon.
	settle, inFlight, drain time.Duration
	forDaemon               time.Duration // to end
}

func (i *installation) flags(cmd *cobra.Command) {
	flags := cmd.Flags()
	flags.StringVar(&i.node.NetDir, "cni-net-dir", "/etc/cni/net.d", "`directory` of network configurations")
	flags.StringVar(&i.node.BinDir, "cni-bin-dir", "/opt/cni/bin", "`directory` of CNI plugins")
	flags.StringVar(&i.bpfDir, "bpf-dir", datapath.DefaultDir, "`directory` in bpffs where the BPF objects are pinned")
	flags.StringVar(&i.stateDir, "state-dir", attach.DefaultStateDir, "`directory` of attachment records and the daemon's state")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error { return checkDirs(cmd.Flags()) }
}

// checkDirs returns an error that names flag and value of each directory that the plugin would refuse, or not find: where the chain
// names such a one, no pod can start, or none can be deleted.
func checkDirs(flags *pflag.FlagSet) error {
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

func installCommand(stderr io.Writer) *cobra.Command {
	var i installation
	cmd := &cobra.Command{
		Use:   "install",
		Short: "Put the CNI plugin onto the node and into the chain",
		Long:  installHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			i.node.Log = slog.New(slog.NewTextHandler(stderr, nil))
			return i.install(cmd.Context())
		},
	}
	i.flags(cmd)
	cmd.Flags().StringVar(&i.way, "chain", "auto", "how to join the chain: `auto|dropin|copy`")
	hookFlag(cmd.Flags(), &i.hook)
	cmd.Flags().StringVar(&i.plugin, "plugin", "", "`FILE` of the plugin's binary (default: probelet beside this one)")
	return cmd
}

func uninstallCommand(stderr io.Writer) *cobra.Command {
	var i installation
	cmd := &cobra.Command{
		Use:   "uninstall",
		Short: "Take probelet off the node",
		Long:  uninstallHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			i.node.Log = slog.New(slog.NewTextHandler(stderr, nil))
			return i.uninstall(cmd.Context())
		},
	}
	i.flags(cmd)
	cmd.Flags().DurationVar(&i.settle, "settle", 5*time.Second, "how long the runtime may take to notice a change of its configuration")
	cmd.Flags().DurationVar(&i.inFlight, "in-flight", 4*time.Minute, "how long plugins are waited for that the runtime ran by the configuration of before")
	cmd.Flags().DurationVar(&i.forDaemon, "wait-for-daemon", 0, "how long the daemon may take to end; 0: it must have ended")
	cmd.Flags().DurationVar(&i.drain, "drain", 10*time.Second, "how long connections that were handed over are waited for")
	return cmd
}

// hookValue is the value of --hook.
type hookValue struct{ hook *attach.Hook }

// hookFlag adds --hook.
func hookFlag(flags *pflag.FlagSet, hook *attach.Hook) {
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

// chainWay resolves --chain, and says what it was resolved by.
func chainWay(text string, log *slog.Logger) (chain.Way, error) {
	switch text {
	case "auto":
		found := runtimes.Find("/proc")
		log.Info("container runtime", "found", found, "chain", chain.BestWay(found))
		return chain.BestWay(found), nil
	case string(chain.DropIn), string(chain.Copy):
		return chain.Way(text), nil
	}
	return "", fmt.Errorf("--chain %q: must be auto, dropin or copy", text)
}

// pluginConf returns the plugin's fields that are not its defaults.
func pluginConf(bpfDir, stateDir string, hook attach.Hook) map[string]string {
	conf := map[string]string{}
	if hook == attach.HookXDP {
		conf["hook"] = string(hook)
	}
	if bpfDir != datapath.DefaultDir {
		conf["bpfDir"] = bpfDir
	}
	if stateDir != attach.DefaultStateDir {
		conf["stateDir"] = stateDir
	}
	return conf
}

func (i *installation) install(ctx context.Context) error {
	way, err := chainWay(i.way, i.node.Log)
	if err != nil {
		return err
	}
	i.node.StateDir = i.stateDir
	if i.plugin == "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		i.plugin = filepath.Join(filepath.Dir(self), chain.PluginType)
	}
	i.node.Conf = pluginConf(i.bpfDir, i.stateDir, i.hook)
	i.node.Runtimes = runtimes.Cached("/proc")
	if err := i.node.CanJoin(); err != nil {
		return fmt.Errorf("nothing has been changed: %w", err)
	}
	// First: a chain that names a plugin that is not there would keep pods from starting.
	changed, err := i.node.PutPlugin(ctx, i.plugin)
	if err != nil {
		return fmt.Errorf("plugin: %w", err)
	}
	i.node.Log.Info("plugin", "dir", i.node.BinDir, "new", changed)
	return i.node.Follow(ctx, way, true)
}

func (i *installation) uninstall(ctx context.Context) error {
	log := i.node.Log
	i.node.StateDir = i.stateDir
	if err := i.netDirThere(); err != nil {
		return err
	}
	unlock, err := i.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	references, err := i.node.References()
	if err != nil {
		return err
	}
	if len(references) > 0 {
		return fmt.Errorf("files that are not ours name the plugin, and without it no pod could start: %s: take it out there, and run uninstall again; nothing has been changed",
			join(references))
	}
	changed, err := i.node.Leave(ctx)
	if err != nil {
		return fmt.Errorf("leaving the chain: %w", err)
	}
	log.Info("left the chain", "was in it", changed)
	if changed || i.node.HasPlugin() {
		if err := i.settleDown(ctx); err != nil {
			return err
		}
	}
	if err := i.detach(ctx); err != nil {
		return err
	}
	if err := i.removePins(); err != nil {
		return err
	}
	if err := i.removeState(); err != nil {
		return err
	}
	if i.pluginIsNeeded() {
		return nil
	}
	if err := i.node.RemovePlugin(); err != nil {
		return err
	}
	log.Info("nothing of probelet is left on the node")
	return nil
}

// netDirThere returns an error if the plugin is there, but not the directory whose files may name it: those are likely elsewhere.
func (i *installation) netDirThere() error {
	if _, err := os.Stat(i.node.NetDir); err != nil && i.node.HasPlugin() {
		return fmt.Errorf("--cni-net-dir: %w: without the plugin in %s no pod could start where a network names it; nothing has been changed", err, i.node.BinDir)
	}
	return nil
}

func join(references []chain.Reference) string {
	var words []string
	for _, r := range references {
		words = append(words, r.String())
	}
	return strings.Join(words, ", ")
}

// A chain is run by one process after the other. One that is not seen at so many looks, this far apart, has ended.
const (
	inFlightLooks    = 5
	inFlightInterval = 100 * time.Millisecond
)

// settleDown waits until the runtime has read its configuration, and until those have ended that it ran by the one before.
func (i *installation) settleDown(ctx context.Context) error {
	if err := i.node.Wake(); err != nil { // whoever left the chain may have been killed before
		return err
	}
	if !wait(ctx, i.settle) {
		return ctx.Err()
	}
	began := map[string]bool{}
	for range inFlightLooks {
		maps.Copy(began, runtimes.UnderWay("/proc"))
		if !wait(ctx, inFlightInterval) {
			return ctx.Err()
		}
	}
	if len(began) > 0 {
		i.node.Log.Info("waiting for CNI plugins that are at work", "containers", len(began))
	}
	deadline := time.Now().Add(i.inFlight)
	for unseen := 0; unseen < inFlightLooks && len(began) > 0; unseen++ {
		for container := range runtimes.UnderWay("/proc") {
			if began[container] {
				unseen = -1
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("CNI plugins are still at work after %s, by a configuration that may name the plugin; run uninstall again", i.inFlight)
		}
		if !wait(ctx, inFlightInterval) {
			return ctx.Err()
		}
	}
	return nil
}

// pluginIsNeeded is whether the runtime will still run the plugin, to delete pods that are there.
func (i *installation) pluginIsNeeded() bool {
	if !runtimes.Find("/proc").KeepConfiguration() {
		return false
	}
	const hint = "the plugin's binary is left, which does nothing now: the runtime deletes a pod with the network configuration of its ADD. Run uninstall again when pods of before are gone"
	pods, err := adopt.Node{Root: "/proc/1/root", CacheDir: adopt.DefaultCacheDir}.Naming(chain.PluginType)
	if err != nil {
		i.node.Log.Warn(hint, "error", err)
		return true
	}
	if pods > 0 {
		i.node.Log.Warn(hint, "interfaces", pods)
	}
	return pods > 0
}

// lock keeps a daemon from attaching what is being detached.
func (i *installation) lock(ctx context.Context) (unlock func(), err error) {
	deadline := time.Now().Add(i.forDaemon)
	unlock, err = i.tryLock()
	for errors.Is(err, statedir.ErrRunning) && time.Now().Before(deadline) && wait(ctx, lookForDaemon) {
		unlock, err = i.tryLock()
	}
	if errors.Is(err, statedir.ErrRunning) {
		err = fmt.Errorf("%w; end it first", err)
	}
	return unlock, err
}

// tryLock returns statedir.ErrRunning if there is a daemon of the same state directory or of the same pins.
func (i *installation) tryLock() (unlock func(), err error) {
	release, err := datapath.Claim(i.bpfDir)
	if err != nil {
		return nil, oneDaemon(err)
	}
	held, err := statedir.Lock(i.stateDir)
	if errors.Is(err, fs.ErrNotExist) {
		return release, nil
	}
	if err != nil {
		release()
		return nil, err
	}
	return func() { _ = held.Release(); release() }, nil
}

// lookForDaemon is how often it is looked whether the daemon has ended.
const lookForDaemon = 200 * time.Millisecond

// wait is false if ctx ended before.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

// takenGrace is longer than a connection that was taken may still be answered.
const takenGrace = 1500 * time.Millisecond

func (i *installation) detach(ctx context.Context) error {
	d, err := datapath.Open(i.bpfDir)
	switch {
	case errors.Is(err, datapath.ErrNotLoaded) || errors.Is(err, fs.ErrNotExist):
		d = nil // or what is left of it when uninstall was killed
	case err != nil:
		return err
	default:
		defer d.Close() //nolint:errcheck // nothing is lost
	}
	ids, err := attach.List(i.bpfDir)
	if err != nil {
		return err
	}
	if d != nil {
		if err := i.quiesce(ctx, d, ids); err != nil {
			return err
		}
	}
	records, err := attach.ReadRecords(i.stateDir)
	if err != nil {
		i.node.Log.Warn("records of attachments that cannot be read", "error", err)
	}
	for _, id := range ids {
		if err := attach.Detach(d, i.bpfDir, id); err != nil {
			return fmt.Errorf("detaching %s: %w", id, err)
		}
	}
	if err := removeFilters(records); err != nil {
		return err
	}
	i.node.Log.Info("detached", "pods", len(ids))
	if d == nil {
		return nil
	}
	return attach.Prune(ctx, d, i.bpfDir)
}

// removeFilters removes filters whose pins are lost from the devices on record. The records themselves go later: should this
// be killed, they are needed again.
func removeFilters(records []attach.Record) error {
	links, err := attach.Links()
	if err != nil {
		return err
	}
	for _, r := range records {
		if link, present := links[r.IfIndex]; !present || link.Name != r.HostIfName {
			continue
		}
		if err := attach.RemoveFilters(r.IfIndex); err != nil {
			return err
		}
	}
	return nil
}

// removePins removes the directory of pins, but never a whole file system of others' pins.
func (i *installation) removePins() error {
	var fs unix.Statfs_t
	if parent := filepath.Dir(i.bpfDir); unix.Statfs(parent, &fs) != nil || fs.Type != unix.BPF_FS_MAGIC {
		i.node.Log.Info("no pins", "reason", parent+" is not a BPF file system")
		return nil
	}
	return os.RemoveAll(i.bpfDir)
}

// quiesce makes the programs take no connection any more, by leaving them nothing to answer from, and waits for those that
// they have.
func (i *installation) quiesce(ctx context.Context, d *datapath.Datapath, ids []attach.ID) error {
	for _, id := range ids {
		known, err := attach.OpenPod(d, i.bpfDir, id)
		if errors.Is(err, os.ErrNotExist) {
			continue // deleted meanwhile, or never whole
		}
		if err != nil {
			return err
		}
		pod, err := store.Open(known)
		if err != nil {
			return err
		}
		if err := pod.Sync(store.Records{}); err != nil {
			return fmt.Errorf("%s: %w", id, err)
		}
	}
	for deadline := time.Now().Add(i.drain); ; {
		if !wait(ctx, takenGrace) {
			return ctx.Err()
		}
		flows, err := d.Flows()
		if err != nil || flows == 0 {
			return err
		}
		if time.Now().After(deadline) {
			i.node.Log.Warn("connections that were handed over, or observed, have not ended", "connections", flows)
			return nil
		}
	}
}

// removeState removes the daemon's files and the records, but nothing of others.
func (i *installation) removeState() error {
	records := attach.RecordsDir(i.stateDir)
	if err := os.RemoveAll(records); err != nil {
		return err
	}
	if err := statedir.Remove(i.stateDir); err != nil {
		return err
	}
	// In a pod the directory is a mount: only where the host has it can it be removed.
	err := os.Remove(filepath.Join("/proc/1/root", i.stateDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		i.node.Log.Info("the empty directory of the state is left", "reason", err)
	}
	return nil
}
