package chain

import (
	"debug/buildinfo"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/mod/semver"
)

// Runtime is the container runtime, as far as its configuration of networks goes.
type Runtime struct {
	Name string // of its process; empty: none was found
	PID  string
	// Libcni is the version of libcni in it; empty: its build does not tell.
	Libcni string
}

// runtimes are the names of processes that run pods.
var runtimes = []string{"containerd", "crio", "cri-dockerd"}

const libcni = "github.com/containernetworking/cni"

// FindRuntime looks for it among the processes in proc.
func FindRuntime(proc string) Runtime {
	processes, _ := filepath.Glob(filepath.Join(proc, "[0-9]*"))
	for _, process := range processes {
		name, err := os.ReadFile(filepath.Join(process, "comm"))
		if err != nil {
			continue
		}
		for _, known := range runtimes {
			if strings.TrimSpace(string(name)) == known {
				return Runtime{known, filepath.Base(process), libcniOf(filepath.Join(process, "exe"))}
			}
		}
	}
	return Runtime{}
}

// KeepsConfiguration is whether it deletes a pod with the network configuration of that pod's ADD. CRI-O does so
// (TearDownPodWithContext in ocicni.go); the others take the configuration that there is at DEL.
func (r Runtime) KeepsConfiguration() bool { return r.Name == "crio" }

// libcniOf reads what the Go linker notes of a program's modules.
func libcniOf(program string) string {
	info, err := buildinfo.ReadFile(program)
	if err != nil {
		return ""
	}
	for _, module := range info.Deps {
		if module.Path == libcni {
			if module.Replace != nil {
				module = module.Replace
			}
			return module.Version
		}
	}
	return ""
}

// Way is the better one that the runtime is known to understand.
func (r Runtime) Way() Way {
	if semver.IsValid(r.Libcni) && semver.Compare(r.Libcni, "v1.3.0") >= 0 {
		return DropIn
	}
	return Copy
}
