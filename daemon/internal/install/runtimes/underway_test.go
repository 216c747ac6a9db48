package runtimes

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/internal/polltest"
)

// Only processes that root's runtime runs count as plugins, not other processes with the same environment, even under a runtime's name.
func TestUnderWay(t *testing.T) {
	bpftest.RequireRoot(t)
	if all := Find("/proc"); len(all) > 0 {
		t.Skipf("container runtime on this machine: %s", all)
	}
	start := func(name string, attributes *syscall.SysProcAttr, script string) {
		t.Helper()
		cmd := exec.Command("/bin/sh", "-c", "echo -n $0 > /proc/self/comm; "+script, name)
		cmd.SysProcAttr = attributes
		in, err := cmd.StdinPipe()
		if err == nil {
			err = cmd.Start()
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = in.Close(); _ = cmd.Wait() }) // cat exits, and the shell with it
	}
	const ours = "underway-" // other tests may be running plugins
	plugin := func(container string) string {
		return "CNI_COMMAND=ADD CNI_CONTAINERID=" + ours + container + " cat"
	}
	user := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	expect := func(running int, want ...string) {
		t.Helper()
		polltest.Eventually(t, fmt.Sprintf("%d plugins run", running), func() bool {
			processes, _ := filepath.Glob("/proc/[0-9]*")
			processes = slices.DeleteFunc(processes, func(p string) bool { return !strings.HasPrefix(containerOf(p), ours) })
			return len(processes) == running
		})
		var got []string
		for container := range UnderWay("/proc") {
			if name, isOurs := strings.CutPrefix(container, ours); isOurs {
				got = append(got, name)
			}
		}
		if slices.Sort(got); !slices.Equal(got, want) {
			t.Fatalf("got %v, want %v", got, want)
		}
	}

	start("sh", nil, plugin("of-root"))
	start("sh", user, plugin("of-a-user"))
	expect(2, "of-root") // no runtime is found

	start("containerd", user, plugin("of-a-false-runtime")+"; :")
	expect(3, "of-root")
	start("containerd", nil, plugin("direct")+"; :")
	start("containerd", nil, "sh -c '"+plugin("delegated")+"; :'; :")
	start("containerd", nil, "unshare --mount sh -c '"+plugin("of-a-pod")+"; :'; :")
	expect(6, "delegated", "direct")
}
