package node

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
)

// Daemon is a running probeletd.
type Daemon struct{ cmd *exec.Cmd }

// StartDaemon starts probeletd with the node's specs and additional flags. The prober is ProberCgroup.
func (n *Node) StartDaemon(flags ...string) (*Daemon, error) {
	log, err := os.OpenFile(n.DaemonLog(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close() //nolint:errcheck // the daemon's
	cmd := exec.Command(filepath.Join(n.Bin, "probeletd"), append([]string{
		"run",
		"--specs", n.specsFile(),
		"--prober", "cgroup:" + n.CgroupPath(ProberCgroup),
		"--bpf-dir", n.BPFDir, "--state-dir", n.StateDir,
		"--metrics-listen", "", // other daemons may be running
	}, flags...)...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return &Daemon{cmd}, nil
}

// DaemonLog returns the file that probeletd logs to.
func (n *Node) DaemonLog() string { return filepath.Join(n.dir, "probeletd.log") }

// Kill ends the daemon abruptly, like a crash.
func (d *Daemon) Kill() {
	_ = d.cmd.Process.Kill()
	_ = d.cmd.Wait()
}

// Stop shuts the daemon down in an orderly way.
func (d *Daemon) Stop() error {
	if err := d.cmd.Process.Signal(unix.SIGTERM); err != nil {
		return err
	}
	return d.cmd.Wait()
}

func (n *Node) specsFile() string { return filepath.Join(n.dir, "specs.yaml") }

// Probed is a pod with the probes of its containers.
type Probed struct {
	Pod       *Pod
	Readiness []Probe
	IPv6      bool // probed at its IPv6 address
}

// Probe is a readiness probe: HTTP with a path, TCP without.
type Probe struct {
	Path           string
	Host           string // address to dial; the pod's if empty
	Headers        []v1.HTTPHeader
	Port           int
	PeriodSeconds  int
	TimeoutSeconds int
}

// addresses returns the pod's addresses, the probed one first.
func (p Probed) addresses() []string {
	if p.IPv6 {
		return []string{p.Pod.IPv6.String(), p.Pod.IPv4.String()}
	}
	return []string{p.Pod.IPv4.String(), p.Pod.IPv6.String()}
}

// WriteSpecs replaces the node's specs. A running daemon picks up the change.
func (n *Node) WriteSpecs(pods ...Probed) error {
	list := []any{}
	for _, p := range pods {
		var containers []any
		for i, probe := range p.Readiness { // a container has only one readiness probe
			containers = append(containers, map[string]any{
				"name": fmt.Sprintf("container%d", i), "readinessProbe": probe.spec(),
			})
		}
		list = append(list, map[string]any{
			"name": p.Pod.Name, "namespace": Namespace,
			"ips":        p.addresses(),
			"containers": containers,
		})
	}
	text, err := json.MarshalIndent(map[string]any{"pods": list}, "", "  ") // JSON is YAML
	if err != nil {
		return err
	}
	replacement := n.specsFile() + ".new"
	if err := os.WriteFile(replacement, text, 0o644); err != nil {
		return err
	}
	return os.Rename(replacement, n.specsFile())
}

func (p Probe) spec() map[string]any {
	spec := map[string]any{"periodSeconds": p.PeriodSeconds, "timeoutSeconds": p.TimeoutSeconds}
	if p.Path == "" {
		spec["tcpSocket"] = map[string]any{"port": p.Port, "host": p.Host}
	} else {
		spec["httpGet"] = map[string]any{"port": p.Port, "path": p.Path, "host": p.Host, "httpHeaders": p.Headers}
	}
	return spec
}
