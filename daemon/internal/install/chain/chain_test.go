package chain

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/daemon/internal/install/runtimes"
	"github.com/probelet/probelet/internal/polltest"
)

const (
	list   = `{"cniVersion":"1.0.0","name":"pods","x":{"big":12345678901234567890},"plugins":[{"type":"ptp","mtu":1.50},{"type":"portmap"}]}`
	single = `{"cniVersion":"0.3.1","name":"pods","type":"bridge","bridge":"b"}`
)

type files = map[string]string

func newNode(t *testing.T, network files) Node {
	t.Helper()
	n := Node{NetDir: filepath.Join(t.TempDir(), "net.d"), BinDir: filepath.Join(t.TempDir(), "bin"), StateDir: t.TempDir(), Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
	for _, dir := range []string{n.NetDir, n.BinDir} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, plugin := range []string{"ptp", "portmap", "bridge", "firewall", "bandwidth", "a", PluginType} {
		n.addProgram(t, plugin)
	}
	for name, text := range network {
		n.write(t, name, text)
	}
	return n
}

// addProgram writes an executable to BinDir.
func (n Node) addProgram(t *testing.T, name string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(n.BinDir, name), []byte("#!"), 0o755); err != nil {
		t.Fatal(err)
	}
}

func (n Node) write(t *testing.T, name, text string) {
	t.Helper()
	file := filepath.Join(n.NetDir, name)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}

// contents returns the files and directories below a directory.
func contents(t *testing.T, dir string) files {
	t.Helper()
	all := files{}
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || path == dir {
			return err
		}
		name, _ := filepath.Rel(dir, path)
		if d.IsDir() {
			all[name+"/"] = ""
			return nil
		}
		text, err := os.ReadFile(path)
		all[name] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// chainIn returns the chain that the runtime would run: the types of the first network's plugins.
func (n Node) chainIn(t *testing.T) string {
	t.Helper()
	entries, err := os.ReadDir(n.NetDir)
	if err != nil {
		t.Error(err)
	}
	for _, e := range entries {
		if e.IsDir() || filepath.Ext(e.Name()) == "" || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		text, err := os.ReadFile(filepath.Join(n.NetDir, e.Name()))
		if err != nil {
			continue // removed meanwhile
		}
		w, err := parse(e.Name(), text)
		if err != nil {
			continue
		}
		var types []string
		for _, p := range w.plugins {
			types = append(types, pluginType(p))
		}
		dropIns, _ := filepath.Glob(filepath.Join(n.NetDir, w.name, "*.conf"))
		for _, file := range dropIns {
			if text, err := os.ReadFile(file); err == nil && w.readsDropIns() {
				types = append(types, pluginType(text))
			}
		}
		return w.name + ": " + strings.Join(types, " ")
	}
	return "none"
}

func TestJoinAndLeave(t *testing.T) {
	for name, test := range map[string]struct {
		way     Way
		network files
		chain   string
		by      Way
		file    string
	}{
		"drop-in":                 {DropIn, files{"10-pods.conflist": list}, "pods: ptp portmap probelet", DropIn, "pods/10-probelet.conf"},
		"drop-in beside others":   {DropIn, files{"10-pods.conflist": list, "pods/20-other.conf": `{"type":"other"}`}, "pods: ptp portmap probelet other", DropIn, "pods/10-probelet.conf"},
		"copy":                    {Copy, files{"10-pods.conflist": list}, "pods: ptp portmap probelet", Copy, "00-probelet.conflist"},
		"copy of a single plugin": {Copy, files{"10-pods.conf": single}, "pods: bridge probelet", Copy, "00-probelet.conflist"},
		"copy before 00-multus":   {Copy, files{"00-multus.conf": single}, "pods: bridge probelet", Copy, "00-0-probelet.conflist"},
		"copy before 00-":         {Copy, files{"00-.conf": single}, "pods: bridge probelet", Copy, "!00-probelet.conflist"},
		"drop-ins not read": {DropIn, files{"10-pods.conflist": strings.Replace(list, `"x":`, `"loadOnlyInlinedPlugins":true,"x":`, 1)},
			"pods: ptp portmap probelet", Copy, "00-probelet.conflist"},
		"first of two networks":          {Copy, files{"10-pods.conflist": list, "20-more.conf": single}, "pods: ptp portmap probelet", Copy, "00-probelet.conflist"},
		"added manually":                 {Copy, files{"10-pods.conflist": strings.Replace(list, `"portmap"`, `"probelet"`, 1)}, "pods: ptp probelet", "", ""},
		"copy name taken":                {Copy, files{"00-probelet.conflist": list}, "pods: ptp portmap probelet", Copy, "00-0-probelet.conflist"},
		"no drop-in for a single plugin": {DropIn, files{"10-pods.conf": single}, "pods: bridge probelet", Copy, "00-probelet.conflist"},
		"drop-in added manually":         {DropIn, files{"10-pods.conflist": list, "pods/50-mine.conf": `{"type":"probelet"}`}, "pods: ptp portmap probelet", "", ""},
		"drop-in added manually, not read": {Copy, files{"10-pods.conflist": strings.Replace(list, `"x":`, `"loadOnlyInlinedPlugins":"True","x":`, 1),
			"pods/50-mine.conf": `{"type":"probelet"}`}, "pods: ptp portmap probelet", Copy, "00-probelet.conflist"},
		"several versions": {Copy, files{"10-pods.conflist": strings.Replace(list, `"cniVersion":"1.0.0"`, `"cniVersions":["0.2.0","1.1.0"]`, 1)}, "pods: ptp portmap probelet", Copy, "00-probelet.conflist"},
		"unrelated files":  {Copy, files{"05-a.txt": "-", "10-pods.conflist": list}, "pods: ptp portmap probelet", Copy, "00-probelet.conflist"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, test.network)
			before, plain := contents(t, n.NetDir), n.chainIn(t)
			for _, changed := range []bool{test.file != "", false} {
				j, err := n.Join(t.Context(), test.way)
				if err != nil {
					t.Fatal(err)
				}
				want := ""
				if test.file != "" {
					want = filepath.Join(n.NetDir, test.file)
				}
				if j.Way != test.by || j.File != want || j.Changed != changed || j.Network != "pods" {
					t.Fatalf("%+v", j)
				}
				if got := n.chainIn(t); got != test.chain {
					t.Fatalf("chain %q, want %q", got, test.chain)
				}
			}
			for file, text := range before {
				if got := contents(t, n.NetDir)[file]; got != text {
					t.Errorf("%s was changed: %s", file, got)
				}
			}
			if _, err := n.Leave(t.Context()); err != nil {
				t.Fatal(err)
			}
			if got := n.chainIn(t); got != plain {
				t.Errorf("chain %q after Leave, want %q", got, plain)
			}
			if after := contents(t, n.NetDir); !reflect.DeepEqual(after, before) {
				t.Errorf("files after Leave: %v, want %v", after, before)
			}
		})
	}
}

// A copy preserves its original down to the digits of numbers.
func TestCopyIsFaithful(t *testing.T) {
	n := newNode(t, files{"10-pods.conflist": list})
	n.Conf = map[string]string{"bpfDir": "/sys/fs/bpf/other"}
	j, err := n.Join(t.Context(), Copy)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(j.File)
	if err != nil {
		t.Fatal(err)
	}
	compact := func(text []byte) string {
		var value map[string]json.RawMessage
		if err := json.Unmarshal(text, &value); err != nil {
			t.Fatal(err)
		}
		delete(value, derivedFrom)
		again, err := json.Marshal(value)
		if err != nil {
			t.Fatal(err)
		}
		return string(again)
	}
	want := strings.Replace(list, `{"type":"portmap"}`, `{"type":"portmap"},{"bpfDir":"/sys/fs/bpf/other","type":"probelet"}`, 1)
	if got := compact(text); got != compact([]byte(want)) {
		t.Errorf("got  %s\nwant %s", got, compact([]byte(want)))
	}
}

func TestJoinErrors(t *testing.T) {
	for name, test := range map[string]struct {
		network files
		want    []string
	}{
		"no file":                    {nil, []string{"no network configuration"}},
		"no plugins":                 {files{"10-x.conflist": `{"name":"x","plugins":[]}`}, []string{"10-x.conflist", "not a network configuration", "no plugins in list"}},
		"single plugin in .conflist": {files{"10-x.conflist": single}, []string{"10-x.conflist", "plugins: empty"}},
		"list in .conf":              {files{"10-x.conf": list}, []string{"10-x.conf", "not a network configuration", "missing 'type'"}},
		"list in .json":              {files{"10-x.json": list}, []string{"10-x.json", "not a network configuration", "missing 'type'"}},
		"first file invalid":         {files{"10-x.conflist": "", "20-y.conflist": list}, []string{"10-x.conflist", "not a network configuration"}},
		"invalid file with our name": {files{"00-probelet.conflist": "{", "10-x.conflist": list}, []string{"00-probelet.conflist", "not a network configuration"}},
		"no name":                    {files{"10-x.conflist": `{"plugins":[{"type":"a"}]}`}, []string{"10-x.conflist", "name: must be set"}},
		"no type":                    {files{"10-x.conflist": `{"name":"x","plugins":[{"type":"a"},{}]}`}, []string{"plugin config 1", "missing 'type'"}},
		"path as a name":             {files{"10-x.conflist": `{"cniVersion":"1.0.0","name":"../x","plugins":[{"type":"a"}]}`}, []string{`"../x"`, "must be a file name"}},
		"no free file name":          {files{"!00-a.conf": single}, []string{"!00-a.conf", "no free name sorts before"}},
		"version too old":            {files{"10-x.conflist": strings.Replace(list, "1.0.0", "0.2.0", 1)}, []string{"10-x.conflist", `cniVersion "0.2.0"`, "0.3.0 or later"}},
		"no version":                 {files{"10-x.conf": `{"name":"x","type":"bridge"}`}, []string{"10-x.conf", `cniVersion ""`}},
		"drop-ins only":              {files{"10-x.conflist": `{"cniVersion":"1.1.0","name":"x"}`, "x/1-a.conf": `{"type":"a"}`}, []string{"10-x.conflist", "plugins: empty"}},
		"invalid boolean":            {files{"10-x.conflist": strings.Replace(list, `"x":`, `"loadOnlyInlinedPlugins":"perhaps","x":`, 1)}, []string{"loadOnlyInlinedPlugins", `"perhaps"`}},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, test.network)
			before := contents(t, n.NetDir)
			_, err := n.Join(t.Context(), Copy)
			for _, part := range test.want {
				if err == nil || !strings.Contains(err.Error(), part) {
					t.Errorf("got error %v, want it to contain %q", err, part)
				}
			}
			if got := contents(t, n.NetDir); !reflect.DeepEqual(got, before) {
				t.Errorf("leftover files: %v", got)
			}
		})
	}
	if _, err := newNode(t, nil).Join(t.Context(), DropIn); !errors.Is(err, ErrNoNetwork) {
		t.Errorf("not ErrNoNetwork: %v", err)
	}
}

// A dangling symlink may have a target in the runtime's mount namespace, so Join must not skip to the next network.
func TestDanglingSymlink(t *testing.T) {
	n := newNode(t, files{"20-other.conflist": list})
	if err := os.Symlink("/nowhere/10-pods.conflist", filepath.Join(n.NetDir, "10-pods.conflist")); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Join(t.Context(), Copy); !errors.Is(err, ErrUnusable) {
		t.Errorf("not ErrUnusable: %v", err)
	}
	if got := n.ours(); len(got) > 0 {
		t.Errorf("files: %v", got)
	}
}

func TestJoinLeavesUnsupportedNetwork(t *testing.T) {
	n := newNode(t, files{"10-pods.conflist": list})
	if _, err := n.Join(t.Context(), Copy); err != nil {
		t.Fatal(err)
	}
	n.write(t, "10-pods.conflist", strings.Replace(list, "1.0.0", "0.1.0", 1))
	if _, err := n.Join(t.Context(), Copy); !errors.Is(err, ErrUnsupported) {
		t.Errorf("not ErrUnsupported: %v", err)
	}
	if got := n.chainIn(t); got != "pods: ptp portmap" {
		t.Errorf("chain %q", got)
	}
}

// Look agrees with Join.
func TestLook(t *testing.T) {
	n := newNode(t, files{"10-pods.conflist": list})
	expect := func(when string, want bool) {
		t.Helper()
		if j, in, err := n.Look(); err != nil || in != want {
			t.Errorf("%s: %v, %+v, %v", when, in, j, err)
		}
	}
	join := func(way Way) {
		t.Helper()
		if _, err := n.Join(t.Context(), way); err != nil {
			t.Fatal(err)
		}
	}
	expect("before", false)
	join(Copy)
	expect("copied", true)
	n.write(t, "10-pods.conflist", strings.Replace(list, `"mtu":1.50`, `"mtu":1400`, 1))
	expect("a plugin has changed", false)
	join(Copy)
	expect("copied again", true)
	n.write(t, "10-pods.conflist", strings.Replace(list, `"big":1`, `"big":2`, 1))
	expect("the list has changed", false)
	join(DropIn)
	expect("dropped in", true)
	n.write(t, "05-single.conf", single)
	expect("a list is not first any more", false)
}

// References finds everything that runs the plugin or reads a file of ours, and nothing else.
func TestReferences(t *testing.T) {
	byHand := strings.Replace(list, `"portmap"`, `"probelet"`, 1)
	const multus = `{"cniVersion":"0.3.1","name":"multus-cni-network","type":"multus","delegates":[%s]}`
	for name, test := range map[string]struct {
		file, text, place string // place: "": no reference; "?": one without a place
	}{
		"list":                          {"20-a.conflist", byHand, "plugins[1].type"},
		"single plugin":                 {"30-b.conf", `{"name":"b","type":"probelet"}`, "type"},
		"drop-in":                       {"pods/50-c.conf", `{"type":"probelet"}`, "type"},
		"renamed":                       {"05-x.conflist.cilium_bak", byHand, "plugins[1].type"},
		"renamed copy":                  {"00-probelet.conflist.cilium_bak", strings.Replace(byHand, `"x"`, `"probelet.dev/derivedFrom":"x","x"`, 1), "plugins[1].type"},
		"Multus: delegate":              {"00-multus.conf", fmt.Sprintf(multus, byHand), "delegates[0].plugins[1].type"},
		"Multus: path":                  {"00-multus.conf", `{"name":"m","type":"multus","clusterNetwork":"/host/etc/cni/net.d/00-probelet.conflist"}`, "clusterNetwork"},
		"Multus: several paths":         {"00-multus.conf", `{"name":"m","type":"multus","defaultNetworks":["x","/etc/cni/net.d/00-0-probelet.conflist"]}`, "defaultNetworks[1]"},
		"in another plugin's directory": {"multus/net.d/10-m.conf", byHand, "plugins[1].type"},
		"YAML":                          {"multus.d/x.yaml", "plugins:\n- type: ptp\n- type: probelet\n", "?"},
		"JSON in JSON":                  {"multus.d/x.json", `{"config":"{\"type\": \"probelet\"}"}`, "config"},
		"YAML, another type":            {"multus.d/x.yaml", "- type: probelet2\n", ""},
		"truncated":                     {"20-a.conflist", byHand[:len(byHand)-3], "?"},
		"truncated, with a path":        {"00-multus.conf", `{"name":"m","clusterNetwork":"/etc/cni/net.d/00-probelet.conflist",`, "?"},
		"another type":                  {"50-e.conf", single, ""},
		"network name":                  {"60-f.conflist", strings.Replace(list, `"pods"`, `"probelet"`, 1), ""},
		"not a configuration":           {"kubeconfig", "kind: Config # probelet", ""},
		"copy name outside a path":      {"70-g.conf", `{"name":"m","type":"bridge","of":"00-probelet.conflist"}`, ""},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, files{"10-pods.conflist": list})
			for _, way := range []Way{Copy, DropIn} {
				if _, err := n.Join(t.Context(), way); err != nil {
					t.Fatal(err)
				}
				if got, err := n.References(); err != nil || len(got) > 0 {
					t.Fatalf("before: %v, %v", got, err)
				}
			}
			n.write(t, test.file, test.text)
			want := []Reference{{filepath.Join(n.NetDir, test.file), strings.Trim(test.place, "?")}}
			if test.place == "" {
				want = nil
			}
			if got, err := n.References(); err != nil || !reflect.DeepEqual(got, want) {
				t.Errorf("%v, %v; want %v", got, err, want)
			}
		})
	}
}

// References follows symlinks, including NetDir itself.
func TestReferencesThroughLinks(t *testing.T) {
	n := newNode(t, files{"10-pods.conflist": list})
	elsewhere := newNode(t, files{"a/20-x.conf": `{"name":"x","type":"probelet"}`})
	link := filepath.Join(t.TempDir(), "net.d")
	for from, to := range map[string]string{
		link: n.NetDir, filepath.Join(n.NetDir, "other"): elsewhere.NetDir, filepath.Join(n.NetDir, "gone"): "/nowhere",
		filepath.Join(elsewhere.NetDir, "circle"): elsewhere.NetDir, filepath.Join(n.NetDir, "itself"): n.NetDir,
	} {
		if err := os.Symlink(to, from); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := n.Join(t.Context(), Copy); err != nil {
		t.Fatal(err)
	}
	for _, dir := range []string{n.NetDir, link} {
		n.NetDir = dir
		got, err := n.References()
		if want := []Reference{{filepath.Join(dir, "other/a/20-x.conf"), "type"}}; err != nil || !slices.Equal(got, want) {
			t.Errorf("%v, %v; want %v", got, err, want)
		}
	}
}

// The binary is executable whatever the mode of the source or of a previous binary.
func TestPluginMode(t *testing.T) {
	n := newNode(t, nil)
	source := filepath.Join(t.TempDir(), "new")
	for _, file := range []string{source, n.pluginFile()} {
		if err := os.WriteFile(file, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if _, err := n.PutPlugin(t.Context(), source); err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(n.pluginFile()); err != nil || info.Mode() != 0o755 {
			t.Errorf("%v, %v", info.Mode(), err)
		}
	}
}

// runtime models a container runtime: the returned function gives the chain that the runtime last read. containerd reads on write,
// rename and remove events (cni_conf_syncer.go).
func (n Node) runtime(t *testing.T) (chain func() string) {
	t.Helper()
	watcher, err := fsnotify.NewWatcher()
	if err == nil {
		err = watcher.Add(n.NetDir)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = watcher.Close() })
	var now atomic.Value
	now.Store(n.chainIn(t))
	go func() {
		for e := range watcher.Events {
			if !e.Has(fsnotify.Chmod) && !e.Has(fsnotify.Create) {
				now.Store(n.chainIn(t))
			}
		}
	}()
	return func() string { return now.Load().(string) }
}

func TestBestWay(t *testing.T) {
	for want, all := range map[Way]runtimes.List{
		DropIn: {{Name: "containerd", Libcni: "v1.3.0"}},
		Copy:   {{Name: "containerd", Libcni: "v1.3.0"}, {Name: "crio", Libcni: "v1.3.0"}},
	} {
		if got := BestWay(all); got != want {
			t.Errorf("%s: %s, want %s", all, got, want)
		}
	}
	if got := BestWay(nil); got != Copy {
		t.Errorf("no runtime: %s", got)
	}
}

// The runtime notices every change, including that of a process that was killed before it could wake the runtime.
func TestRuntimeNotices(t *testing.T) {
	t.Parallel()
	for _, way := range []Way{Copy, DropIn} {
		for range 10 { // to rule out chance
			n := newNode(t, files{"10-pods.conflist": list, "pods/20-other.conf": `{"type":"other"}`})
			chain := n.runtime(t)
			expect := func(what, want string) {
				t.Helper()
				var got string
				if !polltest.Within(polltest.Limit, func() bool { got = chain(); return got == want }) {
					t.Fatalf("%s: the runtime's chain is %s, want %s", what, got, want)
				}
			}
			if _, err := n.Join(t.Context(), way); err != nil {
				t.Fatal(err)
			}
			with := map[Way]string{Copy: "pods: ptp portmap probelet other", DropIn: "pods: ptp portmap probelet other"}[way]
			expect("joined", with)
			if _, err := n.Leave(t.Context()); err != nil {
				t.Fatal(err)
			}
			expect("left", "pods: ptp portmap other")
		}
	}
	n := newNode(t, files{"10-pods.conflist": list, "pods/20-other.conf": `{"type":"other"}`})
	chain := n.runtime(t)
	n.write(t, "pods/10-probelet.conf", "{\n  \"type\": \"probelet\"\n}\n")
	time.Sleep(settle)
	if got := chain(); strings.Contains(got, PluginType) {
		t.Fatalf("the runtime noticed without being woken: %s", got)
	}
	if err := n.Follow(t.Context(), DropIn, true); err != nil {
		t.Fatal(err)
	}
	polltest.Eventually(t, "the runtime was woken", func() bool { return strings.Contains(chain(), PluginType) })
}

// Whatever happens to the primary network's file, the chain is that network's plugins followed by ours. Without a primary network there
// is no chain.
func TestFollow(t *testing.T) {
	t.Parallel()
	for _, way := range []Way{Copy, DropIn} {
		t.Run(string(way), func(t *testing.T) {
			n := newNode(t, nil)
			n.follow(t, way)
			expect := func(what, want string) {
				t.Helper()
				var got string
				if !polltest.Within(polltest.Limit, func() bool { got = n.chainIn(t); return got == want }) {
					t.Fatalf("%s: the chain is %q, want %q", what, got, want)
				}
			}
			rename := func(from, to string) {
				t.Helper()
				if err := os.Rename(filepath.Join(n.NetDir, from), filepath.Join(n.NetDir, to)); err != nil {
					t.Fatal(err)
				}
			}
			n.write(t, "10-pods.conflist", list)
			expect("it comes", "pods: ptp portmap probelet")
			n.write(t, "10-pods.conflist", strings.Replace(list, "portmap", "firewall", 1))
			expect("it changes", "pods: ptp firewall probelet")
			whole := contents(t, n.NetDir)
			maps.DeleteFunc(whole, func(name, _ string) bool { return strings.HasPrefix(name, bell) }) // a Wake in progress
			n.write(t, "10-pods.conflist", list[:40])
			n.write(t, "99-other.conflist", strings.Replace(list, `"pods"`, `"other"`, 1))
			time.Sleep(3 * settle)
			whole["10-pods.conflist"], whole["99-other.conflist"] = list[:40], strings.Replace(list, `"pods"`, `"other"`, 1)
			if got := contents(t, n.NetDir); !reflect.DeepEqual(got, whole) {
				t.Fatalf("partly written: got\n%v, want\n%v", got, whole)
			}
			n.write(t, "new", strings.Replace(list, "portmap", "bandwidth", 1))
			if err := os.Remove(filepath.Join(n.NetDir, "99-other.conflist")); err != nil {
				t.Fatal(err)
			}
			rename("new", "10-pods.conflist")
			expect("it is replaced", "pods: ptp bandwidth probelet")
			rename("10-pods.conflist", "30-pods.conflist")
			expect("it is renamed", "pods: ptp bandwidth probelet")
			n.write(t, "20-other.conflist", strings.Replace(list, `"pods"`, `"other"`, 1))
			expect("another comes before it", "other: ptp portmap probelet")
			if err := os.Remove(filepath.Join(n.NetDir, "20-other.conflist")); err != nil {
				t.Fatal(err)
			}
			expect("the other goes", "pods: ptp bandwidth probelet")
			if err := os.Remove(filepath.Join(n.NetDir, "30-pods.conflist")); err != nil {
				t.Fatal(err)
			}
			expect("it goes", "none")
			n.write(t, "10-pods.conflist", list)
			expect("it comes back", "pods: ptp portmap probelet")
		})
	}
}

// follow runs Follow until the test ends.
func (n Node) follow(t *testing.T, way Way) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Follow(ctx, way, false) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
}

// NetDir is replaced, or a symlink's target changes: no notification arrives.
func TestFollowWithoutNotification(t *testing.T) {
	t.Parallel()
	n := newNode(t, files{"10-pods.conflist": list})
	n.follow(t, Copy)
	polltest.Eventually(t, "it has joined", func() bool { return strings.Contains(n.chainIn(t), PluginType) })
	if err := os.Rename(n.NetDir, n.NetDir+"-old"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(n.NetDir, 0o755); err != nil {
		t.Fatal(err)
	}
	original := filepath.Join(t.TempDir(), "pods")
	if err := os.WriteFile(original, []byte(list), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(original, filepath.Join(n.NetDir, "10-pods.conflist")); err != nil {
		t.Fatal(err)
	}
	late := func(want string) func() bool {
		return func() bool { time.Sleep(20 * time.Millisecond); return n.chainIn(t) == want }
	}
	polltest.Eventually(t, "it follows into the new directory", late("pods: ptp portmap probelet"))
	if err := os.WriteFile(original, []byte(strings.Replace(list, "portmap", "firewall", 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	polltest.Eventually(t, "it follows the link", late("pods: ptp firewall probelet"))
}

// Follow backs off from a process that immediately removes every file but its own.
func TestContested(t *testing.T) {
	t.Parallel()
	n := newNode(t, files{"10-pods.conflist": list})
	watcher, err := fsnotify.NewWatcher()
	if err == nil {
		err = watcher.Add(n.NetDir)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer watcher.Close() //nolint:errcheck // read only
	n.follow(t, Copy)
	rounds := 0
	for end := time.After(5 * time.Second); ; {
		select {
		case e := <-watcher.Events:
			if e.Has(fsnotify.Create) && filepath.Base(e.Name) == copyNames[0] {
				rounds++
				_ = os.Remove(e.Name)
			}
			continue
		case <-end:
		}
		break
	}
	if rounds < 2 || rounds > 8 { // the pauses double: 0.1 s, 0.2 s, …
		t.Errorf("%d rounds in 5 s, want 2 to 8", rounds)
	}
}

// Waiting for a network, or for its owner to finish writing it, causes no backoff: Follow joins as soon as the file is complete.
func TestNoBackoffWhileWaiting(t *testing.T) {
	n := newNode(t, nil)
	f := follower{Node: n, way: Copy, pause: settle}
	for i := range 20 {
		if err := f.join(t.Context()); !passes(err) || f.pause != settle {
			t.Fatalf("check %d: next one after %s: %v", i, f.pause, err)
		}
		n.write(t, "10-pods.conflist", list[:10+i])
	}
}

// If ctx ends before there is a network, Follow with once returns an error.
func TestInstallInterrupted(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	err := newNode(t, nil).Follow(ctx, Copy, true)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no network configuration") {
		t.Errorf("%v", err)
	}
}

// Concurrent processes, such as an init container and an administrator.
func TestJoinConcurrently(t *testing.T) {
	n := newNode(t, files{"10-pods.conflist": list})
	var all sync.WaitGroup
	for worker := range 4 {
		all.Go(func() {
			mine := n
			for i := range 50 {
				mine.Conf = map[string]string{"logFile": fmt.Sprintf("/%d-%d", worker, i)} // so that each Join writes
				if _, err := mine.Join(t.Context(), Copy); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if got := n.chainIn(t); got != "pods: ptp portmap probelet" {
		t.Errorf("chain %q", got)
	}
	if got := contents(t, n.NetDir); len(got) != 2 {
		t.Errorf("files: %v", got)
	}
}

const victim = "PROBELET_TEST_INSTALL"

// TestMain runs as the process that TestKilledAtAnyMoment kills, if its variables are set.
func TestMain(m *testing.M) {
	if dir := os.Getenv(victim); dir != "" {
		n := Node{NetDir: filepath.Join(dir, "net.d"), BinDir: filepath.Join(dir, "bin"), StateDir: filepath.Join(dir, "state"), Log: slog.New(slog.DiscardHandler)}
		for i := 0; ; i++ {
			n.Conf = map[string]string{"logFile": fmt.Sprintf("/%d", i)} // so that each Join writes
			_, err := n.PutPlugin(context.Background(), filepath.Join(dir, fmt.Sprintf("program%d", i%2)))
			if err == nil {
				_, err = n.Join(context.Background(), []Way{Copy, DropIn}[i/2%2])
			}
			if err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
	}
	os.Exit(m.Run())
}

func TestKilledAtAnyMoment(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	n := Node{NetDir: filepath.Join(dir, "net.d"), BinDir: filepath.Join(dir, "bin"), StateDir: filepath.Join(dir, "state"), Log: slog.New(slog.DiscardHandler)}
	if err := errors.Join(os.Mkdir(n.NetDir, 0o755), os.Mkdir(n.BinDir, 0o755)); err != nil {
		t.Fatal(err)
	}
	for _, plugin := range []string{"ptp", "portmap"} {
		n.addProgram(t, plugin)
	}
	n.write(t, "10-pods.conflist", list)
	before := contents(t, n.NetDir)
	programs := map[string]bool{}
	for i := range 2 {
		program := strings.Repeat(fmt.Sprint(i), 1<<20)
		programs[program] = true
		if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("program%d", i)), []byte(program), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for range 40 {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), victim+"="+dir)
		cmd.Stderr = os.Stderr
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20*time.Millisecond + rand.N(40*time.Millisecond))
		_ = cmd.Process.Kill()
		if err := cmd.Wait(); err == nil || cmd.ProcessState.ExitCode() >= 0 {
			t.Fatalf("the process exited on its own: %v", err)
		}
		// The plugin may not be there yet, or twice while one file replaces the other.
		if got := n.chainIn(t); got != "pods: ptp portmap" && strings.ReplaceAll(got, " probelet", "") != "pods: ptp portmap" {
			t.Fatalf("chain %q", got)
		}
		for _, file := range n.ours() {
			if text, err := os.ReadFile(file); err != nil || !json.Valid(text) {
				t.Fatalf("%s: %q, %v", file, text, err)
			}
		}
		if program, err := os.ReadFile(n.pluginFile()); err == nil && !programs[string(program)] {
			t.Fatalf("plugin has %d bytes", len(program))
		}
	}
	if got := n.chainIn(t); !strings.Contains(got, "probelet") {
		t.Errorf("the process never joined: %q", got)
	}
	if _, err := n.Join(t.Context(), Copy); err != nil {
		t.Fatal(err)
	}
	if _, err := n.Leave(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := contents(t, n.NetDir); !reflect.DeepEqual(got, before) {
		t.Errorf("leftover files: %v", got)
	}
	if _, err := n.PutPlugin(t.Context(), filepath.Join(dir, "program0")); err != nil {
		t.Fatal(err)
	}
	if got := contents(t, n.BinDir); len(got) != 3 {
		t.Errorf("%d files in the plugin directory", len(got))
	}
	if err := n.RemovePlugin(); err != nil {
		t.Fatal(err)
	}
}

// Any user can flock the world-readable directories. That must not block Join, Leave or RemovePlugin, and our own locks leave no files.
func TestDirectoriesLockedByUser(t *testing.T) {
	n := newNode(t, files{"10-net.conflist": list})
	for _, dir := range []string{n.NetDir, n.BinDir} {
		f, err := os.Open(dir)
		if err == nil {
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
		}
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close() //nolint:errcheck // read only
	}
	program := filepath.Join(t.TempDir(), PluginType)
	if err := os.WriteFile(program, []byte("program"), 0o755); err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, putErr := n.PutPlugin(t.Context(), program)
		_, joinErr := n.Join(t.Context(), Copy)
		_, leaveErr := n.Leave(t.Context())
		done <- errors.Join(putErr, joinErr, leaveErr, n.RemovePlugin())
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("blocked by another user's lock")
	}
	for _, dir := range []string{n.NetDir, n.BinDir} {
		if left, err := filepath.Glob(filepath.Join(dir, ".*")); err != nil || len(left) > 0 {
			t.Errorf("leftover files: %v, %v", left, err)
		}
	}
}
