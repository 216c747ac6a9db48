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

// Prober tells whose connections are probes.
type Prober struct {
	// CgroupIDs are the cgroup v2 ids of the probers; at most 4.
	CgroupIDs []uint64
	// AnyLocal makes every process of the host's network namespace a prober.
	AnyLocal bool
	// Process narrows CgroupIDs down to one process; nil: every process in them is a prober.
	Process *Process
}

// Process is a prober that shares its cgroup with other processes.
type Process struct {
	// PID is its number, as this process sees it.
	PID uint32
	// Cgroup is the directory of its cgroup.
	Cgroup string
}

// String returns the number, or "any" of nil.
func (p *Process) String() string {
	if p == nil {
		return "any"
	}
	return strconv.FormatUint(uint64(p.PID), 10)
}

// SetProber replaces the prober. If it is a process, only the sockets that this one creates from now on are its, for as long as this
// Datapath is open; afterwards nobody is the prober. If sockets cannot be marked, nobody is the prober either.
func (d *Datapath) SetProber(p Prober) error {
	var config probeletProberConfig
	if len(p.CgroupIDs) > len(config.CgroupIds) {
		return fmt.Errorf("%d prober cgroups, at most %d are possible", len(p.CgroupIDs), len(config.CgroupIds))
	}
	d.prober.Lock()
	defer d.prober.Unlock()
	if err := d.objects.Prober.Lookup(uint32(0), &config); err != nil {
		return err
	}
	// The kernel may see the new value of one field before that of another: first nobody, then whoever it is.
	config.CgroupIds, config.AnyLocal = [len(config.CgroupIds)]uint64{}, 0
	config.Pid, config.PidNamespace = 0, 0
	if p.Process != nil {
		var namespace unix.Stat_t
		if err := unix.Stat("/proc/self/ns/pid", &namespace); err != nil {
			return fmt.Errorf("this process's PID namespace: %w", err)
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

// Prober returns what SetProber set, but for the directory of a process's cgroup.
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

// marker is the program that marks a process's sockets, attached to its cgroup. It is not pinned: whoever set the prober follows it
// when its process is another one.
type marker struct {
	link link.Link
	// cgroup is the directory that it was attached to, as it was: one made again under the same name is another.
	cgroup os.FileInfo
}

// mark has sockets marked in the cgroup of a process, or in none if p is nil. The caller holds d.prober.
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

// attachMark loads mark, which few nodes need, and attaches it.
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
