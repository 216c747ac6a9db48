package attach_test

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
)

// Verdicts of tc programs (include/uapi/linux/pkt_cls.h). Those of tcx have the same values.
const (
	verdictNext = -1 // TC_ACT_UNSPEC, TCX_NEXT: the next program decides
	verdictOK   = 0  // TC_ACT_OK, TCX_PASS: the packet passes, unseen by later programs
	verdictDrop = 2  // TC_ACT_SHOT, TCX_DROP
)

// Offsets in a frame, for IPv4 without options and for IPv6.
const (
	etherTypeAt  = 12
	v4ProtocolAt = 14 + 9
	v6ProtocolAt = 14 + 6
	v4End        = 14 + 20
	v6End        = 14 + 40
)

func loadProgram(t testing.TB, kind ebpf.ProgramType, name string, instructions asm.Instructions) *ebpf.Program {
	t.Helper()
	p, err := ebpf.NewProgram(&ebpf.ProgramSpec{Name: name, Type: kind, Instructions: instructions, License: "GPL"})
	if err != nil {
		t.Fatalf("%s: %+v", name, err)
	}
	t.Cleanup(func() { _ = p.Close() })
	return p
}

func returns(verdict int32) asm.Instructions {
	return asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()}
}

// verdictProgram is a neighbour at tc that treats every packet the same.
func verdictProgram(t testing.TB, verdict int32) *ebpf.Program {
	t.Helper()
	return loadProgram(t, ebpf.SchedCLS, "theirs", returns(verdict))
}

// policy is a neighbour with a connection table of its own.
type policy struct {
	egress, ingress *ebpf.Program
}

// newPolicy drops a pod's SYN-ACK unless it has seen the SYN on its way to the pod.
func newPolicy(t testing.TB) policy {
	t.Helper()
	connections, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.LRUHash, KeySize: 4, ValueSize: 4, MaxEntries: 4096})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = connections.Close() })
	const syn, synAck = 0x02, 0x12
	note := asm.Instructions{
		asm.Mov.Reg(asm.R3, asm.R2), // any value will do
		asm.Mov.Imm(asm.R4, 0),
		asm.FnMapUpdateElem.Call(),
		asm.Ja.Label("next"),
	}
	look := asm.Instructions{
		asm.FnMapLookupElem.Call(),
		asm.JNE.Imm(asm.R0, 0, "next"),
		asm.Mov.Imm(asm.R0, verdictDrop),
		asm.Return(),
	}
	return policy{
		egress:  loadProgram(t, ebpf.SchedCLS, "policy_egress", eachSegment(connections, syn, 0, 2, note)),
		ingress: loadProgram(t, ebpf.SchedCLS, "policy_ingress", eachSegment(connections, synAck, 2, 0, look)),
	}
}

// eachSegment runs then for segments in which SYN and ACK are set as in flags. R1 is the map, and R2 points to the key: the
// ports at the two offsets into the TCP header.
func eachSegment(connections *ebpf.Map, flags, clientPortAt, podPortAt int32, then asm.Instructions) asm.Instructions {
	return append(append(asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadAbs(etherTypeAt, asm.Half),
		asm.JEq.Imm(asm.R0, 0x0800, "v4"),
		asm.JEq.Imm(asm.R0, 0x86dd, "v6"),
		asm.Ja.Label("next"),
		asm.LoadAbs(v4ProtocolAt, asm.Byte).WithSymbol("v4"),
		asm.Mov.Imm(asm.R7, v4End),
		asm.Ja.Label("tcp"),
		asm.LoadAbs(v6ProtocolAt, asm.Byte).WithSymbol("v6"),
		asm.Mov.Imm(asm.R7, v6End),
		asm.JNE.Imm(asm.R0, 6, "next").WithSymbol("tcp"),
		asm.LoadInd(asm.R0, asm.R7, 13, asm.Byte),
		asm.And.Imm(asm.R0, 0x12),
		asm.JNE.Imm(asm.R0, flags, "next"),
		asm.LoadInd(asm.R0, asm.R7, clientPortAt, asm.Half),
		asm.StoreMem(asm.RFP, -4, asm.R0, asm.Half),
		asm.LoadInd(asm.R0, asm.R7, podPortAt, asm.Half),
		asm.StoreMem(asm.RFP, -2, asm.R0, asm.Half),
		asm.LoadMapPtr(asm.R1, connections.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
	}, then...),
		asm.Mov.Imm(asm.R0, verdictNext).WithSymbol("next"),
		asm.Return(),
	)
}

// frameCounts is what a neighbour at tc ingress has counted.
type frameCounts struct {
	*ebpf.Map
}

type frameKey struct {
	Protocol  uint16 // the kernel's value for the packet
	EtherType uint16 // in the header at its beginning
}

// newFrameCounter counts packets by their protocol and by what they begin with.
func newFrameCounter(t testing.TB) (*ebpf.Program, frameCounts) {
	t.Helper()
	counts, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Hash, KeySize: 4, ValueSize: 8, MaxEntries: 1024})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = counts.Close() })
	const protocol = 16 // offset in struct __sk_buff (include/uapi/linux/bpf.h)
	program := loadProgram(t, ebpf.SchedCLS, "frames", asm.Instructions{
		asm.Mov.Reg(asm.R6, asm.R1),
		asm.LoadAbs(etherTypeAt, asm.Half),
		asm.StoreMem(asm.RFP, -2, asm.R0, asm.Half),
		asm.LoadMem(asm.R0, asm.R6, protocol, asm.Word),
		asm.HostTo(asm.BE, asm.R0, asm.Half),
		asm.StoreMem(asm.RFP, -4, asm.R0, asm.Half),
		asm.LoadMapPtr(asm.R1, counts.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.FnMapLookupElem.Call(),
		asm.JEq.Imm(asm.R0, 0, "first"),
		asm.Mov.Imm(asm.R1, 1),
		asm.StoreXAdd(asm.R0, asm.R1, asm.DWord),
		asm.Ja.Label("next"),
		asm.Mov.Imm(asm.R1, 1).WithSymbol("first"),
		asm.StoreMem(asm.RFP, -16, asm.R1, asm.DWord),
		asm.LoadMapPtr(asm.R1, counts.FD()),
		asm.Mov.Reg(asm.R2, asm.RFP),
		asm.Add.Imm(asm.R2, -4),
		asm.Mov.Reg(asm.R3, asm.RFP),
		asm.Add.Imm(asm.R3, -16),
		asm.Mov.Imm(asm.R4, 0),
		asm.FnMapUpdateElem.Call(),
		asm.Mov.Imm(asm.R0, verdictNext).WithSymbol("next"),
		asm.Return(),
	})
	return program, frameCounts{counts}
}

func (c frameCounts) all(t testing.TB) map[frameKey]uint64 {
	t.Helper()
	counts := map[frameKey]uint64{}
	var key frameKey
	var n uint64
	entries := c.Iterate()
	for entries.Next(&key, &n) {
		counts[key] = n
	}
	if err := entries.Err(); err != nil {
		t.Fatal(err)
	}
	return counts
}
