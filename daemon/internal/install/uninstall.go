package install

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/probelet/probelet/daemon/internal/adopt"
	"github.com/probelet/probelet/daemon/internal/install/chain"
	"github.com/probelet/probelet/daemon/internal/install/runtimes"
)

type uninstaller struct {
	Options
	node chain.Node
}

// Uninstall removes probelet from the node. It is idempotent: it may be run again after it was interrupted at any point.
func Uninstall(ctx context.Context, o Options) error {
	return uninstaller{o, o.node()}.run(ctx)
}

func (u uninstaller) run(ctx context.Context) error {
	log := u.Log
	if err := u.checkNetDir(); err != nil {
		return err
	}
	unlock, err := u.lock(ctx)
	if err != nil {
		return err
	}
	defer unlock()
	references, err := u.node.References()
	if err != nil {
		return err
	}
	if len(references) > 0 {
		return fmt.Errorf("files that probelet does not own name the plugin, and without it no pod could start: %s; remove the plugin there and run uninstall again; nothing was changed",
			join(references))
	}
	changed, err := u.node.Leave(ctx)
	if err != nil {
		return fmt.Errorf("leaving the chain: %w", err)
	}
	log.Info("left the chain", "changed", changed)
	if changed || u.node.HasPlugin() {
		if err := u.settleDown(ctx); err != nil {
			return err
		}
	}
	if err := u.detach(ctx); err != nil {
		return err
	}
	if err := u.removePins(); err != nil {
		return err
	}
	if err := u.removeState(); err != nil {
		return err
	}
	if u.pluginIsNeeded() {
		return nil
	}
	if err := u.node.RemovePlugin(); err != nil {
		return err
	}
	log.Info("probelet removed from the node")
	return nil
}

// checkNetDir guards against a wrong NetDir. If the plugin's binary is installed, NetDir must exist, and no runtime may read a network
// that names the plugin from another directory: without the binary no pod of that network could start.
func (u uninstaller) checkNetDir() error {
	if !u.node.HasPlugin() {
		return nil
	}
	if _, err := os.Stat(u.NetDir); err != nil {
		return fmt.Errorf("--cni-net-dir: %w: a network elsewhere may name the plugin, and without its binary in %s no pod could start; nothing was changed", err, u.BinDir)
	}
	if elsewhere := u.node.Elsewhere(); len(elsewhere) > 0 {
		return fmt.Errorf("--cni-net-dir %q: the runtime reads networks from another directory, where files name the plugin: %s; nothing was changed",
			u.NetDir, join(elsewhere))
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

// A runtime runs the plugins of a chain one process after another, with gaps. A chain has ended when none of its processes is seen in
// this many looks, this far apart.
const (
	inFlightLooks    = 5
	inFlightInterval = 100 * time.Millisecond
)

// settleDown waits until the runtime has read its configuration and the plugins that it started with the previous one have exited.
func (u uninstaller) settleDown(ctx context.Context) error {
	if err := u.node.Wake(); err != nil { // an uninstall that left the chain may have been killed before its own Wake
		return err
	}
	if !wait(ctx, u.Settle) {
		return ctx.Err()
	}
	began := map[string]bool{}
	for range inFlightLooks {
		maps.Copy(began, runtimes.UnderWay(u.procDir()))
		if !wait(ctx, inFlightInterval) {
			return ctx.Err()
		}
	}
	if len(began) > 0 {
		u.Log.Info("waiting for running CNI plugins", "containers", len(began))
	}
	deadline := time.Now().Add(u.InFlight)
	for unseen := 0; unseen < inFlightLooks && len(began) > 0; unseen++ {
		for container := range runtimes.UnderWay(u.procDir()) {
			if began[container] {
				unseen = -1
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("CNI plugins are still at work after %s, with a configuration that may name the plugin; run uninstall again", u.InFlight)
		}
		if !wait(ctx, inFlightInterval) {
			return ctx.Err()
		}
	}
	return nil
}

// pluginIsNeeded reports whether the runtime will still run the plugin to delete existing pods.
func (u uninstaller) pluginIsNeeded() bool {
	if !runtimes.Find(u.procDir()).KeepConfiguration() {
		return false
	}
	const hint = "keeping the plugin's binary, now a no-op: the runtime deletes a pod with the network configuration of its ADD; run uninstall again once the existing pods are gone"
	pods, err := adopt.Node{Root: filepath.Join(u.procDir(), "1/root"), CacheDir: adopt.DefaultCacheDir}.Naming(chain.PluginType)
	if err != nil {
		u.Log.Warn(hint, "error", err)
		return true
	}
	if pods > 0 {
		u.Log.Warn(hint, "interfaces", pods)
	}
	return pods > 0
}
