// Package kind runs the cluster tests on kind (make e2e-kind). Its own tests cover what can be checked without Docker.
package kind

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"k8s.io/kubelet/config/v1beta1"
	"sigs.k8s.io/kind/pkg/apis/config/v1alpha4"
	"sigs.k8s.io/yaml"
)

func TestKindConfig(t *testing.T) {
	text, err := os.ReadFile("kind.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var config v1alpha4.Cluster
	if err := yaml.UnmarshalStrict(text, &config); err != nil {
		t.Fatal(err)
	}
	v1alpha4.SetDefaultsCluster(&config)
	if config.Kind != "Cluster" || config.APIVersion != "kind.x-k8s.io/v1alpha4" || len(config.Nodes) != 1 || config.Networking.IPFamily != v1alpha4.DualStackFamily {
		t.Errorf("%+v", config)
	}
}

// The patches that kind passes to kubeadm are valid kubelet configurations.
func TestKubeadmPatches(t *testing.T) {
	text, err := os.ReadFile("kind.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var config v1alpha4.Cluster
	if err := yaml.UnmarshalStrict(text, &config); err != nil {
		t.Fatal(err)
	}
	for _, node := range config.Nodes {
		for _, patch := range node.KubeadmConfigPatches {
			var kubelet v1beta1.KubeletConfiguration
			if err := yaml.UnmarshalStrict([]byte(patch), &kubelet); err != nil || kubelet.Kind != "KubeletConfiguration" {
				t.Errorf("%v in\n%s", err, patch)
			}
		}
	}
}

func TestScriptSyntax(t *testing.T) {
	if out, err := exec.Command("bash", "-n", "run.sh").CombinedOutput(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
}

// The workflows run existing targets of the Makefile, this one among them.
func TestWorkflows(t *testing.T) {
	files, err := filepath.Glob("../../.github/workflows/*.y*ml")
	if err != nil {
		t.Fatal(err)
	}
	var commands []string
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var workflow struct {
			Jobs map[string]struct {
				Steps []struct {
					Run string `json:"run"`
				} `json:"steps"`
			} `json:"jobs"`
		}
		if err := yaml.Unmarshal(text, &workflow); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		for _, job := range workflow.Jobs {
			for _, step := range job.Steps {
				commands = append(commands, strings.Split(strings.TrimSpace(step.Run), "\n")...)
			}
		}
	}
	if !slices.Contains(commands, "make e2e-kind") {
		t.Errorf("commands: %q", commands)
	}
	for _, command := range commands {
		target, isMake := strings.CutPrefix(strings.TrimPrefix(command, `sudo -E env "PATH=$PATH" `), "make ")
		if !isMake {
			continue
		}
		args := append([]string{"-n", "-C", "../.."}, strings.Fields(target)...)
		if out, err := exec.Command("make", args...).CombinedOutput(); err != nil {
			t.Errorf("%s: %v: %s", command, err, out)
		}
	}
}
