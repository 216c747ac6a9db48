package prober

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
)

func TestParseProber(t *testing.T) {
	for value, want := range map[string]Finder{
		"host":               {},
		"kubelet":            {Kubelet: true},
		"cgroup:/sys/fs/x/y": {cgroup: "/sys/fs/x/y"},
	} {
		if got, err := Parse(value); !reflect.DeepEqual(got, want) || err != nil {
			t.Errorf("%q: %+v, %v", value, got, err)
		}
	}
	for _, value := range []string{"", "hosts", "cgroup:", "cgroup:relative", "/sys/fs/cgroup"} {
		if got, err := Parse(value); err == nil || !strings.Contains(err.Error(), value) {
			t.Errorf("%q: %+v, error %v does not name it", value, got, err)
		}
	}
}

func TestProberMustBeACgroup(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{dir, filepath.Join(dir, "missing")} {
		if got, err := (&Finder{cgroup: path}).Find(); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %+v, error %v does not name it", path, got, err)
		}
	}
}

func TestCgroupDir(t *testing.T) {
	const (
		v1      = "30 23 0:26 / /sys/fs/cgroup/cpu rw,relatime shared:9 - cgroup cgroup rw,cpu\n"
		whole   = "31 23 0:27 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
		hybrid  = "31 23 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
		ofPod   = "32 23 0:27 / /sys/fs/cgroup ro,relatime - cgroup2 cgroup rw\n"
		ofHost  = "33 23 0:27 /../../.. /host/cgroup ro,relatime - cgroup2 cgroup2 rw\n"
		kubelet = "/system.slice/kubelet.service"
	)
	for name, test := range map[string]struct{ mounts, cgroup, want string }{
		"version 2":         {whole, kubelet, "/sys/fs/cgroup" + kubelet},
		"beside version 1":  {v1 + hybrid, kubelet, "/sys/fs/cgroup/unified" + kubelet},
		"in a pod":          {v1 + ofPod + ofHost, "/../../.." + kubelet, "/host/cgroup" + kubelet},
		"the host's only":   {ofHost, "/../../.." + kubelet, "/host/cgroup" + kubelet},
		"our own":           {ofHost + ofPod, "/below", "/sys/fs/cgroup/below"},
		"the pod's only":    {ofPod, "/../../.." + kubelet, ""},
		"not far enough up": {ofPod + ofHost, "/../../../.." + kubelet, ""},
		"a common parent":   {ofPod + ofHost, "/../.." + kubelet, ""},
		"none":              {v1, kubelet, ""},
	} {
		proc := t.TempDir()
		err := os.Mkdir(filepath.Join(proc, "self"), 0o700)
		if err == nil {
			err = os.WriteFile(filepath.Join(proc, "self/mountinfo"), []byte(test.mounts), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		if got, err := cgroupDir(proc, test.cgroup); got != test.want || (err != nil) != (test.want == "") {
			t.Errorf("%s: %q, %v; want %q", name, got, err, test.want)
		}
	}
}

// A process named kubelet, as the daemon sees it: started, restarted in another cgroup, one of several, a pod's.
func TestKubeletIsFoundByItsProcess(t *testing.T) {
	bpftest.RequireRoot(t)
	mount, err := cgroupDir("/proc", "/x")
	if err != nil {
		t.Fatal(err)
	}
	mount = filepath.Dir(mount)
	prober := Finder{Kubelet: true}
	if who, err := prober.Find(); err == nil {
		t.Skipf("there is a kubelet on this machine already: %+v", who)
	}
	program := filepath.Join(t.TempDir(), "kubelet")
	sleep, err := os.ReadFile("/bin/sleep")
	if err == nil {
		err = os.WriteFile(program, sleep, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	// start runs it in a cgroup of its own, and returns that one's id and what ends it.
	start := func(name string, namespaces uintptr) (uint64, func()) {
		t.Helper()
		cgroup := filepath.Join(mount, fmt.Sprintf("probelet-test-%d-%s", os.Getpid(), name))
		if err := os.Mkdir(cgroup, 0o755); err != nil {
			t.Fatal(err)
		}
		dir, err := os.Open(cgroup)
		if err != nil {
			t.Fatal(err)
		}
		defer dir.Close() //nolint:errcheck // a test's
		cmd := exec.Command(program, "300")
		cmd.SysProcAttr = &syscall.SysProcAttr{
			UseCgroupFD: true, CgroupFD: int(dir.Fd()), Cloneflags: namespaces, Pdeathsig: unix.SIGKILL,
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		end := sync.OnceFunc(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
			if err := os.Remove(cgroup); err != nil {
				t.Error(err)
			}
		})
		t.Cleanup(end)
		id, err := cgroupID(cgroup)
		if err != nil {
			t.Fatal(err)
		}
		return id, end
	}
	expect := func(want uint64) {
		t.Helper()
		if who, err := prober.Find(); err != nil || !slices.Equal(who.CgroupIDs, []uint64{want}) || who.AnyLocal {
			t.Fatalf("%+v, %v; want cgroup %d", who, err, want)
		}
	}

	start("pod", unix.CLONE_NEWNET)
	if who, err := prober.Find(); err == nil {
		t.Fatalf("a pod's process is the prober: %+v", who)
	}
	first, endFirst := start("first", 0)
	expect(first)
	second, _ := start("second", 0)
	for range lookAround {
		if _, err = prober.Find(); err != nil {
			break
		}
	}
	if err == nil || !strings.Contains(err.Error(), "more than one cgroup") {
		t.Fatalf("with two kubelets: %v", err)
	}
	endFirst()
	expect(second)
}
