package adopt

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/veth"
)

// cached returns what libcni writes after the ptp plugin's ADD of a pod, as modified by change.
func cached(p *bpftest.Pod, change func(map[string]any)) map[string]any {
	c := map[string]any{
		"kind": "cniCacheV1", "containerId": "c-" + p.HostIfName, "ifName": "eth0", "networkName": "pods", "netns": p.NS.Path(),
		"cniArgs": [][2]string{{"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", p.HostIfName}, {"K8S_POD_UID", "u-1"}},
		"config":  []byte(`{"name": "pods", "plugins": [{"type": "ptp"}, {"type": "probelet"}]}`),
		"result": map[string]any{
			"interfaces": []map[string]string{{"name": p.HostIfName}, {"name": "eth0", "sandbox": p.NS.Path()}},
			"ips":        []map[string]string{{"address": p.IPv4.String() + "/24"}, {"address": p.IPv6.String() + "/64"}},
		},
	}
	if change != nil {
		change(c)
	}
	return c
}

func podOf(p *bpftest.Pod) Pod {
	return Pod{Namespace: "shop", Name: p.HostIfName, UID: "u-1", IPs: []netip.Addr{p.IPv4, p.IPv6}}
}

// nodeWith returns a node whose runtime has cached these results.
func nodeWith(t *testing.T, results ...any) Node {
	t.Helper()
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "results"), 0o700); err != nil {
		t.Fatal(err)
	}
	for i, r := range results {
		text, ok := r.(string)
		if !ok {
			encoded, err := json.Marshal(r)
			if err != nil {
				t.Fatal(err)
			}
			text = string(encoded)
		}
		if err := os.WriteFile(filepath.Join(dir, "results", fmt.Sprintf("pods-%d", i)), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return Node{Root: "/", CacheDir: dir}
}

func find(t *testing.T, on *bpftest.Node, n Node, pods ...Pod) (records []attach.Record, err error) {
	t.Helper()
	bpftest.Do(t, on.NS, func() error {
		var unknown map[string]error
		records, unknown, err = n.Find(pods)
		for pod, reason := range unknown {
			err = errors.Join(err, fmt.Errorf("%s: %w", pod, reason))
		}
		return nil
	})
	return records, err
}

func TestPodsThatAreCertain(t *testing.T) {
	machine := bpftest.NewNode(t)
	pod := machine.AddPod(t)
	// A second interface, created first, must not be mistaken for the one in the results.
	bpftest.Do(t, machine.NS, func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "second"}, PeerName: "eth1", PeerNamespace: netlink.NsFd(int(pod.NS.Fd())),
		})
	})
	for name, change := range map[string]func(map[string]any){
		"as ptp writes it": nil,
		"older libcni, which does not cache the namespace": func(c map[string]any) { delete(c, "netns") },
		"older libcni, a placeholder reported first": func(c map[string]any) {
			delete(c, "netns")
			c["result"].(map[string]any)["interfaces"] = []map[string]string{
				{"name": "dummy1", "sandbox": "0"}, {"name": "net1", "sandbox": "/run/netns/other"}, {"name": "eth0", "sandbox": pod.NS.Path()},
			}
		},
		"older libcni, reported as by Calico": func(c map[string]any) {
			delete(c, "netns")
			reporting(pod, "Calico")(c)
		},
		"a runtime that does not pass the UID": func(c map[string]any) {
			c["cniArgs"] = [][2]string{{"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", pod.HostIfName}}
		},
		"a namespace named by its process":                        ofProcessIn(t, pod, fmt.Sprintf(`[{"name": %q}, {"name": "eth0", "sandbox": "PATH"}]`, pod.HostIfName)),
		"a namespace named by its process, reported as by Calico": ofProcessIn(t, pod, fmt.Sprintf(`[{"name": %q, "sandbox": "PATH"}]`, pod.HostIfName)),
		"an IPv4-mapped address": func(c map[string]any) {
			c["result"].(map[string]any)["ips"] = []map[string]string{{"address": "::ffff:" + pod.IPv4.String() + "/120"}}
		},
		"an additional address": func(c map[string]any) {
			c["result"].(map[string]any)["ips"] = []map[string]string{{"address": pod.IPv4.String() + "/24"}, {"address": "fd00::99/64"}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			node := nodeWith(t, cached(pod, change), `{"kind": "cniCach`)
			// Removed after the directory was read.
			if err := os.Symlink("/gone", filepath.Join(node.CacheDir, "results", "gone")); err != nil {
				t.Fatal(err)
			}
			records, err := find(t, machine, node, podOf(pod))
			if err != nil {
				t.Fatal(err)
			}
			if len(records) != 1 {
				t.Fatalf("%+v", records)
			}
			if r := records[0]; r.IfIndex != pod.IfIndex || r.HostIfName != pod.HostIfName || r.PodNetns != pod.Netns ||
				r.ContainerID != "c-"+pod.HostIfName || r.IfName != "eth0" || r.PodUID != "u-1" || !r.Adopted || len(r.PodIPs) == 0 {
				t.Errorf("%+v", r)
			}
		})
	}
}

// The pair of devices is the proof; what the plugin reported is only a hint.
func TestWhateverPluginsReport(t *testing.T) {
	machine := bpftest.NewNode(t)
	other, pod := machine.AddPod(t), machine.AddPod(t)
	for plugin, reported := range pod.Reported() {
		t.Run(plugin, func(t *testing.T) {
			records, err := find(t, machine, nodeWith(t, cached(other, nil), cached(pod, interfaces(reported))), podOf(pod))
			if err != nil || len(records) != 1 {
				t.Fatalf("%+v, %v", records, err)
			}
			if r := records[0]; r.IfIndex != pod.IfIndex || r.HostIfName != pod.HostIfName || r.PodNetns != pod.Netns {
				t.Errorf("%+v", r)
			}
		})
	}
	for what, reported := range pod.Contradicting(other) {
		t.Run(what, func(t *testing.T) {
			records, err := find(t, machine, nodeWith(t, cached(pod, interfaces(reported))), podOf(pod))
			if !errors.Is(err, veth.ErrContradicted) || len(records) != 0 {
				t.Errorf("%+v, %v", records, err)
			}
		})
	}
}

func interfaces(reported string) func(map[string]any) {
	return func(c map[string]any) { c["result"].(map[string]any)["interfaces"] = json.RawMessage(reported) }
}

func reporting(p *bpftest.Pod, plugin string) func(map[string]any) {
	return interfaces(p.Reported()[plugin])
}

// ofProcessIn names the namespace by a process in the pod. PATH in interfaces is replaced by that name.
func ofProcessIn(t *testing.T, p *bpftest.Pod, reported string) func(map[string]any) {
	return func(c map[string]any) {
		path := fmt.Sprintf("/proc/%d/ns/net", processIn(t, p))
		c["netns"] = path
		interfaces(strings.ReplaceAll(reported, "PATH", path))(c)
	}
}

// processIn runs a process in the pod's network namespace, like its first container.
func processIn(t *testing.T, p *bpftest.Pod) (pid int) {
	t.Helper()
	sleep := exec.Command("sleep", "60")
	bpftest.Do(t, p.NS, sleep.Start)
	t.Cleanup(func() { _ = sleep.Process.Kill(); _ = sleep.Wait() })
	return sleep.Process.Pid
}

// Nothing is guessed: a pod without a certain attachment is reported with the reason, and does not keep others from being found.
func TestPodsThatAreNotCertain(t *testing.T) {
	machine := bpftest.NewNode(t)
	pod, other := machine.AddPod(t), machine.AddPod(t)
	elsewhere := bpftest.NewNode(t).AddPod(t)
	odd := machine.AddPod(t)
	bpftest.Do(t, odd.NS, func() error { return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "eth1"}}) })
	bpftest.Do(t, bpftest.NewNode(t).NS, func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "faraway", Index: 4711}, PeerName: "eth3", PeerNamespace: netlink.NsFd(int(odd.NS.Fd())),
		})
	})
	bpftest.Do(t, machine.NS, func() error { // move the other end of eth2 into a third namespace
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "away"}, PeerName: "eth2", PeerNamespace: netlink.NsFd(int(odd.NS.Fd())),
		})
	})
	bpftest.Do(t, machine.NS, func() error {
		away, err := netlink.LinkByName("away")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetNsFd(away, int(other.NS.Fd())); err != nil {
			return err
		}
		decoy := netlink.LinkAttrs{Name: "decoy", Index: away.Attrs().Index}
		return netlink.LinkAdd(&netlink.Veth{LinkAttrs: decoy, PeerName: "decoys"})
	})
	named := func(ifName string) func(map[string]any) {
		return func(c map[string]any) {
			c["ifName"] = ifName
			c["result"].(map[string]any)["interfaces"] = []map[string]string{{"name": ifName, "sandbox": odd.NS.Path()}}
		}
	}
	for name, c := range map[string]struct {
		pod    *bpftest.Pod
		change func(map[string]any)
		why    string
	}{
		"another pod with that name": {pod, func(c map[string]any) {
			c["cniArgs"] = [][2]string{{"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", pod.HostIfName}, {"K8S_POD_UID", "u-0"}}
		}, "no record of its network"},
		"another namespace": {pod, func(c map[string]any) {
			c["cniArgs"] = [][2]string{{"K8S_POD_NAMESPACE", "bank"}, {"K8S_POD_NAME", pod.HostIfName}}
		}, "no record of its network"},
		"another kind of cached result": {pod, func(c map[string]any) { c["kind"] = "cniCacheV9" }, "no record of its network"},
		"only the loopback device":      {pod, func(c map[string]any) { c["ifName"] = "lo" }, "no record of its network"},
		"other addresses": {pod, func(c map[string]any) {
			c["result"].(map[string]any)["ips"] = []map[string]string{{"address": "10.0.0.1/24"}}
		}, "its addresses are [10.0.0.1], expected"},
		"no such interface":             {pod, func(c map[string]any) { c["ifName"] = "net1" }, "the pod has no net1"},
		"an ID that no record can have": {pod, func(c map[string]any) { c["containerId"] = strings.Repeat("c", 300) }, "container ID of 300"},
		"no namespace": {pod, func(c map[string]any) {
			delete(c, "netns")
			reporting(pod, "Azure")(c)
		}, "did not record its network namespace"},
		"a namespace that is gone":                   {pod, func(c map[string]any) { c["netns"] = "/run/netns/gone" }, "no such file"},
		"a file that is not a namespace":             {pod, func(c map[string]any) { c["netns"] = "/etc/hostname" }, "network namespace /etc/hostname"},
		"a process, whose device is not named":       {pod, ofProcessIn(t, pod, `[{"name": "eth0"}]`), "may belong to another process by now"},
		"a process, and nothing is reported":         {pod, ofProcessIn(t, pod, `[]`), "may belong to another process by now"},
		"another pod's process":                      {pod, ofProcessIn(t, other, `[{"name": "eth0", "sandbox": "PATH"}]`), "may belong to another process by now"},
		"another pod's process, the device is named": {pod, ofProcessIn(t, other, pod.Reported()["ptp"]), "is " + other.HostIfName + ", not " + pod.HostIfName},
		"a process of the host":                      {pod, func(c map[string]any) { c["netns"] = fmt.Sprintf("/proc/%d/ns/net", os.Getpid()) }, "no veth leads"},
		"another device": {pod, func(c map[string]any) {
			c["result"].(map[string]any)["interfaces"] = []map[string]string{{"name": other.HostIfName}, {"name": "eth0", "sandbox": pod.NS.Path()}}
		}, "is " + pod.HostIfName + ", not " + other.HostIfName},
		"an interface that is gone":           {odd, named("eth7"), "the pod has no eth7"},
		"an interface that is not a veth":     {odd, named("eth1"), "of type bridge, not veth"},
		"a veth between two other namespaces": {odd, named("eth2"), "decoy, is not the peer of eth2"},
		"a veth whose other end is elsewhere": {odd, named("eth3"), "is not in this namespace"},
		"of another machine":                  {elsewhere, reporting(elsewhere, "pod's end only"), "no veth leads"},
	} {
		t.Run(name, func(t *testing.T) {
			records, err := find(t, machine, nodeWith(t, cached(c.pod, c.change), cached(other, nil)), podOf(c.pod), podOf(other))
			if err == nil || !strings.Contains(err.Error(), c.why) || !strings.Contains(err.Error(), "shop/"+c.pod.HostIfName) {
				t.Errorf("error %v, want %q", err, c.why)
			}
			if len(records) != 1 || records[0].PodName != other.HostIfName || records[0].IfIndex != other.IfIndex {
				t.Errorf("%+v", records)
			}
		})
	}
}

// Symbolic links are resolved as on the host.
func TestLinksOfTheHost(t *testing.T) {
	machine := bpftest.NewNode(t)
	pod := machine.AddPod(t)
	n := nodeWith(t, cached(pod, func(c map[string]any) { c["netns"] = "/var/run/netns/pod" }))
	root := n.CacheDir
	netns := filepath.Join(root, "run", "netns", "pod")
	err := errors.Join(os.MkdirAll(filepath.Dir(netns), 0o700), os.Mkdir(filepath.Join(root, "var"), 0o700),
		os.Symlink("/run", filepath.Join(root, "var", "run")), os.WriteFile(netns, nil, 0o600),
		unix.Mount(pod.NS.Path(), netns, "", unix.MS_BIND, ""))
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(netns, unix.MNT_DETACH) //nolint:errcheck // a test's
	records, err := find(t, machine, Node{Root: root, CacheDir: "/"}, podOf(pod))
	if err != nil || len(records) != 1 || records[0].PodNetns != pod.Netns {
		t.Errorf("%+v, %v", records, err)
	}
}

func TestNaming(t *testing.T) {
	machine := bpftest.NewNode(t)
	pod := machine.AddPod(t)
	n := nodeWith(t, cached(pod, nil), cached(pod, func(c map[string]any) {
		c["config"] = []byte(`{"name": "pods", "plugins": [{"type": "ptp"}]}`)
	}), `{"kind"`)
	if count, err := n.Naming("probelet"); count != 1 || err != nil {
		t.Errorf("%d, %v", count, err)
	}
	if count, err := (Node{Root: "/", CacheDir: t.TempDir()}).Naming("probelet"); count != 0 || err != nil {
		t.Errorf("%d, %v", count, err)
	}
}
