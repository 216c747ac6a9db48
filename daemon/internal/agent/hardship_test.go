package agent

import (
	"errors"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

// programDir is where program is built; empty until then.
var programDir string

// program builds probeletd.
var program = sync.OnceValues(func() (string, error) {
	var err error
	if programDir, err = os.MkdirTemp("", "probeletd"); err != nil {
		return "", err
	}
	file := filepath.Join(programDir, "probeletd")
	out, err := exec.Command("go", "build", "-o", file, "../../cmd/probeletd").CombinedOutput()
	if err != nil {
		err = errors.Join(err, errors.New(string(out)))
	}
	return file, err
})

// process is a probeletd in a process of its own.
type process struct {
	*exec.Cmd
	t      *testing.T
	output *os.File
}

// said returns its output so far.
func (p *process) said() string {
	p.t.Helper()
	text, err := os.ReadFile(p.output.Name())
	if err != nil {
		p.t.Fatal(err)
	}
	return string(text)
}

// command starts a subcommand of probeletd on the node.
func (n *node) command(arguments ...string) *process {
	n.t.Helper()
	file, err := program()
	if err != nil {
		n.t.Fatal(err)
	}
	arguments = append(arguments, "--bpf-dir", n.config.BPFDir, "--state-dir", n.config.StateDir)
	output, err := os.CreateTemp(n.t.TempDir(), "")
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { _ = output.Close() })
	p := &process{exec.Command(file, arguments...), n.t, output}
	p.Stdout, p.Stderr = output, output
	bpftest.Do(n.t, n.pod.Node.NS, p.Start)
	return p
}

// daemon starts a daemon.
func (n *node) daemon() *process {
	n.t.Helper()
	p := n.command("run", "--specs", n.config.Specs, "--prober", "host", "--metrics-listen", "", "--repair=false")
	n.t.Cleanup(func() { _ = p.Process.Kill(); _ = p.Wait() })
	return p
}

// running waits until a daemon makes decisions.
func (n *node) running() {
	n.t.Helper()
	n.eventually("a running daemon", func() bool {
		response, err := n.local().Get("http://probeletd/healthz")
		if err != nil {
			return false
		}
		return errors.Join(response.Body.Close()) == nil && response.StatusCode == http.StatusOK
	})
}

// ends waits until a daemon exits on its own, and says why, once.
func (n *node) ends(p *process, because string) {
	n.t.Helper()
	late := time.AfterFunc(30*time.Second, func() { _ = p.Process.Kill() })
	defer late.Stop()
	err := p.Wait()
	var exit *exec.ExitError
	if said := p.said(); !errors.As(err, &exit) || exit.ExitCode() != 1 || strings.Count(said, because) != 1 {
		n.t.Errorf("%v, want an error with %q, once; the output is:\n%s", err, because, said)
	}
	if errors := strings.Count(p.said(), "level=ERROR"); errors > 0 {
		n.t.Errorf("%d errors besides:\n%s", errors, p.said())
	}
}

// gone uninstalls, and checks that nothing is left.
func (n *node) gone() {
	n.t.Helper()
	net, bin := n.t.TempDir(), n.t.TempDir()
	p := n.command("uninstall", "--cni-net-dir", net, "--cni-bin-dir", bin, "--settle", "1ms", "--in-flight", "1s", "--drain", "1ms")
	if err := p.Wait(); err != nil {
		n.t.Fatalf("uninstall: %v\n%s", err, p.said())
	}
	wantGone(n.t, n.config.BPFDir, n.config.StateDir)
	for _, dir := range []string{net, bin} {
		if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
			n.t.Errorf("in %s: %v, %v", dir, left, err)
		}
	}
}

// mount mounts a file system on a directory of its own.
func mount(t *testing.T, kind, options string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := unix.Mount(kind, dir, kind, 0, options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for unix.Unmount(dir, unix.MNT_DETACH) == nil { // including whatever is mounted over it
		}
	})
	return dir
}

// A daemon that has answered for a pod loses something that it depends on. It exits and says why, evidence is used until it expires at
// most, and probelet can still be uninstalled.
func TestHardship(t *testing.T) {
	for name, test := range map[string]struct {
		happens func(n *node) error
		says    string
	}{
		"the state directory is removed": {func(n *node) error { return removeAll(n.config.StateDir) }, "the state directory was removed"},
		"the state directory is replaced": {func(n *node) error {
			return errors.Join(os.Rename(n.config.StateDir, n.config.StateDir+".old"), os.Mkdir(n.config.StateDir, 0o700))
		}, "the state directory was removed"},
		"the lock is removed":    {func(n *node) error { return os.Remove(filepath.Join(n.config.StateDir, "probeletd.lock")) }, "the state directory was removed"},
		"bpffs is unmounted":     {func(n *node) error { return unix.Unmount(filepath.Dir(n.config.BPFDir), unix.MNT_DETACH) }, errReplaced.Error()},
		"bpffs is remounted":     {func(n *node) error { return remount(filepath.Dir(n.config.BPFDir)) }, errReplaced.Error()},
		"bpffs is mounted over":  {func(n *node) error { return unix.Mount("bpf", filepath.Dir(n.config.BPFDir), "bpf", 0, "") }, errReplaced.Error()},
		"all pins are removed":   {func(n *node) error { return os.RemoveAll(n.config.BPFDir) }, errReplaced.Error()},
		"the objects are others": {func(n *node) error { return os.RemoveAll(filepath.Join(n.d.Dir(), "devices")) }, errReplaced.Error()},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel() // each waits for seconds
			n := newNode(t)
			n.moveTo(filepath.Join(mount(t, "bpf", ""), "probelet"))
			n.specs("httpGet: {path: /healthz, port: 8080}, " + short)
			n.attach()
			p := n.daemon()
			n.running()
			n.eventually("answered", func() bool { _, byKernel := n.ask("/healthz"); return byKernel })
			if err := test.happens(n); err != nil {
				t.Fatal(err)
			}
			n.ends(p, test.says)
			n.eventually("the pod is asked again", func() bool { _, byKernel := n.ask("/healthz"); return !byKernel })
			n.gone()
			var fs unix.Statfs_t
			parent := filepath.Dir(n.config.BPFDir)
			if err := unix.Statfs(parent, &fs); err != nil || fs.Type != unix.BPF_FS_MAGIC {
				n.ends(n.daemon(), "not on a BPF file system")
				if err := unix.Mount("bpf", parent, "bpf", 0, ""); err != nil {
					t.Fatal(err)
				}
			}
			again := n.daemon()
			n.running()
			if err := again.Process.Signal(unix.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := again.Wait(); err != nil {
				t.Errorf("the next daemon: %v\n%s", err, again.said())
			}
			n.gone()
		})
	}
}

// removeAll removes a directory that the daemon may be writing to.
func removeAll(dir string) (err error) {
	for range 100 {
		if err = os.RemoveAll(dir); !errors.Is(err, unix.ENOTEMPTY) {
			break
		}
	}
	return err
}

func remount(dir string) error {
	return errors.Join(unix.Unmount(dir, unix.MNT_DETACH), unix.Mount("bpf", dir, "bpf", 0, ""))
}

// moveTo pins the node's objects elsewhere.
func (n *node) moveTo(bpfDir string) {
	n.t.Helper()
	d, err := datapath.Ensure(n.t.Context(), bpfDir)
	if err = errors.Join(err, n.d.Close()); err != nil {
		n.t.Fatal(err)
	}
	n.d, n.config.BPFDir = d, bpfDir
	n.t.Cleanup(func() { _ = d.Close() })
}

// A second daemon reports the first and exits, whatever they share. The first continues.
func TestTwoDaemons(t *testing.T) {
	n := newNode(t)
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.attach()
	first := n.daemon()
	n.running()
	state := n.config.StateDir
	for _, dir := range []string{state, filepath.Join(t.TempDir(), "another")} {
		n.config.StateDir = dir
		n.ends(n.daemon(), "another probeletd is running")
		p := n.command("uninstall", "--cni-net-dir", t.TempDir(), "--cni-bin-dir", t.TempDir())
		n.ends(p, "another probeletd is running")
	}
	n.config.StateDir = state
	n.eventually("answered", func() bool { _, byKernel := n.ask("/healthz"); return byKernel })
	if err := errors.Join(first.Process.Signal(unix.SIGTERM), first.Wait()); err != nil {
		t.Errorf("%v\n%s", err, first.said())
	}
	n.gone()
}

// A full disk does not keep the daemon from making decisions. It logs the problem once, and writes again once there is room.
func TestDiskFull(t *testing.T) {
	n := newNode(t)
	n.config.StateDir = filepath.Join(mount(t, "tmpfs", "size=256k"), "state")
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.attach()
	p := n.daemon()
	n.running()
	n.key0()
	filler := filepath.Join(filepath.Dir(n.config.StateDir), "filler")
	fill(t, filler)
	n.specs("httpGet: {path: /other, port: 8080}, " + long)
	n.eventually("the port is known", n.has(datapath.PortKey(8080)))
	n.eventually("asked and answered", func() bool { _, byKernel := n.ask("/other"); return byKernel })
	n.eventually("logged", func() bool { return strings.Contains(p.said(), "no space left on device") })
	if described, err := statedir.ReadEndpoints(n.config.StateDir); err != nil || len(described.Attachments) != 1 {
		t.Errorf("what was written before is %+v, %v", described, err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	n.eventually("written", func() bool { e, ok := n.written(); return ok && e.Path == "/other" })
	if err := errors.Join(p.Process.Signal(unix.SIGTERM), p.Wait()); err != nil {
		t.Errorf("%v\n%s", err, p.said())
	}
	if said := p.said(); strings.Count(said, "level=ERROR") != 1 {
		t.Errorf("the output is:\n%s", said)
	}

	for _, name := range []string{"probeletd.lock", "endpoints.json"} {
		if err := os.Remove(filepath.Join(n.config.StateDir, name)); err != nil {
			t.Fatal(err)
		}
	}
	fill(t, filler)
	p = n.daemon()
	n.running()
	n.eventually("answered", func() bool { _, byKernel := n.ask("/other"); return byKernel })
	if err := errors.Join(p.Process.Kill(), ignoreExit(p.Wait())); err != nil {
		t.Fatal(err)
	}
	n.gone()
}

func ignoreExit(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return err
}

// fill writes to a file until the disk has no room for another page.
func fill(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // a test's
	for err == nil {
		_, err = f.Write(make([]byte, 4096))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
}

func (n *node) written() (statedir.Endpoint, bool) {
	described, err := statedir.ReadEndpoints(n.config.StateDir)
	if err != nil || len(described.Attachments) != 1 || len(described.Attachments[0].Endpoints) != 1 {
		return statedir.Endpoint{}, false
	}
	return described.Attachments[0].Endpoints[0], true
}

// key0 waits until a description is written.
func (n *node) key0() {
	n.t.Helper()
	n.eventually("description written", func() bool { _, ok := n.written(); return ok })
}

// Daemons are killed at random moments, while the pod is healthy or not. The maps only have what was observed, nothing is answered after a
// failure, the next daemon finds nothing unfinished, and uninstall leaves nothing.
func TestDaemonKilledAtAnyMoment(t *testing.T) {
	n := newNode(t)
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.attach()
	answered := 0
	for range 30 {
		p := n.daemon()
		end := time.Now().Add(time.Duration(rand.IntN(400)) * time.Millisecond)
		well := rand.IntN(3) > 0
		status := http.StatusServiceUnavailable
		if well {
			status = http.StatusOK
		}
		n.status.Store(int32(status))
		failed := false
		changed := datapath.Now()
		check := func() {
			got, byKernel := n.ask("/healthz")
			switch {
			case byKernel && failed:
				t.Errorf("answered %d after a failure", got)
			case byKernel:
				answered++
			case got != status:
				t.Errorf("%d by the pod, want %d", got, status)
			}
			failed = failed || !byKernel && !well
		}
		for time.Now().Before(end) {
			check()
		}
		if err := p.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = p.Wait()
		check()
		for key, r := range n.records() {
			if r.Result == datapath.ResultSuccess && (r.ObservedAt > datapath.Now() || !well && r.ObservedAt > changed) {
				t.Errorf("%+v: %+v was not observed", key, r)
			}
		}
	}
	if answered == 0 {
		t.Error("nothing was ever answered")
	}
	p := n.daemon()
	n.running()
	n.key0()
	n.eventually("nothing unfinished is left in the state directory", func() bool {
		entries, err := os.ReadDir(n.config.StateDir)
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		return err == nil && slices.Equal(names, []string{"attachments", "endpoints.json", "metrics", "probeletd.lock", "probeletd.sock"})
	})
	if err := p.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = p.Wait()
	n.gone()
}
