package adopt

import (
	"encoding/json"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
)

// cached is what libcni writes after an ADD of a pod by the ptp plugin; change makes it another.
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

// nodeWith is a node whose runtime has left these results.
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
		records, err = n.Find(pods)
		return nil
	})
	return records, err
}

func TestPodsThatAreCertain(t *testing.T) {
	machine := bpftest.NewNode(t)
	pod := machine.AddPod(t)
	for name, change := range map[string]func(map[string]any){
		"as ptp writes it": nil,
		"older libcni, which does not note the namespace": func(c map[string]any) { delete(c, "netns") },
		"a plugin that does not name the host's side": func(c map[string]any) {
			c["result"].(map[string]any)["interfaces"] = []map[string]string{{"name": "eth0", "sandbox": pod.NS.Path()}}
		},
		"a runtime that does not give the UID": func(c map[string]any) {
			c["cniArgs"] = [][2]string{{"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", pod.HostIfName}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			lo := map[string]any{"kind": "cniCacheV1", "containerId": "c-" + pod.HostIfName, "ifName": "lo"}
			records, err := find(t, machine, nodeWith(t, cached(pod, change), lo, `{"kind": "cniCach`), podOf(pod))
			if err != nil {
				t.Fatal(err)
			}
			if len(records) != 1 {
				t.Fatalf("%+v", records)
			}
			if r := records[0]; r.IfIndex != pod.IfIndex || r.HostIfName != pod.HostIfName || r.PodNetns != pod.Netns ||
				r.ContainerID != "c-"+pod.HostIfName || r.IfName != "eth0" || r.PodUID != "u-1" || !r.Adopted ||
				strings.Join(r.PodIPs, " ") != pod.IPv4.String()+" "+pod.IPv6.String() {
				t.Errorf("%+v", r)
			}
		})
	}
}

// Nothing is guessed, and of what is not certain the reason is said. Another pod is not kept from being found.
func TestPodsThatAreNotCertain(t *testing.T) {
	machine := bpftest.NewNode(t)
	pod, other := machine.AddPod(t), machine.AddPod(t)
	twice := machine.AddPod(t)
	bpftest.Do(t, machine.NS, func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "second"}, PeerName: "eth1", PeerNamespace: netlink.NsFd(int(twice.NS.Fd())),
		})
	})
	unnamed := func(p *bpftest.Pod) func(map[string]any) {
		return func(c map[string]any) {
			c["result"].(map[string]any)["interfaces"] = []map[string]string{{"name": "eth0", "sandbox": p.NS.Path()}}
		}
	}
	elsewhere := bpftest.NewNode(t).AddPod(t)
	for name, c := range map[string]struct {
		pod    *bpftest.Pod
		change func(map[string]any)
		why    string
	}{
		"another pod of that name": {pod, func(c map[string]any) {
			c["cniArgs"] = [][2]string{{"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", pod.HostIfName}, {"K8S_POD_UID", "u-0"}}
		}, "no record of its network"},
		"another namespace": {pod, func(c map[string]any) {
			c["cniArgs"] = [][2]string{{"K8S_POD_NAMESPACE", "bank"}, {"K8S_POD_NAME", pod.HostIfName}}
		}, "no record of its network"},
		"other addresses": {pod, func(c map[string]any) {
			c["result"].(map[string]any)["ips"] = []map[string]string{{"address": "10.0.0.1/24"}}
		}, "its addresses are [10.0.0.1], not"},
		"no such interface":           {pod, func(c map[string]any) { c["ifName"] = "net1" }, "not described"},
		"a namespace that is gone":    {pod, func(c map[string]any) { c["netns"] = "/run/netns/gone" }, "no such file"},
		"a file that is no namespace": {pod, func(c map[string]any) { c["netns"] = "/etc/hostname" }, "network namespace /etc/hostname"},
		"another device": {pod, func(c map[string]any) {
			c["result"].(map[string]any)["interfaces"] = []map[string]string{{"name": other.HostIfName}, {"name": "eth0", "sandbox": pod.NS.Path()}}
		}, "no veth of the host leads into"},
		"two devices":        {twice, unnamed(twice), "more than one veth"},
		"of another machine": {elsewhere, unnamed(elsewhere), "no device of the host leads into"},
	} {
		t.Run(name, func(t *testing.T) {
			records, err := find(t, machine, nodeWith(t, cached(c.pod, c.change), cached(other, nil)), podOf(c.pod), podOf(other))
			if err == nil || !strings.Contains(err.Error(), c.why) || !strings.Contains(err.Error(), "shop/"+c.pod.HostIfName) {
				t.Errorf("error %v, want %q", err, c.why)
			}
			if c.pod.HostIfName == other.HostIfName {
				return
			}
			if len(records) != 1 || records[0].PodName != other.HostIfName || records[0].IfIndex != other.IfIndex {
				t.Errorf("%+v", records)
			}
		})
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
