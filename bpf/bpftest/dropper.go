package bpftest

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Place identifies where a Dropper drops packets.
type Place uint32

// Places on the way between a client of this process and a pod.
const (
	ClientOut Place = iota // sent by a client, before it reaches the pod's device
	PodIn                  // received by the pod
	PodOut                 // sent by the pod
	HostIn                 // received by the host from the pod, or in the pod's name
	places
)

// TCP flags as in the header (RFC 9293, section 3.1).
const (
	FIN = 1 << iota
	SYN
	RST
	PSH
	ACK
)

// Drop selects which packets of a port are dropped.
type Drop struct {
	Mask, Flags uint32 // packets whose TCP flags under Mask equal Flags
	Percent     uint32 // a random share of them
	_           uint32
	First       int64 // in addition, this many of the first ones
}

// Dropper drops TCP packets of a pod's ports.
type Dropper struct {
	drops *ebpf.Map
}

// NewDropper attaches programs around the pod that can drop packets, and initially drop none. Other programs on the host side
// of the pod run first.
func (p *Pod) NewDropper(t testing.TB) *Dropper {
	t.Helper()
	drops, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: uint32(binary.Size(Drop{})), MaxEntries: 1024})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = drops.Close() })
	var programs [places]*ebpf.Program
	for place := range places {
		programs[place], err = ebpf.NewProgram(dropProgram(drops, place))
		if err != nil {
			t.Fatal(err)
		}
		defer programs[place].Close() //nolint:errcheck // held by what it is attached to
	}
	cgroup, err := CurrentCgroupDir()
	if err != nil {
		t.Fatal(err)
	}
	l, err := link.AttachCgroup(link.CgroupOptions{Path: cgroup, Attach: ebpf.AttachCGroupInetEgress, Program: programs[ClientOut]})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	Do(t, p.NS, func() error {
		return errors.Join(
			addFilter("eth0", netlink.HANDLE_MIN_INGRESS, programs[PodIn]),
			addFilter("eth0", netlink.HANDLE_MIN_EGRESS, programs[PodOut]),
		)
	})
	Do(t, p.Node.NS, func() error { return addFilter(p.HostIfName, netlink.HANDLE_MIN_INGRESS, programs[HostIn]) })
	return &Dropper{drops}
}

// At starts dropping packets of a port at a place, and replaces the previous Drop for them.
func (d *Dropper) At(t testing.TB, place Place, port uint16, drop Drop) {
	t.Helper()
	if err := d.drops.Put(dropKey(place, port), drop); err != nil {
		t.Fatal(err)
	}
}

// Stop stops dropping packets of a port, everywhere.
func (d *Dropper) Stop(t testing.TB, port uint16) {
	t.Helper()
	for place := range places {
		if err := d.drops.Delete(dropKey(place, port)); err != nil && !errors.Is(err, ebpf.ErrKeyNotExist) {
			t.Fatal(err)
		}
	}
}

// dropKey contains the port in network byte order.
func dropKey(place Place, port uint16) uint32 {
	return uint32(place)<<16 | uint32(binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, port)))
}

func addFilter(ifName string, parent uint32, program *ebpf.Program) error {
	device, err := netlink.LinkByName(ifName)
	if err != nil {
		return err
	}
	clsact := &netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: device.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT,
	}}
	if err := netlink.QdiscAdd(clsact); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return netlink.FilterAdd(&netlink.BpfFilter{
		FilterAttrs: netlink.FilterAttrs{
			LinkIndex: device.Attrs().Index, Parent: parent, Protocol: unix.ETH_P_ALL, Priority: 1000, Handle: 1,
		},
		Fd: program.FD(), Name: "dropper", DirectAction: true,
	})
}

// dropProgram returns a program that looks up the packet's port at the place and applies the Drop that it finds.
func dropProgram(drops *ebpf.Map, place Place) *ebpf.ProgramSpec {
	spec := &ebpf.ProgramSpec{Type: ebpf.SchedCLS, License: "MIT"}
	l3, port, pass, drop := int32(14), int16(0), int32(-1), int32(2) // TC_ACT_UNSPEC, TC_ACT_SHOT
	if place == ClientOut {
		// A cgroup's program sees packets from their IP header on, and returns whether they may pass.
		spec = &ebpf.ProgramSpec{Type: ebpf.CGroupSKB, AttachType: ebpf.AttachCGroupInetEgress, License: "MIT"}
		l3, pass, drop = 0, 1, 0
	}
	if place == ClientOut || place == PodIn {
		port = 2 // the destination's
	}
	const ip, tcp, key = -16, -32, -40 // on the stack
	load := func(offset, to, n int32) asm.Instructions {
		return asm.Instructions{
			asm.Mov.Reg(asm.R1, asm.R6), asm.Mov.Reg(asm.R2, asm.R7), asm.Add.Imm(asm.R2, offset),
			asm.Mov.Reg(asm.R3, asm.RFP), asm.Add.Imm(asm.R3, to), asm.Mov.Imm(asm.R4, n),
			asm.FnSkbLoadBytes.Call(), asm.JNE.Imm(asm.R0, 0, "pass"),
		}
	}
	is := asm.Instructions{asm.Mov.Reg(asm.R6, asm.R1), asm.Mov.Imm(asm.R7, l3)}
	is = append(is, load(0, ip, 10)...)
	is = append(is,
		asm.LoadMem(asm.R1, asm.RFP, ip, asm.Byte),
		asm.LoadMem(asm.R2, asm.RFP, ip+9, asm.Byte), // protocol
		asm.Add.Imm(asm.R7, 20),
		asm.JEq.Imm(asm.R1, 0x45, "found"),
		asm.LoadMem(asm.R2, asm.RFP, ip+6, asm.Byte), // next header
		asm.Add.Imm(asm.R7, 20),
		asm.RSh.Imm(asm.R1, 4),
		asm.JNE.Imm(asm.R1, 6, "pass"),
		asm.JNE.Imm(asm.R2, unix.IPPROTO_TCP, "pass").WithSymbol("found"),
	)
	is = append(is, load(0, tcp, 14)...)
	is = append(is,
		asm.LoadMem(asm.R1, asm.RFP, tcp+port, asm.Half),
		asm.Or.Imm(asm.R1, int32(place)<<16),
		asm.StoreMem(asm.RFP, key, asm.R1, asm.Word),
		asm.LoadMapPtr(asm.R1, drops.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP), asm.Add.Imm(asm.R2, key),
		asm.FnMapLookupElem.Call(), asm.JEq.Imm(asm.R0, 0, "pass"),
		asm.Mov.Reg(asm.R8, asm.R0),
		asm.LoadMem(asm.R1, asm.RFP, tcp+13, asm.Byte),
		asm.LoadMem(asm.R2, asm.R8, 0, asm.Word), asm.And.Reg(asm.R1, asm.R2),
		asm.LoadMem(asm.R2, asm.R8, 4, asm.Word), asm.JNE.Reg(asm.R1, asm.R2, "pass"),
		asm.LoadMem(asm.R1, asm.R8, 16, asm.DWord), asm.JSLE.Imm(asm.R1, 0, "at random"),
		asm.Mov.Imm(asm.R1, -1), asm.AddAtomic.Mem(asm.R8, asm.R1, asm.DWord, 16), asm.Ja.Label("drop"),
		asm.FnGetPrandomU32.Call().WithSymbol("at random"), asm.Mod.Imm(asm.R0, 100),
		asm.LoadMem(asm.R2, asm.R8, 8, asm.Word), asm.JLT.Reg(asm.R0, asm.R2, "drop"),
		asm.Mov.Imm(asm.R0, pass).WithSymbol("pass"), asm.Return(),
		asm.Mov.Imm(asm.R0, drop).WithSymbol("drop"), asm.Return(),
	)
	spec.Instructions = is
	return spec
}
