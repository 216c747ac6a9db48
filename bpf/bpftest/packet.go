package bpftest

import (
	"fmt"
	"net"
	"net/netip"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/gopacket/gopacket"
	"github.com/gopacket/gopacket/layers"
)

// Addresses of the machines that packets built here travel between.
var (
	ClientMAC = net.HardwareAddr{2, 0, 0, 0, 0, 1}
	PodMAC    = net.HardwareAddr{2, 0, 0, 0, 0, 2}
)

// Segment is a TCP segment in an Ethernet frame.
type Segment struct {
	Src, Dst       netip.AddrPort
	SrcMAC, DstMAC net.HardwareAddr
	Flags          string // of F S R P A
	Seq, Ack       uint32
	Window         uint16
	Options        []layers.TCPOption
	Payload        string
}

// Bytes is the frame, checksums included. change, if not nil, may alter the IP header before.
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
	// gopacket pads short frames, as an Ethernet card does; a veth does not.
	length := 14 + int(v4.Length)
	if !s.Src.Addr().Is4() {
		length = 14 + 40 + int(v6.Length)
	}
	return buf.Bytes()[:length]
}

// ParseSegment reads a frame and fails the test if a length or a checksum in it is wrong.
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
	}{{tcp.FIN, "F"}, {tcp.SYN, "S"}, {tcp.RST, "R"}, {tcp.PSH, "P"}, {tcp.ACK, "A"}} {
		if f.set {
			s.Flags += f.flag
		}
	}
	return s
}

// String is the segment on a line, for failures.
func (s Segment) String() string {
	return fmt.Sprintf("%v>%v %s seq %d ack %d win %d %q", s.Src, s.Dst, s.Flags, s.Seq, s.Ack, s.Window, s.Payload)
}

// RunSteer runs the tc program on a frame that leaves by the device ifindex, as if it had come in by fromIfIndex (0: sent
// by a process of this namespace; its cgroup is the test's). Returns the verdict and the frame as it is then.
func RunSteer(t testing.TB, p *ebpf.Program, ifindex, fromIfIndex uint32, frame []byte) (uint32, []byte) {
	t.Helper()
	// struct __sk_buff, of which a test may set these (include/uapi/linux/bpf.h, net/bpf/test_run.c).
	var ctx [48]uint32
	ctx[9], ctx[10] = fromIfIndex, ifindex
	return run(t, p, ctx[:], frame)
}

// RunRespond runs the XDP program on a frame that the device ifindex received.
func RunRespond(t testing.TB, p *ebpf.Program, ifindex uint32, frame []byte) (uint32, []byte) {
	t.Helper()
	// struct xdp_md: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
	return run(t, p, []uint32{0, uint32(len(frame)), 0, ifindex, 0, 0}, frame)
}

func run(t testing.TB, p *ebpf.Program, ctx []uint32, frame []byte) (uint32, []byte) {
	t.Helper()
	out := make([]byte, 64<<10)
	opts := ebpf.RunOptions{Data: frame, DataOut: out, Context: ctx}
	verdict, err := p.Run(&opts)
	if err != nil {
		t.Fatalf("running %v: %v", p, err)
	}
	return verdict, opts.DataOut
}
