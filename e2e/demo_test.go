package e2e

import (
	"bufio"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/e2e/harness/node"
)

// demo returns a command that keeps its temporary files in dir.
func demo(dir string, env ...string) *exec.Cmd {
	cmd := exec.Command(filepath.Join(machine.Bin, "demo"))
	cmd.Env = append(node.Environment(), append(env, "TMPDIR="+dir)...)
	return cmd
}

func TestDemo(t *testing.T) {
	dir, file := t.TempDir(), filepath.Join(t.TempDir(), "demo.json")
	out, err := demo(dir, "DEMO_N=100", "DEMO_JSON="+file).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, want := range []string{"TIME_WAIT", "NAMESPACE/POD", "fresh"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("the tables lack %q:\n%s", want, out)
		}
	}
	text, err := os.ReadFile(file)
	must(t, err)
	var report struct {
		Kernel string
		Runs   []map[string]any
	}
	must(t, json.Unmarshal(text, &report))
	if report.Kernel != node.Kernel() || len(report.Runs) != 8 {
		t.Errorf("kernel %q, %d runs", report.Kernel, len(report.Runs))
	}
	keys := "probe family entry n failures p50_us p99_us time_wait_host time_wait_pod server_requests answered"
	for _, key := range strings.Fields(keys) {
		for _, run := range report.Runs {
			if run[key] == nil {
				t.Errorf("%s is missing in %v", key, run)
			}
		}
	}
	expectEmpty(t, dir)
}

// Ctrl-C in the middle of a run cleans up.
func TestDemoInterrupted(t *testing.T) {
	dir := t.TempDir()
	cmd := demo(dir, "DEMO_N=1000000")
	stderr, err := cmd.StderrPipe()
	must(t, err)
	must(t, cmd.Start())
	lines := bufio.NewScanner(stderr)
	for lines.Scan() && !strings.Contains(lines.Text(), "1000000 http probes") {
	}
	made, err := os.ReadDir(dir)
	must(t, err)
	if len(made) != 1 {
		t.Fatalf("%d temporary directories, want 1", len(made))
	}
	cgroup := filepath.Join(filepath.Dir(filepath.Dir(machine.CgroupPath(node.ProberCgroup))), made[0].Name())
	if _, err := os.Stat(cgroup); err != nil {
		t.Error(err)
	}

	must(t, cmd.Process.Signal(unix.SIGINT))
	for lines.Scan() { // read everything before Wait closes the pipe
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 128+int(unix.SIGINT) {
		t.Errorf("interrupted: %v", err)
	}
	if _, err := os.Stat(cgroup); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is left (%v)", cgroup, err)
	}
	expectEmpty(t, dir)
}

func expectEmpty(t *testing.T, dir string) {
	t.Helper()
	left, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range left {
		t.Errorf("left behind: %s", e.Name())
	}
}
