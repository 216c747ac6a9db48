package prober

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
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
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/internal/polltest"
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
	if _, err := Parse(""); err == nil || !strings.Contains(err.Error(), "required") {
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
		"below no mount":    {ofPod + ofHost, "/../.." + kubelet, ""},
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

// stage manages the cgroups and processes of a test.
type stage struct {
	t       *testing.T
	mount   string // of the hierarchy
	kubelet string // a program with that name
	user    uint32 // the user to run processes as
}

func newStage(t *testing.T) *stage {
	t.Helper()
	bpftest.RequireRoot(t)
	below, err := cgroupDir("/proc", "/x")
	if err != nil {
		t.Fatal(err)
	}
	if who, err := (&Finder{Kubelet: true}).Find(); err == nil {
		t.Skipf("a kubelet is already running on this machine: %+v", who)
	}
	dir, err := os.MkdirTemp("", "kubelet") // in a place where another user can run it, too
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	s := &stage{t: t, mount: filepath.Dir(below), kubelet: filepath.Join(dir, "kubelet")}
	sleep, err := os.ReadFile("/bin/sleep")
	if err == nil {
		err = os.WriteFile(s.kubelet, sleep, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// cgroup creates a cgroup and those above it, and removes them at the end.
func (s *stage) cgroup(name string) string {
	s.t.Helper()
	dir := filepath.Join(s.mount, fmt.Sprintf("probelet-test-%d", os.Getpid()))
	for part := range strings.SplitSeq("./"+name, "/") {
		made := filepath.Join(dir, part)
		dir = made
		switch err := os.Mkdir(made, 0o755); {
		case err == nil:
			s.t.Cleanup(func() {
				var err error
				polltest.Within(polltest.Limit, func() bool { // killed processes may not be gone yet
					err = os.Remove(made)
					return !errors.Is(err, unix.EBUSY)
				})
				if err != nil {
					s.t.Error(err)
				}
			})
		case !os.IsExist(err):
			s.t.Fatal(err)
		}
	}
	return dir
}

// in makes a command start in a cgroup.
func (s *stage) in(cgroup string, cmd *exec.Cmd, namespaces uintptr) *exec.Cmd {
	s.t.Helper()
	dir, err := os.Open(cgroup)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = dir.Close() })
	cmd.SysProcAttr = &syscall.SysProcAttr{
		UseCgroupFD: true, CgroupFD: int(dir.Fd()), Cloneflags: namespaces, Pdeathsig: unix.SIGKILL, Setpgid: true,
	}
	if s.user != 0 {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: s.user, Gid: s.user}
	}
	return cmd
}

// run runs a kubelet in a cgroup, and returns the cgroup's id and a function that ends the kubelet.
func (s *stage) run(cgroup string, namespaces uintptr) (id uint64, end func()) {
	s.t.Helper()
	return s.start(cgroup, namespaces, s.kubelet, "300")
}

func (s *stage) start(cgroup string, namespaces uintptr, program ...string) (id uint64, end func()) {
	s.t.Helper()
	cmd := s.in(cgroup, exec.Command(program[0], program[1:]...), namespaces)
	if err := cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	end = sync.OnceFunc(func() {
		_ = unix.Kill(-cmd.Process.Pid, unix.SIGKILL) // and its descendants
		_ = cmd.Wait()
	})
	s.t.Cleanup(end)
	id, err := cgroupID(cgroup)
	if err != nil {
		s.t.Fatal(err)
	}
	return id, end
}

// In a pod with a cgroup namespace of its own, the common ancestor of the pod's cgroup and the kubelet's is not visible.
func TestKubeletIsFoundFromAPod(t *testing.T) {
	if os.Getenv("PROBELET_TEST_POD") != "" {
		findFromPod(t)
		return
	}
	s := newStage(t)
	pod := s.cgroup("kubelet.slice/kubelet-kubepods.slice/pod.slice/container.scope")
	for name, cgroup := range map[string]string{
		"kubeadm": "system.slice/kubelet.service",
		"kind":    "kubelet.slice/kubelet.service",
		"Talos":   "podruntime/kubelet",
	} {
		t.Run(name, func(t *testing.T) {
			want, end := s.run(s.cgroup(cgroup), 0)
			defer end()
			for _, other := range []string{"pod.slice", "pod.slice/other.scope", "pod2.slice/container.scope"} {
				_, endOther := s.run(s.cgroup("kubelet.slice/kubelet-kubepods.slice/"+other), 0)
				defer endOther()
			}
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
	runtime.LockOSThread() // never unlocked, because the thread's namespace is changed
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

// A process named kubelet, as the daemon sees it: started, restarted in another cgroup, one of several.
func TestKubeletIsFoundByItsProcess(t *testing.T) {
	s := newStage(t)
	prober := Finder{Kubelet: true}
	first, endFirst := s.run(s.cgroup("first"), 0)
	s.expect(&prober, first)
	second, _ := s.run(s.cgroup("second"), 0)
	s.refuses(&prober, "several kubelets")
	endFirst()
	s.expect(&prober, second)
}

// expect also checks a find that looks at all processes. The kubelet is alone in its cgroup.
func (s *stage) expect(prober *Finder, want uint64) {
	s.t.Helper()
	for range lookAround {
		if who, err := prober.Find(); err != nil || !slices.Equal(who.CgroupIDs, []uint64{want}) || who.AnyLocal || who.Process != nil {
			s.t.Fatalf("%+v, %v; want cgroup %d", who, err, want)
		}
	}
}

// refuses waits for a find that looks at all processes.
func (s *stage) refuses(prober *Finder, because string) {
	s.t.Helper()
	var err error
	var who datapath.Prober
	for range lookAround {
		if who, err = prober.Find(); err != nil {
			break
		}
	}
	if err == nil || !strings.Contains(err.Error(), because) {
		s.t.Fatalf("%+v, %v; want %q", who, err, because)
	}
}

// Other processes may have the kubelet's name. They are not mistaken for it, and do not prevent it from being found.
func TestFalseKubelets(t *testing.T) {
	s := newStage(t)
	for name, test := range map[string]struct {
		cgroup     string
		namespaces uintptr
		user       uint32
	}{
		"a pod's":                        {"kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-1.scope", unix.CLONE_NEWNET | unix.CLONE_NEWPID, 0},
		"of the host's network":          {"kubepods.slice/kubepods-pod1.slice/cri-containerd-1.scope", unix.CLONE_NEWPID | unix.CLONE_NEWNS, 0},
		"and of its processes":           {"kubepods.slice/kubepods-pod2.slice/cri-containerd-2.scope", 0, 0},
		"in a cgroup by cgroupfs":        {"kubepods/burstable/pod3/3", 0, 0},
		"below a root of the kubelet's":  {"kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod4.slice/4", 0, 0},
		"a container's of another kind":  {"docker/5", unix.CLONE_NEWPID, 0},
		"in a network of its own":        {"machine.slice/6", unix.CLONE_NEWNET, 0},
		"a user's":                       {"user.slice", 0, 65534},
		"a user's in the kubelet's name": {"system.slice/kubelet.service.d", 0, 65534},
	} {
		t.Run(name, func(t *testing.T) {
			s := *s
			s.t, s.user = t, test.user
			prober := Finder{Kubelet: true}
			s.run(s.cgroup(test.cgroup), test.namespaces)
			s.refuses(&prober, "is named kubelet")
			s.user = 0
			want, _ := s.run(s.cgroup("real"), 0)
			s.expect(&prober, want)
		})
	}
}

// A user can run a setuid program of root's under any name. To an observer who only checks the name and the effective
// user, it looks like root's kubelet.
func TestSetuidKubelet(t *testing.T) {
	s := newStage(t)
	setuid := filepath.Join(filepath.Dir(s.kubelet), "setuid", "kubelet")
	text, err := os.ReadFile(s.kubelet)
	if err == nil {
		err = errors.Join(os.Mkdir(filepath.Dir(setuid), 0o755), os.WriteFile(setuid, text, 0o755), os.Chmod(setuid, 0o755|os.ModeSetuid))
	}
	if err != nil {
		t.Fatal(err)
	}
	want, _ := s.run(s.cgroup("real"), 0)
	s.user = 65534
	s.start(s.cgroup("user.slice"), 0, setuid, "300")
	s.expect(&Finder{Kubelet: true}, want)
}

func init() {
	if os.Getenv("PROBELET_TEST_LEADERLESS") != "" {
		_, _, _ = unix.RawSyscall(unix.SYS_EXIT, 0, 0, 0) // ends the first thread; the runtime's other threads stay
	}
}

// A process whose first thread has ended looks as if it had ended itself, but can still connect to a pod.
func TestSharedCgroupWithoutFirstThread(t *testing.T) {
	s := newStage(t)
	cgroup := s.cgroup("k0scontroller.service")
	s.run(cgroup, 0)
	t.Setenv("PROBELET_TEST_LEADERLESS", "1")
	s.start(cgroup, 0, os.Args[0])
	prober := Finder{Kubelet: true}
	polltest.Eventually(t, "the first thread has ended", func() bool { return hasZombie(t, cgroup) })
	who, err := prober.Find()
	if err != nil || who.Process == nil {
		t.Errorf("%+v, %v; want one process", who, err)
	}
}

func hasZombie(t *testing.T, cgroup string) bool {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(cgroup, "cgroup.procs"))
	if err != nil {
		t.Fatal(err)
	}
	return slices.ContainsFunc(strings.Fields(string(text)), func(pid string) bool {
		status, _ := os.ReadFile(filepath.Join("/proc", pid, "status"))
		return strings.Contains(string(status), "\nState:\tZ")
	})
}

// If something else runs in the kubelet's cgroup, as in RKE2, only the kubelet's process is the prober. Its descendants
// do not count as something else, even while they still have the kubelet's name.
func TestSharedCgroup(t *testing.T) {
	s := newStage(t)
	prober := Finder{Kubelet: true}
	shell := filepath.Join(filepath.Dir(s.kubelet), "shell", "kubelet")
	text, err := os.ReadFile("/bin/sh")
	if err == nil {
		err = errors.Join(os.Mkdir(filepath.Dir(shell), 0o755), os.WriteFile(shell, text, 0o755))
	}
	if err != nil {
		t.Fatal(err)
	}
	cgroup := s.cgroup("rke2.service")
	pidFile := filepath.Join(t.TempDir(), "pid")
	want, _ := s.start(cgroup, 0, shell, "-c", "echo $$ >"+pidFile+"; "+s.kubelet+" 300; :")
	s.expect(&prober, want)
	for range 2 {
		_, end := s.start(cgroup, 0, "/bin/sleep", "300")
		pid, err := os.ReadFile(pidFile)
		if err != nil {
			t.Fatal(err)
		}
		for range lookAround {
			who, err := prober.Find()
			if err != nil || !slices.Equal(who.CgroupIDs, []uint64{want}) || who.Process == nil ||
				fmt.Sprintln(who.Process) != string(pid) || who.Process.Cgroup != cgroup {
				t.Fatalf("%+v, process %s, %v; want %s in cgroup %d", who, who.Process, err, pid, want)
			}
		}
		end()
		s.expect(&prober, want)
	}
	s.run(cgroup, 0)
	s.refuses(&prober, "several kubelets")
}

// k3s and MicroK8s embed the kubelet in another process.
func TestKubeletInsideAnotherProcess(t *testing.T) {
	s := newStage(t)
	for _, name := range []string{"k3s-server", "k3s-agent", "kubelite"} {
		program := filepath.Join(filepath.Dir(s.kubelet), name)
		if err := os.Link(s.kubelet, program); err != nil {
			t.Fatal(err)
		}
		want, end := s.start(s.cgroup("k3s.service"), 0, program, "300")
		s.expect(&Finder{Kubelet: true}, want)
		end()
	}
}

// client is a process that connects to a pod on command.
type client struct {
	t     *testing.T
	ask   io.Writer
	reply *bufio.Scanner
}

// client starts a client under a name.
func (s *stage) client(cgroup, name string, namespaces uintptr, pod *bpftest.Pod) *client {
	s.t.Helper()
	program := filepath.Join(s.t.TempDir(), name)
	self, err := os.Executable()
	if err == nil {
		err = os.Symlink(self, program)
	}
	if err != nil {
		s.t.Fatal(err)
	}
	node, err := os.Open(pod.Node.NS.Path())
	if err != nil {
		s.t.Fatal(err)
	}
	defer node.Close() //nolint:errcheck // read only
	cmd := s.in(cgroup, exec.Command(program, "-test.run=^TestClient$", "-test.v"), namespaces)
	cmd.Env = append(os.Environ(), "PROBELET_TEST_CLIENT="+pod.IPv4.String()+":8080")
	cmd.ExtraFiles, cmd.Stderr = []*os.File{node}, s.t.Output()
	in, err := cmd.StdinPipe()
	out, outErr := cmd.StdoutPipe()
	if err := errors.Join(err, outErr, cmd.Start()); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() {
		_ = in.Close() // ends the client
		if err := cmd.Wait(); err != nil {
			s.t.Error(err)
		}
	})
	c := &client{s.t, in, bufio.NewScanner(out)}
	c.wait("ready")
	return c
}

func (c *client) wait(state string) {
	c.t.Helper()
	for c.reply.Scan() {
		if c.reply.Text() == state {
			return
		}
	}
	c.t.Fatalf("the client ended before it was %s: %v", state, c.reply.Err())
}

func (c *client) connect() {
	c.t.Helper()
	if _, err := io.WriteString(c.ask, "connect\n"); err != nil {
		c.t.Fatal(err)
	}
	c.wait("connected")
}

// TestClient is not a test, but the program of a client. The thread that connects is in the node's network namespace,
// where the pod is; the process is in the one where the daemon looks.
func TestClient(t *testing.T) {
	to := os.Getenv("PROBELET_TEST_CLIENT")
	if to == "" {
		t.Skip("a helper process of other tests")
	}
	node, err := ns.GetNS("/proc/self/fd/3")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Println("ready")
	for in := bufio.NewScanner(os.Stdin); in.Scan(); {
		err := node.Do(func(ns.NetNS) error {
			conn, err := net.DialTimeout("tcp", to, 10*time.Second)
			if err != nil {
				return err
			}
			return conn.Close()
		})
		if err != nil {
			t.Fatal(err)
		}
		fmt.Println("connected")
	}
}

// Real processes connect to a pod. Only the kubelet is the prober: not the processes that share its cgroup, not a pod's
// process with its name, and not the kubelet itself while it cannot be distinguished.
func TestBystandersAreNotTheKubelet(t *testing.T) {
	s := newStage(t)
	pod := bpftest.NewNode(t).AddPod(t)
	bpftest.AcceptAll(pod.Listen(t, 8080))
	bpfDir := bpftest.BPFDir(t)
	d, err := datapath.Ensure(t.Context(), bpfDir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	target := attach.Target{IfIndex: pod.IfIndex, PodNetns: pod.Netns, Hook: attach.HookTC}
	bpftest.Do(t, pod.Node.NS, func() error {
		return attach.Attach(d, bpfDir, attach.ID{ContainerID: "c", IfName: "eth0"}, target, attach.ViaAuto)
	})

	shared := s.cgroup("rke2-server.service")
	kubelet := s.client(shared, "kubelet", 0, pod)
	inPod := s.client(s.cgroup("kubepods.slice/kubepods-pod1.slice/1.scope"), "kubelet", 0, pod)
	finder := Finder{Kubelet: true}
	// isProber reports whether a client's connection counts as the prober's.
	isProber := func(c *client) bool {
		t.Helper()
		before, err := d.Counters()
		if err != nil {
			t.Fatal(err)
		}
		c.connect()
		after, err := d.Counters()
		if err != nil {
			t.Fatal(err)
		}
		its, others := after["passed_not_probed"]-before["passed_not_probed"], after["passed_not_prober"]-before["passed_not_prober"]
		if its+others != 1 {
			t.Fatalf("%d connections of the prober, %d of others", its, others)
		}
		return its == 1
	}
	set := func() {
		t.Helper()
		who, err := finder.Find()
		if err := errors.Join(err, d.SetProber(who)); err != nil {
			t.Fatal(err)
		}
	}
	want := func(when string, c *client, prober bool) {
		t.Helper()
		if isProber(c) != prober {
			t.Errorf("%s: recognised as the prober: %v", when, !prober)
		}
	}
	set()
	want("the kubelet, alone", kubelet, true)
	want("a pod's", inPod, false)
	containerd := s.client(shared, "containerd", 0, pod)
	set()
	want("the kubelet, with others", kubelet, true)
	want("what shares its cgroup", containerd, false)
	want("a pod's", inPod, false)
	if err := d.SetProber(datapath.Prober{}); err != nil {
		t.Fatal(err)
	}
	want("the kubelet, without a prober", kubelet, false)
	set()
	// Another process of the daemon's has set the prober and ended: that says nothing about whose sockets are marked.
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if d, err = datapath.Open(bpfDir); err != nil {
		t.Fatal(err)
	}
	want("the kubelet, without a daemon", kubelet, false)
	want("what shares its cgroup, without a daemon", containerd, false)
	set()
	want("the kubelet, with the next daemon", kubelet, true)
	want("what shares its cgroup, with the next daemon", containerd, false)
}
