// Package datapath loads the BPF programs and maps of probelet, pins them, and gives typed access to what the kernel
// and user space share. It knows nothing of Kubernetes or CNI.
package datapath

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"github.com/cilium/ebpf/ringbuf"
	"golang.org/x/sys/unix"
)

const (
	// ABI names programs, and the layout of maps and orders. Objects are pinned under it, so that builds that differ in it
	// never open each other's; and builds that have it in common use what the first of them has loaded.
	ABI = "v3"
	// DefaultDir is where everything is pinned unless a configuration says otherwise.
	DefaultDir = "/sys/fs/bpf/probelet"
)

var (
	// ErrNotLoaded: nothing is pinned under the directory (or under another ABI only).
	ErrNotLoaded = errors.New("probelet's BPF objects are not loaded")
	// ErrIncomplete: some of the objects are not pinned any more.
	ErrIncomplete = errors.New("some of probelet's BPF objects are not pinned any more")
	// ErrNoBPFFS: the directory does not lie in a BPF file system.
	ErrNoBPFFS = errors.New("not on a BPF file system (mount -t bpf bpf /sys/fs/bpf)")
	// ErrLocked: another process held the lock on the directory until the deadline.
	ErrLocked = errors.New("locked by another process")
)

// Datapath is the set of loaded objects.
type Datapath struct {
	objects struct {
		probeletMaps
		Steer   *ebpf.Program `ebpf:"steer"`
		Respond *ebpf.Program `ebpf:"respond"`
	}
	watch link.Link // nil: listening sockets are not watched, or by another process' doing
	dir   string    // <bpf dir>/<ABI>; empty if nothing is pinned
}

// Load loads the objects without pinning them. They live until Close and the last attachment.
func Load() (*Datapath, error) {
	spec, err := loadProbelet()
	if err != nil {
		return nil, err
	}
	var random [8]byte
	if _, err := rand.Read(random[:]); err != nil {
		return nil, err
	}
	if err := spec.Variables[probeletVarOrderToken].Set(binary.NativeEndian.Uint64(random[:])); err != nil {
		return nil, err
	}
	// Helper and flag came with the same release, 5.18. Before it, generic XDP linearizes every packet.
	frags := features.HaveProgramHelper(ebpf.XDP, asm.FnXdpLoadBytes) == nil
	if err := spec.Variables[probeletVarHaveXdpLoadBytes].Set(frags); err != nil {
		return nil, err
	}
	if !frags {
		spec.Programs[probeletProgRespond].Flags &^= unix.BPF_F_XDP_HAS_FRAGS
	}
	d := &Datapath{}
	if err := spec.LoadAndAssign(&d.objects, nil); err != nil {
		return nil, fmt.Errorf("loading BPF objects: %w", err)
	}
	if err := d.startWatch(spec); err != nil {
		return nil, errors.Join(fmt.Errorf("watching listening sockets: %w", err), d.Close())
	}
	return d, nil
}

// startWatch attaches the program that sees listening sockets close. A kernel that does not describe its types (BTF) goes
// without: evidence then ends with the next probe that is passed on, as it does for failures of any other kind.
func (d *Datapath) startWatch(spec *ebpf.CollectionSpec) error {
	if _, err := btf.LoadKernelSpec(); errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var programs struct {
		Watch *ebpf.Program `ebpf:"watch"`
	}
	err := spec.LoadAndAssign(&programs, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{
		probeletMapPodNetns:    d.objects.PodNetns,
		probeletMapPodEvidence: d.objects.PodEvidence,
		probeletMapPodTallies:  d.objects.PodTallies,
		probeletMapCounters:    d.objects.Counters,
	}})
	if err != nil {
		return err
	}
	defer programs.Watch.Close() //nolint:errcheck // the link holds it
	d.watch, err = link.AttachTracing(link.TracingOptions{Program: programs.Watch})
	return err
}

// Watched is whether listening sockets of pods are watched, so that a port's evidence ends when its server does.
func (d *Datapath) Watched() bool {
	if d.dir == "" {
		return d.watch != nil
	}
	_, err := os.Stat(filepath.Join(d.dir, pinWatch))
	return err == nil
}

const (
	// pinWatch is the pin of the link of the program watch; unlike the other two it is attached once for all pods.
	pinWatch = "watch"
	// pinUnwatched is a directory in its place where the kernel is too old for it.
	pinUnwatched = "unwatched"
)

// Open opens what is pinned under bpfDir. The error is ErrNotLoaded if nothing is, and ErrIncomplete if not all is.
func Open(bpfDir string) (*Datapath, error) {
	d := &Datapath{dir: filepath.Join(bpfDir, ABI)}
	if _, err := os.Stat(d.dir); Absent(err) {
		return nil, fmt.Errorf("%s: %w", d.dir, ErrNotLoaded)
	}
	for name, m := range d.maps() {
		loaded, err := ebpf.LoadPinnedMap(filepath.Join(d.dir, name), nil)
		if err != nil {
			return nil, errors.Join(openError(filepath.Join(d.dir, name), err), d.Close())
		}
		*m = loaded
	}
	for name, p := range d.programs() {
		loaded, err := ebpf.LoadPinnedProgram(filepath.Join(d.dir, name), nil)
		if err != nil {
			return nil, errors.Join(openError(filepath.Join(d.dir, name), err), d.Close())
		}
		*p = loaded
	}
	return d, nil
}

func openError(pin string, err error) error {
	if Absent(err) {
		err = fmt.Errorf("%w: %w", ErrIncomplete, err)
	}
	return fmt.Errorf("opening %s: %w", pin, err)
}

// openWhole is Open; the error is ErrIncomplete too if listening sockets were watched, and are not any more.
func openWhole(bpfDir string) (*Datapath, error) {
	d, err := Open(bpfDir)
	if err != nil || d.watchPinned() {
		return d, err
	}
	return nil, errors.Join(fmt.Errorf("%s: %w", filepath.Join(d.dir, pinWatch), ErrIncomplete), d.Close())
}

// watchPinned is whether watch is pinned, where there is one.
func (d *Datapath) watchPinned() bool {
	_, err := os.Stat(filepath.Join(d.dir, pinUnwatched))
	return err == nil || d.Watched()
}

// Absent says whether err is that of a path that does not exist, also below something that is no directory.
func Absent(err error) bool { return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) }

// Ensure opens what is pinned under bpfDir, and loads and pins it first if nothing is, or not all of it: all of it or nothing.
// Concurrent callers wait for each other until ctx ends; the error is then ErrLocked.
func Ensure(ctx context.Context, bpfDir string) (*Datapath, error) {
	missing := func(err error) bool { return errors.Is(err, ErrNotLoaded) || errors.Is(err, ErrIncomplete) }
	if d, err := openWhole(bpfDir); !missing(err) {
		return d, err
	}
	if err := makeBPFDir(bpfDir); err != nil {
		return nil, err
	}
	unlock, err := Lock(ctx, bpfDir, unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer unlock()
	d, err := openWhole(bpfDir)
	if !missing(err) {
		return d, err
	}
	if errors.Is(err, ErrIncomplete) {
		if err := putAside(bpfDir); err != nil {
			return nil, err
		}
	}
	return loadAndPin(bpfDir)
}

// putAside makes room for a new set of objects. What is attached stays so until it is attached anew.
func putAside(bpfDir string) error {
	for i := 1; ; i++ {
		err := os.Rename(filepath.Join(bpfDir, ABI), filepath.Join(bpfDir, fmt.Sprintf("%s-incomplete-%d", ABI, i)))
		if !errors.Is(err, os.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
}

// Others are the directories under bpfDir with the objects of builds with another ABI, and of sets that are incomplete.
func Others(bpfDir string) ([]string, error) {
	entries, err := os.ReadDir(bpfDir)
	if Absent(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var others []string
	for _, e := range entries {
		if e.IsDir() && e.Name() != ABI && !strings.HasSuffix(e.Name(), loading) {
			others = append(others, filepath.Join(bpfDir, e.Name()))
		}
	}
	return others, nil
}

// RemoveOthers removes those of Others that have no attachment any more.
func RemoveOthers(bpfDir string) error {
	others, err := Others(bpfDir)
	errs := []error{err}
	for _, dir := range others {
		// Another build may be attaching: this is refused then, and its directory is whole.
		if err := os.Remove(filepath.Join(dir, attachmentsDir)); err == nil || Absent(err) {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

// loadAndPin pins into a directory of its own and renames that into place, so that a half-pinned set is never seen.
func loadAndPin(bpfDir string) (_ *Datapath, err error) {
	d, err := Load()
	if err != nil {
		return nil, err
	}
	// Under the lock: whatever is there was left by a process that died.
	staging := filepath.Join(bpfDir, ABI+loading)
	if err := os.RemoveAll(staging); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.RemoveAll(staging), d.Close())
		}
	}()
	if err := os.Mkdir(staging, 0o700); err != nil {
		return nil, err
	}
	for name, m := range d.maps() {
		if err := (*m).Pin(filepath.Join(staging, name)); err != nil {
			return nil, fmt.Errorf("pinning map %s: %w", name, err)
		}
	}
	for name, p := range d.programs() {
		if err := (*p).Pin(filepath.Join(staging, name)); err != nil {
			return nil, fmt.Errorf("pinning program %s: %w", name, err)
		}
	}
	if d.watch == nil {
		err = os.Mkdir(filepath.Join(staging, pinUnwatched), 0o700)
	} else {
		err = d.watch.Pin(filepath.Join(staging, pinWatch))
	}
	if err != nil {
		return nil, fmt.Errorf("pinning the link of watch: %w", err)
	}
	if err := os.Mkdir(filepath.Join(staging, attachmentsDir), 0o700); err != nil {
		return nil, err
	}
	d.dir = filepath.Join(bpfDir, ABI)
	if err := os.Rename(staging, d.dir); err != nil {
		return nil, err
	}
	return d, nil
}

const (
	attachmentsDir = "attachments"
	loading        = "-loading" // ends the name of a directory that is being filled
)

// Current is whether what is pinned is this still, and all of it. It is not when somebody has mounted another BPF file system,
// or has removed pins.
func (d *Datapath) Current() (bool, error) {
	pinned, err := openWhole(filepath.Dir(d.dir))
	if errors.Is(err, ErrNotLoaded) || errors.Is(err, ErrIncomplete) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer pinned.Close() //nolint:errcheck // read only
	theirs, err := pinned.ids()
	if err != nil {
		return false, err
	}
	ours, err := d.ids()
	return maps.Equal(theirs, ours), err
}

// ids are those of the maps and programs, by name.
func (d *Datapath) ids() (map[string]uint32, error) {
	ids := map[string]uint32{}
	for name, m := range d.maps() {
		info, err := (*m).Info()
		if err != nil {
			return nil, fmt.Errorf("map %s: %w", name, err)
		}
		id, _ := info.ID()
		ids[name] = uint32(id)
	}
	for name, p := range d.programs() {
		info, err := (*p).Info()
		if err != nil {
			return nil, fmt.Errorf("program %s: %w", name, err)
		}
		id, _ := info.ID()
		ids[name] = uint32(id)
	}
	return ids, nil
}

// AttachmentsDir is where attachments are pinned, a directory each.
func AttachmentsDir(bpfDir string) string { return AttachmentsIn(filepath.Join(bpfDir, ABI)) }

// AttachmentsIn is AttachmentsDir of one of Others.
func AttachmentsIn(other string) string { return filepath.Join(other, attachmentsDir) }

// Dir is the directory that the objects are pinned in, empty if they are not.
func (d *Datapath) Dir() string { return d.dir }

func (d *Datapath) maps() map[string]**ebpf.Map {
	m := &d.objects.probeletMaps
	return map[string]**ebpf.Map{
		probeletMapProber:      &m.Prober,
		probeletMapPodEvidence: &m.PodEvidence,
		probeletMapPodTallies:  &m.PodTallies,
		probeletMapPodNetns:    &m.PodNetns,
		probeletMapOwnSockets:  &m.OwnSockets,
		probeletMapFlows:       &m.Flows,
		probeletMapOutcomes:    &m.Outcomes,
		probeletMapCounters:    &m.Counters,
		probeletMapAnswerAges:  &m.AnswerAges,
	}
}

func (d *Datapath) programs() map[string]**ebpf.Program {
	return map[string]**ebpf.Program{
		probeletProgSteer:   &d.objects.Steer,
		probeletProgRespond: &d.objects.Respond,
	}
}

// Steer is the tc egress program.
func (d *Datapath) Steer() *ebpf.Program { return d.objects.Steer }

// Respond is the XDP program.
func (d *Datapath) Respond() *ebpf.Program { return d.objects.Respond }

// Close closes the file descriptors; what is pinned or attached lives on.
func (d *Datapath) Close() error {
	var errs []error
	for _, m := range d.maps() {
		errs = append(errs, (*m).Close())
	}
	for _, p := range d.programs() {
		errs = append(errs, (*p).Close())
	}
	if d.watch != nil {
		errs = append(errs, d.watch.Close())
	}
	if d.objects.Scratch != nil {
		errs = append(errs, d.objects.Scratch.Close())
	}
	return errors.Join(errs...)
}

// Prober says whose connections are probes.
type Prober struct {
	// CgroupIDs are the cgroup v2 ids of the probers; at most 4.
	CgroupIDs []uint64
	// AnyLocal makes every process of the host's network namespace a prober.
	AnyLocal bool
}

// SetProber replaces who probes, atomically enough for a reader in the kernel: it sees the old or the new value of
// each field.
func (d *Datapath) SetProber(p Prober) error {
	var config probeletProberConfig
	if len(p.CgroupIDs) > len(config.CgroupIds) {
		return fmt.Errorf("%d prober cgroups, at most %d are possible", len(p.CgroupIDs), len(config.CgroupIds))
	}
	copy(config.CgroupIds[:], p.CgroupIDs)
	if p.AnyLocal {
		config.AnyLocal = 1
	}
	return d.objects.Prober.Put(uint32(0), &config)
}

// Prober returns who probes.
func (d *Datapath) Prober() (Prober, error) {
	var config probeletProberConfig
	if err := d.objects.Prober.Lookup(uint32(0), &config); err != nil {
		return Prober{}, err
	}
	p := Prober{AnyLocal: config.AnyLocal != 0}
	for _, id := range config.CgroupIds {
		if id != 0 {
			p.CgroupIDs = append(p.CgroupIDs, id)
		}
	}
	return p, nil
}

// Outcomes opens the ring buffer of outcomes. Only one reader at a time sees each of them.
func (d *Datapath) Outcomes() (*OutcomeReader, error) {
	r, err := ringbuf.NewReader(d.objects.Outcomes)
	if err != nil {
		return nil, err
	}
	return &OutcomeReader{ring: r}, nil
}

// OutcomeReader reads outcomes of probes that were passed on.
type OutcomeReader struct {
	ring   *ringbuf.Reader
	record ringbuf.Record
}

// Read waits for outcomes, and returns all that there are. After Close the error is os.ErrClosed.
func (r *OutcomeReader) Read() ([]Outcome, error) {
	const most = 1024
	var outcomes []Outcome
	for len(outcomes) == 0 || r.ring.AvailableBytes() > 0 && len(outcomes) < most {
		if err := r.ring.ReadInto(&r.record); err != nil {
			return outcomes, err
		}
		var o Outcome
		if _, err := binary.Decode(r.record.RawSample, binary.NativeEndian, &o); err != nil {
			return outcomes, err
		}
		outcomes = append(outcomes, o)
	}
	return outcomes, nil
}

// SetDeadline makes Read return os.ErrDeadlineExceeded from then on, if there is nothing to be read.
func (r *OutcomeReader) SetDeadline(t time.Time) { r.ring.SetDeadline(t) }

// Close ends the reading.
func (r *OutcomeReader) Close() error { return r.ring.Close() }

// CounterNames are the names of the counters, in the order of enum counter in bpf/abi.h.
var CounterNames = [probeletCounterCOUNT_MAX]string{
	"answered_http", "answered_tcp", "observed", "handed_over", "passed_not_fresh", "passed_not_probed",
	"passed_not_parsable", "passed_not_prober", "passed_own", "dropped", "outcomes_lost",
	"withdrawn_listener_closed", "withdrawn_reset", "withdrawn_status",
}

// Counters returns the counters by name, summed over the CPUs.
func (d *Datapath) Counters() (map[string]uint64, error) {
	all, err := sums(d.objects.Counters, len(CounterNames))
	if err != nil {
		return nil, fmt.Errorf("counters: %w", err)
	}
	counters := make(map[string]uint64, len(CounterNames))
	for i, name := range CounterNames {
		counters[name] = all[i]
	}
	return counters, nil
}

// sums adds up the CPUs' values of the first n elements of an array.
func sums(array *ebpf.Map, n int) ([]uint64, error) {
	sums := make([]uint64, n)
	for i := range sums {
		var perCPU []uint64
		if err := array.Lookup(uint32(i), &perCPU); err != nil {
			return nil, err
		}
		for _, value := range perCPU {
			sums[i] += value
		}
	}
	return sums, nil
}

// AnswerAgeBounds are the longest ages, in seconds, of the buckets of AnswerAges that have one. AGE_BOUNDS in bpf/abi.h.
var AnswerAgeBounds = [probeletAgeAGE_BOUNDED]float64{0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300}

// AnswerAges tells how old evidence was when it was answered with.
type AnswerAges struct {
	// Buckets are how many answers there were of each; the last one is of all that are older.
	Buckets [len(AnswerAgeBounds) + 1]uint64
	Sum     time.Duration // of all ages
}

// AnswerAges returns them of all answers since the programs were loaded.
func (d *Datapath) AnswerAges() (AnswerAges, error) {
	all, err := sums(d.objects.AnswerAges, int(probeletAgeAGE_MAX))
	if err != nil {
		return AnswerAges{}, fmt.Errorf("ages of answers: %w", err)
	}
	return AnswerAges{[len(AnswerAgeBounds) + 1]uint64(all), time.Duration(all[probeletAgeAGE_SUM])}, nil
}

// ExemptSocket makes the connection of the socket with that cookie (SO_COOKIE) reach the pod, whoever the prober is,
// and not be observed. It must be called before the socket connects.
func (d *Datapath) ExemptSocket(cookie uint64) error {
	return d.objects.OwnSockets.Put(cookie, uint8(0))
}

// ForgetSocket ends what ExemptSocket began, for connections that are yet to be made.
func (d *Datapath) ForgetSocket(cookie uint64) error {
	err := d.objects.OwnSockets.Delete(cookie)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}

// Fill is how full a map is.
type Fill struct{ Entries, Max int }

// Fills returns that of the maps that can be full: of flows the table of connections, of pods that of pods.
func (d *Datapath) Fills() (map[string]Fill, error) {
	flows, err := d.Flows()
	if err != nil {
		return nil, fmt.Errorf("flows: %w", err)
	}
	pods, err := innerIDs(d.objects.PodEvidence)
	if err != nil {
		return nil, err
	}
	return map[string]Fill{
		"flows": {flows, int(d.objects.Flows.MaxEntries())},
		"pods":  {len(pods), int(d.objects.PodEvidence.MaxEntries())},
	}, nil
}

// Flows is the number of connections in the flow table.
func (d *Datapath) Flows() (int, error) {
	const batch = 4096
	n := 0
	keys, flows := make([]probeletFlowKey, batch), make([]probeletFlow, batch)
	for cursor := new(ebpf.MapBatchCursor); ; {
		count, err := d.objects.Flows.BatchLookup(cursor, keys, flows, nil)
		n += count
		if errors.Is(err, ebpf.ErrKeyNotExist) { // that was all
			return n, nil
		}
		if err != nil {
			return n, err
		}
	}
}

// Now is the kernel's time as the programs read it: nanoseconds of CLOCK_BOOTTIME.
func Now() uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // the clock exists on every kernel that Go runs on
	}
	return uint64(ts.Nano())
}

func makeBPFDir(dir string) error {
	parent := filepath.Dir(dir)
	var fs unix.Statfs_t
	if err := unix.Statfs(parent, &fs); err != nil {
		return fmt.Errorf("%s: %w: %w", parent, ErrNoBPFFS, err)
	}
	if fs.Type != unix.BPF_FS_MAGIC {
		return fmt.Errorf("%s: %w", parent, ErrNoBPFFS)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

// Lock takes the lock on dir, for oneself (unix.LOCK_EX) or with others (unix.LOCK_SH). It is tried once at least, and until ctx
// ends; the error is then ErrLocked. It is released by the returned function, and by the kernel should the process die.
func Lock(ctx context.Context, dir string, how int) (func(), error) {
	f, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	for {
		err := unix.Flock(int(f.Fd()), how|unix.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			_ = f.Close()
			return nil, fmt.Errorf("locking %s: %w", dir, err)
		}
		select {
		case <-ctx.Done():
			_ = f.Close()
			return nil, fmt.Errorf("%s: %w", dir, ErrLocked)
		case <-time.After(5 * time.Millisecond):
		}
	}
}
