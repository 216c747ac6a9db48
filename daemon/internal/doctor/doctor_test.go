//go:build linux

package doctor_test

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/doctor"
	"github.com/probelet/probelet/daemon/internal/doctor/doctortest"
	"github.com/probelet/probelet/daemon/internal/install/chain"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/survey/surveytest"
)

// examine returns the findings as text.
func examine(c *doctortest.Clinic) string {
	c.T.Helper()
	c.WriteStatus("self")
	var text strings.Builder
	d := doctor.Doctor{
		Source: survey.Source{
			BPFDir: "/sys/fs/bpf/probelet", StateDir: c.StateDir, Now: func() uint64 { return surveytest.Now }, Open: c.Open, Warn: func(error) {},
		},
		Chain:  chain.Node{NetDir: c.NetDir, BinDir: c.BinDir, Runtimes: c.Host.Runtimes, Log: slog.New(slog.DiscardHandler)},
		Host:   c.Host,
		Report: func(f status.Finding) { text.WriteString(f.Text(0)) },
	}
	if err := d.Examine(c.T.Context()); err != nil {
		c.T.Fatal(err)
	}
	return text.String()
}

func TestDoctorFindsWhatIsWrong(t *testing.T) {
	for name, test := range map[string]struct {
		wrong func(*doctortest.Clinic)
		want  string // a line, as a regular expression
	}{
		"nothing":           {func(*doctortest.Clinic) {}, `ok +kernel +Linux 6.1 with BTF`},
		"kernel":            {func(c *doctortest.Clinic) { c.Linux = 5<<16 | 14<<8 }, `PROBLEM +kernel +Linux 5.14`},
		"no BTF":            {func(c *doctortest.Clinic) { c.Host.Sys = c.NetDir }, `note +kernel +Linux 6.1, without .*vmlinux`},
		"bpffs":             {func(c *doctortest.Clinic) { c.FileSystems = c.FileSystems[1:] }, `PROBLEM +bpffs +/sys/fs/bpf is not a BPF file system`},
		"cgroup":            {func(c *doctortest.Clinic) { c.FileSystems = c.FileSystems[:1] }, `PROBLEM +cgroup v2 +not mounted at any of /host/cgroup, `},
		"all capabilities":  {func(*doctortest.Clinic) {}, `ok +capabilities +this command has all`},
		"few capabilities":  {func(c *doctortest.Clinic) { c.Capabilities = 0 }, `PROBLEM +capabilities +this command lacks CAP_BPF, CAP_NET_ADMIN, CAP_PERFMON, CAP_SYS_PTRACE`},
		"admin":             {func(c *doctortest.Clinic) { c.Capabilities = 1 << unix.CAP_SYS_ADMIN }, `PROBLEM +capabilities +this command lacks CAP_NET_ADMIN, CAP_SYS_PTRACE$`},
		"no ptrace":         {func(c *doctortest.Clinic) { c.Capabilities &^= (1 << unix.CAP_SYS_PTRACE) }, `PROBLEM +capabilities +this command lacks CAP_SYS_PTRACE$`},
		"nothing loaded":    {func(c *doctortest.Clinic) { c.Kernel = nil }, `note +BPF objects +none pinned in `},
		"blind":             {func(c *doctortest.Clinic) { c.Kernel.Blind = true }, `note +BPF objects +.*: this kernel does not let the programs check pods' listening sockets`},
		"unwatched":         {func(c *doctortest.Clinic) { c.Kernel.Unwatched = true }, `note +BPF objects +.*: a closed listening socket is noticed only by the next probe`},
		"no runtime":        {func(c *doctortest.Clinic) { c.Found = nil }, `note +runtime +no containerd, crio or cri-dockerd process was found`},
		"drop-in":           {func(*doctortest.Clinic) {}, `ok +chain +network net \(.*10-net.conflist\), through .*10-probelet.conf`},
		"drop-in, not read": {func(c *doctortest.Clinic) { c.Found[0].Libcni = "v1.1.2" }, `PROBLEM +chain +.*10-probelet.conf, which this runtime is not known to read`},
		"copy":              {func(c *doctortest.Clinic) { c.AsCopy(doctortest.Copied) }, `ok +chain +network net \(.*10-net.conflist\), through .*00-probelet.conflist`},
		"copy, stale":       {func(c *doctortest.Clinic) { c.AsCopy(strings.Replace(doctortest.Copied, "ptp", "bridge", 1)) }, `PROBLEM +chain +.*00-probelet.conflist is outdated`},
		"not in the chain":  {func(c *doctortest.Clinic) { c.Remove("net") }, `PROBLEM +chain +the plugin is not in network net`},
		"no network":        {func(c *doctortest.Clinic) { c.Remove("10-net.conflist") }, `PROBLEM +chain +no network configuration`},
		"no plugin":         {func(c *doctortest.Clinic) { c.BinDir = c.NetDir }, `PROBLEM +plugin +.*no such file`},
		"empty plugin":      {func(c *doctortest.Clinic) { c.Write(filepath.Join(c.BinDir, "probelet"), "") }, `PROBLEM +plugin +.* is not an executable file: .*, 0 bytes`},
		"unreadable":        {func(c *doctortest.Clinic) { c.OpenErr = errors.New("broken") }, `PROBLEM +state +broken$`},
		"and down":          {func(c *doctortest.Clinic) { c.OpenErr = errors.New("broken") }, `PROBLEM +daemon +not running on \S+; what the kernel still answers is unknown`},
		"no daemon":         {func(*doctortest.Clinic) {}, `PROBLEM +daemon +not running on `},
		"daemon, wedged":    {func(c *doctortest.Clinic) { c.Daemon() }, `PROBLEM +daemon +process \d+ is running, but not ready: `},
		"pushed":            {func(c *doctortest.Clinic) { c.ServeNode(surveytest.Node{Delivery: api.SourceReply{Pushed: true}}) }, `ok +states +container changes are pushed$`},
		"not pushed":        {func(c *doctortest.Clinic) { c.ServeNode(surveytest.Node{Delivery: api.SourceReply{Why: "no socket"}}) }, `note +states +container changes are not pushed: no socket$`},
		"kubelet":           {func(*doctortest.Clinic) {}, `ok +prober +the kubelet, cgroup 4711`},
		"another prober":    {func(c *doctortest.Clinic) { c.Kernel.ProberSet.CgroupIDs[0]++ }, `PROBLEM +prober +the kubelet is cgroup 4711, but the prober is set to cgroup 4712`},
		"not narrowed down": {func(c *doctortest.Clinic) { c.Kernel.ProberSet.Process = &datapath.Process{PID: 12} }, `PROBLEM +prober +the kubelet is cgroup 4711, but the prober is set to process 12 of`},
		"any process":       {func(c *doctortest.Clinic) { c.Kernel.ProberSet = datapath.Prober{AnyLocal: true} }, `note +prober +every process`},
		"no kubelet": {func(c *doctortest.Clinic) {
			c.KubeletGone, c.Kernel.ProberSet = errors.New("no process named kubelet"), datapath.Prober{}
		}, `PROBLEM +prober +no process named kubelet`},
		"others' veths": {func(c *doctortest.Clinic) {
			c.Devices = []doctor.Device{{Name: "lxc1", IfIndex: 4, Veth: true, Others: []string{"XDP program 7", "program 8 at tcx ingress"}}, {Name: "lxc2", IfIndex: 5, Veth: true, Others: []string{"XDP program 7"}}}
		}, `note +others +on veths without probelet: lxc1 \(XDP program 7, program 8 at tcx ingress\), lxc2 \(XDP program 7\)`},
		"others elsewhere": {func(c *doctortest.Clinic) {
			c.Devices = []doctor.Device{{Name: "eth0", IfIndex: 2, Veth: false, Others: []string{"XDP program 3"}}}
		},
			`note +others +on devices that belong to no pod: eth0 \(XDP program 3\)`},
		"others on ours": {func(c *doctortest.Clinic) {
			c.Record(attach.Record{ContainerID: "c0ffee", IfName: "eth0", IfIndex: 7, PodNamespace: "shop", PodName: "web"})
			c.Devices = []doctor.Device{{Name: "veth7", IfIndex: 7, Veth: true, Others: []string{"XDP program 7"}}}
		}, `note +attachments +other programs on veth7 of shop/web: XDP program 7`},
		"bad annotation": {func(c *doctortest.Clinic) {
			c.Web(surveytest.Maps{})
			settings := probe.NewDefaults().Settings(map[string]string{probe.AnnotationStaleness: "9"})
			c.Describe(statedir.Endpoints{Attachments: []statedir.Attachment{{
				ContainerID: "c0ffee", IfName: "eth0", Pod: "shop/web", Settings: statedir.SettingsOf(settings),
			}}})
		}, `note +annotations +shop/web: annotation probelet.dev/staleness: "9": must be`},
	} {
		t.Run(name, func(t *testing.T) {
			c := doctortest.NewClinic(t)
			test.wrong(c)
			if text := examine(c); !regexp.MustCompile(`(?m)^` + test.want).MatchString(text) {
				t.Errorf("does not say %s:\n%s", test.want, text)
			}
		})
	}
}

// Before an install, doctor says what the install needs and would do. What only the install brings is not reported as a problem.
func TestPreflight(t *testing.T) {
	for name, test := range map[string]struct {
		wrong func(*doctortest.Clinic)
		want  string // a line, as a regular expression
		clean bool   // nothing prevents an install
	}{
		"said":              {func(*doctortest.Clinic) {}, `note +probelet +is not installed on this node`, true},
		"kernel":            {func(*doctortest.Clinic) {}, `ok +kernel +Linux 6.1 with BTF`, true},
		"bpffs":             {func(*doctortest.Clinic) {}, `ok +bpffs +/sys/fs/bpf`, true},
		"cgroup":            {func(*doctortest.Clinic) {}, `ok +cgroup v2 +/`, true},
		"capabilities":      {func(*doctortest.Clinic) {}, `ok +capabilities +this command has all`, true},
		"kubelet":           {func(*doctortest.Clinic) {}, `ok +prober +the kubelet, cgroup 4711$`, true},
		"runtime":           {func(*doctortest.Clinic) {}, `ok +runtime +containerd`, true},
		"directories":       {func(*doctortest.Clinic) {}, `ok +plugins +/`, true},
		"drop-in":           {func(*doctortest.Clinic) {}, `would +chain +write .*/net/10-probelet.conf, which adds the plugin to network net \(.*10-net.conflist\)`, true},
		"copy":              {func(c *doctortest.Clinic) { c.Found[0].Libcni = "v1.1.2" }, `would +chain +write .*/00-probelet.conflist, `, true},
		"plugin":            {func(*doctortest.Clinic) {}, `would +plugin +put it at .*/probelet$`, true},
		"objects":           {func(*doctortest.Clinic) {}, `would +BPF objects +load them, pin them in /sys/fs/bpf/probelet, and keep records in `, true},
		"old kernel":        {func(c *doctortest.Clinic) { c.Linux = 5 << 16 }, `PROBLEM +kernel +Linux 5.0`, false},
		"no bpffs":          {func(c *doctortest.Clinic) { c.FileSystems = c.FileSystems[1:] }, `PROBLEM +bpffs `, false},
		"no kubelet":        {func(c *doctortest.Clinic) { c.KubeletGone = errors.New("no process named kubelet") }, `PROBLEM +prober +no process named kubelet`, false},
		"no plugins":        {func(c *doctortest.Clinic) { c.BinDir = filepath.Join(c.BinDir, "gone") }, `PROBLEM +plugins +.*gone: no such file`, false},
		"plugins elsewhere": {func(c *doctortest.Clinic) { c.BinDir = t.TempDir() }, `PROBLEM +chain +the runtime would not find the plugin: ptp `, false},
		"no network":        {func(c *doctortest.Clinic) { c.Remove("10-net.conflist") }, `PROBLEM +chain +no network configuration`, false},
		"no networks":       {func(c *doctortest.Clinic) { c.NetDir = filepath.Join(c.NetDir, "gone") }, `PROBLEM +networks +.*gone: no such file`, false},
		"few rights":        {func(c *doctortest.Clinic) { c.Capabilities = 0 }, `PROBLEM +capabilities +this command lacks CAP_BPF`, false},
	} {
		t.Run(name, func(t *testing.T) {
			c := doctortest.NewClinic(t)
			c.Kernel = nil
			c.Remove("net")
			if err := os.Remove(filepath.Join(c.BinDir, "probelet")); err != nil {
				t.Fatal(err)
			}
			test.wrong(c)
			text := examine(c)
			if !regexp.MustCompile(`(?m)^` + test.want).MatchString(text) {
				t.Errorf("does not say %s:\n%s", test.want, text)
			}
			if problem := strings.Contains(text, "PROBLEM"); problem == test.clean {
				t.Errorf("a problem: %t\n%s", problem, text)
			}
		})
	}
}

// Lost answers are a problem, with advice.
func TestDoctorFindsLostTrust(t *testing.T) {
	c := doctortest.NewClinic(t)
	c.Web(surveytest.Maps{}, surveytest.Endpoint(probe.HTTP, 80, "/x"))
	if text := examine(c); strings.Contains(text, "trust") {
		t.Errorf("all is well:\n%s", text)
	}
	c.Lose("request_repeated")
	c.Devices = []doctor.Device{{Name: "veth7", IfIndex: 7, Veth: true, Others: []string{"program 12 (guard) at tcx ingress, before ours"}}}
	text := examine(c)
	for _, want := range []string{
		`PROBLEM +trust +shop/web is not answered: answers through veth7 stopped arriving 12s ago: a prober repeated its request`,
		` +-> find out what drops the answers on veth7 .*, then run probeletctl trust shop/web`,
		`note +attachments +other programs on veth7 of c0ffee/eth0: program 12 \(guard\) at tcx ingress, before ours`,
	} {
		if !regexp.MustCompile(`(?m)^` + want).MatchString(text) {
			t.Errorf("does not say %s:\n%s", want, text)
		}
	}
}
