package datapath

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/lock"
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
	for name, c := range map[string]struct{ key, value any }{
		probeletMapProber:           {uint32(0), probeletProberConfig{}},
		probeletMapDevices:          {uint32(0), probeletDevice{}},
		probeletMapEndpointEvidence: {probeletEndpointKey{}, Evidence{}},
		probeletMapEndpointTallies:  {probeletEndpointKey{}, Tally{}},
		probeletMapEndpointLists:    {DeviceKey{}, probeletEndpointList{}},
		probeletMapPodNetns:         {uint32(0), probeletNetnsDevices{}},
		probeletMapFlows:            {probeletFlowKey{}, probeletFlow{}},
		probeletMapRequests:         {probeletFlowKey{}, probeletStored{}},
	} {
		m := spec.Maps[name]
		if int(m.KeySize) != binary.Size(c.key) || int(m.ValueSize) != binary.Size(c.value) {
			t.Errorf("map %s: key %d value %d, Go has %d and %d", name, m.KeySize, m.ValueSize, binary.Size(c.key), binary.Size(c.value))
		}
	}
	for _, name := range CounterNames {
		if name == "" {
			t.Error("a counter has no name")
		}
	}
}

func TestModelAtTheBoundaries(t *testing.T) {
	e := Evidence{ObservedAt: 100, FreshUntil: 200, Result: ResultSuccess}
	void := Tally{WithdrawnAt: 100}
	if MayAnswer(e, Tally{}, void, 150, 150) || MayAnswer(e, void, Tally{}, 150, 150) || !MayAnswer(e, Tally{}, Tally{}, 150, 150) {
		t.Error("a withdrawal of either port or endpoint must count")
	}
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
		if PortFresh(e, tally, c.now) != c.fresh || MayAnswer(e, tally, Tally{}, c.takenAt, c.now) != c.answer {
			t.Errorf("%+v: fresh %v, answer %v", c, PortFresh(e, tally, c.now), MayAnswer(e, tally, Tally{}, c.takenAt, c.now))
		}
	}
}

// programsOf has the hash of each ABI's object. Objects that a build with the same ABI has already loaded are not replaced,
// so a change needs another ABI to take effect before the machine restarts.
var programsOf = map[string]string{
	"v6": "eca11811d0fec55949e358520a3e5d24c69b3c6a1af8c3faa8f6bbb662054465",
}

func TestChangedProgramsNeedAnotherABI(t *testing.T) {
	if hash := fmt.Sprintf("%x", sha256.Sum256(_ProbeletBytes)); programsOf[ABI] != hash {
		t.Errorf("the object changed. If ABI %s was released, it needs another number; if not, update its hash to\n\t%q: %q,", ABI, ABI, hash)
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
		t.Fatalf("Open without pins: %v", err)
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
			t.Fatalf("steer loaded more than once: %v", ids)
		}
	}
	want := []string{"", "/" + ABI}
	for _, name := range []string{
		"answer_ages", "attachments", "counters", "devices", "endpoint_evidence", "endpoint_lists", "endpoint_tallies", "flows", "observe",
		"own_sockets", "pod_netns", "prober", "prober_sockets", "records", "respond", "steer", "sweep", "traffic_slots", "watch",
	} {
		want = append(want, "/"+ABI+"/"+name)
	}
	if got := pinned(t, dir); !slices.Equal(got, want) {
		t.Fatalf("pinned %q, want %q", got, want)
	}
}

func TestEnsureRecoversFromACrash(t *testing.T) {
	bpftest.RequireRoot(t)
	dir := bpftest.BPFDir(t)
	must(t, os.MkdirAll(filepath.Join(dir, ABI+"-loading", "attachments"), 0o700))
	d, err := Ensure(context.Background(), dir)
	must(t, err)
	must(t, d.Close())
	if _, err := os.Stat(filepath.Join(dir, ABI+"-loading")); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("left behind: %v", err)
	}
}

// A pin was removed. Attachments made with the old objects stay visible, and the next caller gets a complete set.
func TestEnsureReplacesAnIncompleteSet(t *testing.T) {
	bpftest.RequireRoot(t)
	dir := bpftest.BPFDir(t)
	for i, pin := range []string{"steer", "observe", "respond", "sweep", "flows", "endpoint_evidence", "answer_ages", pinWatch} {
		old, err := Ensure(t.Context(), dir)
		must(t, err)
		past := time.Now().Add(-time.Minute) // so that later changes have other timestamps
		must(t, os.Chtimes(old.Dir(), past, past))
		if current, err := old.Current(); err != nil || !current {
			t.Fatalf("current: %v, %v", current, err)
		}
		must(t, os.Mkdir(filepath.Join(AttachmentsDir(dir), "c@eth0"), 0o700))
		if pin == pinWatch && !old.Watched() {
			continue
		}
		must(t, os.Remove(filepath.Join(old.Dir(), pin)))
		if current, err := old.Current(); err != nil || current {
			t.Errorf("without %s: current %v, %v", pin, current, err)
		}
		d, err := Ensure(t.Context(), dir)
		must(t, err)
		if current, err := old.Current(); err != nil || current {
			t.Errorf("old set current: %v, %v", current, err)
		}
		if current, err := d.Current(); err != nil || !current {
			t.Errorf("new set current: %v, %v", current, err)
		}
		others, err := Others(dir)
		if err != nil || len(others) != i+1 {
			t.Errorf("put aside: %v, %v", others, err)
		}
		must(t, errors.Join(old.Close(), d.Close(), RemoveOthers(dir)))
		if still, err := Others(dir); err != nil || len(still) != i+1 {
			t.Errorf("removed despite an attachment: %v, %v", still, err)
		}
	}
	others, err := Others(dir)
	must(t, err)
	for _, other := range others {
		must(t, os.Remove(filepath.Join(other, attachmentsDir, "c@eth0")))
	}
	must(t, RemoveOthers(dir))
	if others, err := Others(dir); err != nil || len(others) != 0 {
		t.Errorf("left behind: %v, %v", others, err)
	}
}

// A kernel without BTF has no watch, which must not make Ensure load again and again.
func TestEnsureAcceptsAMissingWatch(t *testing.T) {
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

// On a kernel that does not allow looks at sockets everything else works as usual, and the pins reveal it.
func TestLoadWithoutLookingAtListeners(t *testing.T) {
	bpftest.RequireRoot(t)
	spec, err := loadProbelet()
	must(t, err)
	code := spec.Programs[probeletProgSteer].Instructions
	for i := range code {
		if code[i].IsBuiltinCall() && code[i].Constant == int64(asm.FnSkcToTcpSock) {
			code[i].Constant = 9999 // no such helper
		}
	}
	blind := &Datapath{}
	if err := blind.load(spec); err != nil || blind.SeesListeners() {
		t.Errorf("loaded: %v, looks at sockets: %v", err, blind.SeesListeners())
	}
	must(t, blind.Close())

	d, err := Ensure(t.Context(), bpftest.BPFDir(t))
	must(t, err)
	defer d.Close() //nolint:errcheck // a test's
	if !d.SeesListeners() {
		t.Error("does not look at sockets")
	}
	must(t, os.Mkdir(filepath.Join(d.Dir(), pinBlind), 0o700))
	opened, err := Open(filepath.Dir(d.Dir()))
	must(t, err)
	if opened.SeesListeners() {
		t.Error("the pins claim a look at sockets")
	}
	must(t, opened.Close())
}

func TestEnsureGivesUpWaiting(t *testing.T) {
	bpftest.RequireRoot(t)
	dir := bpftest.BPFDir(t)
	must(t, os.Mkdir(dir, 0o700))
	held, err := lock.Dir(context.Background(), dir, unix.LOCK_EX)
	must(t, err)
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if _, err := Ensure(ctx, dir); !errors.Is(err, ErrLocked) {
		t.Fatalf("with the lock held: %v", err)
	}
	if got := pinned(t, dir); len(got) != 1 {
		t.Fatalf("pinned without the lock: %v", got)
	}
	held.Release()
	d, err := Ensure(context.Background(), dir)
	must(t, err)
	must(t, d.Close())
}

func TestEnsureRequiresABPFFileSystem(t *testing.T) {
	bpftest.RequireRoot(t)
	dir := filepath.Join(t.TempDir(), "probelet")
	if _, err := Ensure(context.Background(), dir); !errors.Is(err, ErrNoBPFFS) {
		t.Fatalf("on a plain directory: %v", err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("created %s nevertheless", dir)
	}
}

// netnsDevices returns the devices that watch knows in a namespace, or nil if it does not know the namespace.
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

// Four processes add devices of one namespace concurrently.
func TestConcurrentDevicesOfOneNamespace(t *testing.T) {
	bpftest.RequireRoot(t)
	d, err := Ensure(t.Context(), bpftest.BPFDir(t))
	must(t, err)
	defer d.Close() //nolint:errcheck // a test's
	for netns := range uint32(40) {
		var all sync.WaitGroup
		for ifindex := range uint32(4) {
			all.Go(func() {
				if err := d.AddDevice(DeviceKey{Ifindex: 10 + 4*netns + ifindex, Generation: 1}, netns, HookTC); err != nil {
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

func TestNamespaceHoldsFourDevices(t *testing.T) {
	bpftest.RequireRoot(t)
	d, err := Load()
	must(t, err)
	defer d.Close() //nolint:errcheck // a test's
	key := func(ifindex uint32) DeviceKey { return DeviceKey{Ifindex: ifindex, Generation: 7} }
	for ifindex := range uint32(4) {
		must(t, d.AddDevice(key(10+ifindex), 33, HookTC))
		must(t, d.AddDevice(key(10+ifindex), 33, HookXDP))
	}
	if err := d.AddDevice(key(20), 33, HookTC); err == nil || !strings.Contains(err.Error(), "33") {
		t.Fatalf("fifth device: %v", err)
	}
	if _, err := d.Device(key(20)); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("fifth device is known nevertheless: %v", err)
	}
	for ifindex := range uint32(4) {
		must(t, d.RemoveDevice(key(10+ifindex)))
	}
	left(t, d)
}

func TestPodsAreIsolated(t *testing.T) {
	bpftest.RequireRoot(t)
	d, err := Load()
	must(t, err)
	defer d.Close() //nolint:errcheck // a test's
	a, b := DeviceKey{Ifindex: 3, Generation: 7}, DeviceKey{Ifindex: 4, Generation: 7}
	must(t, d.AddDevice(a, 33, HookTC))
	must(t, d.AddDevice(b, 33, HookXDP))
	podA, err := d.Pod(a)
	must(t, err)
	podB, err := d.Pod(b)
	must(t, err)
	must(t, podA.Put(TCPKey(80), Evidence{Status: 7}))
	if keys, err := podB.Keys(); err != nil || len(keys) != 0 {
		t.Fatalf("in the other pod: %v, %v", keys, err)
	}
	if _, _, err := podB.Get(TCPKey(80)); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatalf("in the other pod: %v", err)
	}
	// An update keeps what the kernel has noted.
	must(t, d.objects.EndpointTallies.Put(TCPKey(80).of(a), Tally{Hits: 5}))
	must(t, podA.Put(TCPKey(80), Evidence{Status: 8}))
	must(t, podA.Renew(TCPKey(80), Evidence{Status: 9}))
	if e, tally, err := podA.Get(TCPKey(80)); err != nil || e != (Evidence{Status: 9}) || tally.Hits != 5 {
		t.Fatalf("after an update: %+v %+v, %v", e, tally, err)
	}
	must(t, podA.Delete(TCPKey(80)))
	must(t, podA.Delete(TCPKey(80)))
	if err := podA.Renew(TCPKey(80), Evidence{}); !errors.Is(err, ebpf.ErrKeyNotExist) {
		t.Fatalf("Renew without evidence: %v", err)
	}
	if devices := netnsDevices(t, d, 33); !slices.Equal(devices, []uint32{3, 4, 0, 0}) {
		t.Fatalf("devices of the namespace: %v", devices)
	}
	must(t, d.RemoveDevice(a))
	must(t, d.RemoveDevice(a))
	if devices := netnsDevices(t, d, 33); !slices.Equal(devices, []uint32{0, 4, 0, 0}) {
		t.Fatalf("devices of the namespace: %v", devices)
	}
	if devices, err := d.Devices(); err != nil || len(devices) != 1 || devices[4].Key != b || devices[4].Hook != HookXDP {
		t.Fatalf("devices %v, %v", devices, err)
	}
}

// A process that dies in the middle of removing a device leaves its list, by which the remains are found.
func TestStraysAreRemoved(t *testing.T) {
	bpftest.RequireRoot(t)
	d, err := Load()
	must(t, err)
	defer d.Close() //nolint:errcheck // a test's
	for ifindex := range uint32(3) {
		key := DeviceKey{Ifindex: 3 + ifindex, Generation: 7}
		must(t, d.AddDevice(key, 33, HookTC))
		p, err := d.Pod(key)
		must(t, err)
		must(t, p.Put(TCPKey(80), Evidence{}))
		must(t, p.Put(PortKey(80), Evidence{}))
	}
	must(t, d.objects.Devices.Delete(uint32(4)))
	must(t, d.RemoveStrays())
	devices, err := d.Devices()
	if err != nil || len(devices) != 2 {
		t.Fatalf("devices %v, %v", devices, err)
	}
	if n := len(entries[probeletEndpointKey, Evidence](t, d.objects.EndpointEvidence)); n != 4 {
		t.Fatalf("%d endpoints left", n)
	}
	if devices := netnsDevices(t, d, 33); !slices.Equal(devices, []uint32{3, 0, 5, 0}) {
		t.Fatalf("devices of the namespace: %v", devices)
	}
	for _, device := range devices {
		must(t, d.RemoveDevice(device.Key))
	}
	left(t, d)
}
