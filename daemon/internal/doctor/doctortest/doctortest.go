//go:build linux

// Package doctortest provides a node for tests of doctor.
package doctortest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/doctor"
	"github.com/probelet/probelet/daemon/internal/install/runtimes"
	"github.com/probelet/probelet/daemon/internal/survey/surveytest"
)

// Clinic is a node on which all is well, except that the daemon is not running.
type Clinic struct {
	*surveytest.Machine
	Host           doctor.Host
	NetDir, BinDir string
	Capabilities   uint64
	Linux          uint32
	FileSystems    []int64
	Found          runtimes.List
	Devices        []doctor.Device
	KubeletGone    error
}

// Network configurations: Primary is the network plugin's, and Copied and DropIn put the plugin into its chain.
const (
	Primary = `{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp"}]}`
	Copied  = `{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp"}, {"type": "probelet"}], "probelet.dev/derivedFrom": "10-net.conflist"}`
	DropIn  = `{"type": "probelet"}`
)

// NewClinic returns a node with the plugin installed through a drop-in file.
func NewClinic(t *testing.T) *Clinic {
	c := &Clinic{
		Machine: surveytest.NewMachine(t), NetDir: t.TempDir(), BinDir: t.TempDir(), Capabilities: 1<<41 - 1, Linux: 6<<16 | 1<<8,
		FileSystems: []int64{unix.BPF_FS_MAGIC, unix.CGROUP2_SUPER_MAGIC},
		Found:       runtimes.List{{Name: "containerd", Version: "v2.2.0", Libcni: "v1.3.0"}},
	}
	c.Host = doctor.Host{
		Proc: t.TempDir(), Sys: t.TempDir(),
		Version:  func() (uint32, error) { return c.Linux, nil },
		IsFS:     func(_ string, magic int64) bool { return slices.Contains(c.FileSystems, magic) },
		Runtimes: func() runtimes.List { return c.Found },
		Kubelet:  func() (datapath.Prober, error) { return datapath.Prober{CgroupIDs: []uint64{4711}}, c.KubeletGone },
		Devices:  func(string) ([]doctor.Device, error) { return c.Devices, nil },
	}
	c.Write(filepath.Join(c.Host.Sys, "kernel/btf/vmlinux"), "")
	c.Write(filepath.Join(c.NetDir, "10-net.conflist"), Primary)
	c.Write(filepath.Join(c.NetDir, "net/10-probelet.conf"), DropIn)
	c.Write(filepath.Join(c.BinDir, "ptp"), "a program")
	c.Write(filepath.Join(c.BinDir, "probelet"), "a program")
	return c
}

// Write writes an executable file and creates its directory.
func (c *Clinic) Write(file, text string) {
	c.T.Helper()
	err := os.MkdirAll(filepath.Dir(file), 0o755)
	if err == nil {
		err = os.WriteFile(file, []byte(text), 0o755)
	}
	if err != nil {
		c.T.Fatal(err)
	}
}

// WriteStatus writes /proc/PROCESS/status with the capabilities.
func (c *Clinic) WriteStatus(process string) {
	c.T.Helper()
	c.Write(filepath.Join(c.Host.Proc, process, "status"), fmt.Sprintf("Name:\tx\nCapEff:\t%016x\nCapBnd:\t0\n", c.Capabilities))
}

// AsCopy replaces the drop-in file with a copy of the network configuration.
func (c *Clinic) AsCopy(text string) {
	c.Remove("net")
	c.Write(filepath.Join(c.NetDir, "00-probelet.conflist"), text)
}

// Remove removes a file or directory among the network configurations.
func (c *Clinic) Remove(name string) {
	c.T.Helper()
	if err := os.RemoveAll(filepath.Join(c.NetDir, name)); err != nil {
		c.T.Fatal(err)
	}
}
