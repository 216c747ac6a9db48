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
	"github.com/probelet/probelet/internal/polltest"
)

// This file contains everything that depends on how programs are loaded, attached and fed.

// Variants of what is attached to a pod's host-side veth.
const (
	none    variant = "not attached"
	hookTC  variant = "hook tc"
	hookXDP variant = "hook xdp"
	empty   variant = "empty programs" // at tc egress and ingress: the cost of any program there
)

// hooks lists the hooks, the default one first.
var hooks = []variant{hookTC, hookXDP}

var attachHooks = map[variant]attach.Hook{hookTC: attach.HookTC, hookXDP: attach.HookXDP}

func noneAndHooks() []variant  { return append([]variant{none}, hooks...) }
func emptyAndHooks() []variant { return append([]variant{empty}, hooks...) }

// mark returns m for the default hook, which has marks to meet, and nil for others, which are only shown.
func (v variant) mark(m *mark) *mark {
	if v != hookTC {
		return nil
	}
	return m
}

// kernel is a set of loaded programs and maps, plus the empty programs.
type kernel struct {
	d             *datapath.Datapath
	dir           string
	out, in       *ebpf.Program // empty programs, at egress and ingress
	on            map[int]variant
	emptyAttached map[int][]link.Link
}

// newKernel loads the programs in a BPF file system of its own. The prober is the machine's cgroup of that name.
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
	id := cgroup.Sys().(*syscall.Stat_t).Ino // the inode number is the cgroup ID
	if err := k.d.SetProber(datapath.Prober{CgroupIDs: []uint64{id}}); err != nil {
		t.Fatal(err)
	}
	k.out, k.in = emptyProgram(t), emptyProgram(t)
	return k
}

// requireTCX skips the test on kernels before 6.6, which lack tcx, needed for the empty programs.
func requireTCX(t *testing.T) {
	t.Helper()
	const lo = 1
	_, err := link.QueryPrograms(link.QueryOptions{Target: lo, Attach: ebpf.AttachTCXEgress})
	if errors.Is(err, ebpf.ErrNotSupported) {
		t.Skip("needs tcx (Linux 6.6)")
	}
	if err != nil {
		t.Fatal(err)
	}
}

func emptyProgram(t testing.TB) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type:         ebpf.SchedCLS,
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, -1), asm.Return()}, // TC_ACT_UNSPEC: continue with the next program
		License:      "GPL",
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

// put attaches a variant to the pod's veth, and returns once it is attached and nothing of another variant is left.
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

// attachDevice attaches a pod by a hook. ViaAuto, which prefers tcx, is how a pod is attached for most of its life,
// regardless of what ADD did.
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
	// The kernel detaches a link some time after its last pin is removed.
	var is bool
	var err error
	if !polltest.Within(polltest.Limit, func() bool { is, err = bare(pod.IfIndex); return is || err != nil }) {
		return fmt.Errorf("%s still has programs", pod.HostIfName)
	}
	return err
}

// bare reports whether a device has no programs.
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

// pluginConf returns probelet's entry in a network configuration, attaching by the hook.
func (k *kernel) pluginConf(stateDir string, v variant) map[string]any {
	return map[string]any{"type": "probelet", "bpfDir": k.dir, "stateDir": stateDir, "onError": "fail", "hook": attachHooks[v]}
}

// Ports of the pod: one is probed by HTTP, the other by TCP, where every tenth probe reaches the pod.
const (
	podPort = 8080
	tcpPort = 8081
)

// portFor returns the pod's port for a kind of request (Target).
func portFor(kind string) uint16 {
	if kind == "tcp" {
		return tcpPort
	}
	return podPort
}

// checkAnswered fails unless the kernel answered all of the requests or, by TCP, nine of ten, minus one for a series that
// began earlier.
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

// armPod calls arm for a pod that is probed at its IPv4 address.
func (k *kernel) armPod(t testing.TB, pod *bpftest.Pod) {
	t.Helper()
	k.arm(t, idOf(pod), netip.AddrPortFrom(pod.IPv4, podPort).String(), tcpPort)
}

// arm gives the pod four endpoints that are answered for an hour: three HTTP endpoints, and a TCP endpoint on its own port or
// on theirs. host is the address in probes.
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

// counters count what happened to probes.
type counters struct{ answered, handedOver int }

func (k *kernel) counters(t testing.TB) counters {
	t.Helper()
	c, err := k.d.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return counters{int(c["answered_http"] + c["answered_tcp"]), int(c["handed_over"])}
}

// egress and ingress are the programs that packets pass on their way to the pod and back.
func (k *kernel) egress() []*ebpf.Program  { return []*ebpf.Program{k.d.Steer()} }
func (k *kernel) ingress() []*ebpf.Program { return []*ebpf.Program{k.d.Observe(), k.d.Respond()} }

// mapBytes returns the size of the maps that exist once, however many pods there are, according to the memlock that the
// kernel reports.
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

// record writes the record that ADD leaves for the daemon and for DEL.
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

// pins returns how many files and directories the attachments have in the BPF file system.
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
