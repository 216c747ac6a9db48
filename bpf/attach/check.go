package attach

import (
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/datapath"
)

// Checker compares attachments with what Attach made. It reads what they have in common only once.
type Checker struct {
	bpfDir                  string
	devices                 map[uint32]datapath.Device
	steer, observe, respond ebpf.ProgramID
	memory                  *memory // nil: nothing is cached
}

// NewChecker reads the devices that the programs currently know, and the ids of the programs.
func NewChecker(d *datapath.Datapath, bpfDir string) (*Checker, error) {
	c := &Checker{bpfDir: bpfDir}
	var err error
	if c.devices, err = d.Devices(); err != nil {
		return nil, err
	}
	for id, program := range map[*ebpf.ProgramID]*ebpf.Program{&c.steer: d.Steer(), &c.observe: d.Observe(), &c.respond: d.Respond()} {
		if *id, err = programID(program); err != nil {
			return nil, err
		}
	}
	return c, nil
}

// Check verifies the attachment to the device ifindex. The error is ErrNotAttached, or ErrIncomplete with the reason; any other error
// means that the check itself failed.
func (c *Checker) Check(id ID, ifindex int) error {
	wrong := func(format string, args ...any) error {
		return fmt.Errorf("%s: %w: %s", id, ErrIncomplete, fmt.Sprintf(format, args...))
	}
	pins, err := c.memory.pinsOf(c.bpfDir, id)
	if errors.Is(err, ErrNotAttached) {
		return fmt.Errorf("%s: %w", id, err)
	}
	if err != nil {
		return wrong("%v", err)
	}
	device, known := c.devices[uint32(ifindex)]
	if !known || device.Key != pins.device {
		return wrong("the programs know device %d as %+v, want %+v", ifindex, device.Key, pins.device)
	}
	link, err := c.memory.link(ifindex)
	if err != nil {
		return err
	}
	if link.NSID != device.NSID {
		return wrong("the peer of device %d is in the network namespace with id %d (-1: unknown), but steer looks into the one with id %d",
			ifindex, link.NSID, device.NSID)
	}
	if device.Hook == datapath.HookXDP && link.XDP != c.respond {
		return wrong("the XDP program of device %d is %d (0: none), want respond, %d", ifindex, link.XDP, c.respond)
	}
	for _, side := range sides {
		program := c.programAt(side)
		on, err := c.isOn(ifindex, side)
		if err != nil {
			return err
		}
		if !on {
			return wrong("%s, program %d, is not at tc %s of device %d", side.pin, program, side.name, ifindex)
		}
	}
	return nil
}

// isOn reports whether the side's program is attached, by tcx or as a filter.
func (c *Checker) isOn(ifindex int, s side) (bool, error) {
	programs, err := tcxPrograms(ifindex, s.tcx)
	if err != nil {
		return false, err
	}
	program := c.programAt(s)
	if slices.ContainsFunc(programs, func(p link.AttachedProgram) bool { return p.ID == program }) {
		return true, nil
	}
	if c.memory.hasFilter(ifindex, s) {
		return true, nil
	}
	line, err := filterLine(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: ifindex}}, s)
	on := line.index(program) >= 0
	if on && err == nil {
		c.memory.foundFilter(ifindex, s)
	}
	return on, err
}

func (c *Checker) programAt(s side) ebpf.ProgramID {
	if s.pin == pinSteer {
		return c.steer
	}
	return c.observe
}

// Device returns a device as the programs knew it. ok is false if they did not know it.
func (c *Checker) Device(ifindex int) (device datapath.Device, ok bool) {
	device, ok = c.devices[uint32(ifindex)]
	return device, ok
}

// Check is like Checker.Check, for a single attachment.
func Check(d *datapath.Datapath, bpfDir string, id ID, ifindex int) error {
	c, err := NewChecker(d, bpfDir)
	if err != nil {
		return err
	}
	return c.Check(id, ifindex)
}

func programID(p *ebpf.Program) (ebpf.ProgramID, error) {
	info, err := p.Info()
	if err != nil {
		return 0, err
	}
	id, _ := info.ID()
	return id, nil
}
