package cluster

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"

	"github.com/probelet/probelet/e2e/harness/kube"
)

// After a reboot, everything volatile is gone: processes, /run, BPF file systems, devices.
func TestReboot(t *testing.T) {
	if cluster.Kind {
		testRebootOnKind(t)
		return
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
	must(t, cluster.EmptyRun())
	must(t, unix.Unmount(kube.BPFFS, unix.MNT_DETACH))
	must(t, cluster.MountBPFFS())

	must(t, cluster.StartContainerd())
	must(t, cluster.StartKubelet())
	pod, err = cluster.Await(t.Context(), pod, 2*time.Minute, "recreated", func(now *corev1.Pod) bool {
		return kube.Ready(now) && kube.Restarts(now) == 1
	})
	if err != nil {
		t.Fatalf("%v\n%v\n%v", err, events(t, nil), cluster.Log("kubelet"))
	}
	eventually(t, "the daemon runs", time.Minute, func() bool { return strings.Contains(ctl(t, "status"), "probeletd: running") })
	awaitHits(t, pod.Name, 5)
}

// testRebootOnKind runs before and after kind/run.sh restarts the node.
func testRebootOnKind(t *testing.T) {
	pod := web("rebooted")
	switch os.Getenv("PROBELET_KIND") {
	case "reboot":
		deploy(t, nil)
		made, err := cluster.Create(t.Context(), pod)
		must(t, err)
		awaitReady(t, made)
		awaitHits(t, pod.Name, 3)
	case "rebooted":
		now, err := cluster.Await(t.Context(), pod, 5*time.Minute, "recreated", func(now *corev1.Pod) bool {
			return kube.Ready(now) && kube.Restarts(now) > 0
		})
		must(t, err)
		awaitHits(t, pod.Name, 5)
		must(t, cluster.Delete(t.Context(), now))
	default:
		t.Skip("kind/run.sh restarts the node later")
	}
}

// killAllContainers kills the processes that the runtime started.
func killAllContainers() error {
	pids, err := kube.Processes("cmdline", func(text string) bool {
		program, _, _ := strings.Cut(text, "\x00")
		return slices.Contains([]string{"containerd-shim-runc-v2", "app", "probeletd"}, filepath.Base(program))
	})
	for _, pid := range pids {
		_ = syscall.Kill(pid, syscall.SIGKILL) // may have exited already
	}
	return err
}

// The daemon repairs what was removed by accident.
func TestRepair(t *testing.T) {
	deploy(t, nil)
	pod := run(t, web("repaired"))
	awaitHits(t, pod.Name, 3)
	watch := watchSteady(t, pod)
	for _, lost := range []struct {
		name string
		lose func()
	}{
		{"links", func() { detachLinks(t, attachmentOf(t, pod)) }},
		{"pins", func() { must(t, os.RemoveAll(filepath.Join(pinsDir(t), attachmentOf(t, pod)))) }},
		{"bpffs", func() { must(t, unix.Unmount(kube.BPFFS, unix.MNT_DETACH)); must(t, cluster.MountBPFFS()) }},
		{"all", func() { must(t, os.RemoveAll(kube.BPFFS+"/probelet")) }},
	} {
		t.Run(lost.name, func(t *testing.T) {
			lost.lose()
			hits := 0
			eventually(t, "the pod is answered again", 2*time.Minute, func() bool {
				was := hits
				hits = readStatus(t).hits(pod.Name)
				return hits > was && was > 0
			})
		})
	}
	watch.end()
}

// detachLinks detaches the programs from a pod's device, as bpftool link detach does. The daemon turns them into links after
// ADD.
func detachLinks(t *testing.T, attachment string) {
	t.Helper()
	want := 2 // steer and observe
	if *hook == "xdp" {
		want++ // respond
	}
	var links []link.Link
	eventually(t, "steer and observe are tcx links", time.Minute, func() bool {
		links = linksOf(t, attachment)
		return len(links) == want
	})
	for _, l := range links {
		must(t, errors.Join(l.Detach(), l.Close()))
	}
}

func linksOf(t *testing.T, attachment string) (links []link.Link) {
	t.Helper()
	pins, err := os.ReadDir(filepath.Join(pinsDir(t), attachment))
	must(t, err)
	for _, pin := range pins {
		if l, err := link.LoadPinnedLink(filepath.Join(pinsDir(t), attachment, pin.Name()), nil); err == nil {
			links = append(links, l)
		}
	}
	return links
}

// attachmentOf returns the name of an attachment's directory.
func attachmentOf(t *testing.T, pod *corev1.Pod) string {
	t.Helper()
	a := readStatus(t).of(pod.Name)
	if a.ContainerID == "" {
		t.Fatalf("%s is not attached", pod.Name)
	}
	return a.ContainerID + "@" + a.IfName
}
