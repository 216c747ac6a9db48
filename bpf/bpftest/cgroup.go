package bpftest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// OwnCgroup moves this process into a cgroup v2 of its own, such as a kubelet has, and returns the id. In the root cgroup
// the programs would mistake a test's sockets for the kernel's own. leave moves the process back and removes the cgroup.
func OwnCgroup() (id uint64, leave func() error, err error) {
	mount, err := cgroupMount()
	if err != nil {
		return 0, nil, err
	}
	dir := filepath.Join(mount, fmt.Sprintf("probelet-test-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return 0, nil, err
	}
	leave = func() error {
		return errors.Join(join(mount), os.Remove(dir))
	}
	if err := join(dir); err != nil {
		return 0, nil, errors.Join(err, os.Remove(dir))
	}
	id, err = cgroupID(dir)
	return id, leave, err
}

// Cgroup creates an empty cgroup v2 and returns its directory and id. The caller must remove it.
func Cgroup(name string) (dir string, id uint64, err error) {
	mount, err := cgroupMount()
	if err != nil {
		return "", 0, err
	}
	dir = filepath.Join(mount, fmt.Sprintf("probelet-test-%d-%s", os.Getpid(), name))
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return "", 0, err
	}
	id, err = cgroupID(dir)
	return dir, id, err
}

func join(dir string) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0)
}

func cgroupID(dir string) (uint64, error) {
	var stat unix.Stat_t
	err := unix.Stat(dir, &stat)
	return stat.Ino, err
}

func cgroupMount() (string, error) {
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(mounts)) {
		if fields := strings.Fields(line); len(fields) > 2 && fields[2] == "cgroup2" {
			return fields[1], nil
		}
	}
	return "", errors.New("cgroup v2 is not mounted")
}

// CurrentCgroup returns the id of the cgroup v2 that this process is in.
func CurrentCgroup() (id uint64, err error) {
	dir, err := CurrentCgroupDir()
	if err != nil {
		return 0, err
	}
	return cgroupID(dir)
}

// CurrentCgroupDir returns the directory of the cgroup v2 that this process is in.
func CurrentCgroupDir() (dir string, err error) {
	mount, err := cgroupMount()
	if err != nil {
		return "", err
	}
	cgroups, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(cgroups)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok { // cgroup v2, see cgroups(7)
			return filepath.Join(mount, strings.TrimSpace(path)), nil
		}
	}
	return "", errors.New("this process is in no cgroup v2")
}

// RootCgroup returns the directory of the root cgroup v2.
func RootCgroup() (dir string, err error) { return cgroupMount() }

// RunInOwnCgroup is for TestMain: it runs the tests and exits. As root it runs them in a cgroup and a mount namespace of their
// own, so that nothing that they mount, pin or name outlives them, even if they are killed.
func RunInOwnCgroup(run func() int) {
	if os.Geteuid() != 0 {
		os.Exit(run())
	}
	if os.Getenv(inOwnMounts) == "" {
		os.Exit(runAgainInOwnMounts())
	}
	_, leave, err := OwnCgroup()
	if err = errors.Join(err, HideNames()); err != nil {
		fmt.Fprintln(os.Stderr, "a cgroup and a mount namespace for the tests:", err)
		os.Exit(1)
	}
	code := run()
	if err := leave(); err != nil {
		fmt.Fprintln(os.Stderr, "leaving the cgroup of the tests:", err)
		code = max(code, 1)
	}
	os.Exit(code)
}

// inOwnMounts is set in the environment of tests that already run in a mount namespace of their own.
const inOwnMounts = "PROBELET_TEST_IN_OWN_MOUNTS"

// runAgainInOwnMounts runs the current program again and returns its exit code.
func runAgainInOwnMounts() int {
	runtime.LockOSThread() // Pdeathsig is sent when the thread ends
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inOwnMounts+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// Unlike Cloneflags, this also makes mounts private.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	err := cmd.Run()
	if exit := new(exec.ExitError); errors.As(err, &exit) {
		return max(exit.ExitCode(), 1)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "running the tests in a mount namespace:", err)
		return 1
	}
	return 0
}

// HideNames ensures that the names that github.com/containernetworking/plugins/pkg/testutils gives to network namespaces
// disappear with this mount namespace.
func HideNames() error {
	const names = "/var/run/netns"
	return errors.Join(os.MkdirAll(names, 0o755), unix.Mount("tmpfs", names, "tmpfs", 0, ""))
}
