// Package adopt finds the host-side veths of pods that had their network before probelet was in the chain, and says so
// only where it is certain: by what the runtime's CNI library has recorded, and what the kernel says of the devices.
package adopt

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
)

// DefaultCacheDir is where libcni keeps the results of ADD (CacheDir in its api.go), in all runtimes that are known.
const DefaultCacheDir = "/var/lib/cni"

// result is what libcni keeps of an ADD (cachedInfo in its api.go), and we need.
type result struct {
	Kind        string      `json:"kind"`
	ContainerID string      `json:"containerId"`
	IfName      string      `json:"ifName"`
	NetworkName string      `json:"networkName"`
	Netns       string      `json:"netns"` // libcni 1.1 and newer
	Args        [][2]string `json:"cniArgs"`
	Config      []byte      `json:"config"` // of the network, as it was
	Result      struct {
		Interfaces []struct {
			Name    string `json:"name"`
			Sandbox string `json:"sandbox"` // the network namespace; empty on the host's side
		} `json:"interfaces"`
		IPs []struct {
			Address netip.Prefix `json:"address"`
		} `json:"ips"`
	} `json:"result"`
}

func (r result) arg(name string) string {
	for _, a := range r.Args {
		if a[0] == name {
			return a[1]
		}
	}
	return ""
}

// Pod is what is known of a pod from elsewhere.
type Pod struct {
	Namespace, Name string
	UID             string // empty: not known
	IPs             []netip.Addr
}

// Node is where to look.
type Node struct {
	// Root is the host's file system, for example /proc/1/root.
	Root string
	// CacheDir is libcni's, in it.
	CacheDir string
}

// Find returns the attachments that pods would have if probelet had been in the chain at their ADD, one for each interface, with what
// to attach to. It must be called in the host's network namespace. Of a pod that is not certain the error says why; others
// are returned beside it.
func (n Node) Find(pods []Pod) (records []attach.Record, err error) {
	results, err := n.results()
	if err != nil {
		return nil, err
	}
	devices, err := netlinksafe.LinkList()
	if err != nil {
		return nil, fmt.Errorf("listing devices: %w", err)
	}
	var errs []error
	for _, pod := range pods {
		found, err := n.find(pod, results, devices)
		if err != nil {
			errs = append(errs, fmt.Errorf("%s/%s: %w", pod.Namespace, pod.Name, err))
		}
		records = append(records, found...)
	}
	return records, errors.Join(errs...)
}

// find returns an error, or at least one.
func (n Node) find(pod Pod, results []result, devices []netlink.Link) ([]attach.Record, error) {
	var records []attach.Record
	var reasons []error
	for _, r := range results {
		if r.arg("K8S_POD_NAMESPACE") != pod.Namespace || r.arg("K8S_POD_NAME") != pod.Name {
			continue
		}
		if uid := r.arg("K8S_POD_UID"); uid != "" && pod.UID != "" && uid != pod.UID {
			continue // of an earlier pod of that name
		}
		record, err := n.record(r, pod, devices)
		if err != nil {
			reasons = append(reasons, fmt.Errorf("container %s, %s: %w", r.ContainerID, r.IfName, err))
			continue
		}
		records = append(records, record)
	}
	switch {
	case len(records) > 0:
		return records, nil
	case len(reasons) > 0:
		return nil, errors.Join(reasons...)
	}
	return nil, fmt.Errorf("the runtime has no record of its network in %s", n.CacheDir)
}

// Naming is of how many interfaces libcni has kept a network configuration that has a plugin of that type.
func (n Node) Naming(plugin string) (count int, err error) {
	results, err := n.results()
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	for _, r := range results {
		var list struct {
			Plugins []struct {
				Type string `json:"type"`
			} `json:"plugins"`
		}
		if json.Unmarshal(r.Config, &list) != nil {
			continue // no runtime could use it either
		}
		for _, p := range list.Plugins {
			if p.Type == plugin {
				count++
				break
			}
		}
	}
	return count, err
}

func (n Node) results() ([]result, error) {
	dir, err := n.open(filepath.Join(n.CacheDir, "results"))
	if err != nil {
		return nil, fmt.Errorf("what the runtime recorded: %w", err)
	}
	defer dir.Close() //nolint:errcheck // read only
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var results []result
	for _, name := range names {
		text, err := n.read(filepath.Join(n.CacheDir, "results", name))
		if errors.Is(err, os.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		var r result
		// One that is just being written is read the next time. lo leads nowhere.
		if json.Unmarshal(text, &r) == nil && r.Kind == "cniCacheV1" && r.ContainerID != "" && r.IfName != "" && r.IfName != "lo" {
			results = append(results, r)
		}
	}
	return results, nil
}

// open opens a file of the host. Links in its path are the host's too: /var/run is one.
func (n Node) open(path string) (*os.File, error) {
	root, err := os.Open(n.Root)
	if err != nil {
		return nil, err
	}
	defer root.Close() //nolint:errcheck // read only
	fd, err := unix.Openat2(int(root.Fd()), path, &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

func (n Node) read(path string) ([]byte, error) {
	file, err := n.open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close() //nolint:errcheck // read only
	return io.ReadAll(file)
}

func (n Node) record(r result, pod Pod, devices []netlink.Link) (record attach.Record, err error) {
	var inPod, onHost []string
	netns := r.Netns
	for _, i := range r.Result.Interfaces {
		if i.Sandbox == "" {
			onHost = append(onHost, i.Name)
			continue
		}
		inPod = append(inPod, i.Name)
		netns = cmp.Or(netns, i.Sandbox)
	}
	if !slices.Contains(inPod, r.IfName) {
		return record, errors.New("not described by its network's plugins")
	}
	record = attach.Record{
		ContainerID: r.ContainerID, IfName: r.IfName, Network: r.NetworkName,
		PodNamespace: pod.Namespace, PodName: pod.Name, PodUID: cmp.Or(r.arg("K8S_POD_UID"), pod.UID),
		CreatedAt: time.Now().UTC(), Adopted: true,
	}
	matches := false
	for _, ip := range r.Result.IPs {
		record.PodIPs = append(record.PodIPs, ip.Address.Addr().String())
		matches = matches || slices.Contains(pod.IPs, ip.Address.Addr().Unmap())
	}
	if !matches {
		return record, fmt.Errorf("its addresses are %v, not %v", record.PodIPs, pod.IPs)
	}
	file, err := n.openNetns(netns, len(onHost) > 0)
	if err != nil {
		return record, fmt.Errorf("network namespace: %w", err)
	}
	defer file.Close() //nolint:errcheck // read only
	var stat unix.Stat_t
	if err := unix.Fstat(int(file.Fd()), &stat); err != nil {
		return record, fmt.Errorf("network namespace %s: %w", netns, err)
	}
	record.PodNetns = uint32(stat.Ino)
	nsid, err := netlink.GetNetNsIdByFd(int(file.Fd()))
	if err != nil { // such as: the mount is gone, and the file has stayed
		return record, fmt.Errorf("network namespace %s: %w", netns, err)
	}
	if nsid < 0 {
		return record, fmt.Errorf("no device of the host leads into its network namespace %s", netns)
	}
	end, err := deviceIn(nsid, r.IfName)
	if err != nil {
		return record, fmt.Errorf("%s in its network namespace %s: %w", r.IfName, netns, err)
	}
	device, err := peer(devices, nsid, end, onHost)
	if err != nil {
		return record, err
	}
	record.IfIndex, record.HostIfName = device.Index, device.Name
	return record, nil
}

// ofProcess is where cri-dockerd has a network namespace.
var ofProcess = regexp.MustCompile(`^/proc/[0-9]+/ns/net$`)

// openNetns opens the file of a network namespace. The number of a process may be another one's by now; then it must be known from
// elsewhere which device is the pod's.
func (n Node) openNetns(path string, deviceKnown bool) (*os.File, error) {
	switch {
	case !ofProcess.MatchString(path):
		return n.open(path)
	case deviceKnown:
		return os.Open(filepath.Join(n.Root, path)) // which is a link that cannot lead out of the host
	}
	return nil, fmt.Errorf("%s is that of a process, which may be another one by now, and the host's device is not named", path)
}

// deviceIn is a device in the namespace with that id, which takes no more than CAP_NET_ADMIN over it.
func deviceIn(nsid int, name string) (netlink.Link, error) {
	request := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_ACK)
	request.AddData(nl.NewIfInfomsg(unix.AF_UNSPEC))
	request.AddData(nl.NewRtAttr(unix.IFLA_TARGET_NETNSID, nl.Uint32Attr(uint32(nsid))))
	request.AddData(nl.NewRtAttr(unix.IFLA_IFNAME, nl.ZeroTerminated(name)))
	replies, err := request.Execute(unix.NETLINK_ROUTE, 0)
	if err != nil {
		return nil, err
	}
	if len(replies) != 1 {
		return nil, fmt.Errorf("%d devices of that name", len(replies))
	}
	return netlink.LinkDeserialize(nil, replies[0])
}

// peer is the host's end of the veth whose other end is in the namespace. It is one of those that the result names, if it names any.
func peer(devices []netlink.Link, nsid int, inPod netlink.Link, names []string) (*netlink.LinkAttrs, error) {
	end := inPod.Attrs()
	if _, ok := inPod.(*netlink.Veth); !ok {
		return nil, fmt.Errorf("its interface %s is of type %s, not veth", end.Name, inPod.Type())
	}
	onHost := slices.IndexFunc(devices, func(device netlink.Link) bool { return device.Attrs().Index == end.ParentIndex })
	if onHost < 0 {
		return nil, fmt.Errorf("the other end of its interface %s is not on the host", end.Name)
	}
	attrs := devices[onHost].Attrs()
	// An index alone would not do: it is unique within a namespace only.
	if attrs.ParentIndex != end.Index || attrs.NetNsID != nsid {
		return nil, fmt.Errorf("the other end of its interface %s is not on the host, where %s has its number", end.Name, attrs.Name)
	}
	if len(names) > 0 && !slices.Contains(names, attrs.Name) {
		return nil, fmt.Errorf("the host's end of its interface %s is %s, not one of %s", end.Name, attrs.Name, strings.Join(names, ", "))
	}
	return attrs, nil
}
