// Package node sets up the machine that the demo and the tests run on: a network namespace that plays the node, with its own
// mount namespace, BPF file system, cgroups and pods. All of it lives and dies with one process.
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
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Machine is shared by all nodes of a process.
type Machine struct {
	Dir string // temporary, removed at the end
	Bin string // directory of the built binaries

	bpffs  string
	cgroup string
	nodes  atomic.Int32
}

// The main thread cannot exit. If it ran newNetns, it would stay in a pod's namespace, and /proc/self/net with it.
func init() { runtime.LockOSThread() }

const (
	dirEnv    = "PROBELET_MACHINE_DIR"
	cgroupEnv = "PROBELET_MACHINE_CGROUP"
)

// ErrUnsuited means that this machine cannot run what was requested.
var ErrUnsuited = errors.New("unsuited machine")

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
		return fmt.Errorf("%w: kernel %s: must be 5.15 or later", ErrUnsuited, release)
	}
	if _, err := cgroupRoot(); err != nil {
		return err
	}
	return nil
}

// Environment returns the process's environment without the variables that Run adds, for a program that sets up its own
// machine.
func Environment() []string {
	return slices.DeleteFunc(os.Environ(), func(v string) bool {
		return strings.HasPrefix(v, dirEnv+"=") || strings.HasPrefix(v, cgroupEnv+"=")
	})
}

// Kernel returns the release of the running kernel.
func Kernel() string {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return "unknown"
	}
	return unix.ByteSliceToString(uts.Release[:])
}

// Run calls inner in a process with its own mount, network and PID namespaces, and returns what inner returned. To do so, it
// runs the program again with the same arguments. Whatever inner leaves behind disappears with the namespaces, however the
// process ends; Run removes what lies outside them.
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
		_ = cmd.Process.Kill() // init of its PID namespace: nothing in there survives
		<-ended
		return 128 + int(s.(syscall.Signal)), fmt.Errorf("%s: cleaned up", s)
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
		Pdeathsig:  unix.SIGKILL, // sent when the thread that started it exits, here the main one
		// Ctrl-C is meant for the outer process only.
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
	// cnitool keeps results in /var/lib/cni, regardless of its configuration.
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

// Cover redirects writes to a directory into memory, mounted at scratch.
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

// binDir returns PROBELET_BIN or, if it is unset, the directory of the running program.
func binDir() (string, error) {
	if dir := os.Getenv("PROBELET_BIN"); dir != "" {
		return filepath.Abs(dir)
	}
	exe, err := os.Executable()
	return filepath.Dir(exe), err
}

// Cgroups that programs can be started in: the prober's, and one without a role.
const (
	ProberCgroup = "prober"
	OtherCgroup  = "other"
)

// CgroupPath returns the directory of one of the machine's cgroups.
func (m *Machine) CgroupPath(name string) string { return filepath.Join(m.cgroup, name) }

// CgroupName returns the path of the machine's cgroup in its hierarchy. Container runtimes may use the same path in the
// hierarchies of version 1.
func (m *Machine) CgroupName() string { return "/" + filepath.Base(m.cgroup) }

// LimitCPU limits a process to a percentage of one CPU, in a new cgroup of that name. The error wraps ErrUnsuited if there is no CPU
// controller. With cgroup v2 the root cgroup must delegate it, which systemd does.
func (m *Machine) LimitCPU(pid int, name string, percent int) error {
	const period = 100_000 // µs, the kernel's default
	quota := period * percent / 100
	v1, err := mounts("cgroup")
	if err != nil {
		return err
	}
	for _, root := range v1 {
		if _, err := os.Stat(filepath.Join(root, "cpu.cfs_quota_us")); err == nil {
			return limit(pid, filepath.Join(root, m.CgroupName(), name), "cpu.cfs_quota_us", strconv.Itoa(quota))
		}
	}
	offered, err := os.ReadFile(filepath.Join(m.cgroup, "cgroup.controllers"))
	if err != nil {
		return err
	}
	if !slices.Contains(strings.Fields(string(offered)), "cpu") {
		return fmt.Errorf("%w: no cgroup controller for CPU", ErrUnsuited)
	}
	if err := os.WriteFile(filepath.Join(m.cgroup, "cgroup.subtree_control"), []byte("+cpu"), 0o644); err != nil {
		return err
	}
	return limit(pid, m.CgroupPath(name), "cpu.max", fmt.Sprintf("%d %d", quota, period))
}

// limit moves a process into a new cgroup with a limit.
func limit(pid int, dir, file, value string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, file), []byte(value), 0o644); err != nil {
		return err
	}
	return MoveToCgroup(pid, dir)
}

// MoveToCgroup moves a process into a cgroup, given by its directory.
func MoveToCgroup(pid int, dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0o644)
}

// cgroupRoot returns the mount point of cgroup v2.
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

// mounts returns the mount points of file systems of a type.
func mounts(kind string) ([]string, error) {
	text, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	var found []string
	for line := range strings.Lines(string(text)) {
		// proc(5): the file system type is the first field after the separator.
		before, after, ok := strings.Cut(line, " - ")
		fields := strings.Fields(before)
		if ok && strings.HasPrefix(after, kind+" ") && len(fields) > 4 {
			found = append(found, fields[4])
		}
	}
	return found, nil
}

// removeCgroupsV1 removes the cgroups of this name that container runtimes created.
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

// runtimeCgroup is where containerd puts containers without a parent cgroup, in all hierarchies.
const runtimeCgroup = "k8s.io"

// runtimeCgroups lists the existing ones, parents first.
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

// removeRuntimeCgroups removes those that are new and empty; other programs may be running containers as well.
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

// removeCgroup removes a cgroup and its children.
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

// removeEmptyCgroup removes a cgroup. Processes that have exited may still be counted for a moment.
func removeEmptyCgroup(dir string) error {
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		err := os.Remove(dir)
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}
