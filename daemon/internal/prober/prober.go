// Package prober finds the process whose connections are probes, the kubelet, and its cgroup.
package prober

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/procfs"
)

// Finder finds the prober, again whenever Find is called.
type Finder struct {
	// Kubelet: find the kubelet's process by its name.
	Kubelet  bool
	cgroup   string   // directory; empty without Kubelet means every local process
	kubelets []string // directories in /proc of the kubelets found last
	finds    int
	dirs     map[string]string // cache of the directories of cgroups
}

// Parse parses the value of --prober: kubelet, host, or cgroup: followed by a directory.
func Parse(value string) (Finder, error) {
	if value == "host" {
		return Finder{}, nil
	}
	if value == "kubelet" {
		return Finder{Kubelet: true}, nil
	}
	if value == "" {
		return Finder{}, errors.New("--prober: required with specs from a file: must be kubelet, host, or cgroup: followed by the absolute path of a cgroup v2 directory")
	}
	path, ok := strings.CutPrefix(value, "cgroup:")
	if !ok || !filepath.IsAbs(path) {
		return Finder{}, fmt.Errorf("--prober %q: must be kubelet, host, or cgroup: followed by the absolute path of a cgroup v2 directory", value)
	}
	return Finder{cgroup: path}, nil
}

// lookAround is after how many calls of Find all processes are checked, even if the last kubelet is still running: there
// may be a second one. Checking every process of a full node twice a second would cost several percent of a core.
const lookAround = 20

// Find returns what the kernel side is to compare with. A cgroup that was recreated (its service was restarted) has a new
// id.
func (p *Finder) Find() (who datapath.Prober, err error) {
	switch {
	case p.Kubelet:
		if who, err = p.find("/proc"); err != nil {
			return datapath.Prober{}, fmt.Errorf("--prober kubelet: %w", err)
		}
		return who, nil
	case p.cgroup == "":
		return datapath.Prober{AnyLocal: true}, nil
	}
	id, err := cgroupID(p.cgroup)
	if err != nil {
		return datapath.Prober{}, fmt.Errorf("--prober cgroup:%s: %w", p.cgroup, err)
	}
	return datapath.Prober{CgroupIDs: []uint64{id}}, nil
}

// find finds the kubelet by its cgroup if no other process shares that, otherwise by its process.
func (p *Finder) find(proc string) (who datapath.Prober, err error) {
	k, err := p.kubelet(proc)
	if err != nil {
		return who, err
	}
	id, err := cgroupID(k.dir)
	if err != nil {
		return who, err
	}
	who.CgroupIDs = []uint64{id}
	alone, err := k.alone(proc)
	if err != nil || alone {
		return who, err
	}
	pid, err := strconv.ParseUint(filepath.Base(k.process), 10, 32)
	who.Process = &datapath.Process{PID: uint32(pid), Cgroup: k.dir}
	return who, err
}

// kubelet finds the kubelet's process. It returns an error if more than one process could be the kubelet.
func (p *Finder) kubelet(proc string) (k kubelet, err error) {
	var found []kubelet
	if p.finds++; p.finds%lookAround != 0 {
		found, err = p.kubeletsAmong(proc, p.kubelets)
	}
	if err == nil && len(found) == 0 {
		found, err = p.allKubelets(proc)
	}
	if err != nil {
		return k, err
	}
	p.kubelets = nil
	for _, k := range found {
		p.kubelets = append(p.kubelets, k.process)
	}
	switch len(found) {
	case 0:
		return k, fmt.Errorf("no root process in this network namespace and outside of pods is named %s", strings.Join(names, ", "))
	case 1:
		return found[0], nil
	}
	var words []string
	for _, k := range found {
		words = append(words, fmt.Sprintf("process %s in cgroup %s", filepath.Base(k.process), k.dir))
	}
	return k, fmt.Errorf("several kubelets: %s", strings.Join(words, ", "))
}

// names are the names of programs that probe: the kubelet, and those that embed it. In k3s (internalCLIAction in
// cmd/k3s/main.go) and MicroK8s it shares a process with proxies, and with the API server on nodes that run one.
var names = []string{"kubelet", "k3s-server", "k3s-agent", "kubelite"}

// alone reports whether the kubelet's cgroup contains only the kubelet and its descendants. In RKE2, k0s and k3s
// containerd shares it.
func (k kubelet) alone(proc string) (bool, error) {
	text, err := os.ReadFile(filepath.Join(k.dir, "cgroup.procs"))
	if err != nil {
		return false, fmt.Errorf("cannot list the processes in the kubelet's cgroup: %w", err)
	}
	for pid := range strings.FieldsSeq(string(text)) {
		if !runs(proc, filepath.Base(k.process), pid) {
			return false, nil
		}
	}
	return true, nil
}

// runs reports whether pid is other, or an ancestor of other, or whether one of those in between has ended. A parent with
// number 0 is invisible (pid_namespaces(7)).
func runs(proc, pid, other string) bool {
	for ; other != pid; other = parentOf(filepath.Join(proc, other)) {
		switch other {
		case "":
			return true
		case "0", "1":
			return false
		}
	}
	return true
}

// parentOf returns the PID of a process' parent (proc_pid_stat(5)); empty if the process has ended.
func parentOf(process string) string {
	text, _ := os.ReadFile(filepath.Join(process, "stat"))
	// The name, in parentheses, may contain anything.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	const state, parent, threads = 0, 1, 17
	if len(fields) <= threads || fields[state] == "X" {
		return ""
	}
	if fields[state] == "Z" && fields[threads] == "1" { // otherwise only the main thread has ended
		return ""
	}
	return fields[parent]
}

// kubelet is a process that may be the kubelet.
type kubelet struct {
	process string // directory in proc
	dir     string // of its cgroup
}

func (p *Finder) allKubelets(proc string) ([]kubelet, error) {
	processes, err := filepath.Glob(filepath.Join(proc, "[0-9]*"))
	if err != nil {
		return nil, err
	}
	return p.kubeletsAmong(proc, processes)
}

// kubeletsAmong returns the processes with such a name that run as root in this network namespace and PID namespace, and
// not in a pod. A pod may have such a name, run as root and share the host's network and PID namespaces, but it is below
// the kubelet's kubepods cgroup.
func (p *Finder) kubeletsAmong(proc string, processes []string) (found []kubelet, err error) {
	netns, err := os.Readlink(filepath.Join(proc, "self/ns/net"))
	if err != nil {
		return nil, err
	}
	pidns, err := os.Readlink(filepath.Join(proc, "self/ns/pid"))
	if err != nil {
		return nil, err
	}
	for _, process := range processes {
		if !slices.Contains(names, nameOf(process)) || !procfs.StartedByRoot(process) || !isIn(process, "ns/net", netns) || !isIn(process, "ns/pid", pidns) {
			continue
		}
		cgroup, err := cgroupOf(process)
		if err != nil {
			continue // the process has ended
		}
		dir, err := p.dirOf(proc, cgroup)
		if err != nil {
			return nil, err
		}
		if !isPods(dir) {
			found = append(found, kubelet{process, dir})
		}
	}
	// A process that the kubelet has just started may still have the kubelet's name, and k3s may run processes of any
	// name.
	return slices.DeleteFunc(slices.Clone(found), func(k kubelet) bool {
		return slices.ContainsFunc(found, func(other kubelet) bool {
			return other != k && runs(proc, filepath.Base(other.process), filepath.Base(k.process))
		})
	}), nil
}

func nameOf(process string) string {
	name, _ := os.ReadFile(filepath.Join(process, "comm"))
	return strings.TrimSpace(string(name))
}

func isIn(process, namespace, name string) bool {
	of, err := os.Readlink(filepath.Join(process, namespace))
	return err == nil && of == name
}

// isPods reports whether a cgroup is below the one that the kubelet keeps all pods in: kubepods, or with systemd
// kubepods.slice, whose names begin with that of the slice above (pkg/kubelet/cm: defaultNodeAllocatableCgroupName,
// CgroupName.ToSystemd).
func isPods(dir string) bool {
	return slices.ContainsFunc(strings.Split(dir, "/"), func(name string) bool {
		return name == "kubepods" || name == "kubepods.slice" || strings.HasSuffix(name, "-kubepods.slice")
	})
}

// dirOf returns the directory of a cgroup. It caches what it finds, because mounts do not change while this process stays
// in its own cgroup.
func (p *Finder) dirOf(proc, cgroup string) (string, error) {
	if dir, known := p.dirs[cgroup]; known {
		return dir, nil
	}
	// Processes that were never moved to a cgroup are in the root, too.
	if cgroup == "/" {
		return "", errors.New("the kubelet is in the root cgroup, where its sockets cannot be told from others; give it a cgroup of its own")
	}
	dir, err := cgroupDir(proc, cgroup)
	if err != nil {
		return "", err
	}
	const most = 16 // bounds the cache: pods with a process of such a name may come and go
	if len(p.dirs) == most || p.dirs == nil {
		p.dirs = map[string]string{}
	}
	p.dirs[cgroup] = dir
	return dir, nil
}

// defaultCertDir is the kubelet's default of --cert-dir (cmd/kubelet/app/options).
const defaultCertDir = "/var/lib/kubelet/pki"

// KubeletCertificate returns the certificate that the kubelet generated for itself, if it did, from the file system that
// the kubelet sees.
func KubeletCertificate(proc string) ([]byte, error) {
	k, err := (&Finder{}).kubelet(proc)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(filepath.Join(k.process, "cmdline"))
	if err != nil {
		return nil, err
	}
	dir := defaultCertDir
	args := strings.Split(string(text), "\x00")
	for i, arg := range args {
		name, value, joined := strings.Cut(strings.TrimLeft(arg, "-"), "=")
		if name != "cert-dir" || !strings.HasPrefix(arg, "-") {
			continue
		}
		if joined {
			dir = value
		} else if i+1 < len(args) {
			dir = args[i+1]
		}
	}
	return os.ReadFile(filepath.Join(k.process, "root", dir, "kubelet.crt"))
}

// cgroupOf returns the cgroup v2 of a process, relative to the root of our cgroup namespace (cgroups(7)): in a pod that
// is the pod's own cgroup, and others look like /../../system.slice/kubelet.service.
func cgroupOf(process string) (string, error) {
	text, err := os.ReadFile(filepath.Join(process, "cgroup"))
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok {
			return strings.TrimSpace(path), nil
		}
	}
	return "", errors.New("not in a cgroup v2 hierarchy")
}

// cgroupDir returns the directory of a cgroup v2, in a mount whose root is high enough in the hierarchy: on some machines
// one is mounted beside version 1, and in a pod the mount made by the runtime begins at the pod (proc_pid_mountinfo(5),
// cgroup_namespaces(7)).
func cgroupDir(proc, cgroup string) (string, error) {
	mounts, err := cgroupMounts(proc)
	if err != nil {
		return "", err
	}
	for _, m := range mounts {
		below, ok := strings.CutPrefix(cgroup, strings.TrimSuffix(m.root, "/"))
		if ok && strings.HasPrefix(below, "/") && !slices.Contains(strings.Split(below, "/"), "..") {
			return filepath.Join(m.dir, below), nil
		}
	}
	// The path may branch off below the root of a mount, for example /../../../kubelet.service in a mount of
	// /../../../..: the ".." do not reveal the names of the directories they pass.
	own, err := cgroupOf(filepath.Join(proc, "self"))
	if err != nil {
		return "", err
	}
	way, err := filepath.Rel("."+own, "."+cgroup)
	if err != nil {
		return "", err
	}
	for _, m := range mounts {
		dir := filepath.Join(ownDir(m.dir), way)
		if strings.HasPrefix(dir, m.dir+"/") {
			return dir, nil
		}
	}
	return "", fmt.Errorf("cgroup %s: not found in any mounted cgroup v2 hierarchy; a pod must mount the host's /sys/fs/cgroup", cgroup)
}

// cgroupMount is a mount of the hierarchy, from the cgroup root on.
type cgroupMount struct{ root, dir string }

func cgroupMounts(proc string) ([]cgroupMount, error) {
	text, err := os.ReadFile(filepath.Join(proc, "self/mountinfo"))
	if err != nil {
		return nil, err
	}
	var mounts []cgroupMount
	for line := range strings.Lines(string(text)) {
		before, after, ok := strings.Cut(line, " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		if ok && len(fields) > 4 && len(kind) > 0 && kind[0] == "cgroup2" {
			mounts = append(mounts, cgroupMount{root: fields[3], dir: fields[4]})
		}
	}
	return mounts, nil
}

// ownDir searches a mount for the cgroup of this process; empty if it is not there.
func ownDir(mount string) (own string) {
	self := strconv.Itoa(os.Getpid())
	_ = filepath.WalkDir(mount, func(dir string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() {
			return nil // a cgroup that has just been removed
		}
		processes, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
		if slices.Contains(strings.Fields(string(processes)), self) {
			own = dir
			return fs.SkipAll
		}
		return nil
	})
	return own
}

// cgroupID returns the id of a cgroup v2 as the kernel reports it for a socket: the inode number of its directory.
func cgroupID(path string) (uint64, error) {
	dir, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer dir.Close() //nolint:errcheck // read only
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &fs); err != nil {
		return 0, fmt.Errorf("statfs: %w", err)
	}
	if fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return 0, fmt.Errorf("not a cgroup v2 directory (file system type %#x, want %#x)", fs.Type, unix.CGROUP2_SUPER_MAGIC)
	}
	var stat unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &stat); err != nil {
		return 0, fmt.Errorf("stat: %w", err)
	}
	if stat.Mode&unix.S_IFMT != unix.S_IFDIR {
		return 0, unix.ENOTDIR
	}
	return stat.Ino, nil
}
