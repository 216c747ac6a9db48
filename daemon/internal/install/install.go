// Package install puts the CNI plugin onto a node, keeps it in the chain, and takes probelet off the node again.
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

// Options is what install and uninstall are told.
type Options struct {
	NetDir, BinDir   string // of network configurations and plugins
	BPFDir, StateDir string
	Log              *slog.Logger

	Chain  string // how to join the chain: auto, dropin, copy
	Plugin string // the file of its binary
	Hook   attach.Hook

	// How long is waited: for the runtime to notice, for plugins that it runs, for connections, for the daemon.
	Settle, InFlight, Drain time.Duration
	ForDaemon               time.Duration // to end

	proc string // where the host's processes are; empty: /proc
}

func (o *Options) procDir() string { return cmp.Or(o.proc, "/proc") }

// way resolves Chain, and logs what it was resolved by.
func (o *Options) way() (chain.Way, error) {
	switch o.Chain {
	case "auto":
		found := runtimes.Find(o.procDir())
		o.Log.Info("container runtime", "found", found, "chain", chain.BestWay(found))
		return chain.BestWay(found), nil
	case string(chain.DropIn), string(chain.Copy):
		return chain.Way(o.Chain), nil
	}
	return "", fmt.Errorf("--chain %q: must be auto, dropin or copy", o.Chain)
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

// node is what the options say of the chain.
func (o *Options) node() chain.Node {
	return chain.Node{
		NetDir: o.NetDir, BinDir: o.BinDir, StateDir: o.StateDir, Log: o.Log,
		Conf: pluginConf(o.BPFDir, o.StateDir, o.Hook), Runtimes: runtimes.Cached(o.procDir()),
	}
}

// Install puts the plugin onto the node and into the chain.
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
		return fmt.Errorf("nothing has been changed: %w", err)
	}
	// First: a chain that names a plugin that is not there would keep pods from starting.
	changed, err := node.PutPlugin(ctx, o.Plugin)
	if err != nil {
		return fmt.Errorf("plugin: %w", err)
	}
	o.Log.Info("plugin", "dir", o.BinDir, "new", changed)
	return node.Follow(ctx, way, true)
}

// Keep keeps the plugin in the chain until ctx ends. After each look looked gets what keeps it out, or nil.
func Keep(ctx context.Context, o Options, looked func(error)) error {
	way, err := o.way()
	if err != nil {
		return err
	}
	node := o.node()
	node.Looked = func(_ chain.Joined, err error) { looked(err) }
	return node.Follow(ctx, way, false)
}

// checkPlugin returns an error unless file is an executable of the architecture that this program is built for.
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
