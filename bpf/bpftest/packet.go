package bpftest

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// Addresses of the machines at both ends of the packets built here.
var (
	ClientMAC = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	PodMAC    = net.HardwareAddr{2, 0, 0, 0, 0, 2}
)

// Segment is a TCP segment in an Ethernet frame.
type Segment struct {
	Src, Dst       netip.AddrPort
	SrcMAC, DstMAC net.HardwareAddr
	Flags          string // letters from "FSRPAU"
	Seq, Ack       uint32
	Window         uint16
	Options        []layers.TCPOption
	Payload        string
}

// Bytes returns the frame with checksums. change, if not nil, may alter the IP header before they are computed.
func (s Segment) Bytes(t testing.TB, change func(v4 *layers.IPv4, v6 *layers.IPv6)) []byte {
	t.Helper()
	tcp := &layers.TCP{
		SrcPort: layers.TCPPort(s.Src.Port()), DstPort: layers.TCPPort(s.Dst.Port()),
		Seq: s.Seq, Ack: s.Ack, Window: s.Window, Options: s.Options,
	}
	for _, f := range s.Flags {
		switch f {
		case 'F':
			tcp.FIN = true
		case 'S':
			tcp.SYN = true
		case 'R':
			tcp.RST = true
		case 'P':
			tcp.PSH = true
		case 'A':
			tcp.ACK = true
		case 'U':
			tcp.URG = true
		default:
			t.Fatalf("TCP flag %q", f)
		}
	}
	eth := &layers.Ethernet{SrcMAC: s.SrcMAC, DstMAC: s.DstMAC}
	v4 := &layers.IPv4{
		Version: 4, TTL: 64, Protocol: layers.IPProtocolTCP, Id: 77, Flags: layers.IPv4DontFragment,
		SrcIP: s.Src.Addr().AsSlice(), DstIP: s.Dst.Addr().AsSlice(),
	}
	v6 := &layers.IPv6{
		Version: 6, HopLimit: 64, NextHeader: layers.IPProtocolTCP, FlowLabel: 0x12345,
		SrcIP: s.Src.Addr().AsSlice(), DstIP: s.Dst.Addr().AsSlice(),
	}
	var ip gopacket.SerializableLayer
	var err error
	if s.Src.Addr().Is4() {
		eth.EthernetType, ip, err = layers.EthernetTypeIPv4, v4, tcp.SetNetworkLayerForChecksum(v4)
	} else {
		eth.EthernetType, ip, err = layers.EthernetTypeIPv6, v6, tcp.SetNetworkLayerForChecksum(v6)
	}
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(v4, v6)
	}
	buf := gopacket.NewSerializeBuffer()
	opts := gopacket.SerializeOptions{FixLengths: true, ComputeChecksums: true}
	if err := gopacket.SerializeLayers(buf, opts, eth, ip, tcp, gopacket.Payload(s.Payload)); err != nil {
		t.Fatal(err)
	}
	// gopacket pads short frames like an Ethernet card does; a veth does not.
	length := 14 + int(v4.Length)
	if !s.Src.Addr().Is4() {
		length = 14 + 40 + int(v6.Length)
	}
	return buf.Bytes()[:length]
}

// ParseSegment parses a frame and fails the test if a length or a checksum in it is wrong.
func ParseSegment(t testing.TB, frame []byte) Segment {
	t.Helper()
	packet := gopacket.NewPacket(frame, layers.LayerTypeEthernet, gopacket.Default)
	if e := packet.ErrorLayer(); e != nil {
		t.Fatalf("frame % x: %v", frame, e.Error())
	}
	eth := packet.LinkLayer().(*layers.Ethernet)
	tcp, ok := packet.TransportLayer().(*layers.TCP)
	if !ok {
		t.Fatalf("no TCP in %v", packet)
	}
	if err := tcp.SetNetworkLayerForChecksum(packet.NetworkLayer()); err != nil {
		t.Fatal(err)
	}
	if err, mismatches := packet.VerifyChecksums(); err != nil || len(mismatches) > 0 {
		t.Fatalf("checksums of %v: %v %+v", packet, err, mismatches)
	}
	s := Segment{
		SrcMAC: eth.SrcMAC, DstMAC: eth.DstMAC, Seq: tcp.Seq, Ack: tcp.Ack, Window: tcp.Window,
		Options: tcp.Options, Payload: string(tcp.Payload),
	}
	var src, dst net.IP
	switch ip := packet.NetworkLayer().(type) {
	case *layers.IPv4:
		src, dst = ip.SrcIP, ip.DstIP
		if int(ip.Length) != len(frame)-14 {
			t.Fatalf("IPv4 length %d in a frame of %d bytes", ip.Length, len(frame))
		}
	case *layers.IPv6:
		src, dst = ip.SrcIP, ip.DstIP
		if int(ip.Length) != len(frame)-14-40 {
			t.Fatalf("IPv6 length %d in a frame of %d bytes", ip.Length, len(frame))
		}
	}
	srcAddr, _ := netip.AddrFromSlice(src)
	dstAddr, _ := netip.AddrFromSlice(dst)
	s.Src = netip.AddrPortFrom(srcAddr, uint16(tcp.SrcPort))
	s.Dst = netip.AddrPortFrom(dstAddr, uint16(tcp.DstPort))
	for _, f := range []struct {
		set  bool
		flag string
	}{{tcp.FIN, "F"}, {tcp.SYN, "S"}, {tcp.RST, "R"}, {tcp.PSH, "P"}, {tcp.ACK, "A"}, {tcp.URG, "U"}} {
		if f.set {
			s.Flags += f.flag
		}
	}
	return s
}

// String formats the segment on one line, for failure messages.
func (s Segment) String() string {
	return fmt.Sprintf("%v>%v %s seq %d ack %d win %d %q", s.Src, s.Dst, s.Flags, s.Seq, s.Ack, s.Window, s.Payload)
}

// Packet is a frame at a tc hook.
type Packet struct {
	Frame []byte
	From  uint32 // ifindex of the device that received it; 0: sent by a process in this namespace
	Mark  uint32 // skb->mark
	// TCIndex is skb->tc_index. Test runs do not carry it unless CarryTCIndex has changed the program.
	TCIndex uint16
}

// Offsets, in words, in struct __sk_buff (include/uapi/linux/bpf.h). A test run takes and returns all of these fields except
// tc_index (net/bpf/test_run.c).
const (
	skbMark           = 2
	skbIngressIfindex = 9
	skbIfindex        = 10
	skbTCIndex        = 11
	skbCB             = 12
	skbWords          = 48
)

// RunTC runs a tc program on a packet at the device ifindex, and returns the verdict and the resulting packet. The cgroup of its
// socket is the test's.
func RunTC(t testing.TB, p *ebpf.Program, ifindex uint32, in Packet) (verdict uint32, out Packet) {
	t.Helper()
	var before, after [skbWords]uint32
	before[skbMark], before[skbIngressIfindex], before[skbIfindex] = in.Mark, in.From, ifindex
	before[skbCB] = uint32(in.TCIndex)
	verdict, frame := run(t, p, before[:], after[:], in.Frame)
	return verdict, Packet{Frame: frame, From: in.From, Mark: after[skbMark], TCIndex: uint16(after[skbCB])}
}

// CarryTCIndex changes a tc program so that it takes skb->tc_index from skb->cb when it starts and stores it there when it ends.
// The original program is called as a function.
func CarryTCIndex(t testing.TB, p *ebpf.ProgramSpec) {
	t.Helper()
	called := btf.FuncMetadata(&p.Instructions[0])
	if called == nil {
		t.Fatalf("program %s has no type information", p.Name)
	}
	caller := *called
	caller.Name = "carry_tc_index"
	carry := asm.Instructions{
		btf.WithFuncMetadata(asm.Mov.Reg(asm.R6, asm.R1).WithSymbol(caller.Name).WithSource(p.Instructions[0].Source()), &caller),
		asm.LoadMem(asm.R2, asm.R6, 4*skbCB, asm.Word),
		asm.StoreMem(asm.R6, 4*skbTCIndex, asm.R2, asm.Word),
		asm.Call.Label(called.Name),
		asm.LoadMem(asm.R2, asm.R6, 4*skbTCIndex, asm.Word),
		asm.StoreMem(asm.R6, 4*skbCB, asm.R2, asm.Word),
		asm.Return(),
	}
	p.Instructions = append(carry, p.Instructions...)
}

// RunSteer runs steer on a frame that leaves through the device ifindex and was received by fromIfIndex (0: sent by a process in
// this namespace). It returns the verdict and the resulting frame.
func RunSteer(t testing.TB, p *ebpf.Program, ifindex, fromIfIndex uint32, frame []byte) (uint32, []byte) {
	t.Helper()
	verdict, out := RunTC(t, p, ifindex, Packet{Frame: frame, From: fromIfIndex})
	return verdict, out.Frame
}

// RunRespond runs the XDP program on a frame that the device ifindex received.
func RunRespond(t testing.TB, p *ebpf.Program, ifindex uint32, frame []byte) (uint32, []byte) {
	t.Helper()
	// struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
	return run(t, p, []uint32{0, uint32(len(frame)), 0, ifindex, 0, 0}, nil, frame)
}

func run(t testing.TB, p *ebpf.Program, before, after []uint32, frame []byte) (uint32, []byte) {
	t.Helper()
	opts := ebpf.RunOptions{Data: frame, DataOut: make([]byte, 8<<10), Context: before}
	if after != nil {
		opts.ContextOut = after
	}
	verdict, err := p.Run(&opts)
	if err != nil {
		t.Fatalf("running %v: %v", p, err)
	}
	return verdict, opts.DataOut
}
