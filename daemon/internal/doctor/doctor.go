//go:build linux

// Package doctor checks everything that probelet needs on a node, and says what to do about what is wrong.
package doctor

import (
	"context"
	"os"

	"github.com/cilium/ebpf/features"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/install/chain"
	"github.com/probelet/probelet/daemon/internal/install/runtimes"
	"github.com/probelet/probelet/daemon/internal/prober"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
)

// Doctor checks a node.
type Doctor struct {
	Source survey.Source
	Chain  chain.Node
	Host   Host
	// Report is called with each finding as it is made.
	Report func(status.Finding)

	node survey.Status
}

// Host gives the checks access to the machine.
type Host struct {
	UID       int    // effective, of this process
	Proc, Sys string // mount points of procfs and sysfs
	Version   func() (uint32, error)
	IsFS      func(dir string, magic int64) bool
	Runtimes  func() runtimes.List
	Kubelet   func() (datapath.Prober, error)
	Devices   func(bpfDir string) ([]Device, error)
}

// ThisHost returns the machine that the process runs on.
func ThisHost() Host {
	return Host{
		UID: os.Geteuid(), Proc: "/proc", Sys: "/sys", Version: features.LinuxVersionCode, IsFS: isFS, Devices: devices,
		Runtimes: func() runtimes.List { return runtimes.Find("/proc") },
		Kubelet:  func() (datapath.Prober, error) { return (&prober.Finder{Kubelet: true}).Find() },
	}
}

func isFS(dir string, magic int64) bool {
	var fs unix.Statfs_t
	return unix.Statfs(dir, &fs) == nil && int64(fs.Type) == magic //nolint:unconvert // its width depends on the architecture
}

// Examine runs all checks and reports the findings. If nothing is installed, it checks what an install needs instead.
func (d *Doctor) Examine(ctx context.Context) error {
	if d.Host.UID != 0 {
		return status.Errorf(status.NotAllowed, "doctor checks things that only root can see, and would report them as missing: run it as root, or in the daemon's pod")
	}
	d.kernel()
	d.bpffs()
	d.cgroup()
	var err error
	if d.node, err = d.Source.Read(); err != nil {
		d.says(status.Problem, "state", err.Error(), "")
	}
	d.capabilities()
	if err == nil && !d.installed() {
		d.preflight()
	} else {
		d.objects()
		d.network()
		d.plugin()
		d.daemon(ctx)
		d.kubelet()
		d.attachments()
		d.trust()
	}
	d.others()
	return nil
}

// says reports a finding. do says what to do about it.
func (d *Doctor) says(v status.Verdict, about, what, do string) {
	d.Report(status.Finding{Verdict: v, About: about, What: what, Do: do})
}
