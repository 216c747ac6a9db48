// Package datapath loads and pins the BPF programs and maps of probelet, and provides typed access to what the kernel and
// user space share. It knows nothing of Kubernetes or CNI.
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
	ErrIncomplete = errors.New("some of probelet's BPF objects are no longer pinned")
	// ErrNoBPFFS: the directory is not on a BPF file system.
	ErrNoBPFFS = errors.New("not on a BPF file system (mount -t bpf bpf /sys/fs/bpf)")
	// ErrLocked: another process held the lock on the directory until the deadline.
	ErrLocked = lock.ErrHeld
)

// Datapath represents the set of loaded objects.
type Datapath struct {
	objects struct {
		probeletMaps
		Steer   *ebpf.Program `ebpf:"steer"`
		Observe *ebpf.Program `ebpf:"observe"`
		Respond *ebpf.Program `ebpf:"respond"`
		Sweep   *ebpf.Program `ebpf:"sweep"`
	}
	prober sync.Mutex // guards the map's only element, parts of which change independently, and marker
	marker *marker    // nil: sockets are not marked, at least not by this process
	own    bool       // the programs look into own_sockets; guarded by prober
	// traffic has the slots of traffic_slots that this process has set.
	traffic struct {
		sync.Mutex
		wanted map[uint32]bool
	}
	watch link.Link // nil: listening sockets are not watched, at least not by this process
	blind bool      // steer does not look at listening sockets; false if opened by pins
	dir   string    // <bpf dir>/<ABI>; empty if nothing is pinned
	found Stamp     // of dir, when its pins were last confirmed to be of these objects
}

// Dir returns the directory where the objects are pinned, or "" if they are not.
func (d *Datapath) Dir() string { return d.dir }

// maps returns the maps that user space uses, which are the ones to pin. The programs keep the others alive.
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
		probeletMapTrafficSlots:     &m.TrafficSlots,
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

// Steer returns the tc egress program.
func (d *Datapath) Steer() *ebpf.Program { return d.objects.Steer }

// Observe returns the tc ingress program.
func (d *Datapath) Observe() *ebpf.Program { return d.objects.Observe }

// Respond returns the XDP program for devices whose hook is HookXDP.
func (d *Datapath) Respond() *ebpf.Program { return d.objects.Respond }

// Close closes the file descriptors. Pinned and attached objects live on.
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

// Now returns the time by the programs' clock: nanoseconds of CLOCK_BOOTTIME.
func Now() uint64 {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		panic(err) // the clock exists on every kernel that Go runs on
	}
	return uint64(ts.Nano())
}
