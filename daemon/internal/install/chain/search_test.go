package chain

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/daemon/internal/install/runtimes"
	"github.com/probelet/probelet/daemon/internal/install/runtimes/runtimestest"
	"github.com/probelet/probelet/internal/polltest"
)

// process returns a runtime's process with files below its root.
func process(t *testing.T, name string, args []string, root files) runtimes.Runtime {
	t.Helper()
	return runtimes.Runtime{Name: name, PID: "17", Dir: runtimestest.Proc(t, name, args, root)}
}

// Join joins only if the runtime would find the plugin, and leaves the chain, however it was joined, once the runtime would not.
func TestMisplaced(t *testing.T) {
	naming := func(dir string) func(*testing.T, *Node) {
		return func(t *testing.T, n *Node) {
			r := process(t, "containerd", nil, files{
				"etc/containerd/config.toml": "[plugins.cri.cni]\nbin_dir = '" + strings.Replace(dir, "BIN", n.BinDir, 1) + "'\n",
			})
			if err := os.Symlink(n.BinDir, filepath.Join(n.BinDir, "link")); err != nil {
				t.Fatal(err)
			}
			n.Runtimes = func() runtimes.List { return runtimes.List{r} }
		}
	}
	silent := func(inDefault ...string) func(*testing.T, *Node) {
		return func(t *testing.T, n *Node) {
			root := files{}
			for _, name := range inDefault {
				root[defaultBinDir+"/"+name] = "#!"
			}
			r := process(t, "containerd", nil, root)
			n.Runtimes = func() runtimes.List { return runtimes.List{r} }
		}
	}
	removed := func(name string) func(*testing.T, *Node) {
		return func(t *testing.T, n *Node) {
			if err := os.Remove(filepath.Join(n.BinDir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, test := range map[string]struct {
		change func(*testing.T, *Node)
		want   string // in the error; empty: joined
	}{
		"complete":                        {func(*testing.T, *Node) {}, ""},
		"plugin missing":                  {removed(PluginType), "no such file"},
		"network's plugin missing":        {removed("portmap"), "portmap of network pods"},
		"network's plugin not executable": {func(_ *testing.T, n *Node) { _ = os.Chmod(filepath.Join(n.BinDir, "ptp"), 0o644) }, "ptp of network pods"},
		"runtime names BinDir":            {func(t *testing.T, n *Node) { removed("portmap")(t, n); naming("BIN/")(t, n) }, ""},
		"runtime names another directory": {naming("/usr/lib/cni"), "/usr/lib/cni, not in"},
		"one of two runtimes names another directory": {func(t *testing.T, n *Node) {
			naming("BIN")(t, n)
			one, other := n.Runtimes()[0], process(t, "crio", []string{"--cni-plugin-dir=/usr/lib/cni"}, nil)
			n.Runtimes = func() runtimes.List { return runtimes.List{one, other} }
		}, "crio looks for plugins in /usr/lib/cni"},
		"next to a runtime without pods": {func(t *testing.T, n *Node) {
			naming("BIN")(t, n)
			docker := process(t, "containerd", nil, files{"etc/containerd/config.toml": "disabled_plugins = ['cri']\n[plugins.cri.cni]\nbin_dir = '/usr/lib/cni'\n"})
			one := n.Runtimes()[0]
			n.Runtimes = func() runtimes.List { return runtimes.List{docker, one} }
		}, ""},
		"runtime names no directory":             {silent(), ""},
		"no directory, default has some plugins": {silent("ptp"), ""},
		"no directory, default has all plugins":  {silent("ptp", "portmap"), "names no plugin directory"},
		"runtime with another network directory": {func(t *testing.T, n *Node) {
			r := process(t, "crio", []string{"--cni-config-dir=/net", "--cni-plugin-dir=/usr/lib/cni"}, nil)
			n.Runtimes = func() runtimes.List { return runtimes.List{r} }
		}, ""},
		"plugin of another user": {func(t *testing.T, n *Node) {
			if err := os.Chown(filepath.Join(n.BinDir, "ptp"), 12345, 0); err != nil {
				t.Skip(err) // not root
			}
		}, "belongs to user 12345"},
		"missing on the host": {func(t *testing.T, n *Node) {
			host := filepath.Join(t.TempDir(), "1/root")
			theirs := filepath.Join(host, n.NetDir)
			if err := errors.Join(os.MkdirAll(theirs, 0o755), os.MkdirAll(filepath.Join(host, n.BinDir), 0o755)); err != nil {
				t.Fatal(err)
			}
			if err := unix.Mount(n.NetDir, theirs, "", unix.MS_BIND, ""); err != nil {
				t.Skip(err) // not root
			}
			t.Cleanup(func() { _ = unix.Unmount(theirs, unix.MNT_DETACH) })
			n.proc = filepath.Dir(filepath.Dir(host))
		}, "no such file"},
		"host has another NetDir": {func(t *testing.T, n *Node) {
			n.proc = t.TempDir()
			if err := os.MkdirAll(filepath.Join(n.proc, "1/root", n.NetDir), 0o755); err != nil {
				t.Fatal(err)
			}
		}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			for _, way := range []Way{Copy, DropIn} {
				n := newNode(t, files{"10-pods.conflist": list})
				test.change(t, &n)
				before := contents(t, n.NetDir)
				_, err := n.Join(t.Context(), way)
				if got := errors.Is(err, ErrMisplaced); got != (test.want != "") || !got && err != nil || got && !strings.Contains(err.Error(), test.want) {
					t.Fatalf("%v, want %q", err, test.want)
				}
				if got := contents(t, n.NetDir); (len(got) > len(before)) != (test.want == "") {
					t.Errorf("files: %v", got)
				}
				if _, _, err := n.Look(); errors.Is(err, ErrMisplaced) != (test.want != "") {
					t.Errorf("Look: %v", err)
				}

				n = newNode(t, files{"10-pods.conflist": list})
				if _, err := n.Join(t.Context(), way); err != nil {
					t.Fatal(err)
				}
				test.change(t, &n)
				_, err = n.Join(t.Context(), way)
				if got := n.chainIn(t); errors.Is(err, ErrMisplaced) != (test.want != "") || strings.Contains(got, PluginType) != (test.want == "") {
					t.Errorf("chain %q afterwards, %v", got, err)
				}
			}
		})
	}
}

// add runs ADD as a runtime does that looks for plugins in binDir.
func (n Node) add(t *testing.T, binDir string) error {
	t.Helper()
	file := ""
	entries, err := os.ReadDir(n.NetDir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if filepath.Ext(e.Name()) == ".conflist" && file == "" {
			file = filepath.Join(n.NetDir, e.Name())
		}
	}
	list, err := libcni.NetworkConfFromFile(file)
	if err != nil {
		return err
	}
	runtime := libcni.NewCNIConfigWithCacheDir([]string{binDir}, t.TempDir(), nil)
	_, err = runtime.AddNetworkList(t.Context(), list, &libcni.RuntimeConf{ContainerID: "c", NetNS: "/proc/self/ns/net", IfName: "eth0"})
	return err
}

// Pods start even if the runtime looks for plugins in a directory other than BinDir, which does not have ours.
func TestPodsStartWhenMisplaced(t *testing.T) {
	for _, way := range []Way{Copy, DropIn} {
		n := newNode(t, files{"10-pods.conflist": list})
		succeeding := func(dir string, names ...string) {
			t.Helper()
			for _, name := range names {
				if err := os.WriteFile(filepath.Join(dir, name), []byte("#!/bin/sh\necho '{\"cniVersion\": \"1.0.0\"}'\n"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
		}
		looks := t.TempDir()
		succeeding(looks, "ptp", "portmap")
		succeeding(n.BinDir, "ptp", "portmap", PluginType)
		if _, err := n.Join(t.Context(), way); err != nil {
			t.Fatal(err)
		}
		if err := n.add(t, n.BinDir); err != nil {
			t.Fatalf("%s: ADD with BinDir: %v", way, err)
		}
		if err := n.add(t, looks); err == nil || !strings.Contains(err.Error(), PluginType) {
			t.Fatalf("%s: the test does not detect a missing plugin: %v", way, err)
		}
		r := process(t, "crio", []string{"--cni-plugin-dir=" + looks}, nil)
		n.Runtimes = func() runtimes.List { return runtimes.List{r} }
		if _, err := n.Join(t.Context(), way); !errors.Is(err, ErrMisplaced) {
			t.Errorf("%s: %v", way, err)
		}
		if err := n.add(t, looks); err != nil {
			t.Errorf("%s: pods cannot start: %v", way, err)
		}
	}
}

// Follow leaves the chain when the binary is removed and joins again when it is back, without waiting for its next periodic check.
func TestFollowRemovedBinary(t *testing.T) {
	n := newNode(t, files{"10-pods.conflist": list})
	n.follow(t, Copy)
	polltest.Eventually(t, "joined", func() bool { return n.chainIn(t) == "pods: ptp portmap probelet" })
	for range 2 {
		if err := os.Remove(n.pluginFile()); err != nil {
			t.Fatal(err)
		}
		polltest.Eventually(t, "left", func() bool { return n.chainIn(t) == "pods: ptp portmap" })
		n.addProgram(t, PluginType)
		polltest.Eventually(t, "joined again", func() bool { return n.chainIn(t) == "pods: ptp portmap probelet" })
	}
}

func TestCanJoin(t *testing.T) {
	n := newNode(t, nil)
	if err := n.CanJoin(); err != nil {
		t.Errorf("no network yet: %v", err)
	}
	n.write(t, "10-pods.conflist", list)
	if err := os.Remove(n.pluginFile()); err != nil {
		t.Fatal(err)
	}
	if err := n.CanJoin(); err != nil {
		t.Errorf("plugin not installed yet: %v", err)
	}
	if err := os.Remove(filepath.Join(n.BinDir, "ptp")); err != nil {
		t.Fatal(err)
	}
	if err := n.CanJoin(); !errors.Is(err, ErrMisplaced) {
		t.Errorf("not ErrMisplaced: %v", err)
	}
	for _, flag := range []string{"--cni-net-dir", "--cni-bin-dir"} {
		missing := n
		*map[string]*string{"--cni-net-dir": &missing.NetDir, "--cni-bin-dir": &missing.BinDir}[flag] = filepath.Join(t.TempDir(), "none")
		if err := missing.CanJoin(); err == nil || !strings.Contains(err.Error(), flag) || !strings.Contains(err.Error(), "none") {
			t.Errorf("%s: %v", flag, err)
		}
	}
}

// A copy takes over the mode and owner of its original, which may contain a key, and follows their changes.
func TestCopyHasModeOfOriginal(t *testing.T) {
	n := newNode(t, files{"10-pods.conflist": list})
	original := filepath.Join(n.NetDir, "10-pods.conflist")
	for _, want := range []struct {
		mode os.FileMode
		uid  int
	}{{0o600, 0}, {0o640, 1234}, {0o644, 0}} {
		if err := errors.Join(os.Chmod(original, want.mode), os.Chown(original, want.uid, want.uid)); err != nil {
			t.Skip(err) // not root
		}
		j, err := n.Join(t.Context(), Copy)
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(j.File)
		if err != nil {
			t.Fatal(err)
		}
		if stat := info.Sys().(*syscall.Stat_t); info.Mode() != want.mode || int(stat.Uid) != want.uid || int(stat.Gid) != want.uid || !j.Changed {
			t.Errorf("mode %v, owner %d, group %d; want %v", info.Mode(), stat.Uid, stat.Gid, want)
		}
	}
}
