package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	imageutils "k8s.io/kubernetes/test/utils/image"

	"github.com/probelet/probelet/e2e/harness/image"
	"github.com/probelet/probelet/e2e/harness/kube"
	"github.com/probelet/probelet/e2e/harness/node"
)

const (
	// focus selects the specs.
	focus = `Probing (container|restartable init container)|\[sig-apps\] StatefulSet`
	// skip excludes specs of a feature that is off. Specs that need storage skip themselves.
	skip = "StatefulSetRecreateStrategy"
	// gates enables features that are off by default, so that their specs run. They concern probes that are never answered.
	gates = "GRPCContainerProbeTLS=true,H2CContainerProbe=true"
)

// run starts a cluster and runs the specs on it.
func (o options) run(m *node.Machine, name string) (err error) {
	ctx := context.Background()
	v, err := named(name)
	if err != nil {
		return err
	}
	c, err := kube.Start(ctx, m, o.tools, kube.Network("ptp", kube.IPv4, kube.IPv6), gates, func(string) {})
	if c != nil {
		defer func() { err = errors.Join(err, c.KeepLogs(filepath.Join(o.out, "logs"))) }()
	}
	if err != nil {
		return err
	}
	images, err := images(o.tools)
	if err == nil {
		err = c.Import(images...)
	}
	if err != nil {
		return err
	}
	answered := answers{}
	if v.values != nil {
		all := map[string]any{"mode": "answer"}
		maps.Copy(all, v.values)
		if _, err := c.Deploy(ctx, all); err != nil {
			return err
		}
	}
	say("%s: the cluster is running", name)
	if err := o.runSpecs(c, v, answered); err != nil {
		return err
	}
	return answered.write(filepath.Join(o.out, answersFile))
}

// reportFile is the name of ginkgo's report.
const reportFile = "report.json"

// runSpecs runs e2e.test and counts answers meanwhile. Failed specs are in the report, and not an error.
func (o options) runSpecs(c *kube.Cluster, v variant, answered answers) error {
	log, err := os.Create(filepath.Join(o.out, "e2e.log"))
	if err != nil {
		return err
	}
	defer log.Close() //nolint:errcheck // best effort
	cmd := exec.Command(filepath.Join(o.tools, "ginkgo"), fmt.Sprintf("--procs=%d", o.procs), "--no-color", "--timeout=30m",
		"--focus="+o.focus, "--skip="+skip, "--json-report="+reportFile, "--output-dir="+o.out, filepath.Join(o.tools, "e2e.test"), "--",
		"--kubeconfig="+c.AdminKubeconfig(), "--provider=skeleton", "--kubectl-path="+filepath.Join(o.tools, "kubectl"),
		"--num-nodes=1", "--minStartupPods=0", "--report-dir="+filepath.Join(o.out, "junit"))
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for seconds := 1; ; seconds++ {
		select {
		case err := <-ended:
			var failed *exec.ExitError
			if errors.As(err, &failed) {
				if _, noReport := os.Stat(filepath.Join(o.out, reportFile)); noReport == nil {
					return nil
				}
			}
			return err
		case <-tick.C:
		}
		if v.values != nil {
			answered.read(c.Bin)
		}
		if seconds%60 == 0 {
			text, _ := os.ReadFile(log.Name())
			say("%s: %d specs passed", v.name, bytes.Count(text, []byte("•")))
		}
	}
}

// answersFile contains the answers by namespace.
const answersFile = "answers.json"

// answers counts the probes answered by the kernel, by sandbox (NAMESPACE/CONTAINER ID). Those after the last poll of a pod
// are missed.
type answers map[string]int

// read polls probeletctl.
func (a answers) read(bin string) {
	text, err := exec.Command(filepath.Join(bin, "probeletctl"), "status", "-o", "json").Output()
	if err != nil {
		return // try again at the next poll
	}
	var status struct {
		Attachments []struct {
			Pod, ContainerID string
			Endpoints        []struct{ Hits int }
		}
	}
	if err := json.Unmarshal(text, &status); err != nil {
		say("probeletctl status: %v", err)
		return
	}
	for _, at := range status.Attachments {
		namespace, _, _ := strings.Cut(at.Pod, "/")
		hits := 0
		for _, e := range at.Endpoints {
			hits += e.Hits
		}
		key := namespace + "/" + at.ContainerID
		a[key] = max(a[key], hits)
	}
}

func (a answers) write(file string) error {
	sums := map[string]int{}
	for key, hits := range a {
		namespace, _, _ := strings.Cut(key, "/")
		sums[namespace] += hits
	}
	text, err := json.Marshal(sums)
	if err != nil {
		return err
	}
	return os.WriteFile(file, text, 0o644)
}

// images returns the images that the specs need, with only the content that they use.
func images(tools string) ([]image.Image, error) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	list, err := exec.Command(busybox, "--list").Output()
	if err != nil {
		return nil, err
	}
	shell := []image.File{{Path: "/bin/busybox", Source: busybox}, {Path: "/tmp"}}
	for _, applet := range strings.Fields(string(list)) {
		if applet != "busybox" {
			shell = append(shell, image.File{Path: "/bin/" + applet, Link: "busybox"})
		}
	}
	bash := filepath.Join(tools, "bash")
	if err := os.WriteFile(bash, []byte("#!/bin/sh\nexec /bin/sh \"$@\"\n"), 0o755); err != nil {
		return nil, err
	}
	agnhost := append([]image.File{
		{Path: "/agnhost", Source: filepath.Join(tools, "agnhost")}, {Path: "/bin/bash", Source: bash}, {Path: "/uploads"},
		{Path: "/localhost.crt", Source: filepath.Join(tools, "localhost.crt")}, {Path: "/localhost.key", Source: filepath.Join(tools, "localhost.key")},
	}, shell...)
	name := imageutils.GetE2EImage
	return []image.Image{
		{Reference: name(imageutils.Agnhost), Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}, Files: agnhost},
		{Reference: name(imageutils.AgnhostPrev), Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}, Files: agnhost},
		{Reference: name(imageutils.BusyBox), Cmd: []string{"sh"}, Files: shell},
		{Reference: name(imageutils.Pause), Entrypoint: []string{"/agnhost", "pause"}, Files: agnhost[:1]},
	}, nil
}
