package main

import (
	"encoding/json"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/spf13/pflag"

	"github.com/probelet/probelet/daemon/internal/flagenv"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// What somebody chose is a limit, even if it is the built-in one.
func TestChosenStaleness(t *testing.T) {
	for name, test := range map[string]struct {
		args, environ      []string
		staleness, ceiling bool
	}{
		"nothing":     {nil, nil, false, false},
		"flags":       {[]string{"--staleness=1", "--staleness-ceiling=5"}, nil, true, true},
		"environment": {nil, []string{"PROBELET_STALENESS_CEILING", "5"}, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			if test.environ != nil {
				t.Setenv(test.environ[0], test.environ[1])
			}
			var got probe.Defaults
			flags := pflag.NewFlagSet("", pflag.ContinueOnError)
			policyFlags(flags, &got)
			if err := flags.Parse(test.args); err != nil {
				t.Fatal(err)
			}
			if err := flagenv.Apply(flags); err != nil {
				t.Fatal(err)
			}
			noteChosen(flags, &got)
			want := probe.NewDefaults()
			want.StalenessSet, want.CeilingSet = test.staleness, test.ceiling
			if got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}

// The plugin refuses these, so that with them in the chain no pod could start, or be deleted.
func TestDirectories(t *testing.T) {
	for _, command := range []string{"install", "uninstall", "run"} {
		for flag, values := range map[string][]string{
			"--cni-net-dir": {"net"},
			"--cni-bin-dir": {"bin", ""},
			"--state-dir":   {"state", "", "./state"},
			"--bpf-dir":     {"bpf/probelet", "", "/sys/fs/bpf/pro.belet"},
		} {
			for _, value := range values {
				t.Run(command+flag+"="+value, func(t *testing.T) {
					// Before anything else is looked at: none of these is there, and nothing is changed.
					dir := t.TempDir()
					t.Chdir(dir)
					args := []string{command, "--cni-net-dir", filepath.Join(dir, "net"), "--cni-bin-dir", filepath.Join(dir, "bin"),
						"--state-dir", filepath.Join(dir, "state"), "--bpf-dir", filepath.Join(dir, "bpf"), flag, value}
					err := execute(t.Context(), args, io.Discard, io.Discard)
					if err == nil || !strings.Contains(err.Error(), flag+" "+strconv.Quote(value)+": must ") {
						t.Errorf("got %v, want an error that names %s and %q", err, flag, value)
					}
					if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
						t.Errorf("%v, %v: are there now", left, err)
					}
				})
			}
		}
	}
}

func TestLogFormats(t *testing.T) {
	var text strings.Builder
	log, err := newLog(&text, "json", &slog.LevelVar{})
	if err != nil {
		t.Fatal(err)
	}
	log.Info("hello", "pod", "a/b")
	log.Debug("not this")
	var line map[string]any
	if err := json.Unmarshal([]byte(text.String()), &line); err != nil || line["msg"] != "hello" || line["pod"] != "a/b" {
		t.Errorf("%s: %v", &text, err)
	}
	if _, err := newLog(io.Discard, "xml", nil); err == nil || !strings.Contains(err.Error(), `--log-format "xml"`) {
		t.Errorf("%v", err)
	}
}
