package chain

import (
	"bytes"
	"debug/buildinfo"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"golang.org/x/mod/semver"

	"github.com/probelet/probelet/daemon/internal/procfs"
)

// Runtime is a container runtime, as far as its configuration of networks goes.
type Runtime struct {
	Name string // of its process
	PID  string
	// process is its directory in proc.
	process string
	// Version is its own, and Libcni that of libcni in it; empty: its build does not tell.
	Version, Libcni string
}

// Runtimes are those of a node. There is one, but for some that have Docker besides.
type Runtimes []Runtime

// runtimes are the names of processes that run pods.
var runtimes = []string{"containerd", "crio", "cri-dockerd"}

const libcniPath = "github.com/containernetworking/cni"

// FindRuntimes looks for them among the processes in proc. Those that run in containers are no concern of the node.
func FindRuntimes(proc string) Runtimes {
	processes, _ := filepath.Glob(filepath.Join(proc, "[0-9]*"))
	host := mounts(filepath.Join(proc, "1"))
	var all, ofHost Runtimes
	for _, process := range processes {
		name, err := os.ReadFile(filepath.Join(process, "comm"))
		if err != nil || !slices.Contains(runtimes, strings.TrimSpace(string(name))) || !procfs.IsRoots(process) {
			continue
		}
		r := Runtime{Name: strings.TrimSpace(string(name)), PID: filepath.Base(process), process: process}
		r.Version, r.Libcni = versionsOf(filepath.Join(process, "exe"))
		all = append(all, r)
		if host != "" && mounts(process) == host {
			ofHost = append(ofHost, r)
		}
	}
	if len(ofHost) > 0 {
		return ofHost
	}
	return all
}

// CachedRuntimes returns a FindRuntimes that looks again only when one of those found has ended, and at most every lookAgain.
func CachedRuntimes(proc string) func() Runtimes {
	var found Runtimes
	var looked time.Time
	return func() Runtimes {
		ended := func(r Runtime) bool {
			name, err := os.ReadFile(filepath.Join(r.process, "comm"))
			return err != nil || strings.TrimSpace(string(name)) != r.Name
		}
		if (len(found) == 0 || slices.ContainsFunc(found, ended)) && time.Since(looked) > lookAgain {
			found, looked = FindRuntimes(proc), time.Now()
		}
		return found
	}
}

// mounts names the mount namespace of a process; empty if that cannot be read.
func mounts(process string) string {
	link, _ := os.Readlink(filepath.Join(process, "ns/mnt"))
	return link
}

// KeepConfiguration is whether one deletes a pod with the network configuration of that pod's ADD. CRI-O does so
// (TearDownPodWithContext in ocicni.go); the others take the configuration that there is at DEL.
func (all Runtimes) KeepConfiguration() bool {
	return slices.ContainsFunc(all, func(r Runtime) bool { return r.Name == "crio" })
}

// versionStamp is how runtimes are told their version when they are linked, where the build notes that.
var versionStamp = regexp.MustCompile(`version\.Version=([^ '"]+)`)

// versionsOf reads what the Go linker notes of a program and its modules.
func versionsOf(program string) (own, ofLibcni string) {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return "", ""
	}
	if own = info.Main.Version; !semver.IsValid(own) {
		own = ""
	}
	for _, setting := range info.Settings {
		if stamp := versionStamp.FindStringSubmatch(setting.Value); setting.Key == "-ldflags" && stamp != nil {
			own = stamp[1]
		}
	}
	for _, module := range info.Deps {
		if module.Path == libcniPath {
			if module.Replace != nil {
				module = module.Replace
			}
			ofLibcni = module.Version
		}
	}
	return own, ofLibcni
}

// Way is the better one that all of them are known to understand. What CRI-O keeps of an ADD lacks drop-ins, so its DEL would not
// run the plugin.
func (all Runtimes) Way() Way {
	if len(all) == 0 || all.KeepConfiguration() {
		return Copy
	}
	for _, r := range all {
		if !semver.IsValid(r.Libcni) || semver.Compare(r.Libcni, "v1.3.0") < 0 {
			return Copy
		}
	}
	return DropIn
}

func (r Runtime) String() string {
	known := func(version string) string {
		if version == "" {
			return "unknown"
		}
		return version
	}
	return fmt.Sprintf("%s %s, process %s, libcni %s", r.Name, known(r.Version), r.PID, known(r.Libcni))
}

func (all Runtimes) String() string {
	if len(all) == 0 {
		return "none is to be seen"
	}
	var words []string
	for _, r := range all {
		words = append(words, r.String())
	}
	return strings.Join(words, "; ")
}

// UnderWay are the containers that CNI plugins are at work for, by the environments of processes in proc (CNI specification,
// section 2). A plugin is root's, runs in the runtime's mount namespace, and below the runtime: nobody else's process and no pod's
// counts, whatever is in its environment. If no runtime is found, any of root's counts that is not in a pod.
func UnderWay(proc string) map[string]bool {
	containers := map[string]bool{}
	all := FindRuntimes(proc)
	processes, _ := filepath.Glob(filepath.Join(proc, "[0-9]*"))
	for _, process := range processes {
		if container := containerOf(process); container != "" && procfs.IsRoots(process) && all.run(proc, process) {
			containers[container] = true
		}
	}
	return containers
}

// containerOf returns the container that a process is asked to do something for, if it is a CNI plugin by its environment.
func containerOf(process string) string {
	text, _ := os.ReadFile(filepath.Join(process, "environ")) // of one that has ended: nothing
	var command, container string
	for variable := range strings.SplitSeq(string(text), "\x00") {
		if value, ok := strings.CutPrefix(variable, "CNI_COMMAND="); ok {
			command = value
		}
		if value, ok := strings.CutPrefix(variable, "CNI_CONTAINERID="); ok {
			container = value
		}
	}
	if command == "" {
		return ""
	}
	return container
}

// run reports whether a process may be one that they run: it is below one of them and in its mount namespace.
func (all Runtimes) run(proc, process string) bool {
	if len(all) == 0 {
		host := mounts(filepath.Join(proc, "1"))
		return host == "" || mounts(process) == host
	}
	for pid := parentOf(process); pid != "" && pid != "0"; pid = parentOf(filepath.Join(proc, pid)) {
		if slices.ContainsFunc(all, func(r Runtime) bool { return r.PID == pid }) {
			return mounts(process) == mounts(filepath.Join(proc, pid))
		}
	}
	return false
}

// parentOf returns the number of a process' parent (proc_pid_stat(5)); empty if it has ended.
func parentOf(process string) string {
	text, _ := os.ReadFile(filepath.Join(process, "stat"))
	// The name, in parentheses, may have anything in it.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 2 {
		return ""
	}
	return fields[1]
}
