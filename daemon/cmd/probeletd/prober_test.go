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
)

func TestParseProber(t *testing.T) {
	for value, want := range map[string]proberFlag{
		"host":               {},
		"cgroup:/sys/fs/x/y": {cgroup: "/sys/fs/x/y"},
	} {
		if got, err := parseProber(value); got != want || err != nil {
			t.Errorf("%q: %+v, %v", value, got, err)
		}
	}
	for _, value := range []string{"", "hosts", "cgroup:", "cgroup:relative", "/sys/fs/cgroup"} {
		if got, err := parseProber(value); err == nil || !strings.Contains(err.Error(), value) {
			t.Errorf("%q: %+v, error %v does not name it", value, got, err)
		}
	}
}

func TestProberMustBeACgroup(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{dir, filepath.Join(dir, "missing")} {
		if got, err := (proberFlag{cgroup: path}).resolve(); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: %+v, error %v does not name it", path, got, err)
		}
	}
}

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
	prober := proberFlag{cgroup: filepath.Join(mount, "probelet-test")}
	remake := func() uint64 {
		t.Helper()
		if err := os.Mkdir(prober.cgroup, 0o700); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.Remove(prober.cgroup) })
		who, err := prober.resolve()
		if err != nil || len(who.CgroupIDs) != 1 || who.CgroupIDs[0] == 0 || who.AnyLocal {
			t.Fatalf("%+v, %v", who, err)
		}
		return who.CgroupIDs[0]
	}

	first := remake()
	var set []uint64
	l := &loop{
		log:    slog.New(slog.NewTextHandler(t.Output(), nil)),
		prober: prober,
		who:    datapath.Prober{CgroupIDs: []uint64{first}},
		set: func(p datapath.Prober) error {
			set = append(set, p.CgroupIDs...)
			return nil
		},
	}
	l.followProber()
	if err := os.Remove(prober.cgroup); err != nil {
		t.Fatal(err)
	}
	l.followProber()
	if len(set) != 0 {
		t.Errorf("set to %d without need", set)
	}
	second := remake()
	l.followProber()
	l.followProber()
	if first == second || !slices.Equal(set, []uint64{second}) {
		t.Errorf("first %d, then %d; set to %d", first, second, set)
	}
}
