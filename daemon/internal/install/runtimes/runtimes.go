// Package runtimes finds the container runtimes of a node, reads the CNI settings in their configuration, and finds the CNI plugins that
// they are running.
package runtimes

import (
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

// Runtime is the process of a container runtime.
type Runtime struct {
	Name string // process name
	PID  string
	Dir  string // directory in proc
	// Version is the runtime's version, and Libcni that of the libcni it was built with. They are empty if the binary does not record
	// them.
	Version, Libcni string
}

// List holds the runtimes of a node: one, unless the node runs Docker as well.
type List []Runtime

// names are the process names of runtimes that run pods.
var names = []string{"containerd", "crio", "cri-dockerd"}

const libcniPath = "github.com/containernetworking/cni"

// Find returns the runtimes among the processes in proc. It prefers those in the mount namespace of process 1: others run in
// containers and are not the node's.
func Find(proc string) List {
	processes, _ := filepath.Glob(filepath.Join(proc, "[0-9]*"))
	host := mounts(filepath.Join(proc, "1"))
	var all, ofHost List
	for _, process := range processes {
		name, err := os.ReadFile(filepath.Join(process, "comm"))
		if err != nil || !slices.Contains(names, strings.TrimSpace(string(name))) || !procfs.StartedByRoot(process) {
			continue
		}
		r := Runtime{Name: strings.TrimSpace(string(name)), PID: filepath.Base(process), Dir: process}
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

// lookAgain is the minimum interval between two searches by Cached.
const lookAgain = 10 * time.Second

// Cached returns a caching Find. It searches again only after one of the runtimes has exited, and no more often than every lookAgain.
func Cached(proc string) func() List {
	var found List
	var looked time.Time
	return func() List {
		ended := func(r Runtime) bool {
			name, err := os.ReadFile(filepath.Join(r.Dir, "comm"))
			return err != nil || strings.TrimSpace(string(name)) != r.Name
		}
		if (len(found) == 0 || slices.ContainsFunc(found, ended)) && time.Since(looked) > lookAgain {
			found, looked = Find(proc), time.Now()
		}
		return found
	}
}

// mounts identifies the mount namespace of a process. It returns "" if that cannot be read.
func mounts(process string) string {
	link, _ := os.Readlink(filepath.Join(process, "ns/mnt"))
	return link
}

// KeepConfiguration reports whether a runtime deletes each pod with the network configuration of that pod's ADD. CRI-O does
// (TearDownPodWithContext in ocicni.go); the others use the current configuration.
func (all List) KeepConfiguration() bool {
	return slices.ContainsFunc(all, func(r Runtime) bool { return r.Name == "crio" })
}

// versionStamp matches the linker flag that sets the version of a runtime.
var versionStamp = regexp.MustCompile(`version\.Version=([^ '"]+)`)

// versionsOf returns the versions of a Go program and of its libcni, from the build information in the binary.
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

// ReadDropIns reports whether all runtimes are known to run plugins from drop-ins, at ADD and DEL. CRI-O does not at DEL: the
// configuration that it keeps of an ADD lacks drop-ins.
func (all List) ReadDropIns() bool {
	return len(all) > 0 && !all.KeepConfiguration() && !slices.ContainsFunc(all, func(r Runtime) bool {
		return !semver.IsValid(r.Libcni) || semver.Compare(r.Libcni, "v1.3.0") < 0
	})
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

func (all List) String() string {
	if len(all) == 0 {
		return "none found"
	}
	var words []string
	for _, r := range all {
		words = append(words, r.String())
	}
	return strings.Join(words, "; ")
}
