// Package tools tests the script that builds the pinned tools.
package tools

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// fakeGo stands in for the go command: it records what it is told to build, and builds nothing.
const fakeGo = `#!/bin/sh
case "$*" in
env*) echo "$FAKE_GO_VERSION" ;;
*list*) echo "$FAKE_GO_MODULE" ;;
*) echo "$*" >>"$FAKE_GO_LOG" ;;
esac
`

func TestBuildStamps(t *testing.T) {
	script, err := filepath.Abs("build.sh")
	if err != nil {
		t.Fatal(err)
	}
	work := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		t.Helper()
		file := filepath.Join(work, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return file
	}
	write("fake/go", fakeGo, 0o755)
	for _, name := range []string{"localhost.crt", "localhost.key"} {
		write("module/test/images/agnhost/porter/"+name, "", 0o444)
	}
	log := write("log", "", 0o644)
	for _, dir := range []string{"here/deeper", "there"} {
		if err := os.MkdirAll(filepath.Join(work, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// build runs the script in a directory below work, and returns its exit code.
	build := func(goVersion, cwd string, args ...string) int {
		t.Helper()
		cmd := exec.Command(script, args...)
		cmd.Dir = filepath.Join(work, cwd)
		cmd.Env = append(os.Environ(),
			"PATH="+filepath.Join(work, "fake")+":"+os.Getenv("PATH"), "CDPATH=.:"+work,
			"FAKE_GO_VERSION="+goVersion, "FAKE_GO_LOG="+log, "FAKE_GO_MODULE="+filepath.Join(work, "module"))
		out, err := cmd.CombinedOutput()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatalf("%v: %s", err, out)
		}
		return cmd.ProcessState.ExitCode()
	}
	bin := filepath.Join(work, "here/bin/cluster")
	for _, set := range []string{"cluster", "conformance"} {
		if code := build("1", "here", "bin/cluster", set, "check"); code != 1 {
			t.Errorf("%s: check before the build exits with %d", set, code)
		}
	}
	if _, err := os.Stat(bin); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("check made the directory: %v", err)
	}

	for _, set := range []string{"cluster", "conformance"} {
		if code := build("1", "here", "bin/cluster", set); code != 0 {
			t.Fatalf("%s: the build exits with %d", set, code)
		}
		if _, err := os.Stat(filepath.Join(bin, "stamp-"+set)); err != nil {
			t.Error(err)
		}
		for _, from := range [][2]string{
			{"here", "bin/cluster"}, {"here", "./bin//cluster/"}, {"here/deeper", "../bin/cluster"},
			{"there", "../here/bin/cluster"}, {"there", bin},
		} {
			if code := build("1", from[0], from[1], set, "check"); code != 0 {
				t.Errorf("%s: check of %s in %s exits with %d", set, from[1], from[0], code)
			}
		}
		if code := build("2", "here", "bin/cluster", set, "check"); code != 1 {
			t.Errorf("%s: check with another version of Go exits with %d", set, code)
		}
	}

	before := commands(t, log)
	for _, command := range before {
		if !strings.Contains(command, " -o "+bin+"/") {
			t.Errorf("not built into %s: %s", bin, command)
		}
	}
	if code := build("1", "there", bin, "cluster"); code != 0 || len(commands(t, log)) != len(before) {
		t.Errorf("an up-to-date set is built again; exit code %d", code)
	}
	if found, err := filepath.Glob(filepath.Join(work, "*", "*", "stamp*")); err != nil || len(found) != 0 {
		t.Errorf("stamps elsewhere: %v %q", err, found)
	}
	if code := build("1", "here", "bin/cluster", "neither"); code != 2 {
		t.Errorf("an unknown set exits with %d", code)
	}
}

func commands(t *testing.T, log string) []string {
	t.Helper()
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n")
}
