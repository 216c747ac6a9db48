//go:build linux

package ctl

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/doctor/doctortest"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/survey/surveytest"
	"github.com/probelet/probelet/internal/version"
)

// clinic is a node to run any command on, doctor included.
type clinic struct {
	*doctortest.Clinic
	machine *machine
}

func newClinic(t *testing.T) *clinic {
	c := doctortest.NewClinic(t)
	return &clinic{c, &machine{Machine: c.Machine}}
}

func (c *clinic) run(args ...string) (string, error) {
	c.T.Helper()
	c.machine.host = c.Host
	return c.machine.run(args...)
}

// examine runs doctor.
func (c *clinic) examine() string {
	c.T.Helper()
	c.WriteStatus("self")
	text, err := c.run("doctor", "--cni-net-dir", c.NetDir, "--cni-bin-dir", c.BinDir)
	problems := strings.Count("\n"+text, "\nPROBLEM ")
	if (err != nil) != (problems > 0) || err != nil && !strings.HasPrefix(err.Error(), fmt.Sprint(problems, " problem")) {
		c.T.Errorf("%d problems, %v", problems, err)
	}
	return text
}

// The exit code tells a script what happened.
func TestExitCodes(t *testing.T) {
	running := func(c *clinic) { c.ServeNode(surveytest.Node{}) }
	down := func(*clinic) {}
	for name, test := range map[string]struct {
		prepare func(*clinic)
		args    []string
		code    int
		says    string // the error; empty if it was shown already
	}{
		"all is well":                 {running, []string{"status"}, status.OK, ""},
		"explained":                   {running, []string{"explain", "shop/web"}, status.OK, ""},
		"help":                        {down, []string{"status", "--help"}, status.OK, ""},
		"healthy":                     {running, []string{"doctor"}, status.OK, ""},
		"a problem":                   {func(c *clinic) { running(c); c.Linux = 5 << 16 }, []string{"doctor"}, status.Failed, "1 problem found"},
		"a problem, in JSON":          {func(c *clinic) { running(c); c.Linux = 5 << 16 }, []string{"doctor", "-o", "json"}, status.Failed, "1 problem found"},
		"BPF objects unreadable":      {func(c *clinic) { running(c); c.OpenErr = fmt.Errorf("broken") }, []string{"status"}, status.Failed, "broken"},
		"no command":                  {down, []string{"stauts"}, status.Usage, `unknown command "stauts"`},
		"no flag":                     {down, []string{"status", "--nope"}, status.Usage, "unknown flag: --nope"},
		"no format":                   {down, []string{"status", "-o", "xml"}, status.Usage, `--output "xml": must be one of json|table|wide`},
		"no format to explain":        {down, []string{"explain", "shop/web", "-o", "xml"}, status.Usage, `--output "xml": must be one of json|text`},
		"no format of doctor's":       {down, []string{"doctor", "-o", "xml"}, status.Usage, `--output "xml": must be one of json|text`},
		"no pod":                      {down, []string{"explain"}, status.Usage, "0 arguments: must be one, NAMESPACE/POD"},
		"half a pod":                  {down, []string{"explain", "web"}, status.Usage, `"web": must be NAMESPACE/POD, or POD with --namespace`},
		"two namespaces":              {down, []string{"explain", "shop/web", "-n", "bank"}, status.Usage, `"shop/web": is not in --namespace bank`},
		"a namespace and all":         {down, []string{"status", "-n", "shop", "-A"}, status.Usage, "must not both be given"},
		"negative width":              {down, []string{"status", "--width", "-1"}, status.Usage, "--width -1: must not be negative"},
		"top, too often":              {down, []string{"top", "-d", "1ms"}, status.Usage, "--interval 1ms: must be at least 100ms"},
		"no port":                     {down, []string{"invalidate", "shop/web", "--port", "0"}, status.Usage, "--port 0: must be from 1 to 65535"},
		"down":                        {down, []string{"status"}, status.DaemonDown, ""},
		"down, in JSON":               {down, []string{"status", "-o", "json"}, status.DaemonDown, ""},
		"down, in short":              {down, []string{"status", "--summary"}, status.DaemonDown, ""},
		"down, explained":             {down, []string{"explain", "-n", "shop", "web"}, status.DaemonDown, ""},
		"down, nothing to invalidate": {down, []string{"invalidate", "shop/web"}, status.DaemonDown, "probeletd is not running, and only it can withdraw evidence; shop/web: 1 endpoint is still answered"},
		"unknown":                     {running, []string{"explain", "shop/nobody"}, status.NotFound, "pod shop/nobody is not known on this node"},
		"unknown, down":               {down, []string{"explain", "shop/nobody"}, status.NotFound, "pod shop/nobody is not known on this node; probeletd, which knows the pods, is not running"},
		"no such directory":           {running, []string{"status", "--state-dir", "/nonexistent"}, status.Failed, `--state-dir "/nonexistent": no such directory, although BPF objects are loaded`},
		"a relative directory":        {running, []string{"explain", "shop/web", "--bpf-dir", "bpf"}, status.Usage, `--bpf-dir "bpf": must be an absolute path`},
		"not attached":                {running, []string{"trust", "shop/later"}, status.NotFound, "pod shop/later is not attached"},
		"doctor, not root":            {func(c *clinic) { c.Host.UID = 1000 }, []string{"doctor"}, status.NotAllowed, "run it as root, or in the daemon's pod"},
		"status, not root":            {func(c *clinic) { running(c); c.OpenErr = fs.ErrPermission }, []string{"status"}, status.NotAllowed, "permission denied; run this as root"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newClinic(t)
			c.WriteStatus("self")
			if test.args[0] != "doctor" {
				shop(c.Machine)
			}
			test.prepare(c)
			c.WriteStatus(fmt.Sprint(os.Getpid())) // this process holds the daemon's lock
			t.Setenv("PROBELET_CNI_NET_DIR", c.NetDir)
			t.Setenv("PROBELET_CNI_BIN_DIR", c.BinDir)
			c.machine.host = c.Host
			text, err := c.machine.execute(test.args...)
			var stderr strings.Builder
			code := status.Exit(&stderr, "probeletctl", err)
			if code != test.code || !strings.Contains(stderr.String(), test.says) || test.says == "" && stderr.Len() > 0 {
				t.Errorf("%d, %q; want %d, %q\n%s", code, &stderr, test.code, test.says, text)
			}
			if slices.Contains(test.args, "json") && test.says == "" || name == "a problem, in JSON" {
				if !json.Valid([]byte(text)) {
					t.Errorf("is not JSON:\n%s", text)
				}
			}
			if code == status.NotAllowed && strings.Contains(text, "remove") {
				t.Errorf("gives advice on what it cannot see:\n%s", text)
			}
		})
	}
}

// shop adds pods to the node: one that is answered, one that failed to attach and one that is not attached.
func shop(m *surveytest.Machine) {
	m.T.Helper()
	m.Record(attach.Record{ContainerID: "c0ffee", IfName: "eth0", IfIndex: 7, HostIfName: "veth7", PodNamespace: "shop", PodName: "web"})
	m.Record(attach.Record{ContainerID: "decaf", IfName: "eth0", PodNamespace: "bank", PodName: "safe", Error: "no veth"})
	m.Describe(statedir.Endpoints{Unattached: []string{"shop/later"}, Attachments: []statedir.Attachment{{
		ContainerID: "c0ffee", IfName: "eth0", Pod: "shop/web", Endpoints: []statedir.Endpoint{surveytest.Endpoint(probe.HTTP, 80, "/x")},
	}}})
	m.Kernel.Pods["c0ffee"] = surveytest.Maps{
		datapath.PortKey(80): {Evidence: surveytest.Success(1, 42, 0)}, surveytest.KeyOf(80, "/x"): {Evidence: surveytest.Success(1, 42, 200)},
	}
	m.Kernel.Devices["c0ffee"] = datapath.Device{Key: surveytest.WebDevice, Trust: datapath.TrustProven}
}

// Without a daemon, every command says so, and until when the kernel still answers.
func TestDaemonDown(t *testing.T) {
	const until = `until \d\d:\d\d:\d\d \S+ \(42s from now\) at the latest`
	for name, test := range map[string]struct {
		change func(*clinic)
		still  string
	}{
		"fresh":         {func(*clinic) {}, `1 endpoint is still answered in the kernel, ` + until},
		"expired":       {func(c *clinic) { c.Kernel.Pods["c0ffee"] = surveytest.Maps{} }, "nothing is answered, so every probe reaches its pod"},
		"closed":        {func(c *clinic) { delete(c.Kernel.Pods["c0ffee"], datapath.PortKey(80)) }, "nothing is answered, so every probe reaches its pod"},
		"no prober":     {func(c *clinic) { c.Kernel.ProberSet = datapath.Prober{} }, "nothing is answered, so every probe reaches its pod"},
		"shared cgroup": {func(c *clinic) { c.Kernel.ProberSet.Process = &datapath.Process{PID: 12} }, "nothing is answered, so every probe reaches its pod"},
		"answers lost":  {func(c *clinic) { c.Lose("unobserved") }, "nothing is answered, so every probe reaches its pod"},
		// The pod's next accepted connection lets the kernel answer again.
		"a real probe is due": {func(c *clinic) {
			tcp := surveytest.Endpoint(probe.TCP, 80, "")
			tcp.Live = 4
			c.Web(surveytest.Maps{
				datapath.PortKey(80): {Evidence: surveytest.Success(1, 42, 0), Tally: datapath.Tally{Answered: 4, AnsweredMax: 4}},
				datapath.TCPKey(80):  {Evidence: surveytest.Success(1, 42, 0)},
			}, tcp)
		}, `1 endpoint is still answered in the kernel, ` + until},
	} {
		t.Run(name, func(t *testing.T) {
			c := newClinic(t)
			shop(c.Machine)
			test.change(c)
			status, err := c.run("status")
			if err != nil {
				t.Error(err)
			}
			explained, err := c.run("explain", "shop/web")
			if err != nil {
				t.Error(err)
			}
			for what, text := range map[string]string{"status": status, "explain": explained, "doctor": c.examine()} {
				if !regexp.MustCompile(`(NOT RUNNING|not running on \S+); ` + test.still).MatchString(text) {
					t.Errorf("%s does not say %s:\n%s", what, test.still, text)
				}
			}
		})
	}
}

func TestNamespaceFilter(t *testing.T) {
	m := newMachine(t)
	shop(m.Machine)
	for _, test := range []struct {
		args []string
		want []string
	}{
		{nil, []string{"bank/safe", "shop/web", "shop/later"}},
		{[]string{"-A"}, []string{"bank/safe", "shop/web", "shop/later"}},
		{[]string{"-n", "shop"}, []string{"shop/web", "shop/later"}},
		{[]string{"--namespace", "sho"}, nil},
	} {
		text := m.status(test.args...)
		if got := regexp.MustCompile(`(?m)^[a-z]+/[a-z]+`).FindAllString(text, -1); !slices.Equal(got, test.want) {
			t.Errorf("%q: %q, want %q:\n%s", test.args, got, test.want, text)
		}
	}
	m.Daemon()
	if text, err := m.run("top", "--iterations", "1", "-d", "100ms", "-n", "bank"); err != nil || strings.Contains(text, "shop/web") {
		t.Errorf("%v\n%s", err, text)
	}
}

func TestCompletion(t *testing.T) {
	m := newMachine(t)
	shop(m.Machine)
	t.Setenv("PROBELET_STATE_DIR", m.StateDir)
	for _, command := range []string{"explain", "invalidate", "trust"} {
		for _, test := range []struct {
			args []string
			want string
		}{
			{[]string{""}, "bank/safe\nshop/later\nshop/web\n:4\n"},
			{[]string{"-n", "shop", ""}, "later\nweb\n:4\n"},
			{[]string{"shop/web", ""}, ":4\n"},
		} {
			// Not with m.run, which adds arguments.
			var stdout strings.Builder
			env := environment{stdout: &stdout, stderr: &m.stderr}
			if err := execute(t.Context(), env, append([]string{"__complete", command}, test.args...)); err != nil || stdout.String() != test.want {
				t.Errorf("%s %q: %v, %q, want %q", command, test.args, err, &stdout, test.want)
			}
		}
	}
}

// No line exceeds the width of the terminal, except with -o wide.
func TestNarrowTerminal(t *testing.T) {
	for _, width := range []int{20, 40, 80, 120} {
		c := newClinic(t)
		shop(c.Machine)
		c.machine.width = width
		texts := map[string]string{"doctor": c.examine()}
		for _, args := range [][]string{{"status"}, {"status", "--summary"}, {"explain", "shop/web"}, {"top", "--iterations", "1", "-d", "100ms"}} {
			text, err := c.run(args...)
			if err != nil {
				t.Error(err)
			}
			texts[strings.Join(args, " ")] = text
		}
		for what, text := range texts {
			for line := range strings.Lines(text) {
				if n := utf8.RuneCountInString(strings.TrimSuffix(line, "\n")); n > width {
					t.Errorf("%s: %d characters of at most %d: %s", what, n, width, line)
				}
			}
		}
		if wide := c.machine.status("-o", "wide"); !strings.Contains(wide, "CONTAINER ID   DETECTED WITHIN") {
			t.Errorf("wide:\n%s", wide)
		}
	}
}

func TestVersion(t *testing.T) {
	var stdout strings.Builder
	if err := execute(t.Context(), environment{stdout: &stdout}, []string{"--version"}); err != nil || stdout.String() != "probeletctl version "+version.String()+"\n" {
		t.Errorf("%v, %q", err, &stdout)
	}
}

func TestStatusSummary(t *testing.T) {
	m := newMachine(t)
	shop(m.Machine)
	var n status.Node
	text := m.status("--summary", "-o", "json")
	if err := json.Unmarshal([]byte(text), &n); err != nil {
		t.Fatal(err)
	}
	want := []status.Unattached{{Pod: "bank/safe", Why: "no veth"}, {Pod: "shop/later"}}
	if n.Running || n.Attached != 1 || n.Endpoints != 1 || n.Answered != 1 || n.Probes != (status.Probes{Answered: 15, Passed: 1}) || !slices.Equal(n.Unattached, want) ||
		n.Still == nil || n.Still.For != 42 || n.Version == "" {
		t.Errorf("%+v", n)
	}
	for _, want := range []string{"answered 94 % of 16 probes", "not attached bank/safe: no veth", "not attached shop/later", "NOT RUNNING; 1 endpoint is still"} {
		if text := squeeze(m.status("--summary")); !strings.Contains(text, want) {
			t.Errorf("does not say %q: %s", want, text)
		}
	}
	m.ServeNode(surveytest.Node{Missing: []string{"no prober was found, so nothing is answered"}})
	if text := squeeze(m.status("--summary")); !strings.Contains(text, "not ready no prober was found") {
		t.Error(text)
	}
}

// In the daemon's container the commands use its directories, even if they are not the defaults.
func TestDirectoriesFromTheEnvironment(t *testing.T) {
	c := newClinic(t)
	elsewhere, opened := t.TempDir(), ""
	t.Setenv("PROBELET_STATE_DIR", elsewhere)
	t.Setenv("PROBELET_BPF_DIR", "/bpf/probelet")
	t.Setenv("PROBELET_CNI_NET_DIR", c.NetDir)
	t.Setenv("PROBELET_CNI_BIN_DIR", c.BinDir)
	var stdout strings.Builder
	env := environment{stdout: &stdout, stderr: &c.machine.stderr, now: func() uint64 { return surveytest.Now }, host: c.Host, open: func(dir string) (survey.Kernel, error) {
		opened = dir
		return nil, nil
	}}
	_ = execute(t.Context(), env, []string{"doctor"})
	for _, want := range []string{`ok +chain `, `ok +plugin +` + c.BinDir, `PROBLEM +daemon +not running on ` + elsewhere} {
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
