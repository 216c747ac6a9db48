package attach_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/internal/polltest"
)

const (
	etherTypeIPv4    = 0x0800
	etherTypeARP     = 0x0806
	etherTypeVLAN    = 0x8100
	etherTypeIPv6    = 0x86dd
	etherTypeSteered = 0x88b5 // ETH_P_STEERED: IEEE 802 local experimental 1
	protocol8022     = 0x0004 // ETH_P_802_2: the kernel's value for frames with a length instead of an EtherType
)

// packetSocket opens a socket for frames of a protocol on a device.
func packetSocket(t testing.TB, in ns.NetNS, device string, protocol uint16) int {
	t.Helper()
	var fd int
	bpftest.Do(t, in, func() (err error) {
		order := binary.BigEndian.AppendUint16(nil, protocol)
		inNetworkOrder := binary.NativeEndian.Uint16(order)
		link, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		if fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, int(inNetworkOrder)); err != nil {
			return err
		}
		return errors.Join(
			unix.Bind(fd, &unix.SockaddrLinklayer{Ifindex: link.Index, Protocol: inNetworkOrder}),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5}),
		)
	})
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// frame returns a frame that the pod sends to the node.
func (s *served) frame(etherType uint16, payload []byte) []byte {
	header := slices.Concat(s.HostMAC, s.MAC, binary.BigEndian.AppendUint16(nil, etherType))
	return append(header, payload...)
}

// A pod may use the EtherType that steer and respond use between them.
func TestPodFramesArrive(t *testing.T) {
	v4 := bpftest.Segment{
		Src: netip.MustParseAddrPort("10.244.1.8:8080"), Dst: netip.MustParseAddrPort("10.244.1.1:40000"),
		SrcMAC: bpftest.PodMAC, DstMAC: bpftest.ClientMAC, Flags: "SA", Payload: string(make([]byte, 600)),
	}
	v6 := v4
	v6.Src, v6.Dst = netip.MustParseAddrPort("[fd00::8]:8080"), netip.MustParseAddrPort("[fd00::1]:40000")
	payloads := map[string][]byte{
		"empty":              {},
		"one byte":           {0x45},
		"small":              []byte("hello"),
		"large":              bytes.Repeat([]byte{0x60}, 1400),
		"like an IPv4 order": v4.Bytes(t, nil)[14:],
		"like an IPv6 order": v6.Bytes(t, nil)[14:],
	}
	eachWay(t, func(t *testing.T, w *world, way way) {
		s := w.serve(way)
		s.wantAllBy(t, s.IPv4) // the device is trusted, and all programs run
		pod := packetSocket(t, s.NS, "eth0", etherTypeSteered)
		host := packetSocket(t, s.Node.NS, s.HostIfName, etherTypeSteered)
		for name, payload := range payloads {
			t.Run(name, func(t *testing.T) {
				sent := s.frame(etherTypeSteered, payload)
				if _, err := unix.Write(pod, sent); err != nil {
					t.Fatal(err)
				}
				got := make([]byte, 2000)
				n, err := unix.Read(host, got)
				if err != nil || !bytes.Equal(got[:n], sent) {
					t.Errorf("% x, %v; sent % x", got[:max(n, 0)], err, sent)
				}
			})
		}
	})
}

// Programs after ours at tc ingress receive whole Ethernet frames, as without us. Generic XDP removes the headers from some
// packets before any program runs.
func TestNeighboursSeeWholeFrames(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		s := w.serve(way)
		program, counts := newFrameCounter(t)
		w.behind(program, "ingress")
		s.wantAll(t)
		pod := packetSocket(t, s.NS, "eth0", etherTypeARP)
		llc := s.frame(46, bytes.Repeat([]byte{0x42}, 46))
		vlan := s.frame(etherTypeVLAN, append([]byte{0, 7, 0x88, 0xb5}, make([]byte, 60)...))
		for _, sent := range [][]byte{s.frame(etherTypeARP, make([]byte, 28)), s.frame(etherTypeSteered, make([]byte, 60)), llc, vlan} {
			if _, err := unix.Write(pod, sent); err != nil {
				t.Fatal(err)
			}
		}
		want := []frameKey{
			{etherTypeIPv4, etherTypeIPv4}, {etherTypeIPv6, etherTypeIPv6}, {etherTypeARP, etherTypeARP},
			{etherTypeSteered, etherTypeSteered}, {protocol8022, 46},
		}
		var seen map[frameKey]uint64
		polltest.Eventually(t, "all frames are seen", func() bool {
			seen = counts.all(t)
			protocols := map[uint16]bool{}
			for key := range seen {
				protocols[key.Protocol] = true
			}
			return len(protocols) == len(want)
		})
		for key, n := range seen {
			if !slices.Contains(want, key) {
				t.Errorf("%d packets of protocol %#04x begin with a header that says %#04x", n, key.Protocol, key.EtherType)
			}
		}
	})
}

// behind attaches a program after ours, at the same kind of hook.
func (w *world) behind(program *ebpf.Program, side string) {
	w.t.Helper()
	if w.isTCX() {
		w.tcx(program, tcxSides[side], nil)
		return
	}
	w.do(func(device netlink.Link) error {
		return netlink.FilterAdd(bpfFilter(device.Attrs().Index, parents[side], 100, program))
	})
}

// The client's mark must not come back with the answer, because it might affect routing.
func TestAnswersCarryNoMark(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		s := w.serve(way)
		f := newFirewall(t, s.Node)
		f.chain("marked", prerouting, rule(marked(), then(&expr.Counter{})))
		f.chain("all", prerouting, then(&expr.Counter{}))
		f.chain("sent", filterHook["output"], rule(marked(), then(&expr.Counter{})))
		dialer := net.Dialer{Timeout: patience, Control: func(_, _ string, socket syscall.RawConn) (err error) {
			control := socket.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, 0x42) })
			return errors.Join(control, err)
		}}
		answered, handed := s.counted(t, func() {
			for _, addr := range []netip.Addr{s.IPv4, s.IPv6} {
				for _, text := range []string{fresh, unknown} {
					bpftest.Do(t, s.Node.NS, func() error {
						return askBy(dialer, netip.AddrPortFrom(addr, 8080).String(), text)
					})
				}
			}
		})
		if answered != 2 || handed != 2 {
			t.Errorf("answered %d, handed over %d; want 2 each", answered, handed)
		}
		if f.counted("all") == 0 || f.counted("sent") == 0 {
			t.Error("nothing was counted")
		}
		if n := f.counted("marked"); n > 0 {
			t.Errorf("%d packets came back with a mark", n)
		}
	})
}

// askBy sends a request and reads everything that comes back.
func askBy(dialer net.Dialer, address, text string) error {
	conn, err := dialer.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // a test's
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := io.WriteString(conn, text); err != nil {
		return err
	}
	reply, err := io.ReadAll(conn)
	if err == nil && len(reply) == 0 {
		err = fmt.Errorf("no reply")
	}
	return err
}
