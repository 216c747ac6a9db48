package e2e

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/e2e/harness/node"
)

// doctor names problems together with their remedies, and does not report what is healthy.
func TestDoctor(t *testing.T) {
	s := newScene(t, node.PTP)
	p := s.newFreshPod(longHTTP)
	doctor := func(netDir string) (string, error) {
		return s.Ctl("doctor", "--cni-net-dir", netDir, "--cni-bin-dir", s.PluginDir())
	}

	text, err := doctor(s.NetDir())
	must(t, err)
	expectText(t, text,
		`ok +kernel +Linux \d`, `ok +bpffs`, `ok +cgroup v2`, `ok +capabilities +the daemon has all`, `ok +BPF objects`,
		`ok +chain +network `, `ok +plugin`, `ok +daemon +process \d+, ready`,
		`note +states +container changes are not pushed: a specs file does not report container states`, `note +prober +cgroup \d+, which is not a kubelet's`,
		`ok +attachments +1, all complete`)

	device, err := netlinksafe.LinkByName(p.HostDevice)
	must(t, err)
	must(t, netlink.QdiscReplace(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: device.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}))
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Type: ebpf.SchedCLS, License: "MIT", Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, 0), asm.Return()},
	})
	must(t, err)
	defer program.Close() //nolint:errcheck // a test's
	must(t, netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: device.Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: 7, Protocol: unix.ETH_P_ALL,
		},
		Fd: program.FD(), Name: "other", DirectAction: true,
	}))
	text, err = doctor(s.NetDir())
	must(t, err)
	expectText(t, text, `note +attachments +other programs on `+p.HostDevice+` of default/pod1: bpf filter, priority 7, other at tc filter ingress, after ours`)

	must(t, s.daemon.Stop())
	pins, err := filepath.Glob(filepath.Join(s.BPFDir, "*", "attachments", "*"))
	must(t, err)
	for _, dir := range pins {
		must(t, os.RemoveAll(dir))
	}
	_, err = doctor(t.TempDir())
	if err == nil {
		t.Fatal("no error")
	}
	expectText(t, err.Error(), `PROBLEM +chain +no network configuration`, `PROBLEM +daemon +not running on`, `-> start it with probeletd run`,
		`PROBLEM +attachments +default/pod1: .*not attached`, `3 problems found`)
}
