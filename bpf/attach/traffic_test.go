package attach_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/internal/polltest"
)

// Packets that a pod's kernel repeats do not show that the pod serves, whether their client has vanished or has closed its window.
func TestRepeatsAreNoTraffic(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
		if !s.d.SeesListeners() {
			t.Skip("this kernel does not show sockets")
		}
		id, err := bpftest.CurrentCgroup()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.d.SetProber(datapath.Prober{CgroupIDs: []uint64{id + 1}}); err != nil {
			t.Fatal(err)
		}
		dropper := s.NewDropper(t)
		s.testRepeats(t, netip.AddrPortFrom(addr, 8090), dropper, false)
		s.testRepeats(t, netip.AddrPortFrom(addr, 8091), dropper, true)
	})
}

func (s *served) testRepeats(t *testing.T, to netip.AddrPort, dropper *bpftest.Dropper, closesWindow bool) {
	t.Helper()
	s.armPort(t, to.Port())
	if err := s.known(t).WantTraffic(to.Port()); err != nil {
		t.Fatal(err)
	}
	listener := s.Listen(t, int(to.Port()))
	client := s.Dial(t, to.String())
	// The pod keeps its socket: without one, the kernel treats a closed window like a client that has vanished.
	respond := func() *net.TCPConn {
		t.Helper()
		conn, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = conn.Close() })
		if _, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if err := conn.(*net.TCPConn).CloseWrite(); err != nil {
			t.Fatal(err)
		}
		return conn.(*net.TCPConn)
	}
	key := datapath.PortKey(to.Port())
	dropper.At(t, bpftest.HostIn, to.Port(), bpftest.Drop{Percent: 100})
	conn := respond()
	polltest.Eventually(t, "the response is seen", func() bool { return s.tally(t, key).ServedAt != 0 && s.tally(t, key).ClosedAt != 0 })
	if closesWindow {
		s.closeWindow(t, client.(*net.TCPConn))
	}
	time.Sleep(100 * time.Millisecond) // for the probe of a lost tail
	first, sent := s.tally(t, key), tcpInfo(conn).Total_retrans
	polltest.Eventually(t, "two repeats", func() bool { return tcpInfo(conn).Total_retrans >= sent+2 })
	if later := s.tally(t, key); later.ServedAt != first.ServedAt || later.ClosedAt != first.ClosedAt {
		t.Errorf("window closed: %v: served again after %s, and closed after %s",
			closesWindow, time.Duration(later.ServedAt-first.ServedAt), time.Duration(later.ClosedAt-first.ClosedAt))
	}
	// The client comes back, and a response to another client counts again.
	dropper.Stop(t, to.Port())
	if reply, err := io.ReadAll(client); err != nil || len(reply) == 0 {
		t.Errorf("reply %q, %v", reply, err)
	}
	before := s.tally(t, key)
	polltest.Eventually(t, "another response is seen", func() bool {
		s.Dial(t, to.String())
		respond()
		now := s.tally(t, key)
		return now.ServedAt > before.ServedAt && now.ClosedAt > before.ClosedAt
	})
}

// closeWindow tells the pod that the client's receive window is closed, and acknowledges nothing of what the pod has sent since they
// connected.
func (s *served) closeWindow(t *testing.T, client *net.TCPConn) {
	t.Helper()
	socket, err := client.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	const receive, send = 1, 2 // TCP_RECV_QUEUE and TCP_SEND_QUEUE in include/uapi/linux/tcp.h
	var next [3]int            // sequence numbers
	control := socket.Control(func(fd uintptr) {
		set := func(option, value int) {
			err = errors.Join(err, unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, option, value))
		}
		set(unix.TCP_REPAIR, 1)
		for _, queue := range []int{receive, send} {
			set(unix.TCP_REPAIR_QUEUE, queue)
			n, failed := unix.GetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_QUEUE_SEQ)
			next[queue], err = n, errors.Join(err, failed)
		}
		set(unix.TCP_REPAIR, -1) // TCP_REPAIR_OFF_NO_WP: without a packet
	})
	if err := errors.Join(control, err); err != nil {
		t.Fatal(err)
	}
	ack := bpftest.Segment{
		Src: client.LocalAddr().(*net.TCPAddr).AddrPort(), Dst: client.RemoteAddr().(*net.TCPAddr).AddrPort(),
		SrcMAC: s.HostMAC, DstMAC: s.MAC, Flags: "A", Seq: uint32(next[send]), Ack: uint32(next[receive]),
	}
	etherType := uint16(etherTypeIPv4)
	if ack.Dst.Addr().Is6() {
		etherType = etherTypeIPv6
	}
	if _, err := unix.Write(packetSocket(t, s.Node.NS, s.HostIfName, etherType), ack.Bytes(t, nil)); err != nil {
		t.Fatal(err)
	}
}

// Beside an endpoint that the pod's traffic vouches for, other endpoints of the port are answered only as they would be
// without traffic.
func TestTrafficVouchesForItsEndpointOnly(t *testing.T) {
	s := knockable(t, newWorld(t))
	port := uint16(knockPort)
	for _, vouched := range []bool{true, false} {
		for _, obstacle := range []string{"none", "head_old", "not fresh"} {
			port++
			// The server's only worker is busy with one client, and accepts no others.
			to := netip.AddrPortFrom(s.IPv4, port)
			listener := socket{port: int(port), backlog: 64}.listen(t, s.NS)
			s.Dial(t, to.String())
			conn, err := listener.Accept()
			if err != nil {
				t.Fatal(err)
			}
			now := success()
			now.TrafficUntil, now.TrafficWindowMs = now.FreshUntil, 60_000
			gate, endpoint := now, success()
			if vouched {
				endpoint = now
			}
			if obstacle == "not fresh" {
				gate.FreshUntil = 1
			}
			s.put(t, datapath.PortKey(port), gate)
			s.putProbe(t, port, endpoint)
			if err := s.known(t).WantTraffic(port); err != nil {
				t.Fatal(err)
			}
			_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
			polltest.Eventually(t, "the response is seen", func() bool { return s.tally(t, datapath.PortKey(port)).ServedAt != 0 })
			if obstacle == "head_old" {
				bpftest.Dial(t, s.NS, to.String())
				time.Sleep(accepted)
			}
			before := s.counters(t)["answered_http"]
			client := s.Dial(t, to.String())
			_, _ = io.WriteString(client, probe)
			_ = client.SetReadDeadline(time.Now().Add(200 * time.Millisecond))
			_, _ = io.ReadAll(client)
			if got, want := s.counters(t)["answered_http"] > before, vouched || obstacle == "none"; got != want {
				t.Errorf("vouched for %v, obstacle %s: answered %v, want %v", vouched, obstacle, got, want)
			}
		}
	}
}
