package runtimes

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/probelet/probelet/daemon/internal/procfs"
)

// UnderWay returns the IDs of the containers for which CNI plugins are running, taken from the environment of the processes in proc (CNI
// specification, section 2). To count as a plugin a process must belong to root, be in the runtime's mount namespace and descend from the
// runtime, so that no user or pod can pose as one. If no runtime is found, any process of root in the host's mount namespace counts.
func UnderWay(proc string) map[string]bool {
	containers := map[string]bool{}
	all := Find(proc)
	processes, _ := filepath.Glob(filepath.Join(proc, "[0-9]*"))
	for _, process := range processes {
		if container := containerOf(process); container != "" && procfs.StartedByRoot(process) && all.run(proc, process) {
			containers[container] = true
		}
	}
	return containers
}

// containerOf returns the container ID from the environment of a CNI plugin's process, or "" for any other process.
func containerOf(process string) string {
	text, _ := os.ReadFile(filepath.Join(process, "environ")) // empty if it has exited
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

// run reports whether a process descends from one of the runtimes and is in its mount namespace.
func (all List) run(proc, process string) bool {
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

// parentOf returns the PID of a process's parent (proc_pid_stat(5)), or "" if the process has exited.
func parentOf(process string) string {
	text, _ := os.ReadFile(filepath.Join(process, "stat"))
	// The name, in parentheses, may contain spaces and parentheses.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	if len(fields) < 2 {
		return ""
	}
	return fields[1]
}
