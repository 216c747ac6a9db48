//go:build linux

package doctor

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/status"
)

func (d *Doctor) kernel() {
	v, err := d.Host.Version()
	version := "Linux " + datapath.KernelName(v)
	btf := filepath.Join(d.Host.Sys, "kernel/btf/vmlinux")
	switch _, noBTF := os.Stat(btf); {
	case err != nil:
		d.says(status.Problem, "kernel", "the kernel version is unknown: "+err.Error(), "")
	case v < datapath.MinKernel:
		d.says(status.Problem, "kernel", version+" is too old: probelet needs "+datapath.KernelName(datapath.MinKernel)+" or newer",
			"upgrade the kernel; until then pods start without probelet")
	case noBTF != nil:
		d.says(status.Note, "kernel", version+", without "+btf+": a closed listening socket is noticed only by the next probe that reaches the pod",
			"use a kernel with CONFIG_DEBUG_INFO_BTF to have it noticed at once")
	default:
		d.says(status.Well, "kernel", version+" with BTF", "")
	}
}

func (d *Doctor) bpffs() {
	if parent := filepath.Dir(d.Source.BPFDir); d.Host.IsFS(parent, unix.BPF_FS_MAGIC) {
		d.says(status.Well, "bpffs", parent, "")
	} else {
		d.says(status.Problem, "bpffs", parent+" is not a BPF file system, so nothing can be pinned there",
			"mount -t bpf bpf "+parent+", and add it to /etc/fstab")
	}
}

func (d *Doctor) cgroup() {
	// The chart mounts the host's hierarchy at /host/cgroup.
	dirs := []string{"/host/cgroup", "/host/cgroup/unified", "/sys/fs/cgroup", "/sys/fs/cgroup/unified"}
	if i := slices.IndexFunc(dirs, func(dir string) bool { return d.Host.IsFS(dir, unix.CGROUP2_SUPER_MAGIC) }); i >= 0 {
		d.says(status.Well, "cgroup v2", dirs[i], "")
		return
	}
	d.says(status.Problem, "cgroup v2", "not mounted at any of "+strings.Join(dirs, ", ")+"; probelet recognizes the kubelet by its cgroup",
		"mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified")
}

// needed lists the daemon's capabilities; the chart says what each is for.
var needed = []struct {
	name    string
	bit     int
	implied bool // by CAP_SYS_ADMIN, see capabilities(7)
}{
	{"BPF", unix.CAP_BPF, true},
	{"NET_ADMIN", unix.CAP_NET_ADMIN, false},
	{"PERFMON", unix.CAP_PERFMON, true},
	{"SYS_PTRACE", unix.CAP_SYS_PTRACE, false},
}

func (d *Doctor) capabilities() {
	who, process := "this command", "self"
	if d.node.Daemon.Running {
		who, process = "the daemon", strconv.Itoa(d.node.Daemon.PID)
	}
	has, err := capabilitiesOf(d.Host.Proc, process)
	if err != nil {
		d.says(status.Note, "capabilities", "unknown: "+err.Error(), "")
		return
	}
	var missing []string
	for _, c := range needed {
		enough := uint64(1) << c.bit
		if c.implied {
			enough |= 1 << unix.CAP_SYS_ADMIN
		}
		if has&enough == 0 {
			missing = append(missing, "CAP_"+c.name)
		}
	}
	if len(missing) > 0 {
		d.says(status.Problem, "capabilities", who+" lacks "+strings.Join(missing, ", "), "add them to the container's securityContext, or run as root on the node")
		return
	}
	d.says(status.Well, "capabilities", who+" has all that are needed", "")
}

// capabilitiesOf returns a process's effective capabilities, see CapEff in proc_pid_status(5).
func capabilitiesOf(proc, process string) (uint64, error) {
	text, err := os.ReadFile(filepath.Join(proc, process, "status"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if set, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(set), 16, 64)
		}
	}
	return 0, fmt.Errorf("process %s: its status has no CapEff", process)
}

func (d *Doctor) objects() {
	if d.node.Prober == nil {
		d.says(status.Note, "BPF objects", "none pinned in "+d.Source.BPFDir, "nothing: the daemon, or the next pod that starts, loads them")
		return
	}
	k, err := d.Source.Open(d.Source.BPFDir)
	if err == nil && k == nil {
		err = datapath.ErrNotLoaded
	}
	if err != nil { // Read has just opened them
		d.says(status.Problem, "BPF objects", fmt.Sprintf("%s: can no longer be opened: %v", d.Source.BPFDir, err), "run doctor again")
		return
	}
	defer k.Close() //nolint:errcheck // read only
	if !k.Watched() {
		d.says(status.Note, "BPF objects", d.Source.BPFDir+": a closed listening socket is noticed only by the next probe that reaches the pod",
			"to have it noticed at once, the kernel needs CONFIG_DEBUG_INFO_BTF, and the BPF objects must be reloaded")
		return
	}
	if !k.SeesListeners() {
		d.says(status.Note, "BPF objects", d.Source.BPFDir+": this kernel does not let the programs check pods' listening sockets",
			"nothing to do, but TCP probes are answered for no longer than HTTP probes")
		return
	}
	d.says(status.Well, "BPF objects", d.Source.BPFDir, "")
}
