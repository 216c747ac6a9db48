// Package runtimes finds the container runtimes of a node, what their configuration says of CNI, and the plugins that they run.
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

// Runtime is a container runtime, as far as its configuration of networks goes.
type Runtime struct {
	Name string // of its process
	PID  string
	Dir  string // of its process in proc
	// Version is its own, and Libcni that of libcni in it; empty: its build does not tell.
	Version, Libcni string
}

// List is those of a node. There is one, but for some that have Docker besides.
type List []Runtime

// names are those of processes that run pods.
var names = []string{"containerd", "crio", "cri-dockerd"}

const libcniPath = "github.com/containernetworking/cni"

// Find looks for them among the processes in proc. Those that run in containers are no concern of the node.
func Find(proc string) List {
	processes, _ := filepath.Glob(filepath.Join(proc, "[0-9]*"))
	host := mounts(filepath.Join(proc, "1"))
	var all, ofHost List
	for _, process := range processes {
		name, err := os.ReadFile(filepath.Join(process, "comm"))
		if err != nil || !slices.Contains(names, strings.TrimSpace(string(name))) || !procfs.IsRoots(process) {
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

// lookAgain is how often Cached looks at most.
const lookAgain = 10 * time.Second

// Cached returns a Find that looks again only when one of those found has ended, and at most every lookAgain.
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

// mounts names the mount namespace of a process; empty if that cannot be read.
func mounts(process string) string {
	link, _ := os.Readlink(filepath.Join(process, "ns/mnt"))
	return link
}

// KeepConfiguration is whether one deletes a pod with the network configuration of that pod's ADD. CRI-O does so
// (TearDownPodWithContext in ocicni.go); the others take the configuration that there is at DEL.
func (all List) KeepConfiguration() bool {
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

// ReadDropIns reports whether all of them are known to read drop-ins, and to run what was in them at DEL. What CRI-O keeps of an ADD
// lacks drop-ins, so its DEL would not run the plugin.
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
		return "none is to be seen"
	}
	var words []string
	for _, r := range all {
		words = append(words, r.String())
	}
	return strings.Join(words, "; ")
}
