// Package node makes what the demo and the tests run on: a network namespace that plays the node, with a mount
// namespace, a BPF file system, cgroups and pods of its own. All of it lives and dies with one process.
package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Machine is what all nodes of one process share.
type Machine struct {
	Dir string // temporary, removed at the end
	Bin string // where the built binaries are

	bpffs  string
	cgroup string
	nodes  atomic.Int32
}

// The main thread cannot end. Were it to run newNetns, it would stay in a pod's namespace, and /proc/self/net with it.
func init() { runtime.LockOSThread() }

const (
	dirEnv    = "PROBELET_MACHINE_DIR"
	cgroupEnv = "PROBELET_MACHINE_CGROUP"
)

// ErrUnsuited says that this machine cannot run what was asked for, and why.
var ErrUnsuited = errors.New("not possible here")

// Suited returns an error that wraps ErrUnsuited unless the caller is root on a kernel that is new enough.
func Suited() error {
	if os.Geteuid() != 0 {
		return fmt.Errorf("%w: namespaces, BPF programs and cgroups need root", ErrUnsuited)
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	var major, minor int
	release := unix.ByteSliceToString(uts.Release[:])
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return fmt.Errorf("kernel release %q: %w", release, err)
	}
	if major < 5 || major == 5 && minor < 15 {
		return fmt.Errorf("%w: kernel %s, needed is 5.15 or later", ErrUnsuited, release)
	}
	if _, err := cgroupRoot(); err != nil {
		return err
	}
	return nil
}

// Environment is that of the process without what Run adds to it, for a program that is to have a machine of its own.
func Environment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, dirEnv+"=") || strings.HasPrefix(v, cgroupEnv+"=")
	})
}

// Kernel is the release of the running kernel.
func Kernel() string {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(uts.Release[:])
}

// Run calls inner in a process of its own, with namespaces of its own for mounts, network and processes, and returns
// what inner returned. The program is started again for that, with the same arguments. Whatever inner leaves behind
// ends with the namespaces, however it ends; what lies outside of them is removed here.
func Run(inner func(*Machine) int) int {
	if dir := os.Getenv(dirEnv); dir != "" {
		m, err := enter(dir, os.Getenv(cgroupEnv))
		if err != nil {
			fmt.Fprintln(os.Stderr, "setting up:", err)
			return 1
		}
		return inner(m)
	}
	code, err := runOuter()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return max(code, 1)
	}
	return code
}

func runOuter() (code int, err error) {
	if err := Suited(); err != nil {
		return 1, err
	}
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, unix.SIGINT, unix.SIGTERM, unix.SIGHUP, unix.SIGQUIT)

	dir, err := os.MkdirTemp("", "probelet-")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	root, err := cgroupRoot()
	if err != nil {
		return 1, err
	}
	cgroup := filepath.Join(root, filepath.Base(dir))
	if err := os.Mkdir(cgroup, 0o755); err != nil {
		return 1, err
	}
	others, err := runtimeCgroups()
	if err != nil {
		return 1, err
	}
	defer func() {
		err = errors.Join(err, removeCgroup(cgroup), removeCgroupsV1(filepath.Base(dir)), removeRuntimeCgroups(others))
	}()

	cmd := innerCommand(dir, cgroup)
	if err := cmd.Start(); err != nil {
		return 1, err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case s := <-interrupted:
		_ = cmd.Process.Kill() // init of its process namespace: nothing of it survives
		<-ended
		return 128 + int(s.(syscall.Signal)), fmt.Errorf("%s: everything is removed", s)
	case err := <-ended:
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			return 1, err
		}
		return cmd.ProcessState.ExitCode(), nil
	}
}

func innerCommand(dir, cgroup string) *exec.Cmd {
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), dirEnv+"="+dir, cgroupEnv+"="+cgroup)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID,
		Pdeathsig:  unix.SIGKILL, // when the thread that started it ends, here the main one
		// Ctrl-C is for the outer process only.
		Setpgid: true,
	}
	return cmd
}

// enter makes the new namespaces usable.
func enter(dir, cgroup string) (*Machine, error) {
	bin, err := binDir()
	if err != nil {
		return nil, err
	}
	m := &Machine{Dir: dir, Bin: bin, bpffs: filepath.Join(dir, "bpf"), cgroup: cgroup}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return nil, fmt.Errorf("making mounts private: %w", err)
	}
	if err := unix.Mount("proc", "/proc", "proc", 0, ""); err != nil {
		return nil, fmt.Errorf("mounting /proc: %w", err)
	}
	if err := os.Mkdir(m.bpffs, 0o700); err != nil {
		return nil, err
	}
	if err := unix.Mount("bpf", m.bpffs, "bpf", 0, ""); err != nil {
		return nil, fmt.Errorf("mounting a BPF file system: %w", err)
	}
	// cnitool keeps results in /var/lib/cni, whatever one tells it.
	if err := Cover("/var/lib", filepath.Join(dir, "varlib")); err != nil {
		return nil, err
	}
	for _, name := range []string{ProberCgroup, OtherCgroup} {
		if err := os.Mkdir(filepath.Join(cgroup, name), 0o755); err != nil {
			return nil, err
		}
	}
	return m, setUpNetns()
}

// Cover makes what is written to a directory go to memory, mounted at scratch.
func Cover(dir, scratch string) error {
	if err := os.Mkdir(scratch, 0o700); err != nil {
		return err
	}
	if err := unix.Mount("tmpfs", scratch, "tmpfs", 0, ""); err != nil {
		return fmt.Errorf("mounting a tmpfs: %w", err)
	}
	upper, work := filepath.Join(scratch, "upper"), filepath.Join(scratch, "work")
	for _, d := range []string{upper, work} {
		if err := os.Mkdir(d, 0o755); err != nil {
			return err
		}
	}
	options := "lowerdir=" + dir + ",upperdir=" + upper + ",workdir=" + work
	if err := unix.Mount("overlay", dir, "overlay", 0, options); err != nil {
		return fmt.Errorf("covering %s: %w", dir, err)
	}
	return nil
}

// setUpNetns brings lo up and makes IPv6 addresses usable at once, in the calling thread's network namespace.
func setUpNetns() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return err
	}
	for _, scope := range []string{"all", "default"} {
		path := "/proc/sys/net/ipv6/conf/" + scope + "/accept_dad"
		if err := os.WriteFile(path, []byte("0"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// binDir is what PROBELET_BIN says, or where the running program is.
func binDir() (string, error) {
	if dir := os.Getenv("PROBELET_BIN"); dir != "" {
		return filepath.Abs(dir)
	}
	exe, err := os.Executable()
	return filepath.Dir(exe), err
}

// Cgroups that programs can be started in: that of the prober, and one that is nobody's.
const (
	ProberCgroup = "prober"
	OtherCgroup  = "other"
)

// CgroupPath is the directory of one of the cgroups above.
func (m *Machine) CgroupPath(name string) string { return filepath.Join(m.cgroup, name) }

// CgroupName is the path of the machine's cgroup in its hierarchy, and of what container runtimes may make in those of
// version 1.
func (m *Machine) CgroupName() string { return "/" + filepath.Base(m.cgroup) }

// cgroupRoot is where cgroup v2 is mounted.
func cgroupRoot() (string, error) {
	roots, err := mounts("cgroup2")
	if err == nil && len(roots) == 0 {
		err = fmt.Errorf("%w: cgroup v2 is not mounted", ErrUnsuited)
	}
	if err != nil {
		return "", err
	}
	return roots[0], nil
}

// mounts are where file systems of a type are mounted.
func mounts(kind string) ([]string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		// proc(5): the file system's type is the first field behind the separator.
		before, after, ok := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if ok && strings.HasPrefix(after, kind+" ") && len(fields) > 4 {
			found = append(found, fields[4])
		}
	}
	return found, nil
}

// removeCgroupsV1 removes what container runtimes have made under that name.
func removeCgroupsV1(name string) error {
	roots, err := mounts("cgroup")
	if err != nil {
		return err
	}
	var errs []error
	for _, root := range roots {
		dir := filepath.Join(root, name)
		if _, err := os.Stat(dir); err == nil {
			errs = append(errs, removeCgroup(dir))
		}
	}
	return errors.Join(errs...)
}

// runtimeCgroup is where containerd puts containers that are told no cgroup of a parent, in all hierarchies.
const runtimeCgroup = "k8s.io"

// runtimeCgroups are those that there are, each after the one that it is in.
func runtimeCgroups() ([]string, error) {
	var all []string
	for _, version := range []string{"cgroup", "cgroup2"} {
		roots, err := mounts(version)
		if err != nil {
			return nil, err
		}
		for _, root := range roots {
			err := filepath.WalkDir(filepath.Join(root, runtimeCgroup), func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					all = append(all, path)
				}
				if errors.Is(err, fs.ErrNotExist) {
					return nil
				}
				return err
			})
			if err != nil {
				return nil, err
			}
		}
	}
	return all, nil
}

// removeRuntimeCgroups removes those that are new and empty: others may run containers, too.
func removeRuntimeCgroups(old []string) error {
	all, err := runtimeCgroups()
	for _, dir := range slices.Backward(all) {
		if !slices.Contains(old, dir) {
			if e := removeEmptyCgroup(dir); !errors.Is(e, unix.EBUSY) && !errors.Is(e, fs.ErrNotExist) {
				err = errors.Join(err, e)
			}
		}
	}
	return err
}

// removeCgroup removes a cgroup and those in it.
func removeCgroup(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.IsDir() {
			if err := removeCgroup(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	return removeEmptyCgroup(dir)
}

// removeEmptyCgroup removes a cgroup. Processes that have ended may count for a moment longer.
func removeEmptyCgroup(dir string) error {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := os.Remove(dir)
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}
