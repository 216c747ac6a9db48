// Package datapath loads the BPF programs and maps of probelet, pins them, and gives typed access to what the kernel
// and user space share. It knows nothing of Kubernetes or CNI.
package datapath

import (
	"errors"
	"sync"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/lock"
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

// Now returns the time as the programs read it: nanoseconds of CLOCK_BOOTTIME.
func Now() uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // the clock exists on every kernel that Go runs on
	}
	return uint64(ts.Nano())
}
