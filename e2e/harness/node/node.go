package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// Node is a network with pods and the state that probelet keeps for them. Nodes of one machine are independent of each other.
type Node struct {
	*Machine
	BPFDir   string
	StateDir string
	LogFile  string // the CNI plugin's

	dir       string
	network   string
	plugins   string         // directory
	main, own map[string]any // configurations of the main plugin and of probelet
	pods      int
}

// Chain names the main plugin of a network, which runs before probelet.
type Chain string

// The main plugins that a network can have.
const (
	PTP    Chain = "ptp"
	Bridge Chain = "bridge"
)

// NewNode writes the configuration of a network: the chain, host-local addresses of both families, probelet.
func (m *Machine) NewNode(chain Chain) (*Node, error) {
	number := m.nodes.Add(1)
	network := fmt.Sprintf("net%d", number)
	dir := filepath.Join(m.Dir, network)
	n := &Node{
		Machine:  m,
		BPFDir:   filepath.Join(m.bpffs, network),
		StateDir: filepath.Join(dir, "state"),
		LogFile:  filepath.Join(dir, "plugin.log"),
		dir:      dir,
		plugins:  m.Bin,
		network:  network,
	}
	main := map[string]any{
		"type": chain,
		"ipam": map[string]any{
			"type":    "host-local",
			"dataDir": filepath.Join(dir, "addresses"),
			"ranges": [][]map[string]string{
				{{"subnet": fmt.Sprintf("10.88.%d.0/24", number)}},
				{{"subnet": fmt.Sprintf("fd00:88:%x::/64", number)}},
			},
		},
	}
	if chain == Bridge {
		main["bridge"], main["isGateway"] = fmt.Sprintf("bridge%d", number), true
	}
	n.main = main
	n.own = map[string]any{
		"type": "probelet", "bpfDir": n.BPFDir, "stateDir": n.StateDir, "logFile": n.LogFile,
	}
	for _, d := range []string{n.NetDir(), n.netnsDir()} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return nil, err
		}
	}
	return n, n.WriteChain(nil, nil)
}

// NewCgroup creates a cgroup of the node, and returns its directory.
func (n *Node) NewCgroup(name string) (string, error) {
	dir := filepath.Join(n.CgroupPath(n.network), name)
	return dir, os.MkdirAll(dir, 0o755)
}

// WriteChain writes the network's configuration, with the given plugins before and after probelet.
func (n *Node) WriteChain(before, after []map[string]any) error {
	plugins := append([]map[string]any{n.main}, before...)
	if n.own != nil {
		plugins = append(plugins, n.own)
	}
	plugins = append(plugins, after...)
	text, err := json.MarshalIndent(map[string]any{"cniVersion": "1.1.0", "name": n.network, "plugins": plugins}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(n.NetDir(), n.network+".conflist"), text, 0o644)
}

// WithoutProbelet removes probelet from the chain of pods added later.
func (n *Node) WithoutProbelet() error {
	n.own = nil
	return n.WriteChain(nil, nil)
}

// NetDir returns the directory of the node's network configurations.
func (n *Node) NetDir() string { return filepath.Join(n.dir, "net.d") }

// PluginDir returns the directory of the node's CNI plugins.
func (n *Node) PluginDir() string { return n.plugins }

// OwnPlugins gives the node a plugin directory of its own that contains the named plugins.
func (n *Node) OwnPlugins(names ...string) error {
	n.plugins = filepath.Join(n.dir, "plugins")
	if err := os.Mkdir(n.plugins, 0o755); err != nil {
		return err
	}
	for _, name := range names {
		if err := n.OwnPlugin(name, filepath.Join(n.Bin, name)); err != nil {
			return err
		}
	}
	return nil
}

// OwnPlugin puts a program into the node's plugin directory.
func (n *Node) OwnPlugin(name, program string) error {
	program, err := filepath.EvalSymlinks(program)
	if err != nil {
		return err
	}
	target := filepath.Join(n.plugins, name)
	if os.Link(program, target) == nil {
		return nil
	}
	_, err = output(exec.Command("cp", program, target)) // across file systems
	return err
}

func (n *Node) netnsDir() string { return filepath.Join(n.dir, "netns") }

// Pod is a network namespace on a node.
type Pod struct {
	Name       string
	Netns      string // path
	IPv4, IPv6 netip.Addr
	// HostDevice is the host-side end of its veth.
	HostDevice string

	node *Node
}

// Namespace is the namespace of all pods.
const Namespace = "default"

// NewPod creates a network namespace that is not part of the network yet.
func (n *Node) NewPod() (*Pod, error) {
	n.pods++
	name := fmt.Sprintf("pod%d", n.pods)
	p := &Pod{Name: name, Netns: filepath.Join(n.netnsDir(), name), node: n}
	return p, newNetns(p.Netns)
}

// newNetns creates a network namespace that lives as long as it is mounted at path.
func newNetns(path string) error {
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread exits instead of being reused
		err := unix.Unshare(unix.CLONE_NEWNET)
		if err == nil {
			err = unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "")
		}
		if err == nil {
			err = setUpNetns()
		}
		done <- err
	}()
	return <-done
}

// Add adds the pod to the network, as a container runtime does: cnitool runs the chain.
func (p *Pod) Add() error {
	out, err := p.cni("add")
	if err != nil {
		return err
	}
	var result struct {
		Interfaces []struct{ Name, Sandbox string }
		IPs        []struct{ Address netip.Prefix }
	}
	if err := json.Unmarshal(out, &result); err != nil {
		return fmt.Errorf("result of ADD: %w: %s", err, out)
	}
	for _, i := range result.Interfaces {
		if i.Sandbox == "" && strings.HasPrefix(i.Name, "veth") { // neither a bridge nor a device of the bandwidth plugin
			p.HostDevice = i.Name
		}
	}
	for _, ip := range result.IPs {
		if a := ip.Address.Addr(); a.Is4() {
			p.IPv4 = a
		} else {
			p.IPv6 = a
		}
	}
	if !p.IPv4.IsValid() || !p.IPv6.IsValid() {
		return fmt.Errorf("result of ADD lacks an address: %s", out)
	}
	return nil
}

// Check makes the chain compare the pod with what ADD set up.
func (p *Pod) Check() error {
	_, err := p.cni("check")
	return err
}

// Del removes the pod from the network.
func (p *Pod) Del() error {
	_, err := p.cni("del")
	return err
}

func (p *Pod) cni(verb string) ([]byte, error) {
	out, err := p.cniOnce(verb)
	// libcni lists the directory, then opens each file it found, and fails before it runs any plugin if a file was removed in
	// between. A runtime reads the directory again when it changes; cnitool reads it only once.
	if err != nil && strings.Contains(err.Error(), "error reading "+p.node.NetDir()) && strings.Contains(err.Error(), "no such file") {
		return p.cniOnce(verb)
	}
	return out, err
}

func (p *Pod) cniOnce(verb string) ([]byte, error) {
	n := p.node
	cmd := exec.Command(filepath.Join(n.Bin, "cnitool"), verb, n.network, p.Netns)
	cmd.Env = append(os.Environ(),
		"CNI_PATH="+n.plugins,
		"NETCONFPATH="+n.NetDir(),
		"CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE="+Namespace+";K8S_POD_NAME="+p.Name,
	)
	return output(cmd)
}

// RunCommand runs a command. The error includes its output.
func RunCommand(cmd *exec.Cmd) error {
	_, err := output(cmd)
	return err
}

// output returns the standard output of a command. The error includes all its output.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		said := strings.TrimSpace(stdout.String() + stderr.String())
		return nil, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, said)
	}
	return stdout.Bytes(), nil
}

// Remove removes the pod's network namespace, and its veth with it, as if the sandbox had vanished without DEL.
func (p *Pod) Remove() error {
	return errors.Join(unix.Unmount(p.Netns, unix.MNT_DETACH), os.Remove(p.Netns))
}
