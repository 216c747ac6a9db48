package install

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
)

// Networks in another directory may name the plugin, and without its binary no pod could start.
func TestUninstallRefusesMissingNetDir(t *testing.T) {
	dir := t.TempDir()
	plugin := filepath.Join(dir, "probelet")
	if err := os.WriteFile(plugin, nil, 0o755); err != nil { //nolint:gosec // a program
		t.Fatal(err)
	}
	nets := filepath.Join(dir, "net")
	err := execute(t, UninstallCommand, "--cni-net-dir", nets, "--cni-bin-dir", dir, "--settle", "1ms",
		"--state-dir", filepath.Join(dir, "state"), "--bpf-dir", filepath.Join(dir, "bpf"))
	if err == nil || !strings.Contains(err.Error(), "--cni-net-dir") || !strings.Contains(err.Error(), nets) {
		t.Errorf("got %v, want an error that names --cni-net-dir and %s", err, nets)
	}
	if _, err := os.Stat(plugin); err != nil {
		t.Error(err)
	}
}

// Uninstall refuses if a runtime reads networks that name the plugin from a directory other than --cni-net-dir.
func TestUninstallChecksRuntimeNetDir(t *testing.T) {
	const list = `{"cniVersion": "1.0.0", "name": "net", "plugins": [{"type": "ptp"}, {"type": "probelet"}]}`
	for name, test := range map[string]struct {
		conf, text string
		refused    bool
	}{
		"plugin named":                           {"conf_dir = '/net'\nbin_dir = 'BIN'\n", list, true},
		"plugin named, plugin directory unknown": {"conf_dir = '/net'\n", list, true},
		"plugin named in a copy":                 {"conf_dir = '/net'\n", strings.Replace(list, `"name"`, `"probelet.dev/derivedFrom": "10-net.conflist", "name"`, 1), true},
		"plugin not named":                       {"conf_dir = '/net'\n", strings.Replace(list, "probelet", "portmap", 1), false},
		"runtime with another plugin directory":  {"conf_dir = '/net'\nbin_dir = '/usr/lib/cni'\n", list, false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			o := Options{
				NetDir: t.TempDir(), BinDir: t.TempDir(), BPFDir: filepath.Join(dir, "bpf"), StateDir: filepath.Join(dir, "state"),
				Log: slog.New(slog.NewTextHandler(t.Output(), nil)), proc: filepath.Join(dir, "proc"),
			}
			plugin := filepath.Join(o.BinDir, "probelet")
			runtime := filepath.Join(o.proc, "17")
			for file, text := range map[string]string{
				plugin:                            "",
				filepath.Join(runtime, "comm"):    "containerd\n",
				filepath.Join(runtime, "cmdline"): "containerd\x00",
				filepath.Join(runtime, "exe"):     "",
				filepath.Join(runtime, "root/etc/containerd/config.toml"): "[plugins.cri.cni]\n" + strings.Replace(test.conf, "BIN", o.BinDir, 1),
				filepath.Join(runtime, "root/net/00-probelet.conflist"):   test.text,
			} {
				if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			err := Uninstall(t.Context(), o)
			if _, gone := os.Stat(plugin); test.refused != (err != nil) || test.refused == os.IsNotExist(gone) {
				t.Errorf("got %v, plugin: %v; want refusal: %v", err, gone, test.refused)
			}
			if err != nil && (!strings.Contains(err.Error(), "--cni-net-dir") || !strings.Contains(err.Error(), "/net/00-probelet.conflist: plugins[1].type")) {
				t.Errorf("got %v, want an error that names the flag and the place", err)
			}
		})
	}
}

func TestNegativeDurations(t *testing.T) {
	for _, flag := range []string{"--settle", "--in-flight", "--wait-for-daemon", "--drain"} {
		err := execute(t, UninstallCommand, "--cni-net-dir", t.TempDir(), "--cni-bin-dir", t.TempDir(), flag+"=-2s")
		if err == nil || err.Error() != flag+" -2s: must not be negative" {
			t.Errorf("%s: %v", flag, err)
		}
	}
}

// attached adds a pod, attaches it and writes its record.
func attached(t *testing.T, node *bpftest.Node, o Options, via attach.Via) *bpftest.Pod {
	t.Helper()
	d, err := datapath.Ensure(t.Context(), o.BPFDir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close() //nolint:errcheck // nothing is lost
	p := node.AddPod(t)
	r := attach.Record{ContainerID: "c-" + p.HostIfName, IfName: "eth0", Network: "pods", IfIndex: p.IfIndex, HostIfName: p.HostIfName, PodNetns: p.Netns}
	if err := attach.WriteRecord(o.StateDir, r); err != nil {
		t.Fatal(err)
	}
	bpftest.Do(t, node.NS, func() error { return attach.Attach(d, o.BPFDir, r.ID(), r.Target(), via) })
	return p
}

// wantBare checks that no program is attached to the pod's device.
func wantBare(t *testing.T, p *bpftest.Pod) {
	t.Helper()
	bpftest.Do(t, p.Node.NS, func() error {
		device, err := netlink.LinkByIndex(p.IfIndex)
		if err != nil {
			return err
		}
		for _, parent := range []uint32{netlink.HANDLE_MIN_INGRESS, netlink.HANDLE_MIN_EGRESS} {
			if filters, err := netlinksafe.FilterList(device, parent); err == nil && len(filters) > 0 {
				t.Errorf("filters still on %s: %v", p.HostIfName, filters)
			}
		}
		for _, side := range []ebpf.AttachType{ebpf.AttachTCXIngress, ebpf.AttachTCXEgress} {
			result, err := link.QueryPrograms(link.QueryOptions{Target: p.IfIndex, Attach: side})
			if errors.Is(err, ebpf.ErrNotSupported) {
				continue
			}
			if err != nil {
				return err
			}
			if len(result.Programs) > 0 {
				t.Errorf("%s of %s: %d programs still attached", side, p.HostIfName, len(result.Programs))
			}
		}
		return nil
	})
}

func TestUninstallAfterInterruption(t *testing.T) {
	o := Options{
		NetDir: t.TempDir(), BinDir: t.TempDir(), BPFDir: bpftest.BPFDir(t), StateDir: filepath.Join(t.TempDir(), "state"),
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	node := bpftest.NewNode(t)
	pods := []*bpftest.Pod{attached(t, node, o, attach.ViaAuto), attached(t, node, o, attach.ViaClsact)}
	bpftest.Do(t, node.NS, func() error { return uninstaller{o, o.node()}.detach(t.Context()) })
	for range 2 {
		bpftest.Do(t, node.NS, func() error { return Uninstall(t.Context(), o) })
	}
	for _, p := range pods {
		wantBare(t, p)
	}
	for _, dir := range []string{o.BPFDir, o.StateDir} {
		if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s still exists: %v", dir, err)
		}
	}
}
