// Package repairtest provides tests with a node whose attachments break, and with what its runtime and plugin do meanwhile.
package repairtest

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/adopt"
)

// Node is a node with the BPF objects loaded.
type Node struct {
	*bpftest.Node
	T                testing.TB
	BPFDir, StateDir string
	CacheDir         string // libcni's
	Datapath         *datapath.Datapath
}

// New returns a node without pods.
func New(t testing.TB) *Node {
	t.Helper()
	n := &Node{Node: bpftest.NewNode(t), T: t, BPFDir: bpftest.BPFDir(t), StateDir: filepath.Join(t.TempDir(), "state"), CacheDir: t.TempDir()}
	err := errors.Join(os.Mkdir(filepath.Join(n.CacheDir, "results"), 0o700), os.MkdirAll(attach.RecordsDir(n.StateDir), 0o700))
	if err != nil {
		t.Fatal(err)
	}
	n.Load()
	return n
}

// Load loads the BPF objects, or opens them, as a daemon does when it starts.
func (n *Node) Load() {
	n.T.Helper()
	d, err := datapath.Ensure(n.T.Context(), n.BPFDir)
	if err != nil {
		n.T.Fatal(err)
	}
	n.T.Cleanup(func() { _ = d.Close() })
	n.Datapath = d
}

// Adopt says where the pods to adopt are found.
func (n *Node) Adopt() adopt.Node { return adopt.Node{Root: "/", CacheDir: n.CacheDir} }

// In calls f in the node's network namespace.
func (n *Node) In(f func() error) {
	n.T.Helper()
	bpftest.Do(n.T, n.NS, f)
}

// ID returns the ID of a pod's attachment.
func ID(p *bpftest.Pod) attach.ID {
	return attach.ID{ContainerID: "c-" + p.HostIfName, IfName: "eth0"}
}

// Run adds a pod that was started without probelet, with what the runtime records of it.
func (n *Node) Run() *bpftest.Pod {
	n.T.Helper()
	p := n.AddPod(n.T)
	text, err := json.Marshal(map[string]any{
		"kind": "cniCacheV1", "containerId": ID(p).ContainerID, "ifName": "eth0", "networkName": "pods", "netns": p.NS.Path(),
		"cniArgs": [][2]string{{"K8S_POD_NAMESPACE", "shop"}, {"K8S_POD_NAME", p.HostIfName}, {"K8S_POD_UID", "u-1"}},
		"result": map[string]any{
			"interfaces": []map[string]string{{"name": p.HostIfName}, {"name": "eth0", "sandbox": p.NS.Path()}},
			"ips":        []map[string]string{{"address": p.IPv4.String() + "/24"}},
		},
	})
	if err == nil {
		err = os.WriteFile(n.Cached(p), text, 0o600)
	}
	if err != nil {
		n.T.Fatal(err)
	}
	return p
}

// PodOf describes a pod as its source does.
func PodOf(p *bpftest.Pod) adopt.Pod {
	return adopt.Pod{Namespace: "shop", Name: p.HostIfName, UID: "u-1", IPs: []netip.Addr{p.IPv4}}
}

// Cached returns the file in which the runtime keeps the pod's network.
func (n *Node) Cached(p *bpftest.Pod) string {
	return filepath.Join(n.CacheDir, "results", p.HostIfName)
}

// BeginADD writes the record with which ADD begins.
func (n *Node) BeginADD(p *bpftest.Pod) attach.Record {
	n.T.Helper()
	r := attach.Record{
		ContainerID: ID(p).ContainerID, IfName: "eth0", IfIndex: p.IfIndex, HostIfName: p.HostIfName, PodNetns: p.Netns,
		PodNamespace: "shop", PodName: p.HostIfName, PodUID: "u-1", CreatedAt: time.Now(), Error: attach.Unfinished,
	}
	if err := attach.WriteRecord(n.StateDir, r); err != nil {
		n.T.Fatal(err)
	}
	return r
}

// FinishADD attaches the pod of a record, as ADD does.
func (n *Node) FinishADD(p *bpftest.Pod, r attach.Record) {
	n.T.Helper()
	err := n.NS.Do(func(ns.NetNS) error {
		return attach.Attach(n.Datapath, n.BPFDir, ID(p), r.Target(), attach.ViaAuto)
	})
	r.Error = ""
	if err := errors.Join(err, attach.WriteRecord(n.StateDir, r)); err != nil {
		n.T.Fatal(err)
	}
}

// AttachClsact attaches the pod of a record again, by clsact, as ADD prefers it.
func (n *Node) AttachClsact(p *bpftest.Pod) {
	n.T.Helper()
	n.In(func() error {
		return attach.Attach(n.Datapath, n.BPFDir, ID(p), n.Record(p).Target(), attach.ViaClsact)
	})
}

// DEL does what the plugin does at DEL.
func (n *Node) DEL(p *bpftest.Pod) error {
	return n.NS.Do(func(ns.NetNS) error {
		if err := attach.Detach(n.Datapath, n.BPFDir, ID(p)); err != nil {
			return err
		}
		return attach.RemoveRecord(n.StateDir, ID(p))
	})
}

// Record returns the pod's record.
func (n *Node) Record(p *bpftest.Pod) attach.Record {
	n.T.Helper()
	r, err := attach.ReadRecord(n.StateDir, ID(p))
	if err != nil {
		n.T.Fatal(err)
	}
	return r
}

// Check returns what is broken about the pod's attachment.
func (n *Node) Check(p *bpftest.Pod) (err error) {
	n.T.Helper()
	n.In(func() error {
		err = attach.Check(n.Datapath, n.BPFDir, ID(p), p.IfIndex)
		return nil
	})
	return err
}

// WantWhole fails the test unless the pod is attached, and its record says so.
func (n *Node) WantWhole(p *bpftest.Pod) {
	n.T.Helper()
	if err := n.Check(p); err != nil {
		n.T.Error(err)
	}
	if r := n.Record(p); r.Error != "" || r.Passing {
		n.T.Errorf("record %+v", r)
	}
}

// WantNothing fails the test if pins, records or devices are left.
func (n *Node) WantNothing() {
	n.T.Helper()
	ids, err := attach.List(n.BPFDir)
	records, recordsErr := attach.ReadRecords(n.StateDir)
	devices, devicesErr := n.Datapath.Devices()
	if err := errors.Join(err, recordsErr, devicesErr); err != nil || len(ids)+len(records)+len(devices) > 0 {
		n.T.Errorf("pinned %v, on record %v, devices %v, %v", ids, records, devices, err)
	}
}

// Device returns the pod's device, as it is attached.
func (n *Node) Device(p *bpftest.Pod) datapath.DeviceKey {
	n.T.Helper()
	key, err := attach.Device(n.BPFDir, ID(p))
	if err != nil {
		n.T.Fatal(err)
	}
	return key
}

// Pin returns a file of the pod's attachment.
func (n *Node) Pin(p *bpftest.Pod, name string) string {
	return filepath.Join(datapath.AttachmentsDir(n.BPFDir), ID(p).ContainerID+"@eth0", name)
}

// Detach detaches one of the programs, as bpftool does.
func (n *Node) Detach(p *bpftest.Pod, program string) {
	n.T.Helper()
	if err := DetachPinned(n.Pin(p, program)); err != nil {
		n.T.Fatal(err)
	}
}

// DetachPinned detaches the link of a pin, which stays.
func DetachPinned(pin string) error {
	l, err := link.LoadPinnedLink(pin, nil)
	if err != nil {
		return err
	}
	return errors.Join(l.Detach(), l.Close())
}

// Occupy puts another XDP program on the pod's device; with fd -1 it removes it.
func (n *Node) Occupy(p *bpftest.Pod, fd int) {
	n.T.Helper()
	n.In(func() error {
		device, err := netlink.LinkByIndex(p.IfIndex)
		if err != nil {
			return err
		}
		return netlink.LinkSetXdpFdWithFlags(device, fd, unix.XDP_FLAGS_SKB_MODE)
	})
}

// DeleteDevice deletes the pod's device.
func (n *Node) DeleteDevice(p *bpftest.Pod) {
	n.T.Helper()
	n.In(func() error {
		device, err := netlink.LinkByIndex(p.IfIndex)
		if err != nil {
			return err
		}
		return netlink.LinkDel(device)
	})
}

// Filters returns the names of our filters on the pod's device.
func (n *Node) Filters(p *bpftest.Pod) (names []string) {
	n.T.Helper()
	n.In(func() error {
		device, err := netlink.LinkByIndex(p.IfIndex)
		if err != nil {
			return err
		}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			filters, err := netlinksafe.FilterList(device, parent)
			if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) { // no such qdisc
				return err
			}
			for _, f := range filters {
				if b, ok := f.(*netlink.BpfFilter); ok && strings.HasPrefix(b.Name, "probelet/") {
					names = append(names, b.Name)
				}
			}
		}
		return nil
	})
	return names
}

// IsTCX reports whether the pod's tc programs are attached by links only.
func (n *Node) IsTCX(p *bpftest.Pod) bool {
	_, err := os.Stat(n.Pin(p, "steer"))
	return err == nil && len(n.Filters(p)) == 0
}

// RequireTCX skips the test on kernels without tcx.
func (n *Node) RequireTCX() {
	n.T.Helper()
	p := n.AddPod(n.T)
	var err error
	id := attach.ID{ContainerID: "try", IfName: "eth0"}
	n.In(func() error {
		target := attach.Target{IfIndex: p.IfIndex, PodNetns: p.Netns}
		err = attach.Attach(n.Datapath, n.BPFDir, id, target, attach.ViaTCX)
		return attach.Detach(n.Datapath, n.BPFDir, id)
	})
	if errors.Is(err, ebpf.ErrNotSupported) {
		n.T.Skip("this kernel has no tcx")
	}
	if err != nil {
		n.T.Fatal(err)
	}
}
