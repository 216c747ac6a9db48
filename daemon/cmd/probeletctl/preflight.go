//go:build linux

package main

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/install/chain"
	"github.com/probelet/probelet/daemon/internal/status"
)

// installed reports whether there is anything of probelet's on the node.
func (d *doctor) installed() bool {
	if d.status.Daemon.Running || d.status.Prober != nil || len(d.status.Attachments) > 0 {
		return true
	}
	if info, _ := d.pluginFile(); info != nil {
		return true
	}
	joined, in, _ := d.chain.Look() // of no network: nothing is in it
	return in || joined.File != ""
}

// preflight looks at what an install needs, and says what it would do.
func (d *doctor) preflight() {
	d.says(status.Note, "probelet", "is not installed on this node; below is what an install needs, and would do", "")
	found := d.env.host.runtimes()
	d.runtime(found)
	d.directory("plugins", d.chain.BinDir, "--cni-bin-dir")
	d.directory("networks", d.chain.NetDir, "--cni-net-dir")
	if prober, err := d.env.host.kubelet(); err != nil {
		d.says(status.Problem, "prober", err.Error(), "without it nothing is answered. Is the kubelet running, and are the node's processes visible (hostPID)?")
	} else {
		d.says(status.Well, "prober", fmt.Sprintf("the kubelet, %s", proberOf(prober)), "")
	}
	joined, err := d.chain.Plan(chain.BestWay(found))
	switch {
	case errors.Is(err, chain.ErrMisplaced):
		d.says(status.Problem, "chain", err.Error(), "install would refuse")
	case err != nil:
		d.says(status.Problem, "chain", err.Error(), "install the cluster's network plugin first, or later: the daemon joins as soon as there is a network")
	case joined.File == "":
		d.says(status.Would, "chain", "change nothing: "+joined.String(), "")
	default:
		d.says(status.Would, "chain", fmt.Sprintf("write %s, which adds the plugin to network %s of %s", joined.File, joined.Network, joined.Primary), "")
	}
	d.says(status.Would, "plugin", "put it at "+filepath.Join(d.chain.BinDir, chain.PluginType), "")
	d.says(status.Would, "BPF objects", fmt.Sprintf("load them, and pin them in %s; records in %s", d.where.bpfDir, attach.RecordsDir(d.where.stateDir)), "")
	d.says(status.Would, "pods", "attach those that run already and have probes, where the runtime has a record of their network; the others when they are recreated", "")
}

// directory looks for one that must be there before an install.
func (d *doctor) directory(about, dir, flag string) {
	if err := chain.CheckDir(dir); err != nil {
		d.says(status.Problem, about, err.Error(), "say with "+flag+" where the runtime has it")
		return
	}
	d.says(status.Well, about, dir, "")
}
