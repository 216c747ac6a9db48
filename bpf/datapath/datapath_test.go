package datapath

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
)

// ownCgroup is the id of the cgroup v2 that the test runs in.
func ownCgroup(t testing.TB) uint64 {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	cgroups, err := os.ReadFile("/proc/self/cgroup")
	must(t, err)
	for _, mount := range strings.Split(string(mounts), "\n") {
		fields := strings.Fields(mount)
		if len(fields) < 3 || fields[2] != "cgroup2" {
			continue
		}
		for _, line := range strings.Split(string(cgroups), "\n") {
			if path, ok := strings.CutPrefix(line, "0::"); ok {
				var stat unix.Stat_t
				must(t, unix.Stat(filepath.Join(fields[1], path), &stat))
				return stat.Ino
			}
		}
	}
	t.Fatal("no cgroup v2")
	return 0
}

func TestSharedTypesHaveTheSizesOfTheMaps(t *testing.T) {
	spec, err := loadProbelet()
	must(t, err)
	for name, sizes := range map[string][2]int{
		probeletMapProber: {4, binary.Size(probeletProberConfig{})},
		probeletMapFlows:  {binary.Size(probeletFlowKey{}), binary.Size(probeletFlow{})},
	} {
		m := spec.Maps[name]
		if int(m.KeySize) != sizes[0] || int(m.ValueSize) != sizes[1] {
			t.Errorf("map %s: key %d value %d, Go has %v", name, m.KeySize, m.ValueSize, sizes)
		}
	}
	for name, value := range map[string]any{probeletMapPodEvidence: Evidence{}, probeletMapPodTallies: Tally{}} {
		inner := spec.Maps[name].InnerMap
		if int(inner.KeySize) != binary.Size(EndpointKey{}) || int(inner.ValueSize) != binary.Size(value) ||
			inner.MaxEntries != MaxEndpoints {
			t.Errorf("map in %s: %v", name, inner)
		}
	}
	for _, name := range CounterNames {
		if name == "" {
			t.Error("a counter has no name")
		}
	}
}

func TestPathHashIsFNV1a(t *testing.T) {
	for _, path := range []string{"", "/", "/healthz", "/a%20b?x=1", strings.Repeat("x", 300)} {
		h := fnv.New64a()
		_, _ = h.Write([]byte(path))
		if PathHash(path) != h.Sum64() {
			t.Errorf("hash of %q: %#x, want %#x", path, PathHash(path), h.Sum64())
		}
	}
}

func TestModelAtTheBorders(t *testing.T) {
	e := Evidence{ObservedAt: 100, FreshUntil: 200, Result: ResultSuccess}
	for _, c := range []struct {
		withdrawnAt, takenAt, now uint64
		fresh, answer             bool
	}{
		{0, 150, 199, true, true},
		{0, 150, 200, false, true},
		{0, 199, 199 + takenGrace - 1, false, true},
		{0, 199, 199 + takenGrace, false, false},
		{0, 200, 200, false, false},
		{99, 150, 150, true, true},
		{100, 150, 150, false, false},
	} {
		tally := Tally{WithdrawnAt: c.withdrawnAt}
		if PortFresh(e, tally, c.now) != c.fresh || MayAnswer(e, tally, c.takenAt, c.now) != c.answer {
			t.Errorf("%+v: fresh %v, answer %v", c, PortFresh(e, tally, c.now), MayAnswer(e, tally, c.takenAt, c.now))
		}
	}
}

// programsOf is the hash of the object of an ABI. What is loaded already, by a build with the same ABI, is not replaced: so
// that a change has an effect before the machine starts anew, it needs another ABI.
var programsOf = map[string]string{
	"v3": "17e48068dcbbcdb870d2b7624b722c7a6110812b5374cff60bcf8d57ea288637",
}

func TestOtherProgramsHaveAnotherABI(t *testing.T) {
	if hash := fmt.Sprintf("%x", sha256.Sum256(_ProbeletBytes)); programsOf[ABI] != hash {
		t.Errorf("the object's hash is %s, not that of ABI %s; if ABI was released, it needs another number", hash, ABI)
	}
}

func pinned(t *testing.T, bpfDir string) []string {
	t.Helper()
	var paths []string
	must(t, filepath.WalkDir(bpfDir, func(path string, _ os.DirEntry, err error) error {
		paths = append(paths, strings.TrimPrefix(path, bpfDir))
		return err
	}))
	return paths
}

func TestEnsureLoadsOnce(t *testing.T) {
	bpftest.RequireRoot(t)
	dir := bpftest.BPFDir(t)
	if _, err := Open(dir); !errors.Is(err, ErrNotLoaded) {
		t.Fatalf("open of nothing: %v", err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	ids := make([]uint32, 20)
	var all sync.WaitGroup
	for i := range ids {
		all.Go(func() {
			d, err := Ensure(ctx, dir)
			if err != nil {
				t.Error(err)
				return
			}
			info, err := d.Steer().Info()
			if err != nil {
				t.Error(err)
				return
			}
			id, _ := info.ID()
			ids[i] = uint32(id)
			if err := d.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	for _, id := range ids {
		if id == 0 || id != ids[0] {
			t.Fatalf("steer was loaded more than once: %v", ids)
		}
	}
	want := "|/v3|/v3/answer_ages|/v3/attachments|/v3/counters|/v3/flows|/v3/outcomes|/v3/own_sockets|/v3/pod_evidence|/v3/pod_netns|/v3/pod_tallies|/v3/prober|/v3/respond|/v3/steer|/v3/watch"
	if got := strings.Join(pinned(t, dir), "|"); got != want {
		t.Fatalf("pinned %s, want %s", got, want)
	}
}

func TestEnsureRepairsWhatACrashLeft(t *testing.T) {
	bpftest.RequireRoot(t)
	dir := bpftest.BPFDir(t)
	must(t, os.MkdirAll(filepath.Join(dir, ABI+"-loading", "attachments"), 0o700))
	d, err := Ensure(context.Background(), dir)
	must(t, err)
	must(t, d.Close())
	if _, err := os.Stat(filepath.Join(dir, ABI+"-loading")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("left over: %v", err)
	}
}

// Somebody has removed a pin. What is attached with the old objects stays to be seen; whoever comes next gets whole ones.
func TestEnsureReplacesAnIncompleteSet(t *testing.T) {
	bpftest.RequireRoot(t)
	dir := bpftest.BPFDir(t)
	for i, pin := range []string{"steer", "respond", "flows", "answer_ages", pinWatch} {
		old, err := Ensure(t.Context(), dir)
		must(t, err)
		if current, err := old.Current(); err != nil || !current {
			t.Fatalf("current: %v, %v", current, err)
		}
		must(t, os.Mkdir(filepath.Join(AttachmentsDir(dir), "c@eth0"), 0o700))
		if pin == pinWatch && !old.Watched() {
			continue
		}
		must(t, os.Remove(filepath.Join(old.Dir(), pin)))
		if current, err := old.Current(); err != nil || current {
			t.Errorf("without %s it is current: %v, %v", pin, current, err)
		}
		d, err := Ensure(t.Context(), dir)
		must(t, err)
		if current, err := old.Current(); err != nil || current {
			t.Errorf("the old one is current: %v, %v", current, err)
		}
		if current, err := d.Current(); err != nil || !current {
			t.Errorf("the new one is current: %v, %v", current, err)
		}
		others, err := Others(dir)
		if err != nil || len(others) != i+1 {
			t.Errorf("put aside: %v, %v", others, err)
		}
		must(t, errors.Join(old.Close(), d.Close(), RemoveOthers(dir)))
		if still, err := Others(dir); err != nil || len(still) != i+1 {
			t.Errorf("removed although something is attached: %v, %v", still, err)
		}
	}
	others, err := Others(dir)
	must(t, err)
	for _, other := range others {
		must(t, os.Remove(filepath.Join(other, attachmentsDir, "c@eth0")))
	}
	must(t, RemoveOthers(dir))
	if others, err := Others(dir); err != nil || len(others) != 0 {
		t.Errorf("left: %v, %v", others, err)
	}
}

// A kernel that does not describe its types has no watch, which is no reason to load again and again.
func TestEnsureKnowsThatThereIsNoWatch(t *testing.T) {
	bpftest.RequireRoot(t)
	dir := bpftest.BPFDir(t)
	d, err := Ensure(t.Context(), dir)
	must(t, err)
	if d.Watched() {
		must(t, os.Remove(filepath.Join(d.Dir(), pinWatch)))
		must(t, os.Mkdir(filepath.Join(d.Dir(), pinUnwatched), 0o700))
	}
	if current, err := d.Current(); err != nil || !current || d.Watched() {
		t.Errorf("current: %v, %v; watched: %v", current, err, d.Watched())
	}
	must(t, d.Close())
}

func TestEnsureDoesNotWaitForever(t *testing.T) {
	bpftest.RequireRoot(t)
	dir := bpftest.BPFDir(t)
	must(t, os.Mkdir(dir, 0o700))
	unlock, err := Lock(context.Background(), dir, unix.LOCK_EX)
	must(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := Ensure(ctx, dir); !errors.Is(err, ErrLocked) {
		t.Fatalf("with the lock held: %v", err)
	}
	if got := pinned(t, dir); len(got) != 1 {
		t.Fatalf("pinned without the lock: %v", got)
	}
	unlock()
	d, err := Ensure(context.Background(), dir)
	must(t, err)
	must(t, d.Close())
}

func TestEnsureNeedsABPFFileSystem(t *testing.T) {
	bpftest.RequireRoot(t)
	dir := filepath.Join(t.TempDir(), "probelet")
	if _, err := Ensure(context.Background(), dir); !errors.Is(err, ErrNoBPFFS) {
		t.Fatalf("on a plain directory: %v", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("made %s all the same", dir)
	}
}

// netnsDevices are those that watch knows; nil if it does not know the namespace.
func netnsDevices(t *testing.T, d *Datapath, netns uint32) []uint32 {
	t.Helper()
	var devices probeletNetnsDevices
	err := d.objects.PodNetns.Lookup(netns, &devices)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	must(t, err)
	return devices.Ifindex[:]
}

// Two of one namespace's devices, added by two processes at once.
func TestNoDeviceOfANamespaceIsLost(t *testing.T) {
	bpftest.RequireRoot(t)
	d, err := Ensure(t.Context(), bpftest.BPFDir(t))
	must(t, err)
	defer d.Close() //nolint:errcheck // a test's
	p, err := d.NewPod()
	must(t, err)
	defer p.Close() //nolint:errcheck // a test's
	for netns := range uint32(40) {
		var all sync.WaitGroup
		for ifindex := range uint32(4) {
			all.Go(func() {
				if err := d.AddPod(10+ifindex, netns, p); err != nil {
					t.Error(err)
				}
			})
		}
		all.Wait()
		if devices := netnsDevices(t, d, netns); slices.Contains(devices, 0) {
			t.Fatalf("namespace %d has devices %v", netns, devices)
		}
	}
}

func TestANamespaceHasRoomForFourDevices(t *testing.T) {
	bpftest.RequireRoot(t)
	d, err := Load()
	must(t, err)
	defer d.Close() //nolint:errcheck // a test's
	p, err := d.NewPod()
	must(t, err)
	defer p.Close() //nolint:errcheck // a test's
	for ifindex := range uint32(4) {
		must(t, d.AddPod(10+ifindex, 33, p))
		must(t, d.AddPod(10+ifindex, 33, p))
	}
	if err := d.AddPod(20, 33, p); err == nil || !strings.Contains(err.Error(), "33") {
		t.Fatalf("a fifth: %v", err)
	}
	for ifindex := range uint32(4) {
		must(t, d.RemovePod(10+ifindex))
	}
	if devices := netnsDevices(t, d, 33); devices != nil {
		t.Fatalf("left of the namespace: %v", devices)
	}
}

func TestPodsAreApart(t *testing.T) {
	bpftest.RequireRoot(t)
	d, err := Load()
	must(t, err)
	defer d.Close() //nolint:errcheck // a test's
	a, err := d.NewPod()
	must(t, err)
	defer a.Close() //nolint:errcheck // a test's
	b, err := d.NewPod()
	must(t, err)
	defer b.Close() //nolint:errcheck // a test's
	must(t, d.AddPod(3, 33, a))
	must(t, d.AddPod(4, 33, b))
	must(t, a.Put(TCPKey(80), Evidence{Status: 7}))

	dir := filepath.Dir(bpftest.BPFDir(t))
	if _, err := OpenPod(dir); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("before it was pinned: %v", err)
	}
	must(t, a.Pin(dir))
	opened, err := OpenPod(dir)
	must(t, err)
	defer opened.Close() //nolint:errcheck // a test's
	if e, _, err := opened.Get(TCPKey(80)); err != nil || e.Status != 7 {
		t.Fatalf("by its pins: %+v, %v", e, err)
	}
	if keys, err := b.Keys(); err != nil || len(keys) != 0 {
		t.Fatalf("in the other pod: %v, %v", keys, err)
	}
	// An update keeps what the kernel has noted.
	must(t, a.tallies.Put(TCPKey(80), Tally{Hits: 5}))
	must(t, a.Put(TCPKey(80), Evidence{Status: 8}))
	if e, tally, err := a.Get(TCPKey(80)); err != nil || e.Status != 8 || tally.Hits != 5 {
		t.Fatalf("after an update: %+v %+v, %v", e, tally, err)
	}
	must(t, a.Delete(TCPKey(80)))
	must(t, a.Delete(TCPKey(80)))
	if devices := netnsDevices(t, d, 33); !slices.Equal(devices, []uint32{3, 4, 0, 0}) {
		t.Fatalf("devices of the namespace: %v", devices)
	}
	must(t, d.RemovePod(3))
	must(t, d.RemovePod(3))
	if devices := netnsDevices(t, d, 33); !slices.Equal(devices, []uint32{0, 4, 0, 0}) {
		t.Fatalf("devices of the namespace: %v", devices)
	}
	if pods, err := d.PodIDs(); err != nil || len(pods) != 1 {
		t.Fatalf("pods %v, %v", pods, err)
	}
}
