//go:build linux

package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf/features"
	"github.com/containernetworking/plugins/pkg/netlinksafe"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/install/chain"
	"github.com/probelet/probelet/daemon/internal/install/runtimes"
	"github.com/probelet/probelet/daemon/internal/prober"
	"github.com/probelet/probelet/daemon/internal/status"
)

const doctorHelp = `Looks at everything that probelet needs on this node, changes nothing, and says in words what to do about what is not well.
Before an install it looks at what the install needs, and says what that would do.

  ok        as it should be
  note      probelet works, but you may want to know
  would     an install would do this
  PROBLEM   something is not answered, or not attached, or keeps from an install; the command then ends with 1

It needs root, on the node or in the daemon's pod, and looks as the process that it is.`

// doctor looks at a node.
type doctor struct {
	env    *environment
	where  place
	chain  chain.Node
	status Status
	// quiet: findings are only kept.
	quiet    bool
	findings []status.Finding
}

func doctorCommand(env *environment) *cobra.Command {
	d := &doctor{env: env, chain: chain.Node{Runtimes: env.host.runtimes, Log: slog.New(slog.DiscardHandler)}}
	var output string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look at everything that probelet needs on this node, and say what to do",
		Long:  doctorHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return status.Errorf(status.Usage, "--output %q: must be one of json|text", output)
			}
			d.quiet = output == "json"
			return d.run(cmd.Context())
		},
	}
	d.where.flags(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "text", "`format`: json|text")
	cmd.Flags().StringVar(&d.chain.NetDir, "cni-net-dir", "/etc/cni/net.d", "`directory` of network configurations")
	cmd.Flags().StringVar(&d.chain.BinDir, "cni-bin-dir", "/opt/cni/bin", "`directory` of CNI plugins")
	return cmd
}

func (d *doctor) run(ctx context.Context) error {
	if d.env.host.uid != 0 {
		return status.Errorf(status.NotAllowed, "doctor looks at what only root may see, and would take what it cannot see for missing: run it as root, or in the daemon's pod")
	}
	d.kernel()
	d.bpffs()
	d.cgroup()
	var err error
	if d.status, err = collect(d.env, d.where); err != nil {
		d.says(status.Problem, "state", err.Error(), "")
	}
	d.capabilities()
	if err == nil && !d.installed() {
		d.preflight()
	} else {
		d.objects()
		d.network()
		d.plugin()
		d.daemon(ctx)
		d.kubelet()
		d.attachments()
		d.trust()
	}
	d.others()
	if d.quiet {
		if err := printJSON(d.env.stdout, d.findings); err != nil {
			return err
		}
	}
	if n := status.Problems(d.findings); n > 0 {
		return fmt.Errorf("%d of these need attention", n)
	}
	return nil
}

// says notes a finding, and unless quiet prints it, and below it what to do.
func (d *doctor) says(v status.Verdict, about, what, do string) {
	f := status.Finding{Verdict: v, About: about, What: what, Do: do}
	d.findings = append(d.findings, f)
	if !d.quiet {
		_, _ = io.WriteString(d.env.stdout, f.Text(d.env.width))
	}
}

// host is what doctor asks of the machine itself.
type host struct {
	uid       int    // of this process, its effective one
	proc, sys string // where these file systems are
	version   func() (uint32, error)
	isFS      func(dir string, magic int64) bool
	runtimes  func() runtimes.List
	kubelet   func() (datapath.Prober, error)
	devices   func(bpfDir string) ([]device, error)
}

func thisHost() host {
	return host{
		uid: os.Geteuid(), proc: "/proc", sys: "/sys", version: features.LinuxVersionCode, isFS: isFS, devices: devices,
		runtimes: func() runtimes.List { return runtimes.Find("/proc") },
		kubelet:  func() (datapath.Prober, error) { return (&prober.Finder{Kubelet: true}).Find() },
	}
}

func (d *doctor) kernel() {
	v, err := d.env.host.version()
	version := fmt.Sprintf("Linux %d.%d", v>>16, v>>8&0xff)
	// Where the kernel describes its own types.
	btf := filepath.Join(d.env.host.sys, "kernel/btf/vmlinux")
	switch _, noBTF := os.Stat(btf); {
	case err != nil:
		d.says(status.Problem, "kernel", "its version is not known: "+err.Error(), "")
	case v < 5<<16|15<<8:
		d.says(status.Problem, "kernel", version, "probelet needs 5.15 or newer; pods start as ever, without it")
	case noBTF != nil:
		d.says(status.Note, "kernel", version+", without "+btf, "with CONFIG_DEBUG_INFO_BTF a listening socket that is closed is noticed at once; now it is by the next probe that reaches the pod")
	default:
		d.says(status.Well, "kernel", version+" with BTF", "")
	}
}

func isFS(dir string, magic int64) bool {
	var fs unix.Statfs_t
	return unix.Statfs(dir, &fs) == nil && int64(fs.Type) == magic //nolint:unconvert // its width is the architecture's
}

func (d *doctor) bpffs() {
	if parent := filepath.Dir(d.where.bpfDir); d.env.host.isFS(parent, unix.BPF_FS_MAGIC) {
		d.says(status.Well, "bpffs", parent, "")
	} else {
		d.says(status.Problem, "bpffs", parent+" is not a BPF file system", "mount -t bpf bpf "+parent+"; for every start in /etc/fstab")
	}
}

func (d *doctor) cgroup() {
	// /host/cgroup is where the chart mounts the host's.
	dirs := []string{"/host/cgroup", "/host/cgroup/unified", "/sys/fs/cgroup", "/sys/fs/cgroup/unified"}
	if i := slices.IndexFunc(dirs, func(dir string) bool { return d.env.host.isFS(dir, unix.CGROUP2_SUPER_MAGIC) }); i >= 0 {
		d.says(status.Well, "cgroup v2", dirs[i], "")
		return
	}
	d.says(status.Problem, "cgroup v2", "is mounted in none of "+strings.Join(dirs, ", "),
		"the kubelet's connections are known by its cgroup: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified")
}

// needed are the capabilities of the daemon; the chart says what each is for.
var needed = []struct {
	name string
	bit  int
	// implied by CAP_SYS_ADMIN (capabilities(7)); the others are not
	implied bool
}{
	{"BPF", unix.CAP_BPF, true},
	{"NET_ADMIN", unix.CAP_NET_ADMIN, false},
	{"PERFMON", unix.CAP_PERFMON, true},
	{"SYS_PTRACE", unix.CAP_SYS_PTRACE, false},
}

func (d *doctor) capabilities() {
	who, process := "this command's", "self"
	if d.status.Daemon.Running {
		who, process = "the daemon's", strconv.Itoa(d.status.Daemon.PID)
	}
	has, err := capabilitiesOf(d.env.host.proc, process)
	if err != nil {
		d.says(status.Note, "capabilities", "cannot be read: "+err.Error(), "")
		return
	}
	var missing []string
	for _, c := range needed {
		enough := uint64(1) << c.bit
		if c.implied {
			enough |= 1 << unix.CAP_SYS_ADMIN
		}
		if has&enough == 0 {
			missing = append(missing, "CAP_"+c.name)
		}
	}
	if len(missing) > 0 {
		d.says(status.Problem, "capabilities", who+" lack "+strings.Join(missing, ", "), "add them to the container's securityContext, or run as root on the node")
		return
	}
	d.says(status.Well, "capabilities", who, "")
}

// capabilitiesOf are a process's effective ones (CapEff in proc(5)).
func capabilitiesOf(proc, process string) (uint64, error) {
	text, err := os.ReadFile(filepath.Join(proc, process, "status"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(text)) {
		if set, ok := strings.CutPrefix(line, "CapEff:"); ok {
			return strconv.ParseUint(strings.TrimSpace(set), 16, 64)
		}
	}
	return 0, fmt.Errorf("process %s: no CapEff", process)
}

func (d *doctor) objects() {
	if d.status.Prober == nil {
		d.says(status.Note, "BPF objects", "none in "+d.where.bpfDir, "the daemon, or the first pod that is added, loads them")
		return
	}
	k, err := d.env.open(d.where.bpfDir)
	if err != nil || k == nil { // they were there a moment ago
		d.says(status.Problem, "BPF objects", fmt.Sprintf("%s: cannot be opened any more: %v", d.where.bpfDir, err), "")
		return
	}
	defer k.Close() //nolint:errcheck // read only
	if !k.Watched() {
		d.says(status.Note, "BPF objects", d.where.bpfDir+"; listening sockets that close are not noticed",
			"the next probe that reaches the pod notices; the kernel needs CONFIG_DEBUG_INFO_BTF, and the BPF objects to be loaded anew")
		return
	}
	if !k.SeesListeners() {
		d.says(status.Note, "BPF objects", d.where.bpfDir+"; the kernel does not let pods' listening sockets be looked at",
			"TCP probes are answered for as short a time as HTTP probes")
		return
	}
	d.says(status.Well, "BPF objects", d.where.bpfDir, "")
}

// runtime looks at the one that is to read the chain.
func (d *doctor) runtime(found runtimes.List) {
	switch {
	case len(found) == 0:
		d.says(status.Note, "runtime", "no process of containerd, crio or cri-dockerd is to be seen", "")
	case len(found) > 1:
		d.says(status.Note, "runtime", found.String()+fmt.Sprintf("; all of them read %s", chain.BestWay(found)), "one of them runs the pods")
	case found[0].Libcni == "":
		d.says(status.Note, "runtime", found.String(), "install with --chain copy, which every runtime reads")
	default:
		d.says(status.Well, "runtime", fmt.Sprintf("%s, reads %s", found, chain.BestWay(found)), "")
	}
}

// network looks at the chain, and at the runtime that is to read it.
func (d *doctor) network() {
	found := d.env.host.runtimes()
	d.runtime(found)
	joined, in, err := d.chain.Look()
	switch {
	case errors.Is(err, chain.ErrMisplaced):
		d.says(status.Problem, "chain", err.Error(), "until then probeletd keeps the plugin out of the chain, and new pods are not attached")
	case err != nil:
		d.says(status.Problem, "chain", err.Error(), "install the cluster's network plugin; probeletd joins as soon as there is a network")
	case !in:
		what := fmt.Sprintf("the plugin is not in network %s, of %s", joined.Network, joined.Primary)
		if joined.File != "" {
			what += "; " + joined.File + " is not what would be derived from it now, or is not read"
		}
		d.says(status.Problem, "chain", what, "probeletd install --cni-net-dir "+d.chain.NetDir)
	case joined.Way == chain.DropIn && len(found) > 0 && chain.BestWay(found) != chain.DropIn:
		d.says(status.Problem, "chain", joined.File+", which this runtime is not known to read", "probeletd install --chain copy, or a runtime with libcni 1.3 or newer")
	case joined.File == "":
		d.says(status.Well, "chain", fmt.Sprintf("network %s, by its own configuration %s", joined.Network, joined.Primary), "")
	default:
		d.says(status.Well, "chain", fmt.Sprintf("network %s of %s, by %s", joined.Network, joined.Primary, joined.File), "")
	}
}

// pluginFile looks for the plugin; in a pod that has not mounted its directory, too.
func (d *doctor) pluginFile() (os.FileInfo, error) {
	file := filepath.Join(d.chain.BinDir, chain.PluginType)
	info, err := os.Stat(file)
	if errors.Is(err, os.ErrNotExist) {
		if onHost, hostErr := os.Stat(filepath.Join(d.env.host.proc, "1/root", file)); hostErr == nil {
			return onHost, nil
		}
	}
	return info, err
}

func (d *doctor) plugin() {
	file := filepath.Join(d.chain.BinDir, chain.PluginType)
	info, err := d.pluginFile()
	const do = "probeletd install; until then no pod can start on a network that names the plugin"
	switch {
	case err != nil:
		d.says(status.Problem, "plugin", err.Error(), do)
	case !info.Mode().IsRegular() || info.Mode()&0o111 == 0 || info.Size() == 0:
		d.says(status.Problem, "plugin", fmt.Sprintf("%s is no program: %s, %d bytes", file, info.Mode(), info.Size()), do)
	default:
		d.says(status.Well, "plugin", file, "")
	}
}

func (d *doctor) daemon(ctx context.Context) {
	if !d.status.Daemon.Running {
		d.says(status.Problem, "daemon", "does not run on "+d.where.stateDir+"; "+d.status.Daemon.Still.Words(time.Now()),
			"probeletd run; see the pod's log if it ends at once")
		return
	}
	missing, err := api.NewClient(d.where.stateDir).Ready(ctx)
	if err != nil {
		missing = []string{err.Error()}
	}
	if len(missing) > 0 {
		d.says(status.Problem, "daemon", fmt.Sprintf("runs, process %d, but: %s", d.status.Daemon.PID, strings.Join(missing, "; ")), "see its log")
		return
	}
	d.says(status.Well, "daemon", fmt.Sprintf("process %d, ready", d.status.Daemon.PID), "")
	d.states(ctx)
}

// states says how the daemon hears of containers' states.
func (d *doctor) states(ctx context.Context) {
	source, err := api.NewClient(d.where.stateDir).Source(ctx)
	switch {
	case err != nil:
		d.says(status.Note, "states", "how the daemon hears of containers' states is not known: "+err.Error(), "")
	case source.Pushed:
		d.says(status.Well, "states", "changes of containers are pushed", "")
	default:
		d.says(status.Note, "states", "changes of containers are not pushed: "+source.Why,
			"a container that ends without closing a listening socket is noticed late")
	}
}

// kubelet compares whose connections are probes to the kernel side with who should be.
func (d *doctor) kubelet() {
	set := d.status.Prober
	if set != nil && set.Host {
		d.says(status.Note, "prober", "every process of the node is taken for one (--prober host)", "for a node of a cluster: --prober kubelet")
		return
	}
	found, err := d.env.host.kubelet()
	if err == nil {
		should := proberOf(found)
		switch {
		case set == nil:
			d.says(status.Note, "prober", fmt.Sprintf("the kubelet, %s, which nothing is loaded to compare with", should), "")
		case reflect.DeepEqual(set, should):
			d.says(status.Well, "prober", fmt.Sprintf("the kubelet, %s", should), "")
		default:
			d.says(status.Problem, "prober", fmt.Sprintf("the kubelet is %s, but what is set is %s", should, set), "run the daemon with --prober kubelet; its log says why, if it is")
		}
		return
	}
	if set != nil && len(set.CgroupIDs) > 0 {
		d.says(status.Note, "prober", fmt.Sprintf("cgroup %d, which is not a kubelet's", set.CgroupIDs[0]), "")
		return
	}
	d.says(status.Problem, "prober", err.Error(), "nothing is answered. Is the kubelet running, and are the node's processes to be seen (hostPID)?")
}

// attachments looks at those on record.
func (d *doctor) attachments() {
	records, err := attach.ReadRecords(d.where.stateDir)
	if err != nil {
		d.says(status.Problem, "attachments", err.Error(), "remove the record; the pod is adopted, or attached when it is made anew")
	}
	if unattached := d.status.Unattached; len(unattached) > 0 {
		d.says(status.Note, "attachments", fmt.Sprintf("%d pods have probes, and are not attached: %s", len(unattached), strings.Join(unattached, ", ")),
			"restart them if they are older than probelet and the daemon does not adopt them; pods with hostNetwork never are")
	}
	for _, a := range d.status.Attachments {
		if a.Settings != nil && a.Settings.Problem != "" {
			d.says(status.Note, "annotations", a.Pod+": "+a.Settings.Problem, "mend the annotation; until then nothing of the pod is answered")
		}
	}
	if d.status.Prober == nil || len(records) == 0 {
		d.says(status.Well, "attachments", fmt.Sprintf("%d", len(records)), "")
		return
	}
	checker, done, err := newChecker(d.where.bpfDir)
	if err != nil {
		d.says(status.Problem, "attachments", err.Error(), "")
		return
	}
	defer done()
	good := 0
	for _, r := range records {
		err := checker.Check(r.ID(), r.IfIndex)
		switch {
		case r.Error != "":
			d.says(status.Problem, "attachments", nameOf(r)+" was not attached: "+r.Error, "the pod runs without probelet")
		case err != nil:
			d.says(status.Problem, "attachments", nameOf(r)+": "+err.Error(), "the daemon mends this within 10 s, unless another program keeps the place")
		default:
			good++
		}
	}
	if good == len(records) {
		d.says(status.Well, "attachments", fmt.Sprintf("%d, all as they were made", good), "")
	}
}

// trust looks for devices by which answers did not arrive.
func (d *doctor) trust() {
	for _, a := range d.status.Attachments {
		if a.Trust != trustLost {
			continue
		}
		again := "restart the pod"
		if a.Pod != "" {
			again = "run probeletctl trust " + a.Pod
		}
		d.says(status.Problem, "trust", fmt.Sprintf("%s is not answered: %s", cmp.Or(a.Pod, a.ContainerID), a.trust()),
			fmt.Sprintf("find who drops the answers by %s (others on it are named below; or a firewall), then %s", a.HostIfName, again))
	}
}

func nameOf(r attach.Record) string {
	if r.PodName == "" {
		return r.ID().String()
	}
	return r.PodNamespace + "/" + r.PodName
}

// newChecker is of what is loaded; if nothing is, everything is somebody else's.
func newChecker(bpfDir string) (checker *attach.Checker, done func(), err error) {
	objects, err := datapath.Open(bpfDir)
	if errors.Is(err, datapath.ErrNotLoaded) {
		return &attach.Checker{}, func() {}, nil
	}
	if err != nil {
		return nil, nil, err
	}
	done = func() { _ = objects.Close() } // read only
	if checker, err = attach.NewChecker(objects, bpfDir); err != nil {
		done()
	}
	return checker, done, err
}

// device is one of the node's, with what others have at its hooks.
type device struct {
	name    string
	ifindex int
	veth    bool
	others  []string
}

// devices are those that others have something on: of veths at XDP and tc, of the rest at XDP.
func devices(bpfDir string) ([]device, error) {
	links, err := netlinksafe.LinkList()
	if err != nil {
		return nil, err
	}
	checker, done, err := newChecker(bpfDir)
	if err != nil {
		return nil, err
	}
	defer done()
	var all []device
	for _, link := range links {
		one := device{name: link.Attrs().Name, ifindex: link.Attrs().Index, veth: link.Type() == "veth"}
		if xdp := link.Attrs().Xdp; one.veth {
			neighbours, _ := checker.Neighbours(one.ifindex) // one that has just gone has none
			for _, n := range neighbours {
				one.others = append(one.others, n.String())
			}
		} else if xdp != nil && xdp.ProgId != 0 {
			one.others = []string{fmt.Sprintf("XDP program %d", xdp.ProgId)}
		}
		if len(one.others) > 0 {
			all = append(all, one)
		}
	}
	return all, nil
}

// others looks at who else is on the node's devices: those of attached pods, those that a pod to come may be like, and the rest.
func (d *doctor) others() {
	found, err := d.env.host.devices(d.where.bpfDir)
	if err != nil {
		d.says(status.Note, "others", "cannot be looked for: "+err.Error(), "")
		return
	}
	records, _ := attach.ReadRecords(d.where.stateDir) // attachments has told of errors
	var veths, rest []string
	for _, one := range found {
		what := strings.Join(one.others, ", ")
		i := slices.IndexFunc(records, func(r attach.Record) bool { return r.IfIndex == one.ifindex })
		switch {
		case i >= 0:
			d.says(status.Note, "attachments", fmt.Sprintf("others on %s of %s: %s", one.name, nameOf(records[i]), what),
				"those before ours may keep probes from being answered, those after ours may drop the answers")
		case one.veth:
			veths = append(veths, fmt.Sprintf("%s (%s)", one.name, what))
		default:
			rest = append(rest, fmt.Sprintf("%s (%s)", one.name, what))
		}
	}
	if len(veths) > 0 {
		d.says(status.Note, "others", "on veths without probelet: "+some(veths), "a pod whose device has an XDP program already starts without probelet")
	}
	if len(rest) > 0 {
		d.says(status.Note, "others", "on devices of no pod: "+some(rest), "no matter in itself; but whoever it is may want the pods' devices too")
	}
}

// some are the first of many.
func some(all []string) string {
	const most = 5
	if len(all) > most {
		return fmt.Sprintf("%s and %d more", strings.Join(all[:most], ", "), len(all)-most)
	}
	return strings.Join(all, ", ")
}
