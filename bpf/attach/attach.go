// Package attach puts the two programs of package datapath on the host-side veth of a pod, checks that they are there,
// and takes them off. It knows nothing of Kubernetes or CNI; what it records of a pod is carried, not interpreted.
package attach

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
)

var (
	// ErrNotAttached: there is no attachment of that name.
	ErrNotAttached = errors.New("not attached")
	// ErrIncomplete: something of the attachment is missing, or is not ours.
	ErrIncomplete = errors.New("attachment is not as it was made")
)

// ID names an attachment: the pod's container and the name of its interface, as CNI has them.
type ID struct {
	ContainerID string
	IfName      string
}

// names of an ID on disk. A dot is reserved in bpffs, and "@" is in no container ID (CNI spec, section 2), so that the
// first one ends it.
var (
	escape   = strings.NewReplacer("%", "%25", ".", "%2E", "/", "%2F")
	unescape = strings.NewReplacer("%25", "%", "%2E", ".", "%2F", "/")
)

func (id ID) name() string { return escape.Replace(id.ContainerID) + "@" + escape.Replace(id.IfName) }

func parseName(name string) (ID, bool) {
	container, ifName, ok := strings.Cut(name, "@")
	return ID{unescape.Replace(container), unescape.Replace(ifName)}, ok
}

func (id ID) String() string { return id.ContainerID + "/" + id.IfName }

// XDPMode is how respond is attached.
type XDPMode string

// XDPGeneric runs respond on socket buffers, behind the driver. It is the only mode in which it works on a veth:
// native XDP there sees what the pod sends, but not what is redirected into the device's receive path.
const XDPGeneric XDPMode = "generic"

// Hook is the tc hook that steer is attached to.
type Hook string

// Hooks. HookAuto takes tcx where the kernel has it (6.6) and clsact elsewhere.
const (
	HookAuto   Hook = ""
	HookClsact Hook = "clsact"
)

const (
	pinSteer   = "steer"
	pinRespond = "respond"
	// ownsQdisc is a directory in bpffs whose presence says that we made the clsact qdisc.
	ownsQdisc = "owns-clsact"
	// filterName is the name of steer's filter, or begins it: the filter says too whether we made the qdisc, because pins can
	// be lost.
	filterName      = "probelet/steer"
	ownerFilterName = filterName + ", owns-clsact"
)

// Target is what is attached to.
type Target struct {
	IfIndex int // of the host-side veth
	// PodNetns is the inode number of the pod's network namespace.
	PodNetns uint32
}

// Attach makes the pod behind the target known to the programs, with nothing to be answered yet, and
// attaches them. All of it or nothing: what is left of an earlier attempt of the same ID is removed first.
func Attach(d *datapath.Datapath, bpfDir string, id ID, target Target, hook Hook) (err error) {
	if err := Detach(d, bpfDir, id); err != nil {
		return err
	}
	dir := filepath.Join(datapath.AttachmentsDir(bpfDir), id.name())
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, Detach(d, bpfDir, id))
		}
	}()
	pod, err := d.NewPod()
	if err != nil {
		return err
	}
	defer pod.Close() //nolint:errcheck // pinned
	if err := pod.Pin(dir); err != nil {
		return err
	}
	if err := d.AddPod(uint32(target.IfIndex), target.PodNetns, pod); err != nil {
		return err
	}
	if err := attachRespond(d, dir, target.IfIndex); err != nil {
		return err
	}
	return attachSteer(d, dir, target.IfIndex, hook)
}

// attachRespond comes first: steer must not redirect packets that nobody takes.
func attachRespond(d *datapath.Datapath, dir string, ifindex int) error {
	l, err := link.AttachXDP(link.XDPOptions{
		Program:   d.Respond(),
		Interface: ifindex,
		Flags:     link.XDPGenericMode,
	})
	if err != nil {
		return fmt.Errorf("attaching XDP to device %d%s: %w", ifindex, xdpUser(ifindex), err)
	}
	defer l.Close() //nolint:errcheck // pinned
	return l.Pin(filepath.Join(dir, pinRespond))
}

// xdpUser says in words whose program is on the device already, if one is, and what to do.
func xdpUser(ifindex int) string {
	id, err := xdpProgram(ifindex)
	if err != nil || id == 0 {
		return ""
	}
	const do = `if another BPF file system was mounted over the one in which it is pinned, unmount that; or detach it: "bpftool link" knows its link`
	switch name := programName(id); name {
	case "":
		return fmt.Sprintf(" (it has XDP program %d already, somebody else's or of another probelet; %s)", id, do)
	case pinRespond:
		return fmt.Sprintf(" (it has XDP program %d already, respond of another probelet; %s)", id, do)
	default:
		return fmt.Sprintf(" (it has XDP program %d already, %s)", id, name)
	}
}

// programName is empty if it cannot be found out: that takes CAP_SYS_ADMIN.
func programName(id ebpf.ProgramID) string {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer p.Close() //nolint:errcheck // read only
	info, err := p.Info()
	if err != nil {
		return ""
	}
	return info.Name
}

func attachSteer(d *datapath.Datapath, dir string, ifindex int, hook Hook) error {
	if hook != HookClsact {
		l, err := link.AttachTCX(link.TCXOptions{
			Program:   d.Steer(),
			Interface: ifindex,
			Attach:    ebpf.AttachTCXEgress,
		})
		if err == nil {
			defer l.Close() //nolint:errcheck // pinned
			return l.Pin(filepath.Join(dir, pinSteer))
		}
		if !errors.Is(err, ebpf.ErrNotSupported) {
			return fmt.Errorf("attaching tcx to device %d: %w", ifindex, err)
		}
	}
	return attachClsact(d, dir, ifindex)
}

func attachClsact(d *datapath.Datapath, dir string, ifindex int) error {
	// One of ours, whose pins are lost, is in the way.
	owned, _, err := removeFilters(ifindex)
	if err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(dir, ownsQdisc), 0o700); err != nil {
		return err
	}
	name := ownerFilterName
	if err := netlink.QdiscAdd(clsact(ifindex)); errors.Is(err, unix.EEXIST) && !owned {
		if err := os.Remove(filepath.Join(dir, ownsQdisc)); err != nil {
			return err
		}
		name = filterName
	} else if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("adding clsact to device %d: %w", ifindex, err)
	}
	filter := &netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: ifindex,
			Parent:    netlink.HANDLE_MIN_EGRESS,
			Handle:    1,
			Protocol:  unix.ETH_P_ALL,
			Priority:  1,
		},
		Fd:           d.Steer().FD(),
		Name:         name,
		DirectAction: true,
	}
	if err := netlink.FilterAdd(filter); err != nil {
		return fmt.Errorf("adding a tc filter to device %d: %w", ifindex, err)
	}
	return nil
}

// removeFilters removes our filters from the device. It returns whether they say that the qdisc is ours, and how many filters
// of others there are.
func removeFilters(ifindex int) (owned bool, others int, err error) {
	egress, err := filtersAt(ifindex, netlink.HANDLE_MIN_EGRESS)
	if err != nil {
		return false, 0, err
	}
	for _, f := range egress {
		b, ok := f.(*netlink.BpfFilter)
		if !ok || !strings.HasPrefix(b.Name, filterName) {
			others++
			continue
		}
		owned = owned || b.Name == ownerFilterName
		if err := netlink.FilterDel(f); err != nil && !errors.Is(err, unix.ENOENT) {
			return owned, others, fmt.Errorf("removing the tc filter of device %d: %w", ifindex, err)
		}
	}
	return owned, others, nil
}

func clsact(ifindex int) *netlink.Clsact {
	return &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: ifindex,
		Handle:    netlink.MakeHandle(0xffff, 0),
		Parent:    netlink.HANDLE_CLSACT,
	}}
}

// OpenPod opens the maps of an attachment. The error is os.ErrNotExist if they are not pinned.
func OpenPod(bpfDir string, id ID) (*datapath.Pod, error) {
	return datapath.OpenPod(filepath.Join(datapath.AttachmentsDir(bpfDir), id.name()))
}

// Checker compares attachments with what Attach makes of them, all with one look at what is common to them.
type Checker struct {
	bpfDir         string
	pods           map[uint32]datapath.PodIDs
	respond, steer ebpf.ProgramID
}

// NewChecker looks.
func NewChecker(d *datapath.Datapath, bpfDir string) (*Checker, error) {
	c := &Checker{bpfDir: bpfDir}
	var err error
	if c.pods, err = d.PodIDs(); err != nil {
		return nil, err
	}
	if c.respond, err = programID(d.Respond()); err != nil {
		return nil, err
	}
	c.steer, err = programID(d.Steer())
	return c, err
}

// Check is of one attachment, to the device ifindex. The error is ErrNotAttached or ErrIncomplete, with what is wrong; another one
// says that this cannot be found out.
func (c *Checker) Check(id ID, ifindex int) error {
	dir := filepath.Join(datapath.AttachmentsDir(c.bpfDir), id.name())
	if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s: %w", id, ErrNotAttached)
	}
	wrong := func(format string, args ...any) error {
		return fmt.Errorf("%s: %w: %s", id, ErrIncomplete, fmt.Sprintf(format, args...))
	}

	pinned, err := datapath.PinnedPodIDs(dir)
	if err != nil {
		return err
	}
	if pinned.Evidence == 0 || pinned.Tallies == 0 {
		return wrong("the pod's maps are %+v (0: not pinned)", pinned)
	}
	if used := c.pods[uint32(ifindex)]; used != pinned {
		return wrong("the programs use maps %+v (0: none) for device %d, not the pod's, which are %+v", used, ifindex, pinned)
	}

	attached, err := xdpProgram(ifindex)
	if err != nil {
		return err
	}
	if attached != c.respond {
		return wrong("XDP program of device %d is %d (0: none), not respond, which is %d", ifindex, attached, c.respond)
	}
	if has, err := hasSteer(ifindex, c.steer); err != nil {
		return err
	} else if !has {
		return wrong("steer, program %d, is not at tc egress of device %d", c.steer, ifindex)
	}
	return nil
}

// Responding are the devices that respond is on, by index. It asks for no more than that, so that it can be asked often.
func (c *Checker) Responding() (map[int]bool, error) {
	const skipStats = 1 << 3 // RTEXT_FILTER_SKIP_STATS
	request := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	request.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	request.AddData(nl.NewRtAttr(unix.IFLA_EXT_MASK, nl.Uint32Attr(skipStats)))
	devices, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil { // also if it was interrupted, and is incomplete
		return nil, err
	}
	responding := map[int]bool{}
	for _, device := range devices {
		message := nl.DeserializeIfInfomsg(device)
		program, err := xdpAttribute(device[message.Len():])
		if err != nil {
			return nil, err
		}
		responding[int(message.Index)] = program == c.respond
	}
	return responding, nil
}

// xdpAttribute is the id of the XDP program among the attributes of a device, 0 if there is none.
func xdpAttribute(attributes []byte) (ebpf.ProgramID, error) {
	outer, err := nl.ParseRouteAttr(attributes)
	if err != nil {
		return 0, err
	}
	for _, a := range outer {
		if a.Attr.Type&nl.NLA_TYPE_MASK != unix.IFLA_XDP {
			continue
		}
		inner, err := nl.ParseRouteAttr(a.Value)
		if err != nil {
			return 0, err
		}
		for _, x := range inner {
			if x.Attr.Type == nl.IFLA_XDP_PROG_ID {
				return ebpf.ProgramID(binary.NativeEndian.Uint32(x.Value)), nil
			}
		}
	}
	return 0, nil
}

// Others names the BPF programs and tc filters at a device's XDP and tc hooks that are not ours, by where they are.
func (c *Checker) Others(ifindex int) (others []string, err error) {
	xdp, err := xdpProgram(ifindex)
	if err != nil {
		return nil, err
	}
	if xdp != 0 && xdp != c.respond {
		others = append(others, fmt.Sprintf("XDP program %d", xdp))
	}
	for name, hook := range map[string]ebpf.AttachType{"ingress": ebpf.AttachTCXIngress, "egress": ebpf.AttachTCXEgress} {
		programs, err := tcxPrograms(ifindex, hook)
		if err != nil {
			return nil, err
		}
		for _, p := range programs {
			if p.ID != c.steer {
				others = append(others, fmt.Sprintf("program %d at tcx %s", p.ID, name))
			}
		}
	}
	for name, parent := range map[string]uint32{"ingress": netlink.HANDLE_MIN_INGRESS, "egress": netlink.HANDLE_MIN_EGRESS} {
		filters, err := filtersAt(ifindex, parent)
		if err != nil {
			return nil, err
		}
		for _, f := range filters {
			if b, ok := f.(*netlink.BpfFilter); !ok || b.Id != int(c.steer) {
				others = append(others, fmt.Sprintf("%s filter with priority %d at tc %s", f.Type(), f.Attrs().Priority, name))
			}
		}
	}
	slices.Sort(others)
	return others, nil
}

// Check is that of a Checker.
func Check(d *datapath.Datapath, bpfDir string, id ID, ifindex int) error {
	c, err := NewChecker(d, bpfDir)
	if err != nil {
		return err
	}
	return c.Check(id, ifindex)
}

func programID(p *ebpf.Program) (ebpf.ProgramID, error) {
	info, err := p.Info()
	if err != nil {
		return 0, err
	}
	id, _ := info.ID()
	return id, nil
}

// xdpProgram is the id of the XDP program on the device, 0 if there is none.
func xdpProgram(ifindex int) (ebpf.ProgramID, error) {
	device, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return 0, fmt.Errorf("device %d: %w", ifindex, err)
	}
	if xdp := device.Attrs().Xdp; xdp != nil {
		return ebpf.ProgramID(xdp.ProgId), nil
	}
	return 0, nil
}

// hasSteer looks for the program at both hooks.
func hasSteer(ifindex int, steer ebpf.ProgramID) (bool, error) {
	programs, err := tcxPrograms(ifindex, ebpf.AttachTCXEgress)
	if err != nil {
		return false, err
	}
	for _, p := range programs {
		if p.ID == steer {
			return true, nil
		}
	}
	filters, err := egressFilters(ifindex)
	if err != nil {
		return false, err
	}
	for _, f := range filters {
		if f.Id == int(steer) {
			return true, nil
		}
	}
	return false, nil
}

// tcxPrograms are none on a kernel without tcx.
func tcxPrograms(ifindex int, hook ebpf.AttachType) ([]link.AttachedProgram, error) {
	result, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: hook})
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s programs of device %d: %w", hook, ifindex, err)
	}
	return result.Programs, nil
}

// egressFilters are the BPF filters at the device's clsact egress, if it has one.
func egressFilters(ifindex int) ([]*netlink.BpfFilter, error) {
	all, err := filtersAt(ifindex, netlink.HANDLE_MIN_EGRESS)
	var filters []*netlink.BpfFilter
	for _, f := range all {
		if b, ok := f.(*netlink.BpfFilter); ok {
			filters = append(filters, b)
		}
	}
	return filters, err
}

// filtersAt are the filters at one side of the device's clsact, if it has one.
func filtersAt(ifindex int, parent uint32) ([]netlink.Filter, error) {
	device, err := netlink.LinkByIndex(ifindex)
	if err != nil {
		return nil, fmt.Errorf("device %d: %w", ifindex, err)
	}
	filters, err := netlinksafe.FilterList(device, parent)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) { // no such qdisc
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("tc filters of device %d: %w", ifindex, err)
	}
	return filters, nil
}

// Detach removes everything that Attach made under the ID, also of a device that is gone, of an attempt that ended half-way, and by
// a build with another ABI. It is all right if there is nothing. d may be nil if the programs are not loaded (any more).
func Detach(d *datapath.Datapath, bpfDir string, id ID) error {
	dirs, err := dirsOf(bpfDir, id)
	errs := []error{err}
	for _, dir := range dirs {
		of := d
		if !isOurs(bpfDir, dir) {
			of = nil
		}
		errs = append(errs, detach(of, dir))
	}
	return errors.Join(errs...)
}

// dirsOf are the directories in which an attachment may be pinned; under this build's ABI last.
func dirsOf(bpfDir string, id ID) ([]string, error) {
	others, err := datapath.Others(bpfDir)
	var dirs []string
	for _, other := range others {
		dirs = append(dirs, filepath.Join(datapath.AttachmentsIn(other), id.name()))
	}
	return append(dirs, filepath.Join(datapath.AttachmentsDir(bpfDir), id.name())), err
}

// isOurs is whether an attachment that is pinned in dir is of this build's ABI.
func isOurs(bpfDir, dir string) bool { return filepath.Dir(dir) == datapath.AttachmentsDir(bpfDir) }

func detach(d *datapath.Datapath, dir string) error {
	if _, err := os.Stat(dir); datapath.Absent(err) {
		return nil
	}
	if err := detachLink(filepath.Join(dir, pinSteer)); err != nil {
		return err
	}
	ifindex, err := deviceOf(d, dir)
	if err != nil {
		return err
	}
	if ifindex != 0 {
		if err := detachClsact(dir, ifindex); err != nil {
			return err
		}
	}
	if err := detachLink(filepath.Join(dir, pinRespond)); err != nil {
		return err
	}
	if ifindex != 0 && d != nil {
		if err := d.RemovePod(uint32(ifindex)); err != nil {
			return err
		}
	}
	return os.RemoveAll(dir)
}

// deviceOf is the device that was attached under dir, 0 if there is none (any more). What is pinned tells, not an
// index on record: an index may have been given to another pod's device meanwhile.
func deviceOf(d *datapath.Datapath, dir string) (int, error) {
	if ifindex, err := xdpDevice(filepath.Join(dir, pinRespond)); err != nil || ifindex != 0 || d == nil {
		return ifindex, err
	}
	pinned, err := datapath.PinnedPodIDs(dir)
	if err != nil {
		return 0, err
	}
	pods, err := d.PodIDs()
	if err != nil {
		return 0, err
	}
	for ifindex, used := range pods {
		// One of the two suffices: what made or removed them may have died in between.
		if (used.Evidence != 0 && used.Evidence == pinned.Evidence) || (used.Tallies != 0 && used.Tallies == pinned.Tallies) {
			return int(ifindex), nil
		}
	}
	return 0, nil
}

// xdpDevice is the device that the pinned XDP link is attached to, 0 if there is none (any more).
func xdpDevice(pin string) (int, error) {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("%s: %w", pin, err)
	}
	defer l.Close() //nolint:errcheck // read only
	info, err := l.Info()
	if err != nil {
		return 0, fmt.Errorf("%s: %w", pin, err)
	}
	xdp := info.XDP()
	if xdp == nil {
		return 0, nil
	}
	return int(xdp.Ifindex), nil
}

// detachLink detaches at once; removing the pin alone would leave that to a kernel worker.
func detachLink(pin string) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("%s: %w", pin, err)
	}
	defer l.Close() //nolint:errcheck // detached
	if err := l.Detach(); err != nil && !errors.Is(err, unix.ENOLINK) {
		return fmt.Errorf("detaching %s: %w", pin, err)
	}
	return l.Unpin()
}

func detachClsact(dir string, ifindex int) error {
	owned, others, err := removeFilters(ifindex)
	var gone netlink.LinkNotFoundError
	if errors.As(err, &gone) {
		return nil
	}
	if err != nil {
		return err
	}
	ingress, err := filtersAt(ifindex, netlink.HANDLE_MIN_INGRESS)
	if err != nil {
		return err
	}
	_, err = os.Stat(filepath.Join(dir, ownsQdisc))
	if !owned && err != nil || others+len(ingress) > 0 {
		return nil // not ours to remove
	}
	if err := netlink.QdiscDel(clsact(ifindex)); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("removing clsact from device %d: %w", ifindex, err)
	}
	return nil
}

// List returns the attachments that are pinned, complete or not, by whatever build.
func List(bpfDir string) ([]ID, error) {
	others, err := datapath.Others(bpfDir)
	if err != nil {
		return nil, err
	}
	var ids []ID
	for _, dir := range append(others, filepath.Dir(datapath.AttachmentsDir(bpfDir))) {
		entries, err := os.ReadDir(datapath.AttachmentsIn(dir))
		if err != nil && !datapath.Absent(err) {
			return nil, err
		}
		for _, e := range entries {
			if id, ok := parseName(e.Name()); ok && !slices.Contains(ids, id) {
				ids = append(ids, id)
			}
		}
	}
	return ids, nil
}

// Orphaned says of an attachment, complete or not, whether its device is gone or was never reached.
func Orphaned(d *datapath.Datapath, bpfDir string, id ID) (bool, error) {
	dirs, err := dirsOf(bpfDir, id)
	if err != nil {
		return false, err
	}
	for _, dir := range dirs {
		of := d
		if !isOurs(bpfDir, dir) {
			of = nil
		}
		ifindex, err := deviceOf(of, dir)
		if err != nil {
			return false, err
		}
		if ifindex == 0 {
			continue
		}
		_, err = netlink.LinkByIndex(ifindex)
		var gone netlink.LinkNotFoundError
		if !errors.As(err, &gone) {
			return false, err
		}
	}
	return true, nil
}

// Prune makes the programs forget the devices whose maps no attachment pins. Detach leaves none; they come from pins
// removed by other means.
func Prune(d *datapath.Datapath, bpfDir string) error {
	return PruneUntil(context.Background(), d, bpfDir)
}

// PruneUntil is Prune, which leaves the rest when ctx ends.
func PruneUntil(ctx context.Context, d *datapath.Datapath, bpfDir string) error {
	// The order makes it safe beside Attach, which pins before it adds.
	pods, err := d.PodIDs()
	if err != nil {
		return err
	}
	ids, err := List(bpfDir)
	if err != nil {
		return err
	}
	pinned := map[ebpf.MapID]bool{}
	for _, id := range ids {
		maps, err := datapath.PinnedPodIDs(filepath.Join(datapath.AttachmentsDir(bpfDir), id.name()))
		if err != nil {
			return err
		}
		pinned[maps.Evidence], pinned[maps.Tallies] = true, true
	}
	delete(pinned, 0)
	now, err := d.PodIDs()
	if err != nil {
		return err
	}
	for ifindex, used := range pods {
		if ctx.Err() != nil {
			break
		}
		if pinned[used.Evidence] || pinned[used.Tallies] || now[ifindex] != used {
			continue
		}
		if err := d.RemovePod(ifindex); err != nil {
			return err
		}
	}
	return nil
}
