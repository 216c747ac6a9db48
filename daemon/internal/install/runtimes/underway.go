package runtimes

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/probelet/probelet/daemon/internal/procfs"
)

// UnderWay are the containers that CNI plugins are at work for, by the environments of processes in proc (CNI specification,
// section 2). A plugin is root's, runs in the runtime's mount namespace, and below the runtime: nobody else's process and no pod's
// counts, whatever is in its environment. If no runtime is found, any of root's counts that is not in a pod.
func UnderWay(proc string) map[string]bool {
	containers := map[string]bool{}
	all := Find(proc)
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
