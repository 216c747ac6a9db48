package attach

import (
	"cmp"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/vishvananda/netlink"
)

// Neighbour describes another agent's program or filter at one of our hooks.
type Neighbour struct {
	Hook   string // "xdp", "tcx ingress", "tc filter egress" …
	What   string // human-readable
	Before bool   // it runs before ours and may keep packets from it
}

func (n Neighbour) String() string {
	order := "after ours"
	if n.Before {
		order = "before ours"
	}
	return fmt.Sprintf("%s at %s, %s", n.What, n.Hook, order)
}

// Neighbours returns the neighbours at the device's hooks, in the order in which they run at each hook. Where our programs are not
// attached, all of them count as running after ours.
func (c *Checker) Neighbours(ifindex int) ([]Neighbour, error) {
	var all []Neighbour
	link, err := linkAt(ifindex)
	if err != nil {
		return nil, err
	}
	xdp := xdpOn(link)
	_, attached := c.Device(ifindex)
	if xdp != 0 && xdp != c.respond {
		all = append(all, Neighbour{"xdp", fmt.Sprintf("XDP program %s", describe(xdp)), attached})
	}
	for _, side := range sides {
		line, err := lineAt(link, side)
		if err != nil {
			return nil, err
		}
		ours := line.index(c.programAt(side))
		for i, place := range line {
			if place.program == 0 || place.program != c.programAt(side) {
				all = append(all, Neighbour{place.hook + " " + side.name, place.String(), i < ours})
			}
		}
	}
	return all, nil
}

// place describes one program or filter in a line.
type place struct {
	hook    string         // "tcx" or "tc filter"
	program ebpf.ProgramID // 0 for filters that are not BPF programs
	filter  netlink.Filter // nil for tcx programs
}

func (p place) String() string {
	if p.filter == nil {
		return "program " + describe(p.program)
	}
	what := fmt.Sprintf("%s filter, priority %d", p.filter.Type(), p.filter.Attrs().Priority)
	if b, ok := p.filter.(*netlink.BpfFilter); ok {
		what += ", " + cmp.Or(b.Name, describe(p.program))
	}
	return what
}

// line lists what runs on one side of a device, in order.
type line []place

// index returns the position of a program in the line, or -1.
func (l line) index(program ebpf.ProgramID) int {
	for i, p := range l {
		if program != 0 && p.program == program {
			return i
		}
	}
	return -1
}

// lineAt returns what runs on one side of a device: tcx programs, then filters.
func lineAt(device netlink.Link, s side) (line, error) {
	ifindex := device.Attrs().Index
	programs, err := tcxPrograms(ifindex, s.tcx)
	if err != nil {
		return nil, err
	}
	var all line
	for _, p := range programs {
		all = append(all, place{hook: "tcx", program: p.ID})
	}
	filters, err := filterLine(device, s)
	return append(all, filters...), err
}

// filterLine returns the filters on one side of a device.
func filterLine(device netlink.Link, s side) (all line, err error) {
	filters, err := filtersOf(device, s.parent)
	if err != nil {
		return nil, err
	}
	if len(filters) > 0 && s.parent == netlink.HANDLE_MIN_EGRESS {
		// An ingress qdisc lists its filters whichever parent is requested.
		if kind, err := ingressQdisc(device.Attrs().Index); err != nil || kind != "clsact" {
			return nil, err
		}
	}
	for _, f := range filters {
		one := place{hook: "tc filter", filter: f}
		if b, ok := f.(*netlink.BpfFilter); ok {
			one.program = ebpf.ProgramID(b.Id)
		}
		all = append(all, one)
	}
	return all, nil
}

func describe(id ebpf.ProgramID) string {
	if name := programName(id); name != "" {
		return fmt.Sprintf("%d (%s)", id, name)
	}
	return fmt.Sprint(id)
}

// programName returns the name of a program, or "" without CAP_SYS_ADMIN.
func programName(id ebpf.ProgramID) string {
	p, err := ebpf.NewProgramFromID(id)
	if err != nil {
		return ""
	}
	defer p.Close() //nolint:errcheck // read only
	info, err := p.Info()
	if err != nil {
		return ""
	}
	return info.Name
}
