package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	corev1 "k8s.io/api/core/v1"

	"github.com/probelet/probelet/e2e/harness/kube"
)

// setNetwork rewrites the primary's configuration, as its owner would, and restores it at the end of the test.
func setNetwork(t *testing.T, conf string) {
	t.Helper()
	file, _ := cluster.Primary()
	write := func(text string) {
		must(t, os.WriteFile(file+".new", []byte(text), 0o644))
		must(t, os.Rename(file+".new", file))
		if deployed != nil {
			eventually(t, "the plugin is in the chain", 20*time.Second, func() bool { return inChain(t) })
		}
		time.Sleep(read)
	}
	old, err := os.ReadFile(file)
	must(t, err)
	t.Cleanup(func() { write(string(old)) })
	write(conf)
}

// read is how long the runtime takes to read a changed configuration, which it does silently.
const read = 2 * time.Second

// inChain reports whether the plugin is in the chain of the network that the primary's file currently describes, exactly
// once.
func inChain(t *testing.T) bool {
	t.Helper()
	file, _ := cluster.Primary()
	primary := readList(t, file)
	byHand := strings.Contains(fmt.Sprint(primary.Plugins), "type:probelet")
	copied := ""
	if _, err := os.Stat(filepath.Join(kube.NetDir, "00-probelet.conflist")); err == nil {
		plugins := readList(t, filepath.Join(kube.NetDir, "00-probelet.conflist")).Plugins
		copied = fmt.Sprint(plugins[:len(plugins)-1])
	}
	dropIns, err := filepath.Glob(filepath.Join(kube.NetDir, "*", "10-probelet.conf"))
	must(t, err)
	switch {
	case byHand:
		return copied == "" && len(dropIns) == 0
	case copied != "":
		return copied == fmt.Sprint(primary.Plugins) && len(dropIns) == 0
	}
	return len(dropIns) == 1 && filepath.Base(filepath.Dir(dropIns[0])) == primary.Name
}

type list struct {
	Name    string
	Plugins []map[string]any
}

func readList(t *testing.T, file string) (l list) {
	t.Helper()
	text, err := os.ReadFile(file)
	must(t, err)
	must(t, json.Unmarshal(text, &l))
	return l
}

// edit changes the primary's configuration.
func edit(t *testing.T, change func(list map[string]any)) string {
	t.Helper()
	file, _ := cluster.Primary()
	text, err := os.ReadFile(file)
	must(t, err)
	var list map[string]any
	must(t, json.Unmarshal(text, &list))
	change(list)
	text, err = json.MarshalIndent(list, "", "  ")
	must(t, err)
	return string(text)
}

// addPlugins appends to the primary's plugins.
func addPlugins(list map[string]any, plugins ...any) {
	list["plugins"] = append(list["plugins"].([]any), plugins...)
}

// ttl is the value that the tuning plugin sets in pods.
const ttl = "77"

func tuning() map[string]any {
	return map[string]any{"type": "tuning", "sysctl": map[string]string{"net.ipv4.ip_default_ttl": ttl}}
}

// mustBeTuned checks that the tuning plugin ran in a pod.
func mustBeTuned(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	must(t, ns.WithNetNSPath(fmt.Sprintf("/proc/%d/ns/net", process(t, pod)), func(ns.NetNS) error {
		text, err := os.ReadFile("/proc/sys/net/ipv4/ip_default_ttl")
		if err == nil && strings.TrimSpace(string(text)) != ttl {
			err = fmt.Errorf("the other plugin did not run in %s: TTL %s", pod.Name, text)
		}
		return err
	}))
}

// Pods are answered without interruption when the primary's owner changes its configuration or other plugins join the chain.
func TestOtherPluginsInTheChain(t *testing.T) {
	for _, way := range []string{"copy", "dropin"} {
		t.Run(way, func(t *testing.T) {
			deploy(t, map[string]any{"cni": map[string]any{"chain": way}})
			old := run(t, web("old"))
			watch := watchSteady(t, old)
			churn := startChurn(t, "chain-"+way)
			t.Run("another MTU and a plugin before probelet", func(t *testing.T) {
				setNetwork(t, edit(t, func(list map[string]any) {
					list["plugins"].([]any)[0].(map[string]any)["mtu"] = 1400
					addPlugins(list, tuning())
				}))
				pod := run(t, web("in"))
				awaitHits(t, pod.Name, 3)
				mustBeTuned(t, pod)
				device, err := netlinksafe.LinkByName(readStatus(t).of(pod.Name).HostIfName)
				must(t, err)
				if device.Attrs().MTU != 1400 {
					t.Errorf("MTU %d", device.Attrs().MTU)
				}
			})
			t.Run("a bridge", func(t *testing.T) {
				setNetwork(t, kube.Network("bridge", "10.90.0.0/16"))
				pod := run(t, web("in"))
				awaitHits(t, pod.Name, 3)
				if !strings.HasPrefix(pod.Status.PodIP, "10.90.") {
					t.Errorf("address %s", pod.Status.PodIP)
				}
			})
			t.Run("added manually, with a plugin after probelet", func(t *testing.T) {
				setNetwork(t, edit(t, func(list map[string]any) {
					addPlugins(list, map[string]any{"type": "probelet", "hook": *hook}, tuning())
				}))
				pod := run(t, web("in"))
				awaitHits(t, pod.Name, 3)
				mustBeTuned(t, pod)
			})
			if way == "dropin" {
				t.Run("another drop-in", func(t *testing.T) { testOtherDropIn(t, churn) })
			}
			churn.end()
			watch.end()
		})
	}
}

// A drop-in of another plugin runs after probelet's and stays when that is removed.
func testOtherDropIn(t *testing.T, churn *churn) {
	_, network := cluster.Primary()
	file := filepath.Join(kube.NetDir, network, "20-tuning.conf")
	text, err := json.Marshal(tuning())
	must(t, err)
	must(t, os.WriteFile(file, text, 0o644))
	t.Cleanup(func() {
		must(t, os.Remove(file))
		_ = os.Remove(filepath.Dir(file)) // unless probelet's file is in there
	})
	setNetwork(t, edit(t, func(map[string]any) {})) // makes the runtime reload
	pod := run(t, web("in"))
	awaitHits(t, pod.Name, 3)
	mustBeTuned(t, pod)
	churn.during("uninstall beside another's drop-in", func() { uninstall(t) })
	if now, err := os.ReadFile(file); string(now) != string(text) {
		t.Errorf("the other drop-in is %q (%v)", now, err)
	}
	mustBeTuned(t, run(t, web("after")))
}

// Both address families, IPv6 first, and IPv6 alone: the first address is the probed one.
func TestAddressFamilies(t *testing.T) {
	deploy(t, nil)
	dual := run(t, web("dual"))
	if len(dual.Status.PodIPs) != 2 {
		t.Errorf("addresses: %v", dual.Status.PodIPs)
	}
	awaitHits(t, dual.Name, 3)
	t.Run("IPv6 alone", func(t *testing.T) {
		setNetwork(t, kube.Network("ptp", kube.IPv6))
		testIPv6(t, "six", 1)
	})
	t.Run("IPv6 first", func(t *testing.T) {
		if cluster.Kind {
			t.Skip("on kind, the node's IPv4 address comes first, and so does that of its pods")
		}
		restartKubelet(t, kube.NodeIPv6+","+kube.NodeIP)
		t.Cleanup(func() { restartKubelet(t, kube.NodeIP) })
		// The daemon's pod gets the node's address when it is created.
		deploy(t, map[string]any{"podAnnotations": map[string]any{"first": "IPv6"}})
		testIPv6(t, "dual-six", 2)
	})
}

func restartKubelet(t *testing.T, nodeIPs string) {
	t.Helper()
	must(t, cluster.Stop("kubelet", syscall.SIGTERM))
	cluster.NodeIPs = nodeIPs
	must(t, cluster.StartKubelet())
	eventually(t, "the kubelet is running", time.Minute, func() bool {
		_, err := cluster.Kubelet(context.Background(), "/healthz")
		return err == nil
	})
}

func testIPv6(t *testing.T, name string, addresses int) {
	t.Helper()
	f := failure{name: name}
	pod := run(t, f.pod("answer"))
	if ip := pod.Status.PodIP; !strings.Contains(ip, ":") || len(pod.Status.PodIPs) != addresses {
		t.Errorf("addresses: %v", pod.Status.PodIPs)
	}
	watch := watchSteady(t, pod)
	client := startClient(t, pod)
	awaitHits(t, pod.Name, 5)
	client.end()
	watch.end()

	stated, _ := bounds(t, pod, "readiness")
	begin := time.Now()
	set("status=500")(t, pod)
	timesUntil(t, begin, []*corev1.Pod{pod}, stated+slack, "not ready", notReady)
	mustBeFailed(t, pod)
	set("status=200")(t, pod)
	watch = watchSteady(t, awaitReady(t, pod))
	awaitHits(t, pod.Name, 3)
	watch.end()
}
