package node

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"time"
)

// Status is what `probeletctl status -o json` says.
type Status struct {
	Pods []PodStatus `json:"pods"`
}

// PodStatus is a pod's part of Status.
type PodStatus struct {
	Namespace string           `json:"namespace"`
	Name      string           `json:"name"`
	Endpoints []EndpointStatus `json:"endpoints"`
}

// EndpointStatus is an endpoint's part of Status.
type EndpointStatus struct {
	Port  int    `json:"port"`
	Path  string `json:"path"`
	State string `json:"state"`
	Hits  int    `json:"hits"`
}

func (n *Node) ctl(format string) *exec.Cmd {
	return exec.Command(filepath.Join(n.Bin, "probeletctl"), "status", "-o", format,
		"--bpf-dir", n.BPFDir, "--state-dir", n.StateDir)
}

// Status asks probeletctl.
func (n *Node) Status() (s Status, err error) {
	out, err := output(n.ctl("json"))
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal(out, &s)
}

// StatusTable is what probeletctl shows to a person.
func (n *Node) StatusTable() (string, error) {
	out, err := output(n.ctl("table"))
	return string(out), err
}

// States of an endpoint.
const (
	Unknown = "unknown"
	Fresh   = "fresh"
)

// Endpoint returns the status of a pod's endpoint; the zero value if it is not known.
func (n *Node) Endpoint(p *Pod, port int, path string) (EndpointStatus, error) {
	s, err := n.Status()
	if err != nil {
		return EndpointStatus{}, err
	}
	for _, pod := range s.Pods {
		if pod.Namespace != Namespace || pod.Name != p.Name {
			continue
		}
		for _, e := range pod.Endpoints {
			if e.Port == port && e.Path == path {
				return e, nil
			}
		}
	}
	return EndpointStatus{}, nil
}

// AwaitState waits until a pod's endpoint is in one of the states; "" stands for an endpoint that is not known.
func (n *Node) AwaitState(p *Pod, port int, path string, states ...string) error {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		e, err := n.Endpoint(p, port, path)
		if err == nil && slices.Contains(states, e.State) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("port %d path %q of %s is in state %q, not %q (%w)", port, path, p.Name, e.State, states, err)
		}
	}
}
