package agent

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/prober"
)

// A restarted kubelet has a new cgroup under the old name.
func TestFollowProber(t *testing.T) {
	bpftest.RequireRoot(t)
	mount := t.TempDir()
	if err := unix.Mount("cgroup2", mount, "cgroup2", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	cgroup := filepath.Join(mount, "probelet-test")
	finder, err := prober.Parse("cgroup:" + cgroup)
	if err != nil {
		t.Fatal(err)
	}
	remake := func() uint64 {
		t.Helper()
		if err := os.Mkdir(cgroup, 0o700); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove(cgroup) })
		who, err := finder.Find()
		if err != nil || len(who.CgroupIDs) != 1 || who.CgroupIDs[0] == 0 || who.AnyLocal {
			t.Fatalf("%+v, %v", who, err)
		}
		return who.CgroupIDs[0]
	}

	first := remake()
	var set []uint64
	f := &proberFollower{
		log:    slog.New(slog.NewTextHandler(t.Output(), nil)),
		finder: finder,
		who:    datapath.Prober{CgroupIDs: []uint64{first}},
		set: func(p datapath.Prober) error {
			set = append(set, append(p.CgroupIDs, 0)[0])
			return nil
		},
	}
	f.follow()
	if err := os.Remove(cgroup); err != nil {
		t.Fatal(err)
	}
	f.follow()
	f.follow()
	if !slices.Equal(set, []uint64{0}) {
		t.Errorf("without its cgroup the prober is %d, want nobody (0), said once", set)
	}
	second := remake()
	f.follow()
	f.follow()
	if first == second || !slices.Equal(set, []uint64{0, second}) {
		t.Errorf("first %d, then %d; set to %d", first, second, set)
	}
}

// Without a kubelet the daemon runs, says so at once, and nobody is the prober.
func TestStartsWithoutAKubelet(t *testing.T) {
	n := newNode(t)
	if who, err := (&prober.Finder{Kubelet: true}).Find(); err == nil {
		t.Skipf("there is a kubelet on this machine: %+v", who)
	}
	if err := n.d.SetProber(datapath.Prober{AnyLocal: true}); err != nil {
		t.Fatal(err)
	}
	n.config.Prober = "kubelet"
	n.specs("httpGet: {path: /, port: 8080}")
	logged := n.keepLog()
	n.start()
	n.eventually("nobody to be the prober", func() bool {
		who, err := n.d.Prober()
		return err == nil && !who.AnyLocal && len(who.CgroupIDs) == 0
	})
	n.eventually("a word of it", func() bool { return logged("no prober found") == 1 })
}

// ownCgroup is the directory of this process' cgroup.
func ownCgroup(t *testing.T) string {
	t.Helper()
	root, err := bpftest.RootCgroup()
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if path, ok := strings.CutPrefix(line, "0::"); ok { // cgroup v2, see cgroups(7)
			return filepath.Join(root, strings.TrimSpace(path))
		}
	}
	t.Fatal("this process is in no cgroup v2")
	return ""
}

// The prober cannot be found for a moment, or is another process: connections that were taken or handed over before go on to
// their end, new ones reach the pod, and when it is found again its probes are answered as before.
func TestTheProberIsLostForAMoment(t *testing.T) {
	for name, elsewhere := range map[string]bool{"not found": false, "in another cgroup": true} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			own, where := ownCgroup(t), filepath.Join(t.TempDir(), "prober")
			point := func(cgroup string) {
				t.Helper()
				if err := os.Remove(where); err != nil && !errors.Is(err, os.ErrNotExist) {
					t.Fatal(err)
				}
				if cgroup == "" {
					return
				}
				if err := os.Symlink(cgroup, where); err != nil {
					t.Fatal(err)
				}
			}
			point(own)
			n.config.Prober = "cgroup:" + where
			n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
			n.attach()
			n.start()
			n.makeFresh()
			n.want("/healthz", 200, true)

			taken, unasked, handed := n.connect(), n.connect(), n.connect()
			const half = 100_000
			send(t, handed, fmt.Sprintf("POST /x HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n", 2*half))
			send(t, handed, strings.Repeat("a", half))
			n.eventually("handed over", func() bool { return n.counter("handed_over") == 1 })

			other := ""
			if elsewhere {
				dir, _, err := bpftest.Cgroup("elsewhere")
				if err != nil {
					t.Fatal(err)
				}
				defer os.Remove(dir) //nolint:errcheck // a test's
				other = dir
			}
			before := n.prober()
			point(other)
			n.eventually("the prober is another", func() bool {
				now := n.prober()
				return !slices.Equal(now, before) && (len(now) > 0) == elsewhere
			})
			n.want("/healthz", 200, false)
			wantAnswer(t, taken, n.probeRequest("/healthz", ""), "", true)
			wantAnswer(t, unasked, "GET /other HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", "0", false)
			wantAnswer(t, handed, strings.Repeat("b", half), fmt.Sprint(2*half), false)

			point(own)
			n.eventually("it is the prober again", func() bool { return slices.Equal(n.prober(), before) })
			n.want("/healthz", 200, true)
		})
	}
}

// prober are the cgroups that the kernel side knows it by.
func (n *node) prober() []uint64 {
	n.t.Helper()
	who, err := n.d.Prober()
	if err != nil {
		n.t.Fatal(err)
	}
	return who.CgroupIDs
}

func (n *node) connect() net.Conn { return n.pod.Dial(n.t, n.pod.IPv4.String()+":8080") }

func send(t *testing.T, conn net.Conn, text string) {
	t.Helper()
	err := conn.SetDeadline(time.Now().Add(10 * time.Second))
	if err == nil {
		_, err = io.WriteString(conn, text)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// wantAnswer sends what is left of a request. received is how many bytes of a body the pod's server says it got.
func wantAnswer(t *testing.T, conn net.Conn, rest, received string, byKernel bool) {
	t.Helper()
	send(t, conn, rest)
	response, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err == nil {
		_, err = io.Copy(io.Discard, response.Body)
	}
	if err != nil {
		t.Fatalf("%.20q: %v", rest, err)
	}
	if response.StatusCode != 200 || response.Header.Get("X-Received") != received || (response.Header.Get("Cache-Status") != "") != byKernel {
		t.Errorf("%.20q: %s, %v", rest, response.Status, response.Header)
	}
}

// A prober that the kernel side cannot be told is nobody. It is tried again, but not twice a second: each time costs the loading of a
// program.
func TestAProberThatCannotBeSet(t *testing.T) {
	bpftest.RequireRoot(t)
	finder, err := prober.Parse("cgroup:" + ownCgroup(t))
	if err != nil {
		t.Fatal(err)
	}
	var log strings.Builder
	var now datapath.Prober
	tries, broken := 0, errors.New("no BTF")
	f := &proberFollower{
		log: slog.New(slog.NewTextHandler(&log, nil)), finder: finder, who: datapath.Prober{AnyLocal: true},
		set: func(p datapath.Prober) error {
			if len(p.CgroupIDs) > 0 {
				if tries++; broken != nil {
					return broken
				}
			}
			now = p
			return nil
		},
	}
	for range 5 {
		f.follow()
	}
	if tries != 1 || now.AnyLocal || len(now.CgroupIDs) > 0 || f.lost != "no BTF" || strings.Count(log.String(), "no BTF") != 1 {
		t.Errorf("tried %d times; the prober is %+v; lost: %q; log:\n%s", tries, now, f.lost, &log)
	}
	f.refused.at = f.refused.at.Add(-setAgain)
	broken = nil
	f.follow()
	f.follow()
	if tries != 2 || len(now.CgroupIDs) != 1 || f.lost != "" {
		t.Errorf("afterwards: tried %d times; the prober is %+v; lost: %q", tries, now, f.lost)
	}
}
