package install

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"io"
	"log/slog"
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

// program returns an ELF file's header, with the changes made to it.
func program(t *testing.T, change func(*elf.Header64)) []byte {
	t.Helper()
	own, err := headerOf("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	h := elf.Header64{
		Ident:   [elf.EI_NIDENT]byte{0x7f, 'E', 'L', 'F', byte(own.Class), byte(own.Data), byte(elf.EV_CURRENT)},
		Type:    uint16(elf.ET_EXEC),
		Machine: uint16(own.Machine),
		Version: uint32(elf.EV_CURRENT),
	}
	if change != nil {
		change(&h)
	}
	var text bytes.Buffer
	if err := binary.Write(&text, own.ByteOrder, h); err != nil {
		t.Fatal(err)
	}
	return text.Bytes()
}

func TestCheckPlugin(t *testing.T) {
	for name, test := range map[string]struct {
		text []byte
		want string // in the error; empty: none
	}{
		"a program":                {program(t, nil), ""},
		"position-independent":     {program(t, func(h *elf.Header64) { h.Type = uint16(elf.ET_DYN) }), ""},
		"a script":                 {[]byte("#!/bin/sh\n"), "must be an ELF executable: "},
		"an empty file":            {nil, "must be an ELF executable: "},
		"an object file":           {program(t, func(h *elf.Header64) { h.Type = uint16(elf.ET_REL) }), "must be an ELF executable, not ET_REL"},
		"for another architecture": {program(t, func(h *elf.Header64) { h.Machine = uint16(elf.EM_S390) }), "built for EM_S390"},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "probelet")
			if err := os.WriteFile(file, test.text, 0o755); err != nil { //nolint:gosec // a program
				t.Fatal(err)
			}
			err := checkPlugin(file)
			if test.want == "" && err != nil {
				t.Error(err)
			}
			if test.want != "" && (err == nil || !strings.Contains(err.Error(), "--plugin \""+file+"\": ") || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("got %v, want an error that names the file and has %q in it", err, test.want)
			}
		})
	}
	none := filepath.Join(t.TempDir(), "none")
	if err := checkPlugin(none); err == nil || !strings.Contains(err.Error(), "--plugin: ") || !strings.Contains(err.Error(), none) {
		t.Errorf("no such file: %v", err)
	}
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
			plugin:                                   string(program(t, nil)),
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
	for name, text := range map[string]string{file: `{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp"}]}`, plugin: string(program(t, nil))} {
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
		o := Options{
			NetDir: dirs.net, BinDir: dirs.bin, StateDir: t.TempDir(), Log: slog.New(slog.DiscardHandler), Chain: "copy", Plugin: plugin,
			proc: t.TempDir(), // no runtime
		}
		if err := Install(t.Context(), o); err == nil || !strings.Contains(err.Error(), dirs.want) {
			t.Errorf("%s: %v, want %q", name, err, dirs.want)
		}
		left, _ := filepath.Glob(filepath.Join(netDir, "*"))
		more, _ := filepath.Glob(filepath.Join(empty, "*"))
		if _, err := os.Stat(none); !os.IsNotExist(err) || len(left) != 1 || len(more) > 0 {
			t.Errorf("%s: left %s, %s, %v", name, left, more, err)
		}
	}
}
