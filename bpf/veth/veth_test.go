package veth

import (
	"encoding/json"
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
)

// find looks for an interface of a pod, in its node's namespace.
func find(t *testing.T, p *bpftest.Pod, ifName string, hints []Hint) (end HostEnd, err error) {
	t.Helper()
	bpftest.Do(t, p.Node.NS, func() error {
		end, err = findHere(p.NS.Path(), ifName, hints)
		return nil
	})
	return end, err
}

func findHere(netnsPath, ifName string, hints []Hint) (HostEnd, error) {
	netns, err := os.Open(netnsPath)
	if err != nil {
		return HostEnd{}, err
	}
	defer netns.Close() //nolint:errcheck // only read
	return Find(netns, netnsPath, ifName, hints)
}

func parse(t *testing.T, reported string) (hints []Hint) {
	t.Helper()
	if err := json.Unmarshal([]byte(reported), &hints); err != nil {
		t.Fatal(err)
	}
	return hints
}

func wantHostEnd(t *testing.T, p *bpftest.Pod, hints []Hint) (hinted bool) {
	t.Helper()
	end, err := find(t, p, "eth0", hints)
	if err != nil {
		t.Fatal(err)
	}
	if want := (HostEnd{p.IfIndex, p.HostIfName, p.Netns, p.NetnsCookie, end.Hinted}); end != want {
		t.Errorf("%+v, want %+v", end, want)
	}
	return end.Hinted
}

func TestWhateverPluginsReport(t *testing.T) {
	node := bpftest.NewNode(t)
	node.AddPod(t)
	pod := node.AddPod(t)
	for name, reported := range pod.Reported() {
		t.Run(name, func(t *testing.T) {
			hinted := wantHostEnd(t, pod, parse(t, reported))
			if names := strings.Contains(reported, pod.HostIfName); hinted != names {
				t.Errorf("hinted: %v, %s", hinted, reported)
			}
		})
	}
	t.Run("bridge that does not report its port", func(t *testing.T) {
		node.Bridge(t, pod)
		wantHostEnd(t, pod, []Hint{{Name: "br0"}, {"eth0", pod.NS.Path()}})
	})
	t.Run("another sandbox's", func(t *testing.T) {
		wantHostEnd(t, pod, []Hint{{"veth9", "/run/netns/other"}, {"eth9", "/run/netns/other"}})
	})
	t.Run("a second interface", func(t *testing.T) {
		wantHostEnd(t, pod, []Hint{{"net1", pod.NS.Path()}, {Name: "veth9"}, {Name: pod.HostIfName}, {"eth0", pod.NS.Path()}})
	})
}

func TestContradictions(t *testing.T) {
	node := bpftest.NewNode(t)
	other, pod := node.AddPod(t), node.AddPod(t)
	for name, reported := range pod.Contradicting(other) {
		t.Run(name, func(t *testing.T) {
			if end, err := find(t, pod, "eth0", parse(t, reported)); !errors.Is(err, ErrContradicted) {
				t.Errorf("%+v, %v", end, err)
			}
		})
	}
}

// Each device is the host end of only one interface, even if others share its number or name.
func TestTwoPodsWithTwoInterfaces(t *testing.T) {
	node := bpftest.NewNode(t)
	pods := []*bpftest.Pod{node.AddPod(t), node.AddPod(t)}
	seen := map[int]bool{}
	for _, pod := range pods {
		add(t, node.NS, &netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "second" + pod.HostIfName}, PeerName: "net1", PeerNamespace: netlink.NsFd(int(pod.NS.Fd())),
		})
	}
	for _, pod := range pods {
		wantHostEnd(t, pod, nil)
		end, err := find(t, pod, "net1", nil)
		if err != nil || end.Name != "second"+pod.HostIfName {
			t.Errorf("%+v, %v", end, err)
		}
		seen[pod.IfIndex], seen[end.Index] = true, true
	}
	if len(seen) != 4 {
		t.Errorf("devices %v", seen)
	}
}

func add(t *testing.T, where ns.NetNS, device netlink.Link) {
	t.Helper()
	var err error
	bpftest.Do(t, where, func() error {
		err = netlink.LinkAdd(device)
		return nil
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		t.Skipf("this kernel has no devices of type %s", device.Type())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// move moves the pod's host end into another namespace and returns its index, which it keeps.
func move(t *testing.T, p *bpftest.Pod, to ns.NetNS) (index int) {
	t.Helper()
	bpftest.Do(t, p.Node.NS, func() error {
		device, err := netlink.LinkByIndex(p.IfIndex)
		if err != nil {
			return err
		}
		return netlink.LinkSetNsFd(device, int(to.Fd()))
	})
	bpftest.Do(t, to, func() error {
		device, err := netlink.LinkByName(p.HostIfName)
		if err == nil {
			index = device.Attrs().Index
		}
		return err
	})
	return index
}

func indexIn(t *testing.T, where ns.NetNS, name string) (index int) {
	t.Helper()
	bpftest.Do(t, where, func() error {
		device, err := netlink.LinkByName(name)
		if err == nil {
			index = device.Attrs().Index
		}
		return err
	})
	return index
}

func TestNoHostEnd(t *testing.T) {
	remove := func(t *testing.T, p *bpftest.Pod) {
		bpftest.Do(t, p.NS, func() error { return netlink.LinkDel(&netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}}) })
	}
	for name, test := range map[string]struct {
		change func(t *testing.T, p *bpftest.Pod)
		why    string
	}{
		"no such interface": {remove, "no eth0"},
		"a bridge": {func(t *testing.T, p *bpftest.Pod) {
			remove(t, p)
			add(t, p.NS, &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}})
		}, "type bridge"},
		"a dummy": {func(t *testing.T, p *bpftest.Pod) {
			remove(t, p)
			add(t, p.NS, &netlink.Dummy{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}})
		}, "type dummy"},
		"a macvlan of a veth on the host": {func(t *testing.T, p *bpftest.Pod) {
			remove(t, p)
			add(t, p.Node.NS, &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: p.HostIfName, Index: p.IfIndex}, PeerName: "lower"})
			add(t, p.Node.NS, &netlink.Macvlan{
				LinkAttrs: netlink.LinkAttrs{Name: "eth0", ParentIndex: p.IfIndex, Namespace: netlink.NsFd(int(p.NS.Fd()))},
				Mode:      netlink.MACVLAN_MODE_BRIDGE,
			})
		}, "type macvlan"},
		"both ends in the pod": {func(t *testing.T, p *bpftest.Pod) { move(t, p, p.NS) }, "not in this namespace"},
		"both ends in the pod, their numbers used here": {func(t *testing.T, p *bpftest.Pod) {
			index := move(t, p, p.NS)
			add(t, p.Node.NS, &netlink.Veth{
				LinkAttrs: netlink.LinkAttrs{Name: "decoy", Index: index}, PeerName: "decoys",
				PeerNamespace: netlink.NsFd(int(bpftest.NewNode(t).NS.Fd())),
			})
		}, "decoy, is not the peer"},
		"host end in a third namespace": {func(t *testing.T, p *bpftest.Pod) { move(t, p, bpftest.NewNode(t).NS) }, "not in this namespace"},
		"host end in a third namespace, another pod's has its number and name": {func(t *testing.T, p *bpftest.Pod) {
			index := move(t, p, bpftest.NewNode(t).NS)
			add(t, p.Node.NS, &netlink.Veth{
				LinkAttrs: netlink.LinkAttrs{Name: p.HostIfName, Index: index}, PeerName: "eth0",
				PeerNamespace: netlink.NsFd(int(bpftest.NewNode(t).NS.Fd())),
			})
		}, "is not the peer"},
		"host end in a third namespace, a bridge has its number and name": {func(t *testing.T, p *bpftest.Pod) {
			index := move(t, p, bpftest.NewNode(t).NS)
			add(t, p.Node.NS, &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: p.HostIfName, Index: index}})
		}, "is not the peer"},
		"host end in a third namespace, a macvlan of the pod's end has its number": {func(t *testing.T, p *bpftest.Pod) {
			index := move(t, p, bpftest.NewNode(t).NS)
			add(t, p.NS, &netlink.Macvlan{
				LinkAttrs: netlink.LinkAttrs{Name: p.HostIfName, Index: index, ParentIndex: indexIn(t, p.NS, "eth0"),
					Namespace: netlink.NsFd(int(p.Node.NS.Fd()))},
				Mode: netlink.MACVLAN_MODE_BRIDGE,
			})
		}, "is not the peer"},
		"host end in a third namespace, another interface of the pod has its number": {func(t *testing.T, p *bpftest.Pod) {
			index := move(t, p, bpftest.NewNode(t).NS)
			add(t, p.Node.NS, &netlink.Veth{
				LinkAttrs: netlink.LinkAttrs{Name: p.HostIfName, Index: index}, PeerName: "net1", PeerNamespace: netlink.NsFd(int(p.NS.Fd())),
			})
		}, "is not the peer"},
	} {
		t.Run(name, func(t *testing.T) {
			node := bpftest.NewNode(t)
			node.AddPod(t)
			pod := node.AddPod(t) // so that its two ends have different numbers
			test.change(t, pod)
			for reporter, reported := range pod.Reported() {
				end, err := find(t, pod, "eth0", parse(t, reported))
				if !errors.Is(err, ErrNoHostEnd) || !strings.Contains(err.Error(), test.why) {
					t.Errorf("%s: %+v, %v; want %q", reporter, end, err, test.why)
				}
			}
		})
	}
}

// A path that leads back to the host, where a device happens to have the interface's name.
func TestHostNamespace(t *testing.T) {
	node := bpftest.NewNode(t)
	add(t, node.NS, &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "veth1"})
	if end, err := find(t, &bpftest.Pod{Node: node, NS: node.NS}, "eth0", nil); !errors.Is(err, ErrNoHostEnd) {
		t.Errorf("%+v, %v", end, err)
	}
}

func TestNoNetns(t *testing.T) {
	bpftest.RequireRoot(t)
	for _, path := range []string{"/proc/self/exe", "/proc/self/ns/uts", "/tmp"} {
		if end, err := findHere(path, "eth0", nil); !errors.Is(err, ErrNoNetns) {
			t.Errorf("%s: %+v, %v", path, end, err)
		}
	}
}

// Until the host's kernel has reported a device that leads into the pod's namespace, it has no id for that namespace.
func TestNamespaceWithoutID(t *testing.T) {
	node, inside := bpftest.NewNode(t), bpftest.NewNode(t)
	add(t, inside.NS, &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "veth1", PeerNamespace: netlink.NsFd(int(node.NS.Fd())),
	})
	bpftest.Do(t, node.NS, func() error {
		id, err := netlink.GetNetNsIdByFd(int(inside.NS.Fd()))
		if id >= 0 {
			t.Errorf("the namespace already has id %d, so this tests nothing", id)
		}
		return err
	})
	for range 2 {
		if end, err := find(t, &bpftest.Pod{Node: node, NS: inside.NS}, "eth0", nil); err != nil || end.Name != "veth1" {
			t.Errorf("%+v, %v", end, err)
		}
	}
}

// The daemon has CAP_NET_ADMIN, but cannot enter namespaces.
func TestWithoutSysAdmin(t *testing.T) {
	node, inside := bpftest.NewNode(t), bpftest.NewNode(t)
	pods := []*bpftest.Pod{node.AddPod(t), {Node: node, NS: inside.NS}} // the second has no id yet
	add(t, inside.NS, &netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "veth2", PeerNamespace: netlink.NsFd(int(node.NS.Fd())),
	})
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // for good: the thread ends with the goroutine
		if err := errors.Join(node.NS.Set(), keepOnly(unix.CAP_NET_ADMIN)); err != nil {
			t.Error(err)
			return
		}
		if inside.NS.Set() == nil {
			t.Error("this thread can enter namespaces, so this tests nothing")
		}
		for _, pod := range pods {
			if end, err := findHere(pod.NS.Path(), "eth0", nil); err != nil || end.Index == 0 {
				t.Errorf("%+v, %v", end, err)
			}
		}
		// Find reads the cookie in a thread of its own, which has all capabilities here.
		netns, err := os.Open(inside.NS.Path())
		if err == nil {
			_, err = cookieFromInside(netns)
		}
		if !errors.Is(err, unix.EPERM) {
			t.Errorf("cookie: %v", err)
		}
	}()
	<-done
}

// keepOnly drops all capabilities of the thread but one.
func keepOnly(capability int) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{{Effective: 1 << capability, Permitted: 1 << capability}}
	return unix.Capset(&header, &data[0])
}
