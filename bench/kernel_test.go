package bench

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/e2e/harness/node"
)

// Everything that depends on how programs are loaded, attached and fed is in this file.

// What is on a pod's host-side veth.
const (
	none    variant = "not attached"
	hookTC  variant = "hook tc"
	hookXDP variant = "hook xdp"
	empty   variant = "empty programs" // at tc egress and ingress, so the price of any program there
)

// hooks are those that there are, the default one first.
var hooks = []variant{hookTC, hookXDP}

var attachHooks = map[variant]attach.Hook{hookTC: attach.HookTC, hookXDP: attach.HookXDP}

func noneAndHooks() []variant  { return append([]variant{none}, hooks...) }
func emptyAndHooks() []variant { return append([]variant{empty}, hooks...) }

// mark returns m for the hook that has marks to meet, the default one. The others are shown beside it.
func (v variant) mark(m *mark) *mark {
	if v != hookTC {
		return nil
	}
	return m
}

// kernel is a set of loaded programs and maps, and the empty programs beside it.
type kernel struct {
	d             *datapath.Datapath
	dir           string
	out, in       *ebpf.Program // empty, at egress and ingress
	on            map[int]variant
	emptyAttached map[int][]link.Link
}

// newKernel loads the programs, in a BPF file system of its own. The prober is the machine's cgroup of that name.
func newKernel(t testing.TB) *kernel {
	t.Helper()
	k := &kernel{dir: bpftest.BPFDir(t), on: map[int]variant{}, emptyAttached: map[int][]link.Link{}}
	var err error
	if k.d, err = datapath.Ensure(context.Background(), k.dir); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = k.d.Close() })
	cgroup, err := os.Stat(machine.CgroupPath(node.ProberCgroup))
	if err != nil {
		t.Fatal(err)
	}
	id := cgroup.Sys().(*syscall.Stat_t).Ino // a cgroup's id is its inode number
	if err := k.d.SetProber(datapath.Prober{CgroupIDs: []uint64{id}}); err != nil {
		t.Fatal(err)
	}
	k.out, k.in = emptyProgram(t), emptyProgram(t)
	return k
}

// requireTCX skips where the kernel has no tcx (before 6.6), which the empty programs are attached by.
func requireTCX(t *testing.T) {
	t.Helper()
	const lo = 1
	_, err := link.QueryPrograms(link.QueryOptions{Target: lo, Attach: ebpf.AttachTCXEgress})
	if errors.Is(err, ebpf.ErrNotSupported) {
		t.Skip("needs tcx, so Linux 6.6 or later")
	}
	if err != nil {
		t.Fatal(err)
	}
}

func emptyProgram(t testing.TB) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.SchedCLS,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}, // TC_ACT_UNSPEC: on to the next one
		License:      "GPL",
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// put makes the variant the one that is on the pod's veth, and returns when it is, and nothing of another one is left.
func (k *kernel) put(t testing.TB, pod *bpftest.Pod, v variant) {
	t.Helper()
	if on, ok := k.on[pod.IfIndex]; ok && on == v {
		return
	}
	bpftest.Do(t, pod.Node.NS, func() error {
		if err := k.remove(pod); err != nil {
			return err
		}
		k.on[pod.IfIndex] = v
		return k.attach(pod, v)
	})
}

func idOf(pod *bpftest.Pod) attach.ID { return attach.ID{ContainerID: pod.HostIfName, IfName: "eth0"} }

func (k *kernel) attach(pod *bpftest.Pod, v variant) error {
	switch v {
	case none:
		return nil
	case empty:
		return k.attachEmpty(pod)
	}
	return k.attachDevice(idOf(pod), pod.IfIndex, pod.Netns, v, attach.ViaAuto)
}

// attachDevice attaches by a hook. ViaAuto, so tcx if possible, is how a pod is attached for most of its life, whatever ADD did.
func (k *kernel) attachDevice(id attach.ID, ifindex int, netns uint32, v variant, via attach.Via) error {
	return attach.Attach(k.d, k.dir, id, attach.Target{IfIndex: ifindex, PodNetns: netns, Hook: attachHooks[v]}, via)
}

func (k *kernel) attachEmpty(pod *bpftest.Pod) error {
	for at, p := range map[ebpf.AttachType]*ebpf.Program{ebpf.AttachTCXEgress: k.out, ebpf.AttachTCXIngress: k.in} {
		l, err := link.AttachTCX(link.TCXOptions{Program: p, Interface: pod.IfIndex, Attach: at})
		if err != nil {
			return err
		}
		k.emptyAttached[pod.IfIndex] = append(k.emptyAttached[pod.IfIndex], l)
	}
	return nil
}

func (k *kernel) remove(pod *bpftest.Pod) error {
	errs := []error{attach.Detach(k.d, k.dir, idOf(pod))}
	for _, l := range k.emptyAttached[pod.IfIndex] {
		errs = append(errs, l.Close())
	}
	delete(k.emptyAttached, pod.IfIndex)
	if err := errors.Join(errs...); err != nil {
		return err
	}
	// A link that lost its last pin is detached by the kernel a little later.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		is, err := bare(pod.IfIndex)
		if err != nil || is {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%s keeps its programs", pod.HostIfName)
		}
	}
}

// bare reports whether a device has no program.
func bare(ifindex int) (bool, error) {
	device, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return false, err
	}
	if xdp := device.Attrs().Xdp; xdp != nil && xdp.ProgId != 0 {
		return false, nil
	}
	for _, at := range []ebpf.AttachType{ebpf.AttachTCXEgress, ebpf.AttachTCXIngress} {
		found, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: at})
		if err != nil && !errors.Is(err, ebpf.ErrNotSupported) {
			return false, err
		}
		if found != nil && len(found.Programs) > 0 {
			return false, nil
		}
	}
	return true, nil
}

// pluginConf is probelet's entry in a network configuration that attaches by the hook.
func (k *kernel) pluginConf(stateDir string, v variant) map[string]any {
	return map[string]any{"type": "probelet", "bpfDir": k.dir, "stateDir": stateDir, "onError": "fail", "hook": attachHooks[v]}
}

// The pod's ports: one is asked by HTTP, the other by TCP. Where a port is asked by TCP, every tenth probe reaches the pod.
const (
	podPort = 8080
	tcpPort = 8081
)

// portFor returns the pod's port that is asked by a kind of request (Target).
func portFor(kind string) uint16 {
	if kind == "tcp" {
		return tcpPort
	}
	return podPort
}

// checkAnswered fails unless all of so many requests were answered in the kernel, or nine of ten by TCP, less one in a series
// that had begun before.
func checkAnswered(t *testing.T, measure, kind string, got, want int) {
	t.Helper()
	least := want
	if kind == "tcp" {
		least = want * 4 / 5
	}
	if got < least || got > want {
		t.Fatalf("%s: %d of %d were answered", measure, got, want)
	}
}

// armPod is arm for a pod that is asked at its IPv4 address.
func (k *kernel) armPod(t testing.TB, pod *bpftest.Pod) {
	t.Helper()
	k.arm(t, idOf(pod), netip.AddrPortFrom(pod.IPv4, podPort).String(), tcpPort)
}

// arm gives the pod four endpoints that are answered for an hour: three of HTTP, and one of TCP on a port of its own or on theirs.
// host is as probes name it.
func (k *kernel) arm(t testing.TB, id attach.ID, host string, tcp uint16) {
	t.Helper()
	pod, err := attach.OpenPod(k.d, k.dir, id)
	if err != nil {
		t.Fatal(err)
	}
	now := datapath.Now()
	e := datapath.Evidence{ObservedAt: now, FreshUntil: now + uint64(time.Hour), Result: datapath.ResultSuccess}
	if err := e.SetReply(200); err != nil {
		t.Fatal(err)
	}
	put := func(key datapath.EndpointKey, e datapath.Evidence) {
		if err := pod.Put(key, e); err != nil {
			t.Fatal(err)
		}
	}
	keys := bpftest.KeysOf(t, k.d.Steer())
	for _, request := range []string{proberRequest(host, healthPath), proberRequest(bareHost, healthPath), proberRequest(host, "/startup")} {
		var q datapath.Question
		q.Hash, q.Check = keys.Question(request)
		asked := e
		asked.Check = q.Check
		put(datapath.HTTPKey(podPort, q), asked)
	}
	put(datapath.PortKey(podPort), e)
	put(datapath.TCPKey(tcp), e)
	put(datapath.PortKey(tcp), e)
}

// counters are what became of probes.
type counters struct{ answered, handedOver int }

func (k *kernel) counters(t testing.TB) counters {
	t.Helper()
	c, err := k.d.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return counters{int(c["answered_http"] + c["answered_tcp"]), int(c["handed_over"])}
}

// egress and ingress are the programs that packets pass on their way to the pod, and from it.
func (k *kernel) egress() []*ebpf.Program  { return []*ebpf.Program{k.d.Steer()} }
func (k *kernel) ingress() []*ebpf.Program { return []*ebpf.Program{k.d.Observe(), k.d.Respond()} }

// mapBytes returns what the maps take that exist once, whatever the number of pods: what the kernel shows as their memlock.
func (k *kernel) mapBytes(t testing.TB) float64 {
	t.Helper()
	sum := 0.0
	err := filepath.WalkDir(k.dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		m, err := ebpf.LoadPinnedMap(path, nil)
		if err != nil {
			return nil //nolint:nilerr // a program or a link
		}
		defer m.Close() //nolint:errcheck // read only
		info, err := m.Info()
		if err != nil {
			return err
		}
		bytes, _ := info.Memlock()
		sum += float64(bytes)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return sum
}

// record writes what ADD leaves for the daemon and for DEL.
func (k *kernel) record(t testing.TB, stateDir string, id attach.ID, ifindex int) {
	t.Helper()
	err := attach.WriteRecord(stateDir, attach.Record{
		ContainerID: id.ContainerID, IfName: id.IfName, Network: "crowd", IfIndex: ifindex, HostIfName: id.ContainerID,
		PodNetns: uint32(ifindex), CreatedAt: time.Now(),
	})
	if err != nil {
		t.Fatal(err)
	}
}

// pins returns how many files and directories attachments have in the BPF file system.
func (k *kernel) pins(t testing.TB) int {
	t.Helper()
	count := 0
	err := filepath.WalkDir(datapath.AttachmentsDir(k.dir), func(string, fs.DirEntry, error) error {
		count++
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return count
}
