package cluster

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/e2e/harness/kube"
)

const stateDir = "/run/probelet"

// pristine is the node's state without pods, before it ever ran probelet.
var pristine map[string]string

// snapshot returns everything that probelet may change on a node: files and directories with mode, owner and content, devices
// with what is attached to them, and packet filter rules.
func snapshot() (map[string]string, error) {
	all := map[string]string{}
	for _, part := range []func(map[string]string) error{addFiles, addDevices, addRules} {
		if err := part(all); err != nil {
			return nil, err
		}
	}
	return all, nil
}

func addFiles(all map[string]string) error {
	for _, dir := range []string{kube.NetDir, kube.BinDir, kube.BPFFS, stateDir} {
		err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			text := []byte(nil)
			if dir != kube.BPFFS && info.Mode().IsRegular() {
				if text, err = os.ReadFile(path); err != nil {
					return err
				}
			}
			owner := info.Sys().(*syscall.Stat_t)
			all[path] = fmt.Sprintf("%s %d:%d %s", info.Mode(), owner.Uid, owner.Gid, text)
			return nil
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func addDevices(all map[string]string) error {
	devices, err := netlinksafe.LinkList()
	if err != nil {
		return err
	}
	for _, device := range devices {
		qdiscs, err := netlinksafe.QdiscList(device)
		if err != nil {
			return err
		}
		said := device.Type()
		for _, q := range qdiscs {
			if q.Type() != "clsact" { // stays where ADD made it, because removing it would cost the pod packets
				said += " qdisc " + q.Type()
			}
		}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			filters, err := netlinksafe.FilterList(device, parent)
			if err == nil && len(filters) > 0 {
				said += fmt.Sprintf(" filters %d", len(filters))
			}
		}
		if xdp := device.Attrs().Xdp; xdp != nil && xdp.Attached {
			said += " XDP"
		}
		for _, side := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			programs, err := link.QueryPrograms(link.QueryOptions{Target: device.Attrs().Index, Attach: side})
			if err == nil { // Linux 6.6 or newer
				said += fmt.Sprintf(" %s %d", side, len(programs.Programs))
			}
		}
		all["device "+device.Attrs().Name] = said
	}
	return nil
}

func addRules(all map[string]string) error {
	for _, table := range []string{"ip_tables_names", "ip6_tables_names"} {
		text, err := os.ReadFile("/proc/net/" + table)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		all[table] = string(text)
	}
	c, err := nftables.New()
	if err != nil {
		return err
	}
	chains, err := c.ListChains()
	if err != nil {
		return err
	}
	for _, chain := range chains {
		rules, err := c.GetRules(chain.Table, chain)
		if err != nil {
			return err
		}
		said := fmt.Sprint(chain.Type)
		for _, rule := range rules {
			for _, e := range rule.Exprs {
				if _, counts := e.(*expr.Counter); !counts {
					said += fmt.Sprintf(" %T%+v", e, e)
				}
			}
		}
		all[fmt.Sprintf("nftables %d %s %s", chain.Table.Family, chain.Table.Name, chain.Name)] = said
	}
	return nil
}

func takeSnapshot(t *testing.T) map[string]string {
	t.Helper()
	all, err := snapshot()
	must(t, err)
	return all
}

// mustBeAs compares the node with an earlier snapshot.
func mustBeAs(t *testing.T, before map[string]string) {
	t.Helper()
	want := maps.Clone(before)
	var now map[string]string
	// The sandboxes of deleted pods are removed later.
	for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(500 * time.Millisecond) {
		if now = takeSnapshot(t); maps.Equal(now, want) {
			return
		}
	}
	for name, text := range want {
		if now[name] != text {
			t.Errorf("was %s: %q\nis %q", name, text, now[name])
		}
	}
	for name, text := range now {
		if _, ok := want[name]; !ok {
			t.Errorf("left %s: %q", name, text)
		}
	}
}

// pinnedLinks returns the BPF links that probelet pinned.
func pinnedLinks(t *testing.T) (ids []link.ID) {
	t.Helper()
	must(t, filepath.WalkDir(kube.BPFFS+"/probelet", func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		l, err := link.LoadPinnedLink(path, nil)
		if err != nil {
			return nil // a map or a program
		}
		defer l.Close() //nolint:errcheck // read only
		info, err := l.Info()
		if err == nil {
			ids = append(ids, info.ID)
		}
		return err
	}))
	if len(ids) == 0 {
		t.Error("no links are pinned")
	}
	return ids
}

// mustBeGone checks that earlier links no longer exist.
func mustBeGone(t *testing.T, ids []link.ID) {
	t.Helper()
	for _, id := range ids {
		if l, err := link.NewFromID(id); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("link %d still exists (%v)", id, err)
			if err == nil {
				_ = l.Close()
			}
		}
	}
}
