package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

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
	l := &loop{
		log:    slog.New(slog.NewTextHandler(t.Output(), nil)),
		prober: finder,
		who:    datapath.Prober{CgroupIDs: []uint64{first}},
		set: func(p datapath.Prober) error {
			set = append(set, append(p.CgroupIDs, 0)[0])
			return nil
		},
	}
	l.followProber()
	if err := os.Remove(cgroup); err != nil {
		t.Fatal(err)
	}
	l.followProber()
	l.followProber()
	if !slices.Equal(set, []uint64{0}) {
		t.Errorf("without its cgroup the prober is %d, want nobody (0), said once", set)
	}
	second := remake()
	l.followProber()
	l.followProber()
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
	n.config.prober = "kubelet"
	n.specs("httpGet: {path: /, port: 8080}")
	log, err := os.Create(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close() //nolint:errcheck // a test's
	n.log = log
	n.start()
	n.eventually("nobody to be the prober", func() bool {
		who, err := n.d.Prober()
		return err == nil && !who.AnyLocal && len(who.CgroupIDs) == 0
	})
	n.eventually("a word of it", func() bool {
		text, err := os.ReadFile(log.Name())
		return err == nil && strings.Contains(string(text), "no prober yet")
	})
}
