//go:build linux

package main

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
	"github.com/probelet/probelet/daemon/internal/install/runtimes"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
)

// clinic is a node where all is well, but for the daemon, which does not run.
type clinic struct {
	*machine
	netDir, binDir string
	capabilities   uint64
	linux          uint32
	fileSystems    []int64
	found          runtimes.List
	devices        []device
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
	c.host = host{
		proc: t.TempDir(), sys: t.TempDir(),
		version:  func() (uint32, error) { return c.linux, nil },
		isFS:     func(_ string, magic int64) bool { return slices.Contains(c.fileSystems, magic) },
		runtimes: func() runtimes.List { return c.found },
		kubelet:  func() (datapath.Prober, error) { return datapath.Prober{CgroupIDs: []uint64{4711}}, c.kubeletGone },
		devices:  func(string) ([]device, error) { return c.devices, nil },
	}
	c.write(filepath.Join(c.host.sys, "kernel/btf/vmlinux"), "")
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
	c.write(filepath.Join(c.host.proc, "self/status"), fmt.Sprintf("Name:\tx\nCapEff:\t%016x\nCapBnd:\t0\n", c.capabilities))
	text, err := c.run("doctor", "--cni-net-dir", c.netDir, "--cni-bin-dir", c.binDir)
	problems := strings.Count("\n"+text, "\nPROBLEM ")
	if (err != nil) != (problems > 0) || err != nil && !strings.HasPrefix(err.Error(), fmt.Sprint(problems, " of these")) {
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
		"no BTF":            {func(c *clinic) { c.host.sys = c.netDir }, `note +kernel +Linux 6.1, without .*vmlinux`},
		"bpffs":             {func(c *clinic) { c.fileSystems = c.fileSystems[1:] }, `PROBLEM +bpffs +/sys/fs/bpf is not a BPF file system`},
		"cgroup":            {func(c *clinic) { c.fileSystems = c.fileSystems[:1] }, `PROBLEM +cgroup v2 +is mounted in none of /host/cgroup, `},
		"all capabilities":  {func(*clinic) {}, `ok +capabilities +this command's`},
		"few capabilities":  {func(c *clinic) { c.capabilities = 0 }, `PROBLEM +capabilities +this command's lack CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_PTRACE`},
		"admin":             {func(c *clinic) { c.capabilities = 1 << unix.CAP_SYS_ADMIN }, `PROBLEM +capabilities +this command's lack CAP_NET_ADMIN, CAP_SYS_PTRACE$`},
		"no ptrace":         {func(c *clinic) { c.capabilities &^= (1 << unix.CAP_SYS_PTRACE) }, `PROBLEM +capabilities +this command's lack CAP_SYS_PTRACE$`},
		"nothing loaded":    {func(c *clinic) { c.kernel = nil }, `note +BPF objects +none in `},
		"blind":             {func(c *clinic) { c.kernel.blind = true }, `note +BPF objects +.*; the kernel does not let pods' listening sockets be looked at`},
		"unwatched":         {func(c *clinic) { c.kernel.unwatched = true }, `note +BPF objects +.*; listening sockets that close are not noticed`},
		"no runtime":        {func(c *clinic) { c.found = nil }, `note +runtime +no process of containerd`},
		"drop-in":           {func(*clinic) {}, `ok +chain +network net of .*10-net.conflist, by .*10-probelet.conf`},
		"drop-in, not read": {func(c *clinic) { c.found[0].Libcni = "v1.1.2" }, `PROBLEM +chain +.*10-probelet.conf, which this runtime is not known to read`},
		"copy":              {func(c *clinic) { c.asCopy(copied) }, `ok +chain +network net of .*10-net.conflist, by .*00-probelet.conflist`},
		"copy, stale":       {func(c *clinic) { c.asCopy(strings.Replace(copied, "ptp", "bridge", 1)) }, `PROBLEM +chain +.*00-probelet.conflist is not what would be derived from it now`},
		"not in the chain":  {func(c *clinic) { c.remove("net") }, `PROBLEM +chain +the plugin is not in network net`},
		"no network":        {func(c *clinic) { c.remove("10-net.conflist") }, `PROBLEM +chain +no network configuration`},
		"no plugin":         {func(c *clinic) { c.binDir = c.netDir }, `PROBLEM +plugin +.*no such file`},
		"empty plugin":      {func(c *clinic) { c.write(filepath.Join(c.binDir, "probelet"), "") }, `PROBLEM +plugin +.* is no program: .*, 0 bytes`},
		"unreadable":        {func(c *clinic) { c.openErr = errors.New("broken") }, `PROBLEM +state +broken$`},
		"and down":          {func(c *clinic) { c.openErr = errors.New("broken") }, `PROBLEM +daemon +does not run on \S+; what the kernel still answers is not known`},
		"no daemon":         {func(*clinic) {}, `PROBLEM +daemon +does not run on `},
		"daemon, wedged":    {func(c *clinic) { c.daemon() }, `PROBLEM +daemon +runs, process \d+, but: `},
		"pushed":            {func(c *clinic) { c.serveNode(node{source: api.SourceReply{Pushed: true}}) }, `ok +states +changes of containers are pushed$`},
		"not pushed":        {func(c *clinic) { c.serveNode(node{source: api.SourceReply{Why: "no socket"}}) }, `note +states +changes of containers are not pushed: no socket$`},
		"kubelet":           {func(*clinic) {}, `ok +prober +the kubelet, cgroup 4711`},
		"another prober":    {func(c *clinic) { c.kernel.prober.CgroupIDs[0]++ }, `PROBLEM +prober +the kubelet is cgroup 4711, but what is set is cgroup 4712`},
		"not narrowed down": {func(c *clinic) { c.kernel.prober.Process = &datapath.Process{PID: 12} }, `PROBLEM +prober +the kubelet is cgroup 4711, but what is set is process 12 of`},
		"anybody":           {func(c *clinic) { c.kernel.prober = datapath.Prober{AnyLocal: true} }, `note +prober +every process`},
		"no kubelet": {func(c *clinic) {
			c.kubeletGone, c.kernel.prober = errors.New("no process named kubelet"), datapath.Prober{}
		}, `PROBLEM +prober +no process named kubelet`},
		"others' veths": {func(c *clinic) {
			c.devices = []device{{"lxc1", 4, true, []string{"XDP program 7", "program 8 at tcx ingress"}}, {"lxc2", 5, true, []string{"XDP program 7"}}}
		}, `note +others +on veths without probelet: lxc1 \(XDP program 7, program 8 at tcx ingress\), lxc2 \(XDP program 7\)`},
		"others elsewhere": {func(c *clinic) { c.devices = []device{{"eth0", 2, false, []string{"XDP program 3"}}} },
			`note +others +on devices of no pod: eth0 \(XDP program 3\)`},
		"others on ours": {func(c *clinic) {
			c.record(attach.Record{ContainerID: "c0ffee", IfName: "eth0", IfIndex: 7, PodNamespace: "shop", PodName: "web"})
			c.devices = []device{{"veth7", 7, true, []string{"XDP program 7"}}}
		}, `note +attachments +others on veth7 of shop/web: XDP program 7`},
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
		"capabilities":      {func(*clinic) {}, `ok +capabilities +this command's`, true},
		"kubelet":           {func(*clinic) {}, `ok +prober +the kubelet, cgroup 4711$`, true},
		"runtime":           {func(*clinic) {}, `ok +runtime +containerd`, true},
		"directories":       {func(*clinic) {}, `ok +plugins +/`, true},
		"drop-in":           {func(*clinic) {}, `would +chain +write .*/net/10-probelet.conf, which adds the plugin to network net of .*10-net.conflist`, true},
		"copy":              {func(c *clinic) { c.found[0].Libcni = "v1.1.2" }, `would +chain +write .*/00-probelet.conflist, `, true},
		"plugin":            {func(*clinic) {}, `would +plugin +put it at .*/probelet$`, true},
		"objects":           {func(*clinic) {}, `would +BPF objects +load them, and pin them in /sys/fs/bpf/probelet; records in `, true},
		"old kernel":        {func(c *clinic) { c.linux = 5 << 16 }, `PROBLEM +kernel +Linux 5.0`, false},
		"no bpffs":          {func(c *clinic) { c.fileSystems = c.fileSystems[1:] }, `PROBLEM +bpffs `, false},
		"no kubelet":        {func(c *clinic) { c.kubeletGone = errors.New("no process named kubelet") }, `PROBLEM +prober +no process named kubelet`, false},
		"no plugins":        {func(c *clinic) { c.binDir = filepath.Join(c.binDir, "gone") }, `PROBLEM +plugins +.*gone: no such file`, false},
		"plugins elsewhere": {func(c *clinic) { c.binDir = t.TempDir() }, `PROBLEM +chain +the runtime would not find the plugin: ptp `, false},
		"no network":        {func(c *clinic) { c.remove("10-net.conflist") }, `PROBLEM +chain +no network configuration`, false},
		"no networks":       {func(c *clinic) { c.netDir = filepath.Join(c.netDir, "gone") }, `PROBLEM +networks +.*gone: no such file`, false},
		"few rights":        {func(c *clinic) { c.capabilities = 0 }, `PROBLEM +capabilities +this command's lack CAP_BPF`, false},
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
	env := environment{stdout: &stdout, stderr: &c.stderr, now: func() uint64 { return now }, host: c.host, open: func(dir string) (kernel, error) {
		opened = dir
		return nil, nil
	}}
	_ = execute(t.Context(), env, []string{"doctor"})
	for _, want := range []string{`ok +chain `, `ok +plugin +` + c.binDir, `PROBLEM +daemon +does not run on ` + elsewhere} {
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
