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

// uninstaller takes probelet off a node.
type uninstaller struct {
	Options
	node chain.Node
}

// Uninstall takes probelet off the node.
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
		return fmt.Errorf("files that are not ours name the plugin, and without it no pod could start: %s: take it out there, and run uninstall again; nothing has been changed",
			join(references))
	}
	changed, err := u.node.Leave(ctx)
	if err != nil {
		return fmt.Errorf("leaving the chain: %w", err)
	}
	log.Info("left the chain", "was in it", changed)
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
	log.Info("nothing of probelet is left on the node")
	return nil
}

// checkNetDir returns an error if the plugin is there, but NetDir is not, or a runtime reads networks that name the plugin from
// another directory: without the binary pods could not start.
func (u uninstaller) checkNetDir() error {
	if !u.node.HasPlugin() {
		return nil
	}
	if _, err := os.Stat(u.NetDir); err != nil {
		return fmt.Errorf("--cni-net-dir: %w: without the plugin in %s no pod could start where a network names it; nothing has been changed", err, u.BinDir)
	}
	if elsewhere := u.node.Elsewhere(); len(elsewhere) > 0 {
		return fmt.Errorf("--cni-net-dir %q: the runtime reads its networks from another directory, and there the plugin is named: %s; nothing has been changed",
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

// A chain is run by one process after the other. One that is not seen at so many looks, this far apart, has ended.
const (
	inFlightLooks    = 5
	inFlightInterval = 100 * time.Millisecond
)

// settleDown waits until the runtime has read its configuration, and until those have ended that it ran by the one before.
func (u uninstaller) settleDown(ctx context.Context) error {
	if err := u.node.Wake(); err != nil { // whoever left the chain may have been killed before
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
		u.Log.Info("waiting for CNI plugins that are at work", "containers", len(began))
	}
	deadline := time.Now().Add(u.InFlight)
	for unseen := 0; unseen < inFlightLooks && len(began) > 0; unseen++ {
		for container := range runtimes.UnderWay(u.procDir()) {
			if began[container] {
				unseen = -1
			}
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("CNI plugins are still at work after %s, by a configuration that may name the plugin; run uninstall again", u.InFlight)
		}
		if !wait(ctx, inFlightInterval) {
			return ctx.Err()
		}
	}
	return nil
}

// pluginIsNeeded is whether the runtime will still run the plugin, to delete pods that are there.
func (u uninstaller) pluginIsNeeded() bool {
	if !runtimes.Find(u.procDir()).KeepConfiguration() {
		return false
	}
	const hint = "the plugin's binary is left, which does nothing now: the runtime deletes a pod with the network configuration of its ADD. Run uninstall again when pods of before are gone"
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
