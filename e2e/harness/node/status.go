package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// Status is the part of the output of "probeletctl status -o json" that the tests read.
type Status struct {
	Counters    map[string]int `json:"counters"`
	Attachments []struct {
		Pod       string           `json:"pod"`
		Endpoints []EndpointStatus `json:"endpoints"`
	} `json:"attachments"`
}

// EndpointStatus is the status of one endpoint.
type EndpointStatus struct {
	Port           int     `json:"port"`
	Path           string  `json:"path"`
	State          string  `json:"state"`
	FreshFor       float64 `json:"freshForSeconds"`
	Hits           int     `json:"hits"`
	WhyNotAnswered string  `json:"whyNotAnswered"`
	Probes         []struct {
		WorstDetection     float64 `json:"worstDetectionSeconds"`
		WorstDetectionHang float64 `json:"worstDetectionHangSeconds"`
	} `json:"probes"`
}

// States of an endpoint. Absent stands for an endpoint that probeletctl does not list.
const (
	Absent  = ""
	Unknown = "unknown"
	Fresh   = "fresh"
	Stale   = "stale"
	Failed  = "failed"
)

// Counter names.
const (
	AnsweredHTTP = "answered_http"
	AnsweredTCP  = "answered_tcp"
	HandedOver   = "handed_over"
)

// Ctl runs probeletctl and returns what it prints.
func (n *Node) Ctl(args ...string) (string, error) {
	return RunCtl(filepath.Join(n.Bin, "probeletctl"), append(args, "--bpf-dir", n.BPFDir, "--state-dir", n.StateDir)...)
}

// RunCtl runs probeletctl and returns what it prints. Exit code 3 is not an error here: the daemon is down, and probeletctl
// showed what it knows without it. A command with nothing to show reports that on stderr.
func RunCtl(program string, args ...string) (string, error) {
	cmd := exec.Command(program, args...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 3 && stderr.Len() == 0 {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("probeletctl %s: %w: %s", strings.Join(args, " "), err, strings.TrimSpace(stdout.String()+stderr.String()))
	}
	return stdout.String(), err
}

// Status runs probeletctl status and decodes its output.
func (n *Node) Status() (s Status, err error) {
	out, err := n.Ctl("status", "-o", "json")
	if err != nil {
		return s, err
	}
	return s, json.Unmarshal([]byte(out), &s)
}

// StatusTable returns the table that probeletctl prints for people.
func (n *Node) StatusTable() (string, error) {
	return n.Ctl("status")
}

// Endpoint returns the status of a pod's endpoint, Absent if probeletctl does not list it.
func (n *Node) Endpoint(p *Pod, port int, path string) (EndpointStatus, error) {
	s, err := n.Status()
	if err != nil {
		return EndpointStatus{}, err
	}
	for _, a := range s.Attachments {
		if a.Pod != Namespace+"/"+p.Name {
			continue
		}
		for _, e := range a.Endpoints {
			if e.Port == port && e.Path == path {
				return e, nil
			}
		}
	}
	return EndpointStatus{}, nil
}

// AwaitState waits until a pod's endpoint is in one of the states. For Fresh, it must be answered as well.
func (n *Node) AwaitState(p *Pod, port int, path string, states ...string) error {
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		e, err := n.Endpoint(p, port, path)
		if err == nil && slices.Contains(states, e.State) && (e.State != Fresh || e.WhyNotAnswered == "") {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("port %d path %q of %s is not %q: %+v (%v)", port, path, p.Name, states, e, err)
		}
	}
}
