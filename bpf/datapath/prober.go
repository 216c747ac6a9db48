package datapath

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// Prober specifies whose connections are probes.
type Prober struct {
	// CgroupIDs lists the cgroup v2 ids of the probers; at most 4.
	CgroupIDs []uint64
	// AnyLocal makes every process in the host's network namespace a prober.
	AnyLocal bool
	// Process restricts CgroupIDs to one process; nil: every process in them is a prober.
	Process *Process
}

// Process identifies a prober that shares its cgroup with other processes.
type Process struct {
	// PID is its number in the PID namespace of the caller.
	PID uint32
	// Cgroup is the directory of its cgroup.
	Cgroup string
}

// String returns the PID, or "any" for nil.
func (p *Process) String() string {
	if p == nil {
		return "any"
	}
	return strconv.FormatUint(uint64(p.PID), 10)
}

// SetProber replaces the prober. If it is a process, only sockets that the process creates from now on count, and only while this
// Datapath is open; afterwards there is no prober. There is also none if sockets cannot be marked.
func (d *Datapath) SetProber(p Prober) error {
	var config probeletProberConfig
	if len(p.CgroupIDs) > len(config.CgroupIds) {
		return fmt.Errorf("%d prober cgroups: must be at most %d", len(p.CgroupIDs), len(config.CgroupIds))
	}
	d.prober.Lock()
	defer d.prober.Unlock()
	if err := d.objects.Prober.Lookup(uint32(0), &config); err != nil {
		return err
	}
	// The programs may see the new value of one field before that of another, so clear the prober first.
	config.CgroupIds, config.AnyLocal = [len(config.CgroupIds)]uint64{}, 0
	config.Pid, config.PidNamespace = 0, 0
	if p.Process != nil {
		var namespace unix.Stat_t
		if err := unix.Stat("/proc/self/ns/pid", &namespace); err != nil {
			return fmt.Errorf("PID namespace of this process: %w", err)
		}
		config.Pid, config.PidNamespace = p.Process.PID, uint32(namespace.Ino)
	}
	if err := d.objects.Prober.Put(uint32(0), &config); err != nil {
		return err
	}
	if err := d.mark(p.Process); err != nil {
		return err
	}
	copy(config.CgroupIds[:], p.CgroupIDs)
	if p.AnyLocal {
		config.AnyLocal = 1
	}
	return d.objects.Prober.Put(uint32(0), &config)
}

// Prober returns the prober that was set, except for the directory of a process's cgroup.
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
	if config.Pid != 0 {
		p.Process = &Process{PID: config.Pid}
	}
	return p, nil
}

// marker holds the attached program that marks the sockets of a process. It is not pinned, because the process that set the prober
// must follow it when it is restarted as another process.
type marker struct {
	link link.Link
	// cgroup identifies the directory that it was attached to. A directory recreated under the same name is another one.
	cgroup os.FileInfo
}

// mark starts marking sockets in the cgroup of a process, or stops marking if p is nil. The caller holds d.prober.
func (d *Datapath) mark(p *Process) error {
	if p == nil {
		return d.stopMarking()
	}
	cgroup, err := os.Stat(p.Cgroup)
	if err != nil {
		return errors.Join(err, d.stopMarking())
	}
	if d.marker != nil && os.SameFile(d.marker.cgroup, cgroup) {
		return nil
	}
	if err := d.stopMarking(); err != nil {
		return err
	}
	attached, err := d.attachMark(p.Cgroup)
	if err != nil {
		return fmt.Errorf("marking the sockets of process %d in %s: %w", p.PID, p.Cgroup, err)
	}
	d.marker = &marker{attached, cgroup}
	return nil
}

func (d *Datapath) stopMarking() error {
	if d.marker == nil {
		return nil
	}
	err := d.marker.link.Close()
	d.marker = nil
	return err
}

// attachMark loads and attaches mark, which few nodes need.
func (d *Datapath) attachMark(cgroup string) (link.Link, error) {
	spec, err := loadProbelet()
	if err != nil {
		return nil, err
	}
	var programs struct {
		Mark *ebpf.Program `ebpf:"mark"`
	}
	err = spec.LoadAndAssign(&programs, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{
		probeletMapProber:        d.objects.Prober,
		probeletMapProberSockets: d.objects.ProberSockets,
	}})
	if err != nil {
		return nil, err
	}
	defer programs.Mark.Close() //nolint:errcheck // the link holds it
	return link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupInetSockCreate, Program: programs.Mark})
}
