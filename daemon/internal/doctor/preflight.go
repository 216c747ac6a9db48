//go:build linux

package doctor

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/install/chain"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
)

// installed reports whether any part of probelet is on the node.
func (d *Doctor) installed() bool {
	if d.node.Daemon.Running || d.node.Prober != nil || len(d.node.Attachments) > 0 {
		return true
	}
	if info, _ := d.pluginFile(); info != nil {
		return true
	}
	joined, in, _ := d.Chain.Look() // without a network, the plugin is in none
	return in || joined.File != ""
}

// preflight checks what an install needs, and says what it would do.
func (d *Doctor) preflight() {
	d.says(status.Note, "probelet", "is not installed on this node; below is what an install needs and would do", "")
	found := d.Host.Runtimes()
	d.runtime(found)
	d.directory("plugins", d.Chain.BinDir, "--cni-bin-dir")
	d.directory("networks", d.Chain.NetDir, "--cni-net-dir")
	if prober, err := d.Host.Kubelet(); err != nil {
		d.says(status.Problem, "prober", err.Error(), "nothing is answered without it: is the kubelet running, and are the node's processes visible (hostPID)?")
	} else {
		d.says(status.Well, "prober", fmt.Sprintf("the kubelet, %s", survey.ProberOf(prober)), "")
	}
	joined, err := d.Chain.Plan(chain.BestWay(found))
	switch {
	case errors.Is(err, chain.ErrMisplaced):
		d.says(status.Problem, "chain", err.Error(), "correct that first; until then install refuses")
	case err != nil:
		d.says(status.Problem, "chain", err.Error(), "install the cluster's network plugin, before probelet or after: the daemon joins its network as soon as it is configured")
	case joined.File == "":
		d.says(status.Would, "chain", "change nothing: "+joined.String(), "")
	default:
		d.says(status.Would, "chain", fmt.Sprintf("write %s, which adds the plugin to network %s (%s)", joined.File, joined.Network, joined.Primary), "")
	}
	d.says(status.Would, "plugin", "put it at "+filepath.Join(d.Chain.BinDir, chain.PluginType), "")
	d.says(status.Would, "BPF objects", fmt.Sprintf("load them, pin them in %s, and keep records in %s", d.Source.BPFDir, attach.RecordsDir(d.Source.StateDir)), "")
	d.says(status.Would, "pods", "attach running pods that have probes if the runtime has a record of their network, and the others when they are recreated", "")
}

// directory checks a directory that must exist before an install.
func (d *Doctor) directory(about, dir, flag string) {
	if err := chain.CheckDir(dir); err != nil {
		d.says(status.Problem, about, err.Error(), "set "+flag+" to the directory that the runtime uses")
		return
	}
	d.says(status.Well, about, dir, "")
}
