package runtimes

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/probelet/probelet/bpf/bpftest"
)

func TestRuntimes(t *testing.T) {
	proc, programs := t.TempDir(), t.TempDir()
	program := filepath.Join(programs, "plugin") // contains libcni, as a runtime does
	build := exec.Command("go", "build", "-ldflags", "-X github.com/containerd/containerd/v2/version.Version=2.9.1", "-o", program, "github.com/probelet/probelet/plugin")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	process := func(pid, name, mounts, program string) {
		t.Helper()
		dir := filepath.Join(proc, pid)
		err := os.MkdirAll(filepath.Join(dir, "ns"), 0o755)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, "comm"), []byte(name+"\n"), 0o644)
		}
		if err == nil {
			err = os.Symlink(program, filepath.Join(dir, "exe"))
		}
		if err == nil {
			err = os.Symlink(mounts, filepath.Join(dir, "ns/mnt"))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	expect := func(names string, dropIns, keeps bool) {
		t.Helper()
		var found []string
		all := Find(proc)
		for _, r := range all {
			found = append(found, r.Name)
		}
		if got := strings.Join(found, " "); got != names || all.ReadDropIns() != dropIns || all.KeepConfiguration() != keeps {
			t.Errorf("found %s (%s), drop-ins %v, keeps %v; want %s, %v, %v", got, all, all.ReadDropIns(), all.KeepConfiguration(), names, dropIns, keeps)
		}
	}
	process("1", "systemd", "host", "/bin/bash")
	process("17", "bash", "host", "/bin/bash")
	expect("", false, false)
	process("230", "containerd", "pod", program) // in a container
	expect("containerd", true, false)
	process("2300", "cri-dockerd", "host", "/bin/bash")
	expect("cri-dockerd", false, false)
	process("900", "crio", "host", program)
	expect("cri-dockerd crio", false, true)

	r := Runtime{Name: "containerd", PID: "230"}
	if r.Version, r.Libcni = versionsOf(program); r.Version != "2.9.1" || !strings.HasPrefix(r.Libcni, "v1.") || !(List{r}).ReadDropIns() {
		t.Errorf("%+v", r)
	}
	for libcni, want := range map[string]bool{"": false, "(devel)": false, "v1.2.3": false, "v1.3.0": true, "v1.3.0-rc1": false, "v1.10.0": true, "v0.8.1": false} {
		if got := (List{{Libcni: libcni}}).ReadDropIns(); got != want {
			t.Errorf("libcni %s: %v", libcni, got)
		}
		if (List{{Name: "crio", Libcni: libcni}}).ReadDropIns() {
			t.Errorf("libcni %s in CRI-O", libcni)
		}
	}
	if own, libcni := versionsOf("/bin/bash"); own+libcni != "" {
		t.Errorf("binary without modules: %s, %s", own, libcni)
	}
}

// A user can run a setuid-root program under a runtime's name with arbitrary arguments.
func TestUserProcessIsNoRuntime(t *testing.T) {
	bpftest.RequireRoot(t)
	dir, err := os.MkdirTemp("", "runtime") // accessible to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	program := filepath.Join(dir, "crio")
	text, err := os.ReadFile("/bin/sleep")
	if err == nil {
		err = errors.Join(os.Chmod(dir, 0o755), os.WriteFile(program, text, 0o755), os.Chmod(program, 0o755|os.ModeSetuid))
	}
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(program, "300")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()         //nolint:errcheck // killed
	defer cmd.Process.Kill() //nolint:errcheck // before that
	for _, r := range Find("/proc") {
		if r.PID == strconv.Itoa(cmd.Process.Pid) {
			t.Errorf("found %s", r)
		}
	}
}
