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

// OnKind uses the node of a kind cluster, on which this process is running. There is nothing to tear down.
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
	// The kubelet accepts the cluster's CA for clients, but its own certificate is self-signed.
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

// kind runs the API server as a static pod, which exists as long as this file does.
const (
	apiServerManifest = "/etc/kubernetes/manifests/kube-apiserver.yaml"
	parked            = "/etc/kubernetes/kube-apiserver.yaml.parked"
)

func startAPIServerOnKind() error { return os.Rename(parked, apiServerManifest) }

// stopOnKind stops a component so that nothing restarts it.
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

// killAll kills the processes with this name until none is left.
func killAll(name string) error {
	return Until(context.Background(), time.Minute, func(context.Context) error {
		pids, err := Processes("comm", func(text string) bool {
			return strings.TrimSpace(text) == name[:min(len(name), 15)] // the kernel truncates names
		})
		if err != nil {
			return err
		}
		var left error
		for _, pid := range pids {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			left = errors.Join(left, fmt.Errorf("%s is still running as process %d", name, pid))
		}
		return left
	})
}
