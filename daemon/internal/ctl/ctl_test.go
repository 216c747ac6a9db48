//go:build linux

package ctl

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/internal/version"
)

// What a command ends with tells a script what it met.
func TestExitCodes(t *testing.T) {
	running := func(c *clinic) { c.serveNode(node{}) }
	down := func(*clinic) {}
	for name, test := range map[string]struct {
		prepare func(*clinic)
		args    []string
		code    int
		says    string // the error; empty: what there is to say has been shown
	}{
		"all is well":             {running, []string{"status"}, status.OK, ""},
		"explained":               {running, []string{"explain", "shop/web"}, status.OK, ""},
		"help":                    {down, []string{"status", "--help"}, status.OK, ""},
		"well":                    {running, []string{"doctor"}, status.OK, ""},
		"ill":                     {func(c *clinic) { running(c); c.linux = 5 << 16 }, []string{"doctor"}, status.Failed, "1 problem found"},
		"ill, in JSON":            {func(c *clinic) { running(c); c.linux = 5 << 16 }, []string{"doctor", "-o", "json"}, status.Failed, "1 problem found"},
		"kernel side unreadable":  {func(c *clinic) { running(c); c.openErr = fmt.Errorf("broken") }, []string{"status"}, status.Failed, "broken"},
		"no command":              {down, []string{"stauts"}, status.Usage, `unknown command "stauts"`},
		"no flag":                 {down, []string{"status", "--nope"}, status.Usage, "unknown flag: --nope"},
		"no format":               {down, []string{"status", "-o", "xml"}, status.Usage, `--output "xml": must be one of json|table|wide`},
		"no format to explain":    {down, []string{"explain", "shop/web", "-o", "xml"}, status.Usage, `--output "xml": must be one of json|text`},
		"no format of doctor's":   {down, []string{"doctor", "-o", "xml"}, status.Usage, `--output "xml": must be one of json|text`},
		"no pod":                  {down, []string{"explain"}, status.Usage, "0 arguments: must be one, NAMESPACE/POD"},
		"half a pod":              {down, []string{"explain", "web"}, status.Usage, `"web": must be NAMESPACE/POD, or POD with --namespace`},
		"two namespaces":          {down, []string{"explain", "shop/web", "-n", "bank"}, status.Usage, `"shop/web": is not in --namespace bank`},
		"a namespace and all":     {down, []string{"status", "-n", "shop", "-A"}, status.Usage, "none of the others can be"},
		"narrower than nothing":   {down, []string{"status", "--width", "-1"}, status.Usage, "--width -1: must not be negative"},
		"top, too often":          {down, []string{"top", "-d", "1ms"}, status.Usage, "--interval 1ms: must be at least 100ms"},
		"down":                    {down, []string{"status"}, status.DaemonDown, ""},
		"down, in JSON":           {down, []string{"status", "-o", "json"}, status.DaemonDown, ""},
		"down, in short":          {down, []string{"status", "--summary"}, status.DaemonDown, ""},
		"down, explained":         {down, []string{"explain", "-n", "shop", "web"}, status.DaemonDown, ""},
		"down, nobody to be told": {down, []string{"invalidate", "shop/web"}, status.DaemonDown, "probeletd is not running, and only it can withdraw evidence; shop/web: 1 endpoint is still answered"},
		"unknown":                 {running, []string{"explain", "shop/nobody"}, status.NotFound, "pod shop/nobody is not known on this node"},
		"unknown, down":           {down, []string{"explain", "shop/nobody"}, status.NotFound, "pod shop/nobody is not known on this node"},
		"not attached":            {running, []string{"trust", "shop/later"}, status.NotFound, "pod shop/later is not attached"},
		"doctor, not root":        {func(c *clinic) { c.host.UID = 1000 }, []string{"doctor"}, status.NotAllowed, "run it as root, or in the daemon's pod"},
		"status, not root":        {func(c *clinic) { running(c); c.openErr = fs.ErrPermission }, []string{"status"}, status.NotAllowed, "permission denied; run this as root"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newClinic(t)
			c.write(filepath.Join(c.host.Proc, "self/status"), "CapEff:\tffffffffffffffff\n")
			if test.args[0] != "doctor" {
				c.shop()
			}
			test.prepare(c)
			pid := fmt.Sprint(os.Getpid()) // the daemon of the test is this process
			c.write(filepath.Join(c.host.Proc, pid, "status"), "CapEff:\tffffffffffffffff\n")
			t.Setenv("PROBELET_CNI_NET_DIR", c.netDir)
			t.Setenv("PROBELET_CNI_BIN_DIR", c.binDir)
			text, err := c.execute(test.args...)
			var stderr strings.Builder
			code := status.Exit(&stderr, "probeletctl", err)
			if code != test.code || !strings.Contains(stderr.String(), test.says) || test.says == "" && stderr.Len() > 0 {
				t.Errorf("%d, %q; want %d, %q\n%s", code, &stderr, test.code, test.says, text)
			}
			if slices.Contains(test.args, "json") && test.says == "" || name == "ill, in JSON" {
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

// shop has a pod that is answered, and one that is not attached.
func (m *machine) shop() {
	m.t.Helper()
	m.record(attach.Record{ContainerID: "c0ffee", IfName: "eth0", IfIndex: 7, HostIfName: "veth7", PodNamespace: "shop", PodName: "web"})
	m.record(attach.Record{ContainerID: "decaf", IfName: "eth0", PodNamespace: "bank", PodName: "safe", Error: "no veth"})
	m.describe(statedir.Endpoints{Unattached: []string{"shop/later"}, Attachments: []statedir.Attachment{{
		ContainerID: "c0ffee", IfName: "eth0", Pod: "shop/web", Endpoints: []statedir.Endpoint{endpoint(probe.HTTP, 80, "/x")},
	}}})
	m.kernel.pods["c0ffee"] = fakeMaps{
		datapath.PortKey(80): {evidence: success(1, 42, 0)}, keyOf(80, "/x"): {evidence: success(1, 42, 200)},
	}
	m.kernel.devices["c0ffee"] = datapath.Device{Key: webDevice, Trust: datapath.TrustProven}
}

// With the daemon dead, everything says so, and until when the kernel still answers.
func TestDaemonDown(t *testing.T) {
	const until = `until \d\d:\d\d:\d\d \S+ \(42s from now\) at the latest`
	for name, test := range map[string]struct {
		change func(*clinic)
		still  string
	}{
		"fresh":       {func(*clinic) {}, `1 endpoint is still answered in the kernel, ` + until},
		"expired":     {func(c *clinic) { c.kernel.pods["c0ffee"] = fakeMaps{} }, "nothing is answered: every probe reaches its pod"},
		"closed":      {func(c *clinic) { delete(c.kernel.pods["c0ffee"], datapath.PortKey(80)) }, "nothing is answered: every probe reaches its pod"},
		"nobody asks": {func(c *clinic) { c.kernel.prober = datapath.Prober{} }, "nothing is answered: every probe reaches its pod"},
		"told apart":  {func(c *clinic) { c.kernel.prober.Process = &datapath.Process{PID: 12} }, "nothing is answered: every probe reaches its pod"},
		"not trusted": {func(c *clinic) { c.lose("unobserved") }, "nothing is answered: every probe reaches its pod"},
		// The pod's next connection lets the kernel answer again.
		"a real probe is due": {func(c *clinic) {
			tcp := endpoint(probe.TCP, 80, "")
			tcp.Live = 4
			c.web(fakeMaps{
				datapath.PortKey(80): {success(1, 42, 0), datapath.Tally{Answered: 4, AnsweredMax: 4}},
				datapath.TCPKey(80):  {evidence: success(1, 42, 0)},
			}, tcp)
		}, `1 endpoint is still answered in the kernel, ` + until},
	} {
		t.Run(name, func(t *testing.T) {
			c := newClinic(t)
			c.shop()
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
	m.shop()
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
	m.daemon()
	if text, err := m.run("top", "--iterations", "1", "-d", "100ms", "-n", "bank"); err != nil || strings.Contains(text, "shop/web") {
		t.Errorf("%v\n%s", err, text)
	}
}

func TestCompletion(t *testing.T) {
	m := newMachine(t)
	m.shop()
	t.Setenv("PROBELET_STATE_DIR", m.stateDir)
	for _, command := range []string{"explain", "invalidate", "trust"} {
		for _, test := range []struct {
			args []string
			want string
		}{
			{[]string{""}, "bank/safe\nshop/later\nshop/web\n:4\n"},
			{[]string{"-n", "shop", ""}, "later\nweb\n:4\n"},
			{[]string{"shop/web", ""}, ":4\n"},
		} {
			// Not by m.run, which adds arguments.
			var stdout strings.Builder
			env := environment{stdout: &stdout, stderr: &m.stderr}
			if err := execute(t.Context(), env, append([]string{"__complete", command}, test.args...)); err != nil || stdout.String() != test.want {
				t.Errorf("%s %q: %v, %q, want %q", command, test.args, err, &stdout, test.want)
			}
		}
	}
}

// On a narrow terminal no line is longer than it; -o wide is as wide as it is.
func TestNarrowTerminal(t *testing.T) {
	for _, width := range []int{20, 40, 80, 120} {
		c := newClinic(t)
		c.shop()
		c.width = width
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
		if wide := c.status("-o", "wide"); !strings.Contains(wide, "CONTAINER ID   DETECTED WITHIN") {
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

func TestNodeInNumbers(t *testing.T) {
	m := newMachine(t)
	m.shop()
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
	m.serveNode(node{unready: []string{"no prober was found, so nothing is answered"}})
	if text := squeeze(m.status("--summary")); !strings.Contains(text, "not ready no prober was found") {
		t.Error(text)
	}
}
