package kube

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/probelet/probelet/e2e/harness/node"
)

// adminConfig is where kubeadm puts the administrator's kubeconfig.
const adminConfig = "/etc/kubernetes/admin.conf"

// OnKind takes the node of a kind cluster that this process runs on. There is nothing to be torn down: that is the node's.
func OnKind(ctx context.Context, bin string, say func(string)) (*Cluster, error) {
	dir, err := os.MkdirTemp("", "probelet")
	if err != nil {
		return nil, err
	}
	c := &Cluster{Machine: &node.Machine{Dir: dir, Bin: bin}, Kind: true, dir: dir}
	if c.NodeName, err = os.Hostname(); err != nil {
		return c, err
	}
	if c.Config, err = clientcmd.BuildConfigFromFlags("", adminConfig); err != nil {
		return c, err
	}
	c.Config.QPS, c.Config.Burst = 1000, 1000
	if c.Client, err = kubernetes.NewForConfig(c.Config); err != nil {
		return c, err
	}
	// The kubelet knows the cluster's authority, and its certificate is its own.
	c.kubelet = rest.CopyConfig(c.Config)
	c.kubelet.Host = "https://127.0.0.1:10250"
	c.kubelet.Insecure, c.kubelet.CAData, c.kubelet.CAFile = true, nil, ""
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"BPF file system", func() error {
			var fs unix.Statfs_t
			if err := unix.Statfs(BPFFS, &fs); err != nil || fs.Type == unix.BPF_FS_MAGIC {
				return err
			}
			return c.MountBPFFS()
		}},
		{"plugins", c.installPlugins},
		{"images", c.importImages},
		{"node ready", func() error { return c.awaitNode(ctx) }},
	} {
		say(step.what)
		if err := step.do(); err != nil {
			return c, fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return c, nil
}

// The API server of kind is a static pod: it is there as long as this file is.
const (
	apiServerManifest = "/etc/kubernetes/manifests/kube-apiserver.yaml"
	parked            = "/etc/kubernetes/kube-apiserver.yaml.parked"
)

func startAPIServerOnKind() error { return os.Rename(parked, apiServerManifest) }

// stopOnKind stops what would be started again if it were only killed.
func (c *Cluster) stopOnKind(name string, signal os.Signal) error {
	if name == "kube-apiserver" {
		if err := os.Rename(apiServerManifest, parked); err != nil {
			return err
		}
		return killAll(name)
	}
	if signal == syscall.SIGKILL {
		if err := node.RunCommand(exec.Command("systemctl", "kill", "--signal=SIGKILL", name)); err != nil {
			return err
		}
	}
	return node.RunCommand(exec.Command("systemctl", "stop", name))
}

// killAll kills processes of a name until there is none.
func killAll(name string) error {
	return Until(context.Background(), time.Minute, func(context.Context) error {
		pids, err := Processes("comm", func(text string) bool {
			return strings.TrimSpace(text) == name[:min(len(name), 15)] // as much as the kernel keeps of it
		})
		if err != nil {
			return err
		}
		var left error
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			left = errors.Join(left, fmt.Errorf("%s still runs, process %d", name, pid))
		}
		return left
	})
}
