package attach_test

import (
	"io"
	"net/netip"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
)

// What a pod's kernel repeats for a client that has vanished does not show that the pod serves.
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
		waitFor(t, "the response", func() bool { return s.tally(t, key).ServedAt != 0 && s.tally(t, key).ClosedAt != 0 })
		time.Sleep(100 * time.Millisecond) // for the probe of a lost tail
		first := s.tally(t, key)
		time.Sleep(1500 * time.Millisecond)
		if later := s.tally(t, key); later.ServedAt != first.ServedAt || later.ClosedAt != first.ClosedAt {
			t.Errorf("served again after %s, and closed after %s", time.Duration(later.ServedAt-first.ServedAt), time.Duration(later.ClosedAt-first.ClosedAt))
		}
		// The client returns. What others get counts meanwhile.
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
		waitFor(t, "another response", func() bool {
			now := s.tally(t, key)
			return now.ServedAt > before.ServedAt && now.ClosedAt > before.ClosedAt
		})
	})
}
