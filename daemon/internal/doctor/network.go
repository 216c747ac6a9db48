//go:build linux

package doctor

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/probelet/probelet/daemon/internal/install/chain"
	"github.com/probelet/probelet/daemon/internal/install/runtimes"
	"github.com/probelet/probelet/daemon/internal/status"
)

// runtime checks which runtime reads the chain.
func (d *Doctor) runtime(found runtimes.List) {
	switch {
	case len(found) == 0:
		d.says(status.Note, "runtime", "no containerd, crio or cri-dockerd process was found", "run doctor where the node's processes are visible (hostPID)")
	case len(found) > 1:
		d.says(status.Note, "runtime", fmt.Sprintf("several are running: %s; all of them read %s", found, chain.BestWay(found)), "")
	case found[0].Libcni == "":
		d.says(status.Note, "runtime", found.String(), "install with --chain copy, which every runtime reads")
	default:
		d.says(status.Well, "runtime", fmt.Sprintf("%s, reads %s", found, chain.BestWay(found)), "")
	}
}

// network checks the runtime, and whether the plugin is in the chain.
func (d *Doctor) network() {
	found := d.Host.Runtimes()
	d.runtime(found)
	joined, in, err := d.Chain.Look()
	switch {
	case errors.Is(err, chain.ErrMisplaced):
		d.says(status.Problem, "chain", err.Error(), "correct that; until then probeletd keeps the plugin out of the chain, and new pods are not attached")
	case err != nil:
		d.says(status.Problem, "chain", err.Error(), "install the cluster's network plugin; probeletd joins its network as soon as it is configured")
	case !in:
		what := fmt.Sprintf("the plugin is not in network %s (%s), so new pods are not attached", joined.Network, joined.Primary)
		if joined.File != "" {
			what += "; " + joined.File + " is outdated, or the runtime does not read it"
		}
		d.says(status.Problem, "chain", what, "run probeletd install --cni-net-dir "+d.Chain.NetDir)
	case joined.Way == chain.DropIn && len(found) > 0 && chain.BestWay(found) != chain.DropIn:
		d.says(status.Problem, "chain", joined.File+", which this runtime is not known to read, so new pods may not be attached",
			"run probeletd install --chain copy, or use a runtime with libcni 1.3 or newer")
	case joined.File == "":
		d.says(status.Well, "chain", fmt.Sprintf("network %s, in its own configuration %s", joined.Network, joined.Primary), "")
	default:
		d.says(status.Well, "chain", fmt.Sprintf("network %s (%s), through %s", joined.Network, joined.Primary, joined.File), "")
	}
}

// pluginFile looks for the plugin's binary, also from a pod that has not mounted its directory.
func (d *Doctor) pluginFile() (os.FileInfo, error) {
	file := filepath.Join(d.Chain.BinDir, chain.PluginType)
	info, err := os.Stat(file)
	if errors.Is(err, os.ErrNotExist) {
		if onHost, hostErr := os.Stat(filepath.Join(d.Host.Proc, "1/root", file)); hostErr == nil {
			return onHost, nil
		}
	}
	return info, err
}

func (d *Doctor) plugin() {
	file := filepath.Join(d.Chain.BinDir, chain.PluginType)
	info, err := d.pluginFile()
	const do = "run probeletd install; until then no pod can start on a network that names the plugin"
	switch {
	case err != nil:
		d.says(status.Problem, "plugin", err.Error(), do)
	case !info.Mode().IsRegular() || info.Mode()&0o111 == 0 || info.Size() == 0:
		d.says(status.Problem, "plugin", fmt.Sprintf("%s is not an executable file: %s, %d bytes", file, info.Mode(), info.Size()), do)
	default:
		d.says(status.Well, "plugin", file, "")
	}
}
