//go:build linux

package ctl

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/doctor"
	"github.com/probelet/probelet/daemon/internal/install/runtimes"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
)

// clinic is a node where all is well, but for the daemon, which does not run.
type clinic struct {
	*machine
	netDir, binDir string
	capabilities   uint64
	linux          uint32
	fileSystems    []int64
	found          runtimes.List
	devices        []doctor.Device
	kubeletGone    error
}

const (
	primary = `{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp"}]}`
	copied  = `{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp"}, {"type": "probelet"}], "probelet.dev/derivedFrom": "10-net.conflist"}`
	dropIn  = `{"type": "probelet"}`
)

func newClinic(t *testing.T) *clinic {
	c := &clinic{
		machine: newMachine(t), netDir: t.TempDir(), binDir: t.TempDir(), capabilities: 1<<41 - 1, linux: 6<<16 | 1<<8,
		fileSystems: []int64{unix.BPF_FS_MAGIC, unix.CGROUP2_SUPER_MAGIC},
		found:       runtimes.List{{Name: "containerd", Version: "v2.2.0", Libcni: "v1.3.0"}},
	}
	c.host = doctor.Host{
		Proc: t.TempDir(), Sys: t.TempDir(),
		Version:  func() (uint32, error) { return c.linux, nil },
		IsFS:     func(_ string, magic int64) bool { return slices.Contains(c.fileSystems, magic) },
		Runtimes: func() runtimes.List { return c.found },
		Kubelet:  func() (datapath.Prober, error) { return datapath.Prober{CgroupIDs: []uint64{4711}}, c.kubeletGone },
		Devices:  func(string) ([]doctor.Device, error) { return c.devices, nil },
	}
	c.write(filepath.Join(c.host.Sys, "kernel/btf/vmlinux"), "")
	c.write(filepath.Join(c.netDir, "10-net.conflist"), primary)
	c.write(filepath.Join(c.netDir, "net/10-probelet.conf"), dropIn)
	c.write(filepath.Join(c.binDir, "ptp"), "a program")
	c.write(filepath.Join(c.binDir, "probelet"), "a program")
	return c
}

func (c *clinic) write(file, text string) {
	c.t.Helper()
	err := os.MkdirAll(filepath.Dir(file), 0o755)
	if err == nil {
		err = os.WriteFile(file, []byte(text), 0o755)
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *clinic) examine() string {
	c.t.Helper()
	c.write(filepath.Join(c.host.Proc, "self/status"), fmt.Sprintf("Name:\tx\nCapEff:\t%016x\nCapBnd:\t0\n", c.capabilities))
	text, err := c.run("doctor", "--cni-net-dir", c.netDir, "--cni-bin-dir", c.binDir)
	problems := strings.Count("\n"+text, "\nPROBLEM ")
	if (err != nil) != (problems > 0) || err != nil && !strings.HasPrefix(err.Error(), fmt.Sprint(problems, " problem")) {
		c.t.Errorf("%d problems, %v", problems, err)
	}
	return text
}

func TestDoctorFindsWhatIsWrong(t *testing.T) {
	for name, test := range map[string]struct {
		wrong func(*clinic)
		want  string // a line
	}{
		"nothing":           {func(*clinic) {}, `ok +kernel +Linux 6.1 with BTF`},
		"kernel":            {func(c *clinic) { c.linux = 5<<16 | 14<<8 }, `PROBLEM +kernel +Linux 5.14`},
		"no BTF":            {func(c *clinic) { c.host.Sys = c.netDir }, `note +kernel +Linux 6.1, without .*vmlinux`},
		"bpffs":             {func(c *clinic) { c.fileSystems = c.fileSystems[1:] }, `PROBLEM +bpffs +/sys/fs/bpf is not a BPF file system`},
		"cgroup":            {func(c *clinic) { c.fileSystems = c.fileSystems[:1] }, `PROBLEM +cgroup v2 +not mounted at any of /host/cgroup, `},
		"all capabilities":  {func(*clinic) {}, `ok +capabilities +this command has all`},
		"few capabilities":  {func(c *clinic) { c.capabilities = 0 }, `PROBLEM +capabilities +this command lacks CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_PTRACE`},
		"admin":             {func(c *clinic) { c.capabilities = 1 << unix.CAP_SYS_ADMIN }, `PROBLEM +capabilities +this command lacks CAP_NET_ADMIN, CAP_SYS_PTRACE$`},
		"no ptrace":         {func(c *clinic) { c.capabilities &^= (1 << unix.CAP_SYS_PTRACE) }, `PROBLEM +capabilities +this command lacks CAP_SYS_PTRACE$`},
		"nothing loaded":    {func(c *clinic) { c.kernel = nil }, `note +BPF objects +none pinned in `},
		"blind":             {func(c *clinic) { c.kernel.blind = true }, `note +BPF objects +.*: this kernel does not let the programs check pods' listening sockets`},
		"unwatched":         {func(c *clinic) { c.kernel.unwatched = true }, `note +BPF objects +.*: a closed listening socket is noticed only by the next probe`},
		"no runtime":        {func(c *clinic) { c.found = nil }, `note +runtime +no containerd, crio or cri-dockerd process was found`},
		"drop-in":           {func(*clinic) {}, `ok +chain +network net \(.*10-net.conflist\), through .*10-probelet.conf`},
		"drop-in, not read": {func(c *clinic) { c.found[0].Libcni = "v1.1.2" }, `PROBLEM +chain +.*10-probelet.conf, which this runtime is not known to read`},
		"copy":              {func(c *clinic) { c.asCopy(copied) }, `ok +chain +network net \(.*10-net.conflist\), through .*00-probelet.conflist`},
		"copy, stale":       {func(c *clinic) { c.asCopy(strings.Replace(copied, "ptp", "bridge", 1)) }, `PROBLEM +chain +.*00-probelet.conflist is outdated`},
		"not in the chain":  {func(c *clinic) { c.remove("net") }, `PROBLEM +chain +the plugin is not in network net`},
		"no network":        {func(c *clinic) { c.remove("10-net.conflist") }, `PROBLEM +chain +no network configuration`},
		"no plugin":         {func(c *clinic) { c.binDir = c.netDir }, `PROBLEM +plugin +.*no such file`},
		"empty plugin":      {func(c *clinic) { c.write(filepath.Join(c.binDir, "probelet"), "") }, `PROBLEM +plugin +.* is not an executable file: .*, 0 bytes`},
		"unreadable":        {func(c *clinic) { c.openErr = errors.New("broken") }, `PROBLEM +state +broken$`},
		"and down":          {func(c *clinic) { c.openErr = errors.New("broken") }, `PROBLEM +daemon +not running on \S+; what the kernel still answers is unknown`},
		"no daemon":         {func(*clinic) {}, `PROBLEM +daemon +not running on `},
		"daemon, wedged":    {func(c *clinic) { c.daemon() }, `PROBLEM +daemon +process \d+ is running, but not ready: `},
		"pushed":            {func(c *clinic) { c.serveNode(node{source: api.SourceReply{Pushed: true}}) }, `ok +states +container changes are pushed$`},
		"not pushed":        {func(c *clinic) { c.serveNode(node{source: api.SourceReply{Why: "no socket"}}) }, `note +states +container changes are not pushed: no socket$`},
		"kubelet":           {func(*clinic) {}, `ok +prober +the kubelet, cgroup 4711`},
		"another prober":    {func(c *clinic) { c.kernel.prober.CgroupIDs[0]++ }, `PROBLEM +prober +the kubelet is cgroup 4711, but the prober is set to cgroup 4712`},
		"not narrowed down": {func(c *clinic) { c.kernel.prober.Process = &datapath.Process{PID: 12} }, `PROBLEM +prober +the kubelet is cgroup 4711, but the prober is set to process 12 of`},
		"anybody":           {func(c *clinic) { c.kernel.prober = datapath.Prober{AnyLocal: true} }, `note +prober +every process`},
		"no kubelet": {func(c *clinic) {
			c.kubeletGone, c.kernel.prober = errors.New("no process named kubelet"), datapath.Prober{}
		}, `PROBLEM +prober +no process named kubelet`},
		"others' veths": {func(c *clinic) {
			c.devices = []doctor.Device{{Name: "lxc1", IfIndex: 4, Veth: true, Others: []string{"XDP program 7", "program 8 at tcx ingress"}}, {Name: "lxc2", IfIndex: 5, Veth: true, Others: []string{"XDP program 7"}}}
		}, `note +others +on veths without probelet: lxc1 \(XDP program 7, program 8 at tcx ingress\), lxc2 \(XDP program 7\)`},
		"others elsewhere": {func(c *clinic) {
			c.devices = []doctor.Device{{Name: "eth0", IfIndex: 2, Veth: false, Others: []string{"XDP program 3"}}}
		},
			`note +others +on devices that belong to no pod: eth0 \(XDP program 3\)`},
		"others on ours": {func(c *clinic) {
			c.record(attach.Record{ContainerID: "c0ffee", IfName: "eth0", IfIndex: 7, PodNamespace: "shop", PodName: "web"})
			c.devices = []doctor.Device{{Name: "veth7", IfIndex: 7, Veth: true, Others: []string{"XDP program 7"}}}
		}, `note +attachments +other programs on veth7 of shop/web: XDP program 7`},
		"bad annotation": {func(c *clinic) {
			c.web(fakeMaps{})
			settings := probe.NewDefaults().Settings(map[string]string{probe.AnnotationStaleness: "9"})
			c.describe(statedir.Endpoints{Attachments: []statedir.Attachment{{
				ContainerID: "c0ffee", IfName: "eth0", Pod: "shop/web", Settings: statedir.SettingsOf(settings),
			}}})
		}, `note +annotations +shop/web: annotation probelet.dev/staleness: "9": must be`},
	} {
		t.Run(name, func(t *testing.T) {
			c := newClinic(t)
			test.wrong(c)
			if text := c.examine(); !regexp.MustCompile(`(?m)^` + test.want).MatchString(text) {
				t.Errorf("does not say %s:\n%s", test.want, text)
			}
		})
	}
}

// Before an install doctor says what that needs, and what it would do; nothing missing is a problem that the install brings.
func TestPreflight(t *testing.T) {
	for name, test := range map[string]struct {
		wrong func(*clinic)
		want  string // a line
		clean bool   // nothing keeps from an install
	}{
		"said":              {func(*clinic) {}, `note +probelet +is not installed on this node`, true},
		"kernel":            {func(*clinic) {}, `ok +kernel +Linux 6.1 with BTF`, true},
		"bpffs":             {func(*clinic) {}, `ok +bpffs +/sys/fs/bpf`, true},
		"cgroup":            {func(*clinic) {}, `ok +cgroup v2 +/`, true},
		"capabilities":      {func(*clinic) {}, `ok +capabilities +this command has all`, true},
		"kubelet":           {func(*clinic) {}, `ok +prober +the kubelet, cgroup 4711$`, true},
		"runtime":           {func(*clinic) {}, `ok +runtime +containerd`, true},
		"directories":       {func(*clinic) {}, `ok +plugins +/`, true},
		"drop-in":           {func(*clinic) {}, `would +chain +write .*/net/10-probelet.conf, which adds the plugin to network net \(.*10-net.conflist\)`, true},
		"copy":              {func(c *clinic) { c.found[0].Libcni = "v1.1.2" }, `would +chain +write .*/00-probelet.conflist, `, true},
		"plugin":            {func(*clinic) {}, `would +plugin +put it at .*/probelet$`, true},
		"objects":           {func(*clinic) {}, `would +BPF objects +load them, pin them in /sys/fs/bpf/probelet, and keep records in `, true},
		"old kernel":        {func(c *clinic) { c.linux = 5 << 16 }, `PROBLEM +kernel +Linux 5.0`, false},
		"no bpffs":          {func(c *clinic) { c.fileSystems = c.fileSystems[1:] }, `PROBLEM +bpffs `, false},
		"no kubelet":        {func(c *clinic) { c.kubeletGone = errors.New("no process named kubelet") }, `PROBLEM +prober +no process named kubelet`, false},
		"no plugins":        {func(c *clinic) { c.binDir = filepath.Join(c.binDir, "gone") }, `PROBLEM +plugins +.*gone: no such file`, false},
		"plugins elsewhere": {func(c *clinic) { c.binDir = t.TempDir() }, `PROBLEM +chain +the runtime would not find the plugin: ptp `, false},
		"no network":        {func(c *clinic) { c.remove("10-net.conflist") }, `PROBLEM +chain +no network configuration`, false},
		"no networks":       {func(c *clinic) { c.netDir = filepath.Join(c.netDir, "gone") }, `PROBLEM +networks +.*gone: no such file`, false},
		"few rights":        {func(c *clinic) { c.capabilities = 0 }, `PROBLEM +capabilities +this command lacks CAP_BPF`, false},
	} {
		t.Run(name, func(t *testing.T) {
			c := newClinic(t)
			c.kernel = nil
			c.remove("net")
			if err := os.Remove(filepath.Join(c.binDir, "probelet")); err != nil {
				t.Fatal(err)
			}
			test.wrong(c)
			text := c.examine()
			if !regexp.MustCompile(`(?m)^` + test.want).MatchString(text) {
				t.Errorf("does not say %s:\n%s", test.want, text)
			}
			if problem := strings.Contains(text, "PROBLEM"); problem == test.clean {
				t.Errorf("a problem: %t\n%s", problem, text)
			}
		})
	}
}

// asCopy has the plugin in the chain by a copy.
func (c *clinic) asCopy(text string) {
	c.remove("net")
	c.write(filepath.Join(c.netDir, "00-probelet.conflist"), text)
}

func (c *clinic) remove(name string) {
	c.t.Helper()
	if err := os.RemoveAll(filepath.Join(c.netDir, name)); err != nil {
		c.t.Fatal(err)
	}
}

// In the daemon's container the directories are known, also where they are not the defaults.
func TestDirectoriesFromTheEnvironment(t *testing.T) {
	c := newClinic(t)
	elsewhere, opened := t.TempDir(), ""
	t.Setenv("PROBELET_STATE_DIR", elsewhere)
	t.Setenv("PROBELET_BPF_DIR", "/bpf/probelet")
	t.Setenv("PROBELET_CNI_NET_DIR", c.netDir)
	t.Setenv("PROBELET_CNI_BIN_DIR", c.binDir)
	var stdout strings.Builder
	env := environment{stdout: &stdout, stderr: &c.stderr, now: func() uint64 { return now }, host: c.host, open: func(dir string) (survey.Kernel, error) {
		opened = dir
		return nil, nil
	}}
	_ = execute(t.Context(), env, []string{"doctor"})
	for _, want := range []string{`ok +chain `, `ok +plugin +` + c.binDir, `PROBLEM +daemon +not running on ` + elsewhere} {
		if !regexp.MustCompile(`(?m)^` + want).MatchString(stdout.String()) {
			t.Errorf("does not say %s:\n%s", want, &stdout)
		}
	}
	if opened != "/bpf/probelet" {
		t.Errorf("looked into %s", opened)
	}
	if err := execute(t.Context(), env, []string{"status", "--bpf-dir", "/given"}); status.Code(err) != status.DaemonDown || opened != "/given" {
		t.Errorf("looked into %s, %v", opened, err)
	}
}
