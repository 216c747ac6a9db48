// Package install installs the CNI plugin on a node, keeps it in the chain, and removes probelet from the node.
package install

import (
	"cmp"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/install/chain"
	"github.com/probelet/probelet/daemon/internal/install/runtimes"
)

// Options configures Install, Keeper and Uninstall.
type Options struct {
	NetDir, BinDir   string // CNI's network configurations and plugins
	BPFDir, StateDir string
	Log              *slog.Logger

	// Install and Keeper.
	Chain string // how the plugin joins the chain: auto, dropin or copy
	Hook  attach.Hook
	// Plugin is the binary to install. The default is PluginType in the directory of this program.
	Plugin string

	// Uninstall.
	Settle    time.Duration // for the runtime to notice that the plugin left the chain
	InFlight  time.Duration // for plugins that the runtime started before
	Drain     time.Duration // for connections that were handed over
	ForDaemon time.Duration // for the daemon to exit

	proc string // default: /proc
}

func (o *Options) procDir() string { return cmp.Or(o.proc, "/proc") }

// way resolves Chain and logs the runtimes it was derived from.
func (o *Options) way() (chain.Way, error) {
	switch o.Chain {
	case "auto":
		found := runtimes.Find(o.procDir())
		o.Log.Info("found container runtimes", "runtimes", found, "chain", chain.BestWay(found))
		return chain.BestWay(found), nil
	case string(chain.DropIn), string(chain.Copy):
		return chain.Way(o.Chain), nil
	}
	return "", fmt.Errorf("--chain %q: must be auto, dropin or copy", o.Chain)
}

// pluginConf returns the fields of the plugin's configuration that differ from the plugin's defaults.
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

func (o *Options) node() chain.Node {
	return chain.Node{
		NetDir: o.NetDir, BinDir: o.BinDir, StateDir: o.StateDir, Log: o.Log,
		Conf: pluginConf(o.BPFDir, o.StateDir, o.Hook), Runtimes: runtimes.Cached(o.procDir()),
	}
}

// Install copies the plugin onto the node and adds it to the chain. It waits for a network to join.
func Install(ctx context.Context, o Options) error {
	way, err := o.way()
	if err != nil {
		return err
	}
	if o.Plugin == "" {
		self, err := os.Executable()
		if err != nil {
			return err
		}
		o.Plugin = filepath.Join(filepath.Dir(self), chain.PluginType)
	}
	node := o.node()
	if err := checkPlugin(o.Plugin); err != nil {
		return err
	}
	if err := node.CanJoin(); err != nil {
		return fmt.Errorf("nothing was changed: %w", err)
	}
	// The binary goes first: with a chain that names a missing plugin no pod could start.
	changed, err := node.PutPlugin(ctx, o.Plugin)
	if err != nil {
		return fmt.Errorf("plugin: %w", err)
	}
	o.Log.Info("plugin binary installed", "dir", o.BinDir, "changed", changed)
	return node.Follow(ctx, way, true)
}

// Keeper returns a function that keeps the plugin in the chain until ctx ends. It calls looked after each check, with the reason why the
// plugin is not in the chain, or nil.
func Keeper(o Options) (keep func(ctx context.Context, looked func(error)) error, err error) {
	way, err := o.way()
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, looked func(error)) error {
		node := o.node()
		node.Looked = func(_ chain.Joined, err error) { looked(err) }
		return node.Follow(ctx, way, false)
	}, nil
}

// checkPlugin returns an error unless file is an executable for the architecture of this program.
func checkPlugin(file string) error {
	want, err := headerOf("/proc/self/exe")
	if err != nil {
		return err
	}
	got, err := headerOf(file)
	switch pathErr := (*fs.PathError)(nil); {
	case errors.As(err, &pathErr):
		return fmt.Errorf("--plugin: %w", err)
	case err != nil:
		return fmt.Errorf("--plugin %q: must be an ELF executable: %w", file, err)
	case got.Type != elf.ET_EXEC && got.Type != elf.ET_DYN:
		return fmt.Errorf("--plugin %q: must be an ELF executable, not %s", file, got.Type)
	case got.Machine != want.Machine || got.Class != want.Class || got.Data != want.Data:
		return fmt.Errorf("--plugin %q: built for %s (%s, %s), must be for %s (%s, %s)",
			file, got.Machine, got.Class, got.Data, want.Machine, want.Class, want.Data)
	}
	return nil
}

func headerOf(file string) (elf.FileHeader, error) {
	f, err := elf.Open(file)
	if err != nil {
		return elf.FileHeader{}, err
	}
	return f.FileHeader, f.Close()
}
