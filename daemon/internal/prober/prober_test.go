package prober

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"runtime"
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
	if _, err := Parse(""); err == nil || !strings.Contains(err.Error(), "needed") {
		t.Errorf("no value: %v", err)
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
		"nobody's":          {ofPod + ofHost, "/../.." + kubelet, ""},
		"none":              {v1, kubelet, ""},
	} {
		proc := t.TempDir()
		err := os.Mkdir(filepath.Join(proc, "self"), 0o700)
		if err == nil {
			err = os.WriteFile(filepath.Join(proc, "self/mountinfo"), []byte(test.mounts), 0o600)
		}
		if err == nil {
			err = os.WriteFile(filepath.Join(proc, "self/cgroup"), []byte("0::/\n"), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		if got, err := cgroupDir(proc, test.cgroup); got != test.want || (err != nil) != (test.want == "") {
			t.Errorf("%s: %q, %v; want %q", name, got, err, test.want)
		}
	}
}

// stage has cgroups and processes of the test's.
type stage struct {
	t       *testing.T
	mount   string // of the hierarchy
	kubelet string // a program of that name
}

func newStage(t *testing.T) *stage {
	t.Helper()
	bpftest.RequireRoot(t)
	below, err := cgroupDir("/proc", "/x")
	if err != nil {
		t.Fatal(err)
	}
	if who, err := (&Finder{Kubelet: true}).Find(); err == nil {
		t.Skipf("there is a kubelet on this machine already: %+v", who)
	}
	s := &stage{t, filepath.Dir(below), filepath.Join(t.TempDir(), "kubelet")}
	sleep, err := os.ReadFile("/bin/sleep")
	if err == nil {
		err = os.WriteFile(s.kubelet, sleep, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// cgroup makes one, with those above it, and removes what it made.
func (s *stage) cgroup(name string) string {
	s.t.Helper()
	dir := filepath.Join(s.mount, fmt.Sprintf("probelet-test-%d", os.Getpid()))
	for part := range strings.SplitSeq("./"+name, "/") {
		made := filepath.Join(dir, part)
		dir = made
		switch err := os.Mkdir(made, 0o755); {
		case err == nil:
			s.t.Cleanup(func() {
				if err := os.Remove(made); err != nil {
					s.t.Error(err)
				}
			})
		case !os.IsExist(err):
			s.t.Fatal(err)
		}
	}
	return dir
}

// in has a command start in a cgroup.
func (s *stage) in(cgroup string, cmd *exec.Cmd, namespaces uintptr) *exec.Cmd {
	s.t.Helper()
	dir, err := os.Open(cgroup)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = dir.Close() })
	cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true, CgroupFD: int(dir.Fd()), Cloneflags: namespaces, Pdeathsig: unix.SIGKILL,
	}
	return cmd
}

// run runs a kubelet in a cgroup, and returns that one's id and what ends it.
func (s *stage) run(cgroup string, namespaces uintptr) (id uint64, end func()) {
	s.t.Helper()
	cmd := s.in(cgroup, exec.Command(s.kubelet, "300"), namespaces)
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	end = sync.OnceFunc(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	s.t.Cleanup(end)
	id, err := cgroupID(cgroup)
	if err != nil {
		s.t.Fatal(err)
	}
	return id, end
}

// Where the kubelet's cgroup and a pod's part is not seen from the pod, which has a cgroup namespace of its own.
func TestKubeletIsFoundFromAPod(t *testing.T) {
	if os.Getenv("PROBELET_TEST_POD") != "" {
		findFromPod(t)
		return
	}
	s := newStage(t)
	pod := s.cgroup("kubelet.slice/kubepods.slice/pod.slice/container.scope")
	for name, cgroup := range map[string]string{
		"kubeadm":            "system.slice/kubelet.service",
		"kind":               "kubelet.slice/kubelet.service",
		"beside the pod":     "kubelet.slice/kubepods.slice/kubelet.service",
		"in the pod's slice": "kubelet.slice/kubepods.slice/pod.slice/kubelet.service",
	} {
		t.Run(name, func(t *testing.T) {
			want, end := s.run(s.cgroup(cgroup), 0)
			defer end()
			cmd := s.in(pod, exec.Command(os.Args[0], "-test.run=^TestKubeletIsFoundFromAPod$", "-test.v"), 0)
			cmd.Env = append(os.Environ(), "PROBELET_TEST_POD=1")
			text, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(text), fmt.Sprintf("cgroup %d\n", want)) {
				t.Errorf("%v, want cgroup %d:\n%s", err, want, text)
			}
		})
	}
}

func findFromPod(t *testing.T) {
	runtime.LockOSThread() // for good: its namespace is another one
	if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
		t.Fatal(err)
	}
	finder := Finder{Kubelet: true}
	for range 2 {
		who, err := finder.Find()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Printf("cgroup %d\n", who.CgroupIDs[0])
	}
}

// A process named kubelet, as the daemon sees it: started, restarted in another cgroup, one of several, a pod's.
func TestKubeletIsFoundByItsProcess(t *testing.T) {
	s := newStage(t)
	prober := Finder{Kubelet: true}
	start := func(name string, namespaces uintptr) (uint64, func()) {
		t.Helper()
		return s.run(s.cgroup(name), namespaces)
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
	var err error
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
