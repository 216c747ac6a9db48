package attach_test

import (
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/internal/polltest"
)

// Packets that a pod's kernel repeats for a client that has vanished do not show that the pod serves.
func TestRepeatsAreNoTraffic(t *testing.T) {
	eachFamily(t, func(t *testing.T, s *served, addr netip.Addr) {
		if !s.d.SeesListeners() {
			t.Skip("this kernel does not show sockets")
		}
		const port = 8090
		id, err := bpftest.CurrentCgroup()
		if err != nil {
			t.Fatal(err)
		}
		if err := s.d.SetProber(datapath.Prober{CgroupIDs: []uint64{id + 1}}); err != nil {
			t.Fatal(err)
		}
		s.armPort(t, port)
		if err := s.known(t).WantTraffic(port); err != nil {
			t.Fatal(err)
		}
		dropper := s.NewDropper(t)
		listener := s.Listen(t, port)
		client := s.Dial(t, netip.AddrPortFrom(addr, port).String())
		conn, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		dropper.At(t, bpftest.HostIn, port, bpftest.Drop{Percent: 100})
		if _, err := io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		_ = conn.Close()
		key := datapath.PortKey(port)
		polltest.Eventually(t, "the response is seen", func() bool { return s.tally(t, key).ServedAt != 0 && s.tally(t, key).ClosedAt != 0 })
		time.Sleep(100 * time.Millisecond) // for the probe of a lost tail
		first := s.tally(t, key)
		time.Sleep(1500 * time.Millisecond)
		if later := s.tally(t, key); later.ServedAt != first.ServedAt || later.ClosedAt != first.ClosedAt {
			t.Errorf("served again after %s, and closed after %s", time.Duration(later.ServedAt-first.ServedAt), time.Duration(later.ClosedAt-first.ClosedAt))
		}
		// The client comes back, and a response to another client counts again.
		dropper.Stop(t, port)
		if reply, err := io.ReadAll(client); err != nil || len(reply) == 0 {
			t.Errorf("reply %q, %v", reply, err)
		}
		before := s.tally(t, key)
		client = s.Dial(t, netip.AddrPortFrom(addr, port).String())
		defer client.Close() //nolint:errcheck // nothing is lost
		if conn, err = listener.Accept(); err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\n\r\n")
		_ = conn.Close()
		polltest.Eventually(t, "another response is seen", func() bool {
			now := s.tally(t, key)
			return now.ServedAt > before.ServedAt && now.ClosedAt > before.ClosedAt
		})
	})
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
