package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
)

// setNetwork rewrites the primary's configuration, as its owner does, and puts the usual one back at the end of the test.
func setNetwork(t *testing.T, conf string) {
	t.Helper()
	file, _ := cluster.Primary()
	write := func(text string) {
		must(t, os.WriteFile(file+".new", []byte(text), 0o644))
		must(t, os.Rename(file+".new", file))
	}
	old, err := os.ReadFile(file)
	must(t, err)
	t.Cleanup(func() { write(string(old)) })
	write(conf)
	time.Sleep(settled)
}

// settled is when a change of the configuration has reached the daemon and the runtime.
const settled = 2 * time.Second

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

// The primary's owner does as he likes, others are in the chain too, and pods are answered all the same.
func TestOthersInTheChain(t *testing.T) {
	tuning := func(name string) map[string]any {
		return map[string]any{"type": "tuning", "sysctl": map[string]string{"net.ipv4.conf.all." + name: "1"}}
	}
	for _, way := range []string{"copy", "dropin"} {
		t.Run(way, func(t *testing.T) {
			deploy(t, map[string]any{"cni": map[string]any{"chain": way}})
			for name, conf := range map[string]string{
				"another MTU, and another before us": edit(t, func(list map[string]any) {
					list["plugins"].([]any)[0].(map[string]any)["mtu"] = 1400
					list["plugins"] = append(list["plugins"].([]any), tuning("log_martians"))
				}),
				"a bridge": Network("bridge", "10.90.0.0/16"),
			} {
				t.Run(name, func(t *testing.T) {
					setNetwork(t, conf)
					pod := run(t, web("in-"+way))
					awaitHits(t, pod.Name, 3)
					if name != "a bridge" {
						for _, a := range ours(t, pod) {
							device, err := netlinksafe.LinkByName(a)
							must(t, err)
							if device.Attrs().MTU != 1400 {
								t.Errorf("%s has MTU %d", a, device.Attrs().MTU)
							}
						}
					}
				})
			}
			if way == "dropin" {
				t.Run("another behind us", func(t *testing.T) {
					_, network := cluster.Primary()
					file := filepath.Join(NetDir, network, "20-tuning.conf")
					text, err := json.Marshal(tuning("log_martians"))
					must(t, err)
					must(t, os.WriteFile(file, text, 0o644))
					t.Cleanup(func() { must(t, os.Remove(file)) })
					setNetwork(t, edit(t, func(map[string]any) {})) // the runtime looks again
					pod := run(t, web("before-tuning"))
					awaitHits(t, pod.Name, 3)
				})
			}
		})
	}
}

// ours are the host-side devices of a pod.
func ours(t *testing.T, pod *corev1.Pod) []string {
	t.Helper()
	var names []string
	for _, a := range readStatus(t).Attachments {
		if a.Pod == Namespace+"/"+pod.Name {
			names = append(names, a.HostIfName)
		}
	}
	return names
}

// Both families, and IPv6 alone.
func TestFamilies(t *testing.T) {
	deploy(t, nil)
	dual := run(t, web("dual"))
	if len(dual.Status.PodIPs) != 2 {
		t.Errorf("addresses: %v", dual.Status.PodIPs)
	}
	awaitHits(t, dual.Name, 3)
	setNetwork(t, Network("ptp", IPv6))
	pod := run(t, web("six"))
	if ip := pod.Status.PodIP; !strings.Contains(ip, ":") || len(pod.Status.PodIPs) != 1 {
		t.Errorf("addresses: %v", pod.Status.PodIPs)
	}
	client := startClient(t, pod)
	awaitHits(t, pod.Name, 5)
	client.end()
}

// Everything that does not outlive a reboot is gone: processes, /run, BPF file systems, devices.
func TestReboot(t *testing.T) {
	if cluster.Kind {
		t.Skip("what ends with the node of a kind cluster is this test, too")
	}
	deploy(t, nil)
	pod := run(t, web("rebooted"))
	awaitHits(t, pod.Name, 3)
	for _, part := range []string{"kubelet", "containerd"} {
		must(t, cluster.Stop(part, syscall.SIGKILL))
	}
	must(t, killAllContainers())
	devices, err := netlinksafe.LinkList()
	must(t, err)
	for _, device := range devices {
		if strings.HasPrefix(device.Attrs().Name, "veth") {
			must(t, netlink.LinkDel(device))
		}
	}
	must(t, cluster.emptyRun())
	must(t, unix.Unmount(BPFFS, unix.MNT_DETACH))
	must(t, cluster.MountBPFFS())

	must(t, cluster.startContainerd())
	must(t, cluster.StartKubelet())
	pod, err = cluster.Await(t.Context(), pod, 2*time.Minute, "made anew", func(now *corev1.Pod) bool {
		return Ready(now) && Restarts(now) == 1
	})
	if err != nil {
		t.Fatalf("%v\n%v\n%v", err, events(t, nil), cluster.Log("kubelet"))
	}
	eventually(t, "the daemon runs", time.Minute, func() bool { return strings.Contains(ctl(t, "status"), "probeletd: running") })
	awaitHits(t, pod.Name, 5)
}

// killAllContainers kills what the runtime has started.
func killAllContainers() error {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		program, _, _ := strings.Cut(string(text), "\x00")
		var pid int
		switch filepath.Base(program) {
		case "containerd-shim-runc-v2", "app", "probeletd":
			if _, err := fmt.Sscanf(file, "/proc/%d/cmdline", &pid); err != nil {
				return err
			}
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return nil
}

// What was lost by somebody's hand is put back.
func TestRepair(t *testing.T) {
	deploy(t, nil)
	pod := run(t, web("repaired"))
	awaitHits(t, pod.Name, 3)
	watch := watchSteady(t, pod)
	for name, lose := range map[string]func(){
		"links": func() { detachLinks(t, attachmentOf(t, pod)) },
		"pins":  func() { must(t, os.RemoveAll(filepath.Join(pinsDir, attachmentOf(t, pod)))) },
		"bpffs": func() { must(t, unix.Unmount(BPFFS, unix.MNT_DETACH)); must(t, cluster.MountBPFFS()) },
		"all":   func() { must(t, os.RemoveAll(BPFFS+"/probelet")) },
	} {
		t.Run(name, func(t *testing.T) {
			lose()
			hits := 0
			eventually(t, "it is answered again", 2*time.Minute, func() bool {
				was := hits
				hits = readStatus(t).hits(pod.Name)
				return hits > was && was > 0
			})
		})
	}
	watch.end(true)
}

// detachLinks takes the programs off a pod's device, as bpftool link detach does.
func detachLinks(t *testing.T, attachment string) {
	t.Helper()
	pins, err := os.ReadDir(filepath.Join(pinsDir, attachment))
	must(t, err)
	detached := 0
	for _, pin := range pins {
		l, err := link.LoadPinnedLink(filepath.Join(pinsDir, attachment, pin.Name()), nil)
		if err != nil {
			continue // a map
		}
		must(t, errors.Join(l.Detach(), l.Close()))
		detached++
	}
	if detached == 0 {
		t.Fatalf("no links among %v", pins)
	}
}

// attachmentOf is the name of an attachment's directory.
func attachmentOf(t *testing.T, pod *corev1.Pod) string {
	t.Helper()
	for _, a := range readStatus(t).Attachments {
		if a.Pod == Namespace+"/"+pod.Name {
			return a.ContainerID + "@" + a.IfName
		}
	}
	t.Fatalf("%s is not attached", pod.Name)
	return ""
}
