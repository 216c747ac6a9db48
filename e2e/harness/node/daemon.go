package node

import (
	"cmp"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
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

// Pid returns the process ID.
func (d *Daemon) Pid() int { return d.cmd.Process.Pid }

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

// Probed is a pod with probes, each of a container of its own.
type Probed struct {
	Pod                 *Pod
	Readiness, Liveness []Probe
	IPv6                bool // probed at its IPv6 address
}

// Probe is an HTTP probe with a path, a TCP probe without.
type Probe struct {
	Container      string // its name; containers without one are numbered
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

// Containers returns the pod's containers, as in its spec.
func (p Probed) Containers() (all []v1.Container) {
	name := func(p Probe) string { return cmp.Or(p.Container, fmt.Sprintf("container%d", len(all))) }
	for _, probe := range p.Readiness {
		all = append(all, v1.Container{Name: name(probe), ReadinessProbe: probe.spec()})
	}
	for _, probe := range p.Liveness {
		all = append(all, v1.Container{Name: name(probe), LivenessProbe: probe.spec()})
	}
	return all
}

// WriteSpecs replaces the node's specs. A running daemon picks up the change.
func (n *Node) WriteSpecs(pods ...Probed) error {
	list := []any{}
	for _, p := range pods {
		list = append(list, map[string]any{
			"name": p.Pod.Name, "namespace": Namespace,
			"ips":        p.addresses(),
			"containers": p.Containers(),
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

// FailureThreshold is the number of failures in a row, the kubelet's default, after which a probe has failed.
const FailureThreshold = 3

// spec returns the probe with the API server's default thresholds and scheme.
func (p Probe) spec() *v1.Probe {
	spec := &v1.Probe{
		PeriodSeconds: int32(p.PeriodSeconds), TimeoutSeconds: int32(p.TimeoutSeconds), SuccessThreshold: 1, FailureThreshold: FailureThreshold,
	}
	port := intstr.FromInt32(int32(p.Port))
	if p.Path == "" {
		spec.TCPSocket = &v1.TCPSocketAction{Port: port, Host: p.Host}
	} else {
		spec.HTTPGet = &v1.HTTPGetAction{Port: port, Path: p.Path, Host: p.Host, HTTPHeaders: p.Headers, Scheme: v1.URISchemeHTTP}
	}
	return spec
}
