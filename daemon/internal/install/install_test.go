package install

import (
	"io"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spf13/cobra"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
)

func execute(t *testing.T, command func(io.Writer) *cobra.Command, args ...string) error {
	t.Helper()
	cmd := command(io.Discard)
	cmd.SetArgs(args)
	cmd.SilenceUsage, cmd.SilenceErrors = true, true
	return cmd.ExecuteContext(t.Context())
}

// The plugin's configuration has the fields that are not the plugin's defaults, and no more.
func TestPluginConf(t *testing.T) {
	for _, test := range []struct {
		bpfDir, stateDir string
		hook             attach.Hook
		want             map[string]string
	}{
		{datapath.DefaultDir, attach.DefaultStateDir, attach.HookTC, map[string]string{}},
		{datapath.DefaultDir, attach.DefaultStateDir, attach.HookXDP, map[string]string{"hook": "xdp"}},
		{"/b", "/s", attach.HookTC, map[string]string{"bpfDir": "/b", "stateDir": "/s"}},
		{"/b", "/s", attach.HookXDP, map[string]string{"bpfDir": "/b", "stateDir": "/s", "hook": "xdp"}},
	} {
		if got := pluginConf(test.bpfDir, test.stateDir, test.hook); !maps.Equal(got, test.want) {
			t.Errorf("%+v: %v", test, got)
		}
	}
}

// What install writes into the chain. The default is not written: it is the plugin's.
func TestInstallWritesTheHook(t *testing.T) {
	for hook, want := range map[string]string{"": "", "tc": "", "xdp": `"hook": "xdp"`} {
		netDir, binDir, plugin := t.TempDir(), t.TempDir(), filepath.Join(t.TempDir(), "probelet")
		for file, text := range map[string]string{
			filepath.Join(netDir, "10-net.conflist"): `{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp"}]}`,
			plugin:                                   "#!/bin/sh\n",
			filepath.Join(binDir, "ptp"):             "#!/bin/sh\n",
		} {
			if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		args := []string{"--chain", "copy", "--cni-net-dir", netDir, "--cni-bin-dir", binDir, "--state-dir", t.TempDir(), "--plugin", plugin}
		if hook != "" {
			args = append(args, "--hook", hook)
		}
		if err := execute(t, Command, args...); err != nil {
			t.Fatal(err)
		}
		files, err := filepath.Glob(filepath.Join(netDir, "00-*"))
		if err != nil || len(files) != 1 {
			t.Fatalf("%v, %v", files, err)
		}
		text, err := os.ReadFile(files[0])
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(text), want) || strings.Contains(string(text), "hook") != (want != "") {
			t.Errorf("--hook %q: %s", hook, text)
		}
	}
}

// Where the runtime would not find the plugin nothing is installed, whatever the daemon's mode, and no directory is made.
func TestInstallRefusesAWrongDirectory(t *testing.T) {
	netDir, plugin := t.TempDir(), filepath.Join(t.TempDir(), "probelet")
	file := filepath.Join(netDir, "10-net.conflist")
	for name, text := range map[string]string{file: `{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp"}]}`, plugin: "#!/bin/sh\n"} {
		if err := os.WriteFile(name, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	empty, none := t.TempDir(), filepath.Join(t.TempDir(), "none")
	for name, dirs := range map[string]struct{ net, bin, want string }{
		"others' plugins are not there": {netDir, empty, "would not find the plugin"},
		"no plugins' directory":         {netDir, none, "--cni-bin-dir"},
		"no networks' directory":        {none, empty, "--cni-net-dir"},
	} {
		args := []string{"--chain", "copy", "--cni-net-dir", dirs.net, "--cni-bin-dir", dirs.bin, "--plugin", plugin, "--state-dir", t.TempDir()}
		if err := execute(t, Command, args...); err == nil || !strings.Contains(err.Error(), dirs.want) {
			t.Errorf("%s: %v, want %q", name, err, dirs.want)
		}
		left, _ := filepath.Glob(filepath.Join(netDir, "*"))
		more, _ := filepath.Glob(filepath.Join(empty, "*"))
		if _, err := os.Stat(none); !os.IsNotExist(err) || len(left) != 1 || len(more) > 0 {
			t.Errorf("%s: left %s, %s, %v", name, left, more, err)
		}
	}
}
