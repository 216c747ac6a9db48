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

// program returns the header of an ELF executable for this machine, after change.
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
		"executable":           {program(t, nil), ""},
		"position-independent": {program(t, func(h *elf.Header64) { h.Type = uint16(elf.ET_DYN) }), ""},
		"script":               {[]byte("#!/bin/sh\n"), "must be an ELF executable: "},
		"empty file":           {nil, "must be an ELF executable: "},
		"object file":          {program(t, func(h *elf.Header64) { h.Type = uint16(elf.ET_REL) }), "must be an ELF executable, not ET_REL"},
		"another architecture": {program(t, func(h *elf.Header64) { h.Machine = uint16(elf.EM_S390) }), "built for EM_S390"},
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
				t.Errorf("got %v, want an error that names the file and contains %q", err, test.want)
			}
		})
	}
	none := filepath.Join(t.TempDir(), "none")
	if err := checkPlugin(none); err == nil || !strings.Contains(err.Error(), "--plugin: ") || !strings.Contains(err.Error(), none) {
		t.Errorf("missing file: %v", err)
	}
}

func TestPluginConfOmitsDefaults(t *testing.T) {
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

// The default is omitted, because it is the plugin's own.
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

// Install changes nothing and creates no directory if the runtime would not find the plugin.
func TestInstallRefusesWrongDirectory(t *testing.T) {
	netDir, plugin := t.TempDir(), filepath.Join(t.TempDir(), "probelet")
	file := filepath.Join(netDir, "10-net.conflist")
	for name, text := range map[string]string{file: `{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp"}]}`, plugin: string(program(t, nil))} {
		if err := os.WriteFile(name, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	empty, none := t.TempDir(), filepath.Join(t.TempDir(), "none")
	for name, dirs := range map[string]struct{ net, bin, want string }{
		"other plugins missing": {netDir, empty, "would not find the plugin"},
		"no plugin directory":   {netDir, none, "--cni-bin-dir"},
		"no network directory":  {none, empty, "--cni-net-dir"},
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
			t.Errorf("%s: found %s, %s, %v afterwards", name, left, more, err)
		}
	}
}
