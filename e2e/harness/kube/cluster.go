// Package kube runs a Kubernetes cluster of one node: the real etcd, API server, controller manager, scheduler, kubelet,
// containerd, runc and CNI plugins, in the namespaces of package node. Files are in the usual places, but writes go to memory
// and disappear with the namespaces. Alternatively, it uses the node of a kind cluster, as a process on that node.
package kube

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/rest"

	"github.com/probelet/probelet/e2e/harness/image"
	"github.com/probelet/probelet/e2e/harness/node"
)

// Locations on the node.
const (
	NetDir = "/etc/cni/net.d"
	BinDir = "/opt/cni/bin"
	BPFFS  = "/sys/fs/bpf"

	ownNode    = "node1"
	NodeIP     = "192.168.177.1"
	NodeIPv6   = "fd00:177::1"
	apiAddress = "https://" + NodeIP
	// serviceIP is the address of the API server's service. There is no kube-proxy: the address is assigned to the node.
	serviceIP = "10.96.0.1"
)

// AppImage is the image of the app in the tests' pods.
const AppImage = "probelet.test/app:test"

// Cluster is a running cluster.
type Cluster struct {
	*node.Machine
	Client kubernetes.Interface
	Config *rest.Config

	NodeName string
	// Kind is set on the node of a kind cluster, whose components are run by systemd and the kubelet.
	Kind bool

	kubelet  *rest.Config // the kubelet's server
	kubelets int          // number of starts
	NodeIPs  string       // separated by a comma
	gates    string       // feature gates, such as "A=true,B=true"
	tools    string       // directory of its binaries; empty with Kind, where they are in the PATH
	dir      string       // directory of its own files
	running  map[string]*exec.Cmd
}

// Start starts a cluster, with pods on the network that networkConf configures and with feature gates such as
// "A=true,B=true", and waits until its node is Ready.
func Start(ctx context.Context, m *node.Machine, tools, networkConf, gates string, say func(string)) (*Cluster, error) {
	c := &Cluster{
		Machine: m, NodeName: ownNode, NodeIPs: NodeIP, tools: tools, gates: gates,
		dir: filepath.Join(m.Dir, "cluster"), running: map[string]*exec.Cmd{},
	}
	c.kubelet = &rest.Config{Host: "https://" + NodeIP + ":10250", BearerToken: AdminToken, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"files", c.prepareFiles},
		{"network", c.prepareNetwork},
		{"etcd", c.startEtcd},
		{"kube-apiserver", func() error { return c.startAPIServer(ctx) }},
		{"kube-controller-manager, kube-scheduler", func() error { return c.startControllers(ctx) }},
		{"CNI", func() error { return c.installCNI(networkConf) }},
		{"containerd", c.StartContainerd},
		{"images", c.importImages},
		{"kubelet", func() error { return c.StartKubelet() }},
		{"node ready", func() error { return c.awaitNode(ctx) }},
	} {
		say(step.what)
		if err := step.do(); err != nil {
			return c, fmt.Errorf("%s: %w", step.what, err)
		}
	}
	return c, nil
}

// prepareFiles covers the directories that the components of a node write to.
func (c *Cluster) prepareFiles() error {
	if err := os.Mkdir(c.dir, 0o700); err != nil {
		return err
	}
	for _, dir := range []string{"/etc", "/opt"} {
		if err := node.Cover(dir, filepath.Join(c.Dir, "cover"+strings.ReplaceAll(dir, "/", "-"))); err != nil {
			return err
		}
	}
	for _, dir := range []string{"/run", "/var/lib/kubelet", "/var/lib/containerd", "/var/log"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("covering %s: %w", dir, err)
		}
	}
	if err := c.MountBPFFS(); err != nil {
		return err
	}
	// Host paths mounted into pods must see later mounts, as on a machine with systemd.
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_SHARED, ""); err != nil {
		return err
	}
	for _, dir := range []string{NetDir, BinDir, "/etc/kubernetes", "/run/netns"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// MountBPFFS mounts a BPF file system, as systemd does at boot.
func (c *Cluster) MountBPFFS() error { return unix.Mount("bpf", BPFFS, "bpf", 0, "") }

// EmptyRun empties /run, as a reboot does.
func (c *Cluster) EmptyRun() error {
	mounts, err := filepath.Glob("/run/netns/*")
	if err != nil {
		return err
	}
	for _, mount := range mounts {
		_ = unix.Unmount(mount, unix.MNT_DETACH)
	}
	if err := unix.Unmount("/run", unix.MNT_DETACH); err != nil {
		return err
	}
	return unix.Mount("tmpfs", "/run", "tmpfs", 0, "mode=755")
}

// prepareNetwork gives the node an address of each family.
func (c *Cluster) prepareNetwork() error {
	err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "uplink"}, PeerName: "uplink-peer"})
	if err != nil {
		return err
	}
	for _, name := range []string{"uplink", "uplink-peer"} {
		device, err := netlink.LinkByName(name)
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(device); err != nil {
			return err
		}
		if name != "uplink" {
			continue
		}
		for _, text := range []string{NodeIP + "/24", NodeIPv6 + "/64", serviceIP + "/32"} {
			address, err := netlink.ParseAddr(text)
			if err != nil {
				return err
			}
			if err := netlink.AddrAdd(device, address); err != nil {
				return err
			}
		}
	}
	for _, knob := range []string{"ipv4/ip_forward", "ipv6/conf/all/forwarding"} {
		if err := os.WriteFile(filepath.Join("/proc/sys/net", knob), []byte("1"), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// installCNI installs the plugins and the primary network.
func (c *Cluster) installCNI(conf string) error {
	if err := c.installPlugins(); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(NetDir, "10-pods.conflist"), []byte(conf), 0o644)
}

// installPlugins installs the CNI plugins that the tests use and the node lacks.
func (c *Cluster) installPlugins() error {
	for _, plugin := range []string{"ptp", "bridge", "host-local", "loopback", "tuning"} {
		if _, err := os.Stat(filepath.Join(BinDir, plugin)); err == nil {
			continue
		}
		program, err := os.ReadFile(filepath.Join(c.Bin, plugin))
		if err != nil {
			return err
		}
		if err := os.WriteFile(filepath.Join(BinDir, plugin), program, 0o755); err != nil {
			return err
		}
	}
	return nil
}

// Primary returns the file and the name of the primary network.
func (c *Cluster) Primary() (file, name string) {
	if c.Kind {
		return filepath.Join(NetDir, "10-kindnet.conflist"), "kindnet"
	}
	return filepath.Join(NetDir, "10-pods.conflist"), "pods"
}

// Network returns a network configuration with a range of addresses per subnet.
func Network(main string, families ...string) string {
	ranges := [][]map[string]string{}
	for _, subnet := range families {
		ranges = append(ranges, []map[string]string{{"subnet": subnet}})
	}
	plugin := map[string]any{"type": main, "ipam": map[string]any{"type": "host-local", "ranges": ranges}}
	if main == "bridge" {
		plugin["bridge"], plugin["isGateway"] = "pods0", true
	}
	text, err := json.MarshalIndent(map[string]any{
		"cniVersion": "1.0.0", "name": "pods", "plugins": []any{plugin},
	}, "", "  ")
	if err != nil {
		panic(err)
	}
	return string(text)
}

// Subnets for pods.
const (
	IPv4 = "10.89.0.0/16"
	IPv6 = "fd00:89::/64"
)

// StartContainerd starts containerd, for example after Stop, and waits until it answers.
func (c *Cluster) StartContainerd() error {
	config := fmt.Sprintf(`version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
[grpc]
  address = "/run/containerd/containerd.sock"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = %q
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  tolerate_missing_hugetlb_controller = true
  netns_mounts_under_state_dir = false
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = [%q]
    conf_dir = %q
`, pauseImage, BinDir, NetDir)
	file := c.file("containerd.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return err
	}
	if err := c.start("containerd", node.OtherCgroup, c.Tool("containerd"), "--config", file); err != nil {
		return err
	}
	return Until(context.Background(), 30*time.Second, func(context.Context) error { return c.Ctr("version") })
}

const pauseImage = "probelet.test/pause:test"

func (c *Cluster) importImages() error {
	app := filepath.Join(c.Bin, "app")
	program := []image.File{{Path: "/app", Source: app}}
	return c.Import(
		image.Image{Reference: AppImage, Entrypoint: []string{"/app"}, Files: program},
		image.Image{Reference: pauseImage, Entrypoint: []string{"/app", "pause"}, Files: program},
		image.Probelet(image.Reference, c.Bin),
	)
}

// Import imports images on the node.
func (c *Cluster) Import(images ...image.Image) error {
	file := c.file("image.tar")
	for _, i := range images {
		if err := i.Write(file); err != nil {
			return fmt.Errorf("%s: %w", i.Reference, err)
		}
		if err := c.Ctr("images", "import", file); err != nil {
			return err
		}
	}
	return os.Remove(file)
}

// Ctr runs a command of ctr in the namespace of Kubernetes.
func (c *Cluster) Ctr(args ...string) error {
	return node.RunCommand(exec.Command(c.Tool("ctr"), append([]string{"-n", "k8s.io"}, args...)...))
}

// Tool returns the path of one of the cluster's binaries.
func (c *Cluster) Tool(name string) string {
	if c.tools == "" {
		return name
	}
	return filepath.Join(c.tools, name)
}

// kubeletCgroup returns the name of the cgroup of the most recently started kubelet. Each start gets a new one, as with
// systemd.
func (c *Cluster) kubeletCgroup() string { return fmt.Sprintf("kubelet-%d", c.kubelets) }

// StartKubelet starts the kubelet, for example after Stop.
func (c *Cluster) StartKubelet() error {
	if c.Kind {
		return node.RunCommand(exec.Command("systemctl", "start", "kubelet"))
	}
	config := fmt.Sprintf(`apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupsPerQOS: false
enforceNodeAllocatable: []
localStorageCapacityIsolation: false
makeIPTablesUtilChains: false
failSwapOn: false
evictionHard: {memory.available: "0%%", nodefs.available: "0%%", nodefs.inodesFree: "0%%", imagefs.available: "0%%", imagefs.inodesFree: "0%%"}
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
maxPods: 250
cgroupRoot: %s
featureGates: %s
authentication:
  anonymous: {enabled: false}
  webhook: {enabled: true}
  x509: {clientCAFile: %s}
authorization: {mode: Webhook}
registerNode: true
syncFrequency: 10s
nodeStatusUpdateFrequency: 5s
volumePluginDir: %s
`, c.CgroupName(), kubeletGates(c.gates), c.file(clientAuthority), c.file("volume-plugins"))
	file := c.file("kubelet.yaml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		return err
	}
	c.kubelets++
	if err := os.Mkdir(c.CgroupPath(c.kubeletCgroup()), 0o755); err != nil {
		return err
	}
	return c.start("kubelet", c.kubeletCgroup(), c.Tool("kubelet"),
		"--config", file, "--kubeconfig", c.Kubeconfig(NodeToken),
		"--hostname-override", c.NodeName, "--node-ip", c.NodeIPs)
}

// awaitNode waits until the node is Ready and accepts pods.
func (c *Cluster) awaitNode(ctx context.Context) error {
	err := Until(ctx, time.Minute, func(ctx context.Context) error {
		n, err := c.Client.CoreV1().Nodes().Get(ctx, c.NodeName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if len(n.Spec.Taints) > 0 {
			return fmt.Errorf("the node's taints are %+v", n.Spec.Taints)
		}
		for _, condition := range n.Status.Conditions {
			if condition.Type == corev1.NodeReady && condition.Status == corev1.ConditionTrue {
				return nil
			}
		}
		return fmt.Errorf("the node is not Ready: %+v", n.Status.Conditions)
	})
	if err != nil {
		return errors.Join(err, c.Log("kubelet"), c.Log("containerd"))
	}
	return nil
}

// start starts a component in one of the machine's cgroups.
func (c *Cluster) start(name, cgroup, program string, args ...string) error {
	log, err := os.OpenFile(c.logFile(name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer log.Close() //nolint:errcheck // the component's
	dir, err := os.Open(c.CgroupPath(cgroup))
	if err != nil {
		return err
	}
	defer dir.Close() //nolint:errcheck // read only
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Env = append(os.Environ(), "PATH="+c.tools+":/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(dir.Fd())}
	if err := cmd.Start(); err != nil {
		return err
	}
	c.running[name] = cmd
	return nil
}

// Stop stops a component with a signal and waits for it to exit.
func (c *Cluster) Stop(name string, signal os.Signal) error {
	if c.Kind {
		return c.stopOnKind(name, signal)
	}
	cmd := c.running[name]
	if cmd == nil {
		return fmt.Errorf("%s is not running", name)
	}
	delete(c.running, name)
	if err := cmd.Process.Signal(signal); err != nil {
		return err
	}
	_ = cmd.Wait() // killed by the signal
	if name == "kubelet" {
		return os.Remove(c.CgroupPath(c.kubeletCgroup()))
	}
	return nil
}

func (c *Cluster) logFile(name string) string { return c.file(name + ".log") }

// Log returns the end of a component's log, as an error.
func (c *Cluster) Log(name string) error {
	if c.Kind {
		return fmt.Errorf("%s: see journalctl on the node", name)
	}
	text, err := os.ReadFile(c.logFile(name))
	if err != nil {
		return err
	}
	lines := bytes.Split(bytes.TrimSpace(text), []byte("\n"))
	return fmt.Errorf("the log of %s ends with\n%s", name, bytes.Join(lines[max(0, len(lines)-15):], []byte("\n")))
}

// KeepLogs copies the logs of components and pods into a directory, replacing it.
func (c *Cluster) KeepLogs(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	logs, err := filepath.Glob(filepath.Join(c.dir, "*.log"))
	if err != nil {
		return err
	}
	return node.RunCommand(exec.Command("cp", append(append([]string{"-r"}, logs...), "/var/log/pods", dir)...))
}

// Kubelet requests a path from the kubelet's server.
func (c *Cluster) Kubelet(ctx context.Context, path string) ([]byte, error) {
	config := rest.CopyConfig(c.kubelet)
	config.GroupVersion, config.NegotiatedSerializer = &corev1.SchemeGroupVersion, scheme.Codecs
	client, err := rest.RESTClientFor(config)
	if err != nil {
		return nil, err
	}
	return client.Get().AbsPath(path).DoRaw(ctx)
}

// Until retries until there is no error or the limit is reached.
func Until(ctx context.Context, limit time.Duration, try func(context.Context) error) error {
	deadline := time.Now().Add(limit)
	for {
		err := try(ctx)
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) || ctx.Err() != nil {
			return fmt.Errorf("not within %s: %w", limit, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// Processes returns the processes whose file of this name in /proc satisfies wanted.
func Processes(file string, wanted func(text string) bool) (pids []int, err error) {
	entries, err := os.ReadDir("/proc")
	for _, e := range entries {
		pid, noProcess := strconv.Atoi(e.Name())
		if noProcess != nil {
			continue
		}
		if text, err := os.ReadFile(filepath.Join("/proc", e.Name(), file)); err == nil && wanted(string(text)) {
			pids = append(pids, pid)
		}
	}
	return pids, err
}
