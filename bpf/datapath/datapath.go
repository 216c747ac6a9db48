// Package datapath loads the BPF programs and maps of probelet, pins them, and gives typed access to what the kernel
// and user space share. It knows nothing of Kubernetes or CNI.
package datapath

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/lock"
)

const (
	// ABI versions the programs and the layout of maps and orders. Objects are pinned under it, so builds with different
	// ABIs never open each other's objects, and builds with the same ABI share what the first of them loaded.
	ABI = "v5"
	// DefaultDir is where everything is pinned by default.
	DefaultDir = "/sys/fs/bpf/probelet"
)

var (
	// ErrNotLoaded: nothing is pinned in the directory under this ABI.
	ErrNotLoaded = errors.New("probelet's BPF objects are not loaded")
	// ErrIncomplete: some of the pins are missing.
	ErrIncomplete = errors.New("some of probelet's BPF objects are not pinned any more")
	// ErrNoBPFFS: the directory is not on a BPF file system.
	ErrNoBPFFS = errors.New("not on a BPF file system (mount -t bpf bpf /sys/fs/bpf)")
	// ErrLocked: another process kept the lock on the directory until the deadline.
	ErrLocked = lock.ErrHeld
)

// Datapath is the set of loaded objects.
type Datapath struct {
	objects struct {
		probeletMaps
		Steer   *ebpf.Program `ebpf:"steer"`
		Observe *ebpf.Program `ebpf:"observe"`
		Respond *ebpf.Program `ebpf:"respond"`
		Sweep   *ebpf.Program `ebpf:"sweep"`
	}
	prober sync.Mutex // of the one element of that map, parts of which are changed independently, and of marker
	marker *marker    // nil: sockets are not marked, or by another process' doing
	own    bool       // the programs look into own_sockets; guarded by prober
	watch  link.Link  // nil: listening sockets are not watched, or by another process' doing
	blind  bool       // steer does not look at listening sockets; false if opened by pins
	dir    string     // <bpf dir>/<ABI>; empty if nothing is pinned
	found  Stamp      // of dir, when the pins in it were found to be of these objects
}

// Load loads the objects without pinning them. They live until Close and the last attachment.
func Load() (*Datapath, error) {
	spec, err := loadProbelet()
	if err != nil {
		return nil, err
	}
	if err := drawSecrets(spec); err != nil {
		return nil, err
	}
	if err := spec.Variables[probeletVarReplies].Set(replies()); err != nil {
		return nil, err
	}
	// Kernels before 5.18 do not know the flag; their generic XDP linearizes every packet.
	if features.HaveProgramHelper(ebpf.XDP, asm.FnXdpLoadBytes) != nil {
		spec.Programs[probeletProgRespond].Flags &^= unix.BPF_F_XDP_HAS_FRAGS
	}
	d := &Datapath{}
	if err := d.load(spec); err != nil {
		return nil, fmt.Errorf("loading BPF objects: %w", err)
	}
	if err := d.startWatch(spec); err != nil {
		return nil, errors.Join(fmt.Errorf("watching listening sockets: %w", err), d.Close())
	}
	return d, nil
}

// drawSecrets sets the constants that pods must not know.
func drawSecrets(spec *ebpf.CollectionSpec) error {
	for _, name := range []string{probeletVarOrderToken, probeletVarQuestionKeys} {
		random := make([]byte, spec.Variables[name].Size())
		if _, err := rand.Read(random); err != nil {
			return err
		}
		if err := spec.Variables[name].Set(random); err != nil {
			return err
		}
	}
	return nil
}

// load loads steer with its look at listening sockets, or without it where the kernel refuses that: it takes BTF, CAP_PERFMON, a helper
// and a verifier that accepts them.
func (d *Datapath) load(spec *ebpf.CollectionSpec) error {
	seeing := d.loadSteer(spec, true)
	if seeing == nil {
		return nil
	}
	if err := d.loadSteer(spec, false); err != nil {
		return errors.Join(err, fmt.Errorf("and with a look at listening sockets: %w", seeing))
	}
	return nil
}

// loadSteer loads all objects but watch. sees: steer looks at listening sockets.
func (d *Datapath) loadSteer(spec *ebpf.CollectionSpec, sees bool) error {
	var options ebpf.CollectionOptions
	if !sees {
		// The code that reads the kernel's types is dead then, but CO-RE still resolves it: against the object's own types.
		options.Programs.KernelTypes = spec.Types
	}
	d.blind = !sees
	if err := spec.Variables[probeletVarSeesListeners].Set(sees); err != nil {
		return err
	}
	return spec.LoadAndAssign(&d.objects, &options)
}

// startWatch attaches the program that sees listening sockets close. It does nothing on a kernel without BTF: evidence then
// ends with the next probe that is passed on, as it does after any other failure.
func (d *Datapath) startWatch(spec *ebpf.CollectionSpec) error {
	if _, err := btf.LoadKernelSpec(); errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var programs struct {
		Watch *ebpf.Program `ebpf:"watch"`
	}
	err := spec.LoadAndAssign(&programs, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{
		probeletMapPodNetns: d.objects.PodNetns,
		probeletMapDevices:  d.objects.Devices,
		probeletMapCounters: d.objects.Counters,
	}})
	if err != nil {
		return err
	}
	defer programs.Watch.Close() //nolint:errcheck // the link holds it
	d.watch, err = link.AttachTracing(link.TracingOptions{Program: programs.Watch})
	return err
}

// Watched reports whether pods' listening sockets are watched, so that a pod's evidence ends when one of its servers does.
func (d *Datapath) Watched() bool {
	if d.dir == "" {
		return d.watch != nil
	}
	_, err := os.Stat(filepath.Join(d.dir, pinWatch))
	return err == nil
}

// SeesListeners reports whether steer looks at pods' listening sockets. Without it TCP probes are answered as HTTP probes are, on
// the evidence of earlier ones only.
func (d *Datapath) SeesListeners() bool {
	if d.dir == "" {
		return !d.blind
	}
	_, err := os.Stat(filepath.Join(d.dir, pinBlind))
	return Absent(err)
}

const (
	// pinBlind is a directory that is there if steer does not look at listening sockets.
	pinBlind = "blind"
	// pinWatch is the pin of watch's link. watch is attached once, for all pods.
	pinWatch = "watch"
	// pinUnwatched is a directory in its place on a kernel without BTF.
	pinUnwatched = "unwatched"
)

// Open opens what is pinned under bpfDir. It returns ErrNotLoaded if nothing is, and ErrIncomplete if pins are missing.
func Open(bpfDir string) (*Datapath, error) {
	d := &Datapath{dir: filepath.Join(bpfDir, ABI)}
	if _, err := os.Stat(d.dir); Absent(err) {
		return nil, fmt.Errorf("%s: %w", d.dir, ErrNotLoaded)
	}
	if err := checkPrivate(bpfDir); err != nil {
		return nil, err
	}
	for name, m := range d.maps() {
		loaded, err := ebpf.LoadPinnedMap(filepath.Join(d.dir, name), nil)
		if err != nil {
			return nil, errors.Join(openError(filepath.Join(d.dir, name), err), d.Close())
		}
		*m = loaded
	}
	for name, p := range d.programs() {
		loaded, err := openPinnedProgram(filepath.Join(d.dir, name))
		if err != nil {
			return nil, errors.Join(openError(filepath.Join(d.dir, name), err), d.Close())
		}
		*p = loaded
	}
	return d, nil
}

// openPinnedProgram does what ebpf.LoadPinnedProgram does, without reading the machine's mounts first to look for a BPF
// token. A node with many pods has thousands of mounts, and reading them took longer than the rest of a CNI ADD.
func openPinnedProgram(pin string) (*ebpf.Program, error) {
	path, err := unix.BytePtrFromString(pin)
	if err != nil {
		return nil, err
	}
	// The part of union bpf_attr that BPF_OBJ_GET uses (include/uapi/linux/bpf.h).
	attr := struct {
		pathname  unsafe.Pointer
		fd, flags uint32
	}{pathname: unsafe.Pointer(path)}
	fd, _, errno := unix.Syscall(unix.SYS_BPF, unix.BPF_OBJ_GET, uintptr(unsafe.Pointer(&attr)), unsafe.Sizeof(attr))
	if errno != 0 {
		return nil, errno
	}
	return ebpf.NewProgramFromFD(int(fd))
}

func openError(pin string, err error) error {
	if Absent(err) {
		err = fmt.Errorf("%w: %w", ErrIncomplete, err)
	}
	return fmt.Errorf("opening %s: %w", pin, err)
}

// openWhole is Open, but also returns ErrIncomplete if the pin of watch is missing.
func openWhole(bpfDir string) (*Datapath, error) {
	d, err := Open(bpfDir)
	if err != nil || d.watchPinned() {
		return d, err
	}
	return nil, errors.Join(fmt.Errorf("%s: %w", filepath.Join(d.dir, pinWatch), ErrIncomplete), d.Close())
}

// watchPinned reports whether watch is pinned, or was never attached.
func (d *Datapath) watchPinned() bool {
	_, err := os.Stat(filepath.Join(d.dir, pinUnwatched))
	return err == nil || d.Watched()
}

// Absent reports whether err means that a path does not exist, be it because a parent is not a directory.
func Absent(err error) bool { return errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ENOTDIR) }

// Ensure opens what is pinned under bpfDir. If nothing is, or pins are missing, it loads and pins a new set first, all of it
// or nothing. Concurrent callers wait for each other; if ctx ends first, the error is ErrLocked.
func Ensure(ctx context.Context, bpfDir string) (*Datapath, error) {
	missing := func(err error) bool { return errors.Is(err, ErrNotLoaded) || errors.Is(err, ErrIncomplete) }
	if d, err := openWhole(bpfDir); !missing(err) {
		return d, err
	}
	if err := makeBPFDir(bpfDir); err != nil {
		return nil, err
	}
	locked, err := lock.Dir(ctx, bpfDir, unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer locked.Release()
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

// Claim makes the caller the one daemon of what is pinned under bpfDir, until it releases it or ends. The error is ErrLocked if there
// is one already. Nothing is claimed if nothing is pinned.
func Claim(bpfDir string) (release func(), err error) {
	once, cancel := context.WithCancel(context.Background())
	cancel()
	l, err := lock.Dir(once, AttachmentsDir(bpfDir), unix.LOCK_EX)
	if Absent(err) {
		return func() {}, nil
	}
	if err != nil {
		return nil, err
	}
	return l.Release, nil
}

// putAside makes room for a new set of objects. What the old set is attached to stays attached, until it is reattached.
func putAside(bpfDir string) error {
	for i := 1; ; i++ {
		err := os.Rename(filepath.Join(bpfDir, ABI), filepath.Join(bpfDir, fmt.Sprintf("%s-incomplete-%d", ABI, i)))
		if !errors.Is(err, os.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return err
		}
	}
}

// Others returns the directories under bpfDir with objects of other ABIs, and with incomplete sets that were put aside.
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

// RemoveOthers removes those of Others that have no attachment left.
func RemoveOthers(bpfDir string) error {
	others, err := Others(bpfDir)
	errs := []error{err}
	for _, dir := range others {
		// Fails if another build is just attaching, and then leaves its directory alone.
		if err := os.Remove(filepath.Join(dir, attachmentsDir)); err == nil || Absent(err) {
			errs = append(errs, os.RemoveAll(dir))
		}
	}
	return errors.Join(errs...)
}

// loadAndPin pins into a staging directory and renames it into place, so that nobody sees a half-pinned set. The caller
// holds the lock on bpfDir.
func loadAndPin(bpfDir string) (_ *Datapath, err error) {
	d, err := Load()
	if err != nil {
		return nil, err
	}
	// Because of the lock, whatever is there was left by a process that died.
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
	if d.blind {
		if err := os.Mkdir(filepath.Join(staging, pinBlind), 0o700); err != nil {
			return nil, err
		}
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

// Current reports whether these objects are still what is pinned, and none is missing. They are not if another BPF file system
// was mounted, or pins were removed. It looks at the pins only if their directory has changed since it last did. It is not safe for
// concurrent use.
func (d *Datapath) Current() (bool, error) {
	stamp, err := StampOf(d.dir)
	if err == nil && stamp == d.found {
		return true, nil
	}
	d.found = Stamp{}
	current, err := d.isPinned()
	if err == nil && current {
		d.found = stamp.Settled()
	}
	return current, err
}

func (d *Datapath) isPinned() (bool, error) {
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

// ids returns the kernel's ids of the maps and programs, by name.
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

// AttachmentsDir is the directory with this ABI's attachments, one directory each.
func AttachmentsDir(bpfDir string) string { return AttachmentsIn(filepath.Join(bpfDir, ABI)) }

// AttachmentsIn is the AttachmentsDir of one of Others.
func AttachmentsIn(other string) string { return filepath.Join(other, attachmentsDir) }

// Dir is the directory in which the objects are pinned, empty if they are not.
func (d *Datapath) Dir() string { return d.dir }

// maps returns the maps that user space uses, which are pinned. The programs keep the others alive.
func (d *Datapath) maps() map[string]**ebpf.Map {
	m := &d.objects.probeletMaps
	return map[string]**ebpf.Map{
		probeletMapProber:           &m.Prober,
		probeletMapDevices:          &m.Devices,
		probeletMapEndpointEvidence: &m.EndpointEvidence,
		probeletMapEndpointTallies:  &m.EndpointTallies,
		probeletMapEndpointLists:    &m.EndpointLists,
		probeletMapPodNetns:         &m.PodNetns,
		probeletMapOwnSockets:       &m.OwnSockets,
		probeletMapProberSockets:    &m.ProberSockets,
		probeletMapFlows:            &m.Flows,
		probeletMapRecords:          &m.Records,
		probeletMapCounters:         &m.Counters,
		probeletMapAnswerAges:       &m.AnswerAges,
	}
}

func (d *Datapath) programs() map[string]**ebpf.Program {
	return map[string]**ebpf.Program{
		probeletProgSteer:   &d.objects.Steer,
		probeletProgObserve: &d.objects.Observe,
		probeletProgRespond: &d.objects.Respond,
		probeletProgSweep:   &d.objects.Sweep,
	}
}

// Steer is the tc egress program.
func (d *Datapath) Steer() *ebpf.Program { return d.objects.Steer }

// Observe is the tc ingress program.
func (d *Datapath) Observe() *ebpf.Program { return d.objects.Observe }

// Respond is the XDP program of devices whose hook is HookXDP.
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
	errs = append(errs, d.stopMarking())
	for _, m := range []*ebpf.Map{d.objects.Scratch, d.objects.Blank, d.objects.Requests} {
		errs = append(errs, m.Close()) // nil if opened by pins
	}
	return errors.Join(errs...)
}

// CounterNames are the names of the counters, in the order of enum counter in bpf/abi.h.
var CounterNames = [probeletCounterCOUNT_MAX]string{
	"answered_http", "answered_tcp", "observed", "handed_over", "passed_not_fresh", "passed_not_probed",
	"passed_not_parsable", "passed_not_prober", "passed_own", "passed_untrusted", "passed_full", "dropped",
	"records_lost", "flows_expired", "devices_lost",
	"withdrawn_listener_closed", "withdrawn_reset", "withdrawn_status",
	"passed_no_listener", "passed_queue_long", "passed_head_old", "passed_special", "passed_real_due",
	"passed_unanswered",
}

// ProbeVerdict tells which of a prober's connections a counter counts, each of them once: those "answered", or "passed" to the pod,
// and as or why what. ok is false for counters of something else.
func ProbeVerdict(counter string) (verdict, reason string, ok bool) {
	switch counter {
	case "handed_over":
		return "passed", counter, true
	case "passed_not_prober", "passed_own":
		return "", "", false
	}
	verdict, reason, _ = strings.Cut(counter, "_")
	if verdict != "answered" && verdict != "passed" {
		return "", "", false
	}
	return verdict, reason, true
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

func (d *Datapath) counter(index probeletCounter) (uint64, error) {
	value, err := sum(d.objects.Counters, uint32(index))
	if err != nil {
		return 0, fmt.Errorf("counters: %w", err)
	}
	return value, nil
}

// Unrecorded returns how many connections of probers were not recorded, or not whole, for want of room.
func (d *Datapath) Unrecorded() (uint64, error) {
	full, err := d.counter(probeletCounterCOUNT_PASSED_FULL)
	if err != nil {
		return 0, err
	}
	lost, err := d.counter(probeletCounterCOUNT_RECORDS_LOST)
	return full + lost, err
}

// sums returns the first n elements of a per-CPU array, each summed over the CPUs.
func sums(array *ebpf.Map, n int) (sums []uint64, err error) {
	sums = make([]uint64, n)
	for i := range sums {
		if sums[i], err = sum(array, uint32(i)); err != nil {
			return nil, err
		}
	}
	return sums, nil
}

func sum(array *ebpf.Map, index uint32) (sum uint64, err error) {
	var perCPU []uint64
	if err := array.Lookup(index, &perCPU); err != nil {
		return 0, err
	}
	for _, value := range perCPU {
		sum += value
	}
	return sum, nil
}

// AnswerAgeBounds are the upper bounds, in seconds, of AnswerAges' buckets but the last (AGE_BOUNDS in bpf/abi.h).
var AnswerAgeBounds = [probeletAgeAGE_BOUNDED]float64{0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300}

// AnswerAges tells how old the evidence of answers was.
type AnswerAges struct {
	// Buckets counts answers by age. The last bucket has no bound; none includes another.
	Buckets [len(AnswerAgeBounds) + 1]uint64
	Sum     time.Duration // of all ages
}

// AnswerAges returns the ages of all answers since the programs were loaded.
func (d *Datapath) AnswerAges() (AnswerAges, error) {
	all, err := sums(d.objects.AnswerAges, int(probeletAgeAGE_MAX))
	if err != nil {
		return AnswerAges{}, fmt.Errorf("ages of answers: %w", err)
	}
	return AnswerAges{[len(AnswerAgeBounds) + 1]uint64(all), time.Duration(all[probeletAgeAGE_SUM])}, nil
}

// ExemptSocket makes the connection of the socket with that cookie (SO_COOKIE) reach the pod unobserved, whoever the
// prober is. Call it before the socket connects.
func (d *Datapath) ExemptSocket(cookie uint64) error {
	if err := d.lookForOwnSockets(); err != nil {
		return err
	}
	return d.objects.OwnSockets.Put(cookie, uint8(0))
}

// lookForOwnSockets makes the programs look into own_sockets, which they do not until it is used.
func (d *Datapath) lookForOwnSockets() error {
	d.prober.Lock()
	defer d.prober.Unlock()
	var config probeletProberConfig
	if d.own {
		return nil
	}
	if err := d.objects.Prober.Lookup(uint32(0), &config); err != nil {
		return err
	}
	config.OwnSockets = 1
	err := d.objects.Prober.Put(uint32(0), &config)
	d.own = err == nil
	return err
}

// ForgetSocket ends what ExemptSocket began, for connections that are yet to be made.
func (d *Datapath) ForgetSocket(cookie uint64) error {
	err := d.objects.OwnSockets.Delete(cookie)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}

// Fill tells how full a map is.
type Fill struct{ Entries, Max int }

// Fills returns the fill of the maps that can become full: "flows" (connections) and "pods" (devices).
func (d *Datapath) Fills() (map[string]Fill, error) {
	flows, err := d.Flows()
	if err != nil {
		return nil, fmt.Errorf("flows: %w", err)
	}
	devices, err := d.Devices()
	if err != nil {
		return nil, err
	}
	return map[string]Fill{
		"flows": {flows, int(d.objects.Flows.MaxEntries())},
		"pods":  {len(devices), int(d.objects.Devices.MaxEntries())},
	}, nil
}

// Sweep removes flows that are past their deadline, because their end was not seen, and flows of detached devices.
func (d *Datapath) Sweep() error {
	if _, err := d.objects.Sweep.Run(&ebpf.RunOptions{}); err != nil {
		return fmt.Errorf("sweeping flows: %w", err)
	}
	return nil
}

// Flows counts the connections in the flow table.
func (d *Datapath) Flows() (n int, err error) {
	err = d.eachFlow(func(probeletFlowKey, *probeletFlow) { n++ })
	return n, err
}

// PodPort is a port of the pod behind a device.
type PodPort struct {
	Device DeviceKey
	Port   uint16
}

// Unanswered returns when connections of a prober began that a port was not seen to answer, in terms of Now, for as long as
// the flow table has them. Nothing else tells of them: a client that gives up connecting sends nothing.
func (d *Datapath) Unanswered() (map[PodPort][]uint64, error) {
	began := map[PodPort][]uint64{}
	err := d.eachFlow(func(key probeletFlowKey, flow *probeletFlow) {
		if flow.State == uint8(probeletFlowStateFLOW_OBSERVING) && flow.Flags&uint32(probeletFlowFlagFLOW_CONNECTED) == 0 {
			to := PodPort{DeviceKey{Ifindex: key.Ifindex, Generation: flow.Generation}, key.PodPort}
			began[to] = append(began[to], flow.StartedAt)
		}
	})
	return began, err
}

// eachFlow calls f for each connection in the flow table.
func (d *Datapath) eachFlow(f func(probeletFlowKey, *probeletFlow)) error {
	const batch = 512
	keys, flows := make([]probeletFlowKey, batch), make([]probeletFlow, batch)
	for cursor := new(ebpf.MapBatchCursor); ; {
		count, err := d.objects.Flows.BatchLookup(cursor, keys, flows, nil)
		for i := range count {
			f(keys[i], &flows[i])
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) { // that was all
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// Now returns the time as the programs read it: nanoseconds of CLOCK_BOOTTIME.
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
	return checkPrivate(dir) // anybody may have made it: the root of a BPF file system is like /tmp
}
