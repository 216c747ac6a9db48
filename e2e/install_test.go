package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/e2e/harness/node"
)

// snapshot records everything below some directories: files with mode and content.
func snapshot(t *testing.T, dirs ...string) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, dir := range dirs {
		must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil || d.IsDir() {
				all[path] = "directory"
				return err
			}
			text, err := os.ReadFile(path)
			all[path] = info.Mode().String() + " " + string(text)
			return err
		}))
	}
	return all
}

// probelet joins an existing network, and uninstall restores the node's previous state.
func TestInstallAndUninstall(t *testing.T) {
	for _, way := range []string{"copy", "dropin"} {
		t.Run(way, func(t *testing.T) {
			s, plain := newPlainScene(t)
			before := snapshot(t, s.NetDir(), s.PluginDir())
			old := plain.add(t)

			s.daemon.Kill()
			must(t, s.install("--chain", way))
			s.startDaemon("--cni-net-dir", s.NetDir(), "--cni-bin-dir", s.PluginDir(), "--chain", way)
			p := plain.add(t)
			must(t, s.WriteSpecs(node.Probed{Pod: p.Pod, Readiness: []node.Probe{longHTTP}}))
			p.makeFresh(longHTTP)
			expectAnswered(t, p, longHTTP, p.IPv4, 10)
			must(t, p.Check())
			ended := plain.add(t)
			must(t, ended.Del())

			// When the primary's owner rewrites its configuration, the chain follows.
			rewritten := plain.rewrite(t)
			if !within(deadline, func() bool { return strings.Contains(s.effective(t), `"mtu": 1400`) }) {
				t.Fatalf("the chain is still %s", s.effective(t))
			}
			before[rewritten] = snapshot(t, s.NetDir())[rewritten]

			if err := s.uninstall("--settle", "10ms"); err == nil ||
				!strings.Contains(err.Error(), "another probeletd is running") {
				t.Fatalf("next to a running daemon: %v", err)
			}
			must(t, s.daemon.Stop())
			objects := pinned(t, s)
			const kept = "GET /other HTTP/1.1\r\nHost: pod\r\n\r\n"
			last := strings.Replace(kept, "pod\r\n", "pod\r\nConnection: close\r\n", 1)
			handedOver := s.dial(t, s.prober, p.address(httpPort))
			must(t, send(kept)(handedOver))
			_, err := io.ReadFull(handedOver, make([]byte, len("HTTP/1.1 404")))
			must(t, err)
			uninstalled := make(chan error, 1)
			go func() {
				uninstalled <- s.uninstall("--settle", "200ms")
			}()
			// Probes, while pods come and go.
			for gone, rounds := false, 0; !gone; rounds++ {
				select {
				case err := <-uninstalled:
					must(t, err)
					gone = true
				default:
				}
				p.probe(longHTTP, p.IPv4, 20)
				passing := plain.add(t)
				must(t, passing.Del())
				switch {
				case rounds < 10:
					must(t, send(kept)(handedOver))
				case rounds == 10:
					must(t, send(last)(handedOver))
					rest, err := io.ReadAll(handedOver)
					if err != nil || strings.Count(string(rest), "HTTP/1.1 404") != 11 {
						t.Errorf("a connection that was handed over ended with %s, %v", rest, err)
					}
				}
			}
			if after := snapshot(t, s.NetDir(), s.PluginDir()); !reflect.DeepEqual(after, before) {
				t.Errorf("left\n%v\nbefore\n%v", after, before)
			}
			s.expectNothingLeft(t, objects)
			must(t, p.Check())
			p.probe(longHTTP, p.IPv4, 3)
			must(t, p.Del())
			must(t, old.Del())
		})
	}
}

// uninstall waits for a pod that a slow plugin is still setting up with the old configuration, and leaves nothing of that
// pod.
func TestUninstallWaitsForRunningPlugins(t *testing.T) {
	s, plain := newPlainScene(t)
	s.daemon.Kill()
	dir := t.TempDir()
	started, release := filepath.Join(dir, slowStarted), filepath.Join(dir, slowRelease)
	must(t, s.OwnPlugin(slowPlugin, "/proc/self/exe"))
	plain.edit(t, func(plugins []any) []any { return append(plugins, map[string]any{"type": slowPlugin, "dir": dir}) })
	begin := func() (*node.Pod, chan error) {
		t.Helper()
		must(t, s.install())
		p, err := s.NewPod()
		must(t, err)
		added := make(chan error, 1)
		go func() { added <- p.Add() }()
		if !within(deadline, func() bool { _, err = os.Stat(started); return err == nil }) {
			t.Fatal(err)
		}
		return p, added
	}
	p, added := begin()
	uninstalled := make(chan error, 1)
	go func() { uninstalled <- s.uninstall("--settle", "10ms") }()
	select {
	case err := <-uninstalled:
		t.Errorf("uninstall did not wait: %v", err)
	case <-time.After(3 * time.Second):
	}
	must(t, os.WriteFile(release, nil, 0o600))
	must(t, <-added)
	must(t, <-uninstalled)
	s.expectNothingLeft(t, nil)
	must(t, p.Del())

	must(t, errors.Join(os.Remove(release), os.Remove(started)))
	p, added = begin()
	if err := s.uninstall("--settle", "10ms", "--in-flight", "100ms"); err == nil || !strings.Contains(err.Error(), "still at work") {
		t.Errorf("with a hanging plugin: %v", err)
	}
	must(t, os.WriteFile(release, nil, 0o600))
	must(t, <-added)
	must(t, s.uninstall("--settle", "10ms"))
	s.expectNothingLeft(t, nil)
	must(t, p.Del())
}

// uninstall does not remove the plugin from a configuration that the user wrote.
func TestUninstallRefusesManualConfiguration(t *testing.T) {
	s, plain := newPlainScene(t)
	must(t, s.install())
	plain.edit(t, func(plugins []any) []any {
		return append(plugins, map[string]any{"type": "probelet", "bpfDir": s.BPFDir, "stateDir": s.StateDir})
	})
	s.daemon.Kill()
	before := snapshot(t, s.NetDir(), s.PluginDir())
	if err := s.uninstall("--settle", "10ms"); err == nil || !strings.Contains(err.Error(), plain.file) {
		t.Errorf("%v does not name %s", err, plain.file)
	}
	if after := snapshot(t, s.NetDir(), s.PluginDir()); !reflect.DeepEqual(after, before) {
		t.Errorf("left\n%v\nbefore\n%v", after, before)
	}
	p := plain.add(t)
	plain.edit(t, func(plugins []any) []any { return plugins[:len(plugins)-1] })
	must(t, s.uninstall("--settle", "10ms"))
	s.expectNothingLeft(t, nil)
	must(t, p.Del())
}

// If the plugin cannot be installed, it does not join the chain.
func TestInstallWithoutItsPlugin(t *testing.T) {
	s, _ := newPlainScene(t)
	before := snapshot(t, s.NetDir(), s.PluginDir())
	if err := s.install("--plugin", "/nowhere/probelet"); err == nil || !strings.Contains(err.Error(), "/nowhere/probelet") {
		t.Errorf("%v", err)
	}
	if after := snapshot(t, s.NetDir(), s.PluginDir()); !reflect.DeepEqual(after, before) {
		t.Errorf("left\n%v\nbefore\n%v", after, before)
	}
}

// uninstall can be killed at any moment and run again, and pods can come and go in between.
func TestUninstallResumesAfterKill(t *testing.T) {
	const whole, moments = 3 * time.Second, 8 // the approximate duration of uninstall
	for i := range moments {
		killed := whole * time.Duration(i+1) / (moments + 1)
		t.Run(killed.String(), func(t *testing.T) {
			t.Parallel()
			s, plain := newPlainScene(t)
			before := snapshot(t, s.NetDir(), s.PluginDir())
			must(t, s.install())
			p := plain.add(t)
			must(t, s.daemon.Stop())
			objects := pinned(t, s)
			uninstall := s.command("uninstall", "--settle", "500ms")
			must(t, uninstall.Start())
			time.Sleep(killed)
			_ = uninstall.Process.Kill()
			_ = uninstall.Wait()
			passing := plain.add(t)
			must(t, passing.Del())
			must(t, s.uninstall("--settle", "10ms"))
			if after := snapshot(t, s.NetDir(), s.PluginDir()); !reflect.DeepEqual(after, before) {
				t.Errorf("left\n%v\nbefore\n%v", after, before)
			}
			s.expectNothingLeft(t, objects)
			must(t, p.Del())
		})
	}
	t.Run("while removing pins", func(t *testing.T) {
		s, plain := newPlainScene(t)
		must(t, s.install())
		p := plain.add(t)
		must(t, s.daemon.Stop())
		objects := pinned(t, s)
		pins, err := filepath.Glob(filepath.Join(s.BPFDir, "*", "prober"))
		must(t, err)
		must(t, os.Remove(pins[0]))
		must(t, s.uninstall("--settle", "10ms"))
		s.expectNothingLeft(t, objects)
		must(t, p.Del())
	})
}

// CRI-O deletes a pod with the configuration used for its ADD. As long as that may name the plugin, the binary stays and
// works on its own. Here, a process merely has CRI-O's name.
func TestUninstallLeavesThePluginToCRIO(t *testing.T) {
	// All nodes share this directory: remove what the pods of other tests left.
	must(t, os.RemoveAll("/var/lib/cni/results"))
	s, plain := newPlainScene(t)
	s.daemon.Kill()
	must(t, s.install())
	p := plain.add(t)

	sleep, err := os.ReadFile("/bin/sleep")
	must(t, err)
	program := filepath.Join(t.TempDir(), "crio")
	must(t, os.WriteFile(program, sleep, 0o755))
	crio := exec.Command(program, "infinity")
	must(t, crio.Start())
	t.Cleanup(func() {
		_ = crio.Process.Kill()
		_ = crio.Wait()
	})
	must(t, s.uninstall("--settle", "10ms"))
	del := exec.Command(filepath.Join(s.PluginDir(), "probelet"))
	del.Env = []string{"CNI_COMMAND=DEL", "CNI_CONTAINERID=any", "CNI_IFNAME=eth0", "CNI_NETNS=" + p.Netns, "CNI_PATH=" + s.PluginDir()}
	del.Stdin = strings.NewReader(fmt.Sprintf(`{"cniVersion": "1.0.0", "name": "n", "type": "probelet", "bpfDir": %q, "stateDir": %q}`, s.BPFDir, s.StateDir))
	must(t, node.RunCommand(del))
	must(t, p.Del())
	must(t, s.uninstall("--settle", "10ms"))
	s.expectNothingLeft(t, nil)
}

// network is the configuration of a network without probelet.
type network struct {
	s    *scene
	file string
}

// withoutProbelet removes probelet from the node's configuration, and its binary from the plugin directory.
func (s *scene) withoutProbelet(t *testing.T) *network {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(s.NetDir(), "*.conflist"))
	must(t, err)
	n := &network{s, files[0]}
	n.edit(t, func(plugins []any) []any { return plugins[:len(plugins)-1] })
	must(t, s.OwnPlugins("ptp", "host-local"))
	return n
}

func (n *network) edit(t *testing.T, change func(plugins []any) []any) {
	t.Helper()
	text, err := os.ReadFile(n.file)
	must(t, err)
	var list map[string]any
	must(t, json.Unmarshal(text, &list))
	list["plugins"] = change(list["plugins"].([]any))
	text, err = json.MarshalIndent(list, "", "  ")
	must(t, err)
	must(t, os.WriteFile(n.file+".new", text, 0o644))
	must(t, os.Rename(n.file+".new", n.file))
}

func (n *network) rewrite(t *testing.T) (file string) {
	t.Helper()
	n.edit(t, func(plugins []any) []any {
		plugins[0].(map[string]any)["mtu"] = 1400
		return plugins
	})
	return n.file
}

func (n *network) add(t *testing.T) *pod {
	t.Helper()
	return n.s.newPod()
}

// effective returns the text of the file that the runtime reads first.
func (s *scene) effective(t *testing.T) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(s.NetDir(), "*.conflist"))
	must(t, err)
	text, err := os.ReadFile(files[0])
	must(t, err)
	return string(text)
}

// newPlainScene returns a node with an existing network and a daemon.
func newPlainScene(t *testing.T) (*scene, *network) {
	t.Helper()
	s := newScene(t, node.PTP)
	return s, s.withoutProbelet(t)
}

// command runs a probeletd subcommand on the node.
func (s *scene) command(verb string, flags ...string) *exec.Cmd {
	return exec.Command(filepath.Join(s.Bin, "probeletd"), append([]string{
		verb, "--bpf-dir", s.BPFDir, "--state-dir", s.StateDir, "--cni-net-dir", s.NetDir(), "--cni-bin-dir", s.PluginDir(),
	}, flags...)...)
}

func (s *scene) install(flags ...string) error {
	return node.RunCommand(s.command("install", append([]string{"--chain", "copy"}, flags...)...))
}

func (s *scene) uninstall(flags ...string) error {
	return node.RunCommand(s.command("uninstall", flags...))
}

// expectNothingLeft checks that uninstall removed its files and freed the BPF objects that were pinned before.
func (s *scene) expectNothingLeft(t *testing.T, objects map[node.Object]bool) {
	t.Helper()
	for _, path := range []string{s.BPFDir, s.StateDir, filepath.Join(s.PluginDir(), "probelet")} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s is left: %v", path, err)
		}
	}
	expectDead(t, objects)
}

// slowPlugin is the name under which this program acts as a CNI plugin that waits to be released.
const (
	slowPlugin = "slow"
	// Names of files in the directory that its configuration specifies.
	slowStarted = "started"
	slowRelease = "release"
)

func runSlowPlugin() {
	if os.Getenv("CNI_COMMAND") != "ADD" {
		return
	}
	var conf struct {
		Dir        string          `json:"dir"`
		PrevResult json.RawMessage `json:"prevResult"`
	}
	err := json.NewDecoder(os.Stdin).Decode(&conf)
	if err == nil {
		err = os.WriteFile(filepath.Join(conf.Dir, slowStarted), nil, 0o600)
	}
	if err == nil {
		within(time.Minute, func() bool { _, err := os.Stat(filepath.Join(conf.Dir, slowRelease)); return err == nil })
	}
	if err != nil {
		fmt.Printf(`{"code": 100, "msg": %q}`, err)
		os.Exit(1)
	}
	fmt.Printf("%s", conf.PrevResult)
}
