// Package adopt finds the host-side veths of pods that were started before probelet joined the chain. It takes their network
// namespaces from what the runtime's CNI library recorded, and the rest from the kernel.
package adopt

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/veth"
	"github.com/probelet/probelet/daemon/internal/hostfs"
)

// DefaultCacheDir is where libcni caches the results of ADD (CacheDir in its api.go), in all known runtimes.
const DefaultCacheDir = "/var/lib/cni"

// result has the fields that we need of what libcni caches of an ADD (cachedInfo in its api.go).
type result struct {
	Kind        string      `json:"kind"`
	ContainerID string      `json:"containerId"`
	IfName      string      `json:"ifName"`
	NetworkName string      `json:"networkName"`
	Netns       string      `json:"netns"` // libcni 1.1 and newer
	Args        [][2]string `json:"cniArgs"`
	Config      []byte      `json:"config"` // of the network, at ADD
	Result      struct {
		Interfaces []veth.Hint `json:"interfaces"`
		IPs        []struct {
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

// netns returns the path of the pod's network namespace. Older versions of libcni cache it only if the plugin reported it.
func (r result) netns() string {
	if r.Netns != "" {
		return r.Netns
	}
	var first string
	for _, i := range r.Result.Interfaces {
		if i.Name == r.IfName && i.Sandbox != "" {
			return i.Sandbox
		}
		first = cmp.Or(first, i.Sandbox)
	}
	return first
}

// Pod is a pod to adopt, as its source knows it.
type Pod struct {
	Namespace, Name string
	UID             string // empty: unknown
	IPs             []netip.Addr
}

// Node says where the host's files are.
type Node struct {
	// Root is the host's root directory, for example /proc/1/root.
	Root string
	// CacheDir is libcni's cache, below Root.
	CacheDir string
}

// Find returns the attachments that pods would have if probelet had been in the chain at their ADD, one per interface. It must be
// called in the host's network namespace. unknown has the pods without a certain attachment, by namespace/name, with the reason.
func (n Node) Find(pods []Pod) (records []attach.Record, unknown map[string]error, err error) {
	results, err := n.results()
	if err != nil {
		return nil, nil, err
	}
	unknown = map[string]error{}
	for _, pod := range pods {
		found, err := n.find(pod, results)
		if err != nil {
			unknown[pod.Namespace+"/"+pod.Name] = err
		}
		records = append(records, found...)
	}
	return records, unknown, nil
}

// find returns at least one record, or an error.
func (n Node) find(pod Pod, results []result) ([]attach.Record, error) {
	var records []attach.Record
	var reasons []error
	for _, r := range results {
		if r.arg("K8S_POD_NAMESPACE") != pod.Namespace || r.arg("K8S_POD_NAME") != pod.Name {
			continue
		}
		if uid := r.arg("K8S_POD_UID"); uid != "" && pod.UID != "" && uid != pod.UID {
			continue // of a previous pod with that name
		}
		record, err := n.record(r, pod)
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

// Naming counts the interfaces whose cached network configuration names a plugin.
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
			continue // unusable for the runtime, too
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

func (n Node) fs() hostfs.FS { return hostfs.FS{Root: n.Root} }

func (n Node) results() ([]result, error) {
	dir, err := n.fs().Open(filepath.Join(n.CacheDir, "results"))
	if err != nil {
		return nil, fmt.Errorf("reading the runtime's records of networks: %w", err)
	}
	defer dir.Close() //nolint:errcheck // read only
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var results []result
	for _, name := range names {
		text, err := n.fs().ReadFile(filepath.Join(n.CacheDir, "results", name))
		if errors.Is(err, os.ErrNotExist) {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, err
		}
		var r result
		// A file that is just being written is read the next time. lo leads nowhere.
		if json.Unmarshal(text, &r) == nil && r.Kind == "cniCacheV1" && r.ContainerID != "" && r.IfName != "" && r.IfName != "lo" {
			results = append(results, r)
		}
	}
	return results, nil
}

// record returns the record of the attachment that an interface would have.
func (n Node) record(r result, pod Pod) (record attach.Record, err error) {
	record = attach.Record{
		ContainerID: r.ContainerID, IfName: r.IfName, Network: r.NetworkName,
		PodNamespace: pod.Namespace, PodName: pod.Name, PodUID: cmp.Or(r.arg("K8S_POD_UID"), pod.UID),
		CreatedAt: time.Now().UTC(), Adopted: true,
	}
	if err := record.ID().Check(); err != nil {
		return record, err
	}
	matches := false
	for _, ip := range r.Result.IPs {
		record.PodIPs = append(record.PodIPs, ip.Address.Addr().String())
		matches = matches || slices.Contains(pod.IPs, ip.Address.Addr().Unmap())
	}
	if !matches {
		return record, fmt.Errorf("its addresses are %v, expected one of %v", record.PodIPs, pod.IPs)
	}
	end, err := n.hostEnd(r)
	record.IfIndex, record.HostIfName, record.PodNetns = end.Index, end.Name, end.PodNetns
	record.NetnsCookie = end.NetnsCookie
	return record, err
}

func (n Node) hostEnd(r result) (veth.HostEnd, error) {
	path := r.netns()
	if path == "" {
		return veth.HostEnd{}, errors.New("the runtime did not record its network namespace")
	}
	netns, err := n.openNetns(path)
	if err != nil {
		return veth.HostEnd{}, fmt.Errorf("network namespace %s: %w", path, err)
	}
	defer netns.Close() //nolint:errcheck // read only
	end, err := veth.Find(netns, path, r.IfName, r.Result.Interfaces)
	if err != nil {
		return end, fmt.Errorf("network namespace %s: %w", path, err)
	}
	// The process may have exited, and its PID belong to another pod by now. The pair of devices only proves whose it is now.
	if ofProcess.MatchString(path) && !end.Hinted {
		return end, fmt.Errorf("network namespace %s: the PID may belong to another process by now, and the result does not name %s", path, end.Name)
	}
	return end, nil
}

// ofProcess matches paths of network namespaces as cri-dockerd reports them.
var ofProcess = regexp.MustCompile(`^/proc/[0-9]+/ns/net$`)

func (n Node) openNetns(path string) (*os.File, error) {
	if ofProcess.MatchString(path) {
		return os.Open(filepath.Join(n.Root, path)) // a magic link, which cannot lead out of the host's root
	}
	return n.fs().Open(path)
}
