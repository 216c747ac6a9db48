package main

import (
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
)

func TestParseProber(t *testing.T) {
	for value, want := range map[string]proberFlag{
		"host":               {},
		"kubelet":            {kubelet: true},
		"cgroup:/sys/fs/x/y": {cgroup: "/sys/fs/x/y"},
	} {
		if got, err := parseProber(value); got != want || err != nil {
			t.Errorf("%q: %+v, %v", value, got, err)
		}
	}
	for _, value := range []string{"", "hosts", "cgroup:", "cgroup:relative", "/sys/fs/cgroup"} {
		if got, err := parseProber(value); err == nil || !strings.Contains(err.Error(), value) {
			t.Errorf("%q: %+v, error %v does not name it", value, got, err)
		}
	}
}

func TestProberMustBeACgroup(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{dir, filepath.Join(dir, "missing")} {
		if got, err := (&proberFinder{proberFlag: proberFlag{cgroup: path}}).find(); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %+v, error %v does not name it", path, got, err)
		}
	}
}

// A restarted kubelet has a new cgroup under the old name.
func TestFollowProber(t *testing.T) {
	bpftest.RequireRoot(t)
	mount := t.TempDir()
	if err := unix.Mount("cgroup2", mount, "cgroup2", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	prober := proberFinder{proberFlag: proberFlag{cgroup: filepath.Join(mount, "probelet-test")}}
	remake := func() uint64 {
		t.Helper()
		if err := os.Mkdir(prober.cgroup, 0o700); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove(prober.cgroup) })
		who, err := prober.find()
		if err != nil || len(who.CgroupIDs) != 1 || who.CgroupIDs[0] == 0 || who.AnyLocal {
			t.Fatalf("%+v, %v", who, err)
		}
		return who.CgroupIDs[0]
	}

	first := remake()
	var set []uint64
	l := &loop{
		log:    slog.New(slog.NewTextHandler(t.Output(), nil)),
		prober: prober,
		who:    datapath.Prober{CgroupIDs: []uint64{first}},
		set: func(p datapath.Prober) error {
			set = append(set, append(p.CgroupIDs, 0)[0])
			return nil
		},
	}
	l.followProber()
	if err := os.Remove(prober.cgroup); err != nil {
		t.Fatal(err)
	}
	l.followProber()
	l.followProber()
	if !slices.Equal(set, []uint64{0}) {
		t.Errorf("without its cgroup the prober is %d, want nobody (0), said once", set)
	}
	second := remake()
	l.followProber()
	l.followProber()
	if first == second || !slices.Equal(set, []uint64{0, second}) {
		t.Errorf("first %d, then %d; set to %d", first, second, set)
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
	prober := proberFinder{proberFlag: proberFlag{kubelet: true}}
	if who, err := prober.find(); err == nil {
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
		if who, err := prober.find(); err != nil || !slices.Equal(who.CgroupIDs, []uint64{want}) || who.AnyLocal {
			t.Fatalf("%+v, %v; want cgroup %d", who, err, want)
		}
	}

	start("pod", unix.CLONE_NEWNET)
	if who, err := prober.find(); err == nil {
		t.Fatalf("a pod's process is the prober: %+v", who)
	}
	first, endFirst := start("first", 0)
	expect(first)
	second, _ := start("second", 0)
	for range lookAround {
		if _, err = prober.find(); err != nil {
			break
		}
	}
	if err == nil || !strings.Contains(err.Error(), "more than one cgroup") {
		t.Fatalf("with two kubelets: %v", err)
	}
	endFirst()
	expect(second)
}

// Without a kubelet the daemon runs, says so at once, and nobody is the prober.
func TestStartsWithoutAKubelet(t *testing.T) {
	n := newNode(t)
	if who, err := (&proberFinder{proberFlag: proberFlag{kubelet: true}}).find(); err == nil {
		t.Skipf("there is a kubelet on this machine: %+v", who)
	}
	if err := n.d.SetProber(datapath.Prober{AnyLocal: true}); err != nil {
		t.Fatal(err)
	}
	n.config.prober = "kubelet"
	n.specs("httpGet: {path: /, port: 8080}")
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() //nolint:errcheck // a test's
	n.log = log
	n.start()
	n.eventually("nobody to be the prober", func() bool {
		who, err := n.d.Prober()
		return err == nil && !who.AnyLocal && len(who.CgroupIDs) == 0
	})
	n.eventually("a word of it", func() bool {
		text, err := os.ReadFile(log.Name())
		return err == nil && strings.Contains(string(text), "no prober yet")
	})
}
