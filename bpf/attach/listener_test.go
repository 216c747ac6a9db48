package attach_test

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/containernetworking/plugins/pkg/testutils"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/internal/polltest"
)

// knockPort is the port of TCP probes in these tests.
const knockPort = 9000

// socket describes how to listen, by default on any address of both families.
type socket struct {
	port     int // 0 is knockPort
	address  netip.Addr
	protocol int
	backlog  int
	set      func(fd int) error // before it is bound
}

// listen creates the socket in a namespace, and accepts nothing.
func (o socket) listen(t testing.TB, in ns.NetNS) net.Listener {
	t.Helper()
	var l net.Listener
	bpftest.Do(t, in, func() error {
		fd, err := o.open()
		if err != nil {
			return err
		}
		file := os.NewFile(uintptr(fd), "listener")
		defer file.Close() //nolint:errcheck // copied
		l, err = net.FileListener(file)
		return err
	})
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func (o socket) open() (fd int, err error) {
	port, ip, family := cmp.Or(o.port, knockPort), cmp.Or(o.address, netip.IPv6Unspecified()), unix.AF_INET6
	var address unix.Sockaddr = &unix.SockaddrInet6{Port: port, Addr: ip.As16()}
	if ip.Is4() {
		family, address = unix.AF_INET, &unix.SockaddrInet4{Port: port, Addr: ip.As4()}
	}
	if fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, o.protocol); err != nil {
		return -1, err
	}
	err = option(unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)(fd)
	if o.set != nil {
		err = errors.Join(err, o.set(fd))
	}
	if err = errors.Join(err, unix.Bind(fd, address), unix.Listen(fd, o.backlog)); err != nil {
		return -1, errors.Join(err, unix.Close(fd))
	}
	return fd, nil
}

// with returns the socket with an option that is set before it is bound.
func (o socket) with(set func(fd int) error) socket {
	o.set = set
	return o
}

// option sets a socket option of 4 bytes.
func option(level, name, value int) func(fd int) error {
	return func(fd int) error { return unix.SetsockoptInt(fd, level, name, value) }
}

// filtered attaches a filter that lets every packet through.
func filtered(fd int) error {
	pass := unix.SockFilter{Code: unix.BPF_RET, K: 1 << 16}
	return unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &pass})
}

// keyed requires a signature on connections from 192.0.2.1.
func keyed(fd int) error {
	md5 := struct { // struct tcp_md5sig in include/uapi/linux/tcp.h
		Family           uint16
		_                [2]byte // port
		Address          [124]byte
		Flags, PrefixLen uint8
		KeyLen           uint16
		IfIndex          int32
		Key              [80]byte
	}{Family: unix.AF_INET, Address: [124]byte{192, 0, 2, 1}, KeyLen: 1}
	text, err := binary.Append(nil, binary.NativeEndian, md5)
	return errors.Join(err, unix.SetsockoptString(fd, unix.IPPROTO_TCP, unix.TCP_MD5SIG, string(text)))
}

// knockable returns a pod whose device is proven. A new pod must first resolve its neighbours, which takes a second.
func knockable(t *testing.T, w *world) *served {
	t.Helper()
	if !w.d.SeesListeners() {
		t.Fatal("listening sockets are not looked at")
	}
	s := w.serve(ways[0])
	for _, addr := range s.families() {
		s.ask(t, s.Node.NS, addr, probe)
	}
	return s
}

// families returns a pod's two addresses.
func (s *served) families() []netip.Addr { return []netip.Addr{s.IPv4, s.IPv6} }

// armTCP acts as if a port's TCP probe had just succeeded for the first time.
func (s *served) armTCP(t testing.TB, port uint16) {
	t.Helper()
	if err := s.known(t).Delete(datapath.PortKey(port)); err != nil {
		t.Fatal(err)
	}
	s.put(t, datapath.TCPKey(port), success())
	s.armPort(t, port)
}

// knock performs a TCP probe. It reports whether the probe succeeded, and whether it was passed on to the pod.
func (s *served) knock(t testing.TB, to netip.AddrPort) (ok, passed bool) {
	t.Helper()
	before := s.tally(t, datapath.TCPKey(to.Port())).Hits
	ok = connects(t, s.Node, to)
	return ok, s.tally(t, datapath.TCPKey(to.Port())).Hits == before
}

func (s *served) tally(t testing.TB, key datapath.EndpointKey) datapath.Tally {
	t.Helper()
	tally, err := s.known(t).Tally(key)
	if err != nil {
		t.Fatal(err)
	}
	return tally
}

// obstacle returns the last obstacle on the port.
func (s *served) obstacle(t testing.TB, port uint16) string {
	t.Helper()
	return datapath.Obstacles[s.tally(t, datapath.PortKey(port)).Obstacle]
}

// connects reports whether a connection from the node succeeds before its SYN is repeated (1 s), and closes it.
func connects(t testing.TB, node *bpftest.Node, to netip.AddrPort) bool {
	t.Helper()
	var conn net.Conn
	err := inNS(node.NS, func() (err error) {
		conn, err = net.DialTimeout("tcp", to.String(), 900*time.Millisecond)
		return err
	})
	if err == nil {
		err = conn.Close() // where an answered probe counts
	}
	return err == nil
}

// A TCP probe is answered only if the pod's kernel would accept the connection, as a real one shows.
func TestWhatListens(t *testing.T) {
	s := knockable(t, newWorld(t))
	other := s.Node.AddPod(t)
	addresses := []netip.Addr{netip.MustParseAddr("192.0.2.1"), netip.MustParseAddr("2001:db8::1")}
	bpftest.Do(t, s.NS, func() error { return bpftest.Configure("eth0", addresses...) })
	anyIPv4, anyIP := socket{address: netip.IPv4Unspecified(), backlog: 128}, socket{backlog: 128}
	both, none := []string{"", ""}, []string{"no_listener", "no_listener"}
	for name, c := range map[string]struct {
		listen func(t *testing.T)
		want   []string // why probes over IPv4 and IPv6 are passed on; empty if they are answered
	}{
		"any address":                  {s.listens(anyIP), both},
		"any address of IPv4":          {s.listens(anyIPv4), []string{"", "no_listener"}},
		"any address of IPv6":          {s.listens(anyIP.with(option(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, 1))), []string{"no_listener", ""}},
		"MPTCP":                        {s.listens(socket{protocol: unix.IPPROTO_MPTCP, backlog: 128}), both},
		"delayed until data":           {s.listens(anyIP.with(option(unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, 30))), both},
		"its own addresses":            {s.listens(at(s.IPv4), at(s.IPv6)), both},
		"nothing":                      {s.listens(), none},
		"loopback":                     {s.listens(at(netip.MustParseAddr("127.0.0.1")), at(netip.IPv6Loopback())), none},
		"other addresses":              {s.listens(at(addresses[0]), at(addresses[1])), none},
		"bound to the loopback device": {s.listens(anyIP.with(boundTo("lo"))), none},
		"another pod":                  {func(t *testing.T) { bpftest.AcceptAll(anyIP.listen(t, other.NS)) }, none},
		"the node":                     {func(t *testing.T) { bpftest.AcceptAll(anyIP.listen(t, s.Node.NS)) }, none},
		"a filter":                     {s.listens(anyIP.with(filtered)), []string{"special", "special"}},
		"a minimum TTL":                {s.listens(anyIPv4.with(option(unix.IPPROTO_IP, unix.IP_MINTTL, 5))), []string{"special", "no_listener"}},
		"a minimum hop limit":          {s.listens(anyIP.with(option(unix.IPPROTO_IPV6, unix.IPV6_MINHOPCOUNT, 5))), []string{"special", "special"}},
		"signatures":                   {s.listens(anyIPv4.with(keyed)), []string{"special", "no_listener"}},
		"room for only one":            {s.listens(socket{}), []string{"real_due", "real_due"}},
	} {
		t.Run(name, func(t *testing.T) {
			c.listen(t)
			for i, addr := range s.families() {
				s.armTCP(t, knockPort)
				to := netip.AddrPortFrom(addr, knockPort)
				before := s.counters(t)
				ok, passed := s.knock(t, to)
				for range 20 { // a busy machine has not yet answered or accepted the previous connection
					if met := s.obstacle(t, knockPort); !passed || met != "queue_long" && met != "head_old" && met != "unanswered" {
						break
					}
					time.Sleep(accepted)
					before = s.counters(t)
					ok, passed = s.knock(t, to)
				}
				if passed != (c.want[i] != "") || passed && s.obstacle(t, knockPort) != c.want[i] {
					t.Errorf("%v: passed on: %v, because of %q, want %q", to, passed, s.obstacle(t, knockPort), c.want[i])
				}
				if passed && s.counters(t)["passed_"+c.want[i]] != before["passed_"+c.want[i]]+1 {
					t.Errorf("%v: not counted as %q", to, c.want[i])
				}
				really := s.connectsReally(t, to)
				for n := 0; n < 20 && really != ok; n++ { // as above
					really = s.connectsReally(t, to)
				}
				if really != ok {
					t.Errorf("%v: the probe succeeded: %v; the pod itself: %v", to, ok, really)
				}
			}
		})
	}
}

// accepted is longer than it takes to find out that a real connection was accepted.
const accepted = 60 * time.Millisecond

// listens creates sockets in the pod that accept.
func (s *served) listens(sockets ...socket) func(t *testing.T) {
	return func(t *testing.T) {
		for _, o := range sockets {
			bpftest.AcceptAll(o.listen(t, s.NS))
		}
	}
}

// at returns a socket on one address.
func at(a netip.Addr) socket { return socket{address: a, backlog: 128} }

func boundTo(device string) func(fd int) error {
	return func(fd int) error { return unix.BindToDevice(fd, device) }
}

// connectsReally connects to the pod while there is no prober, so that nothing is answered in its name.
func (s *served) connectsReally(t testing.TB, to netip.AddrPort) (ok bool) {
	t.Helper()
	err := s.d.SetProber(datapath.Prober{})
	ok = connects(t, s.Node, to)
	if err := errors.Join(err, s.d.SetProber(datapath.Prober{AnyLocal: true})); err != nil {
		t.Fatal(err)
	}
	return ok
}

// An earlier connection that the pod still has on the same ports neither hides a listener nor is mistaken for one.
func TestEarlierConnection(t *testing.T) {
	s := knockable(t, newWorld(t))
	for name, c := range map[string]struct{ vanished, listens bool }{
		"TIME_WAIT":                            {false, true},
		"its client vanished":                  {true, true},
		"its client vanished, nothing listens": {true, false},
	} {
		t.Run(name, func(t *testing.T) {
			for _, addr := range s.families() {
				to := netip.AddrPortFrom(addr, knockPort)
				listener := socket{backlog: 128}.listen(t, s.NS)
				from := s.leave(t, listener, to, c.vanished)
				if !c.listens {
					_ = listener.Close()
				}
				s.armTCP(t, knockPort)
				before := s.counters(t)["answered_tcp"]
				err := inNS(s.Node.NS, func() error {
					conn, err := dialFrom(from, to)
					if err != nil {
						return err
					}
					return conn.Close()
				})
				if (err == nil) != c.listens {
					t.Errorf("%v: %v", to, err)
				}
				if answered := s.counters(t)["answered_tcp"] > before; answered != c.listens {
					t.Errorf("%v: answered: %v, %q", to, answered, s.obstacle(t, knockPort))
				}
				_ = listener.Close()
			}
		})
	}
}

// leave leaves a remnant of a connection in the pod, and returns the client's address.
func (s *served) leave(t *testing.T, listener net.Listener, to netip.AddrPort, vanishes bool) (from netip.AddrPort) {
	t.Helper()
	bpftest.Do(t, s.Node.NS, func() error {
		client, err := dialFrom(netip.AddrPort{}, to)
		if err != nil {
			return err
		}
		from = client.LocalAddr().(*net.TCPAddr).AddrPort()
		server, err := listener.Accept()
		if err != nil {
			return err
		}
		if vanishes {
			t.Cleanup(func() { _ = server.Close() })
			return abandon(client)
		}
		err = server.Close() // first, so that it ends in TIME_WAIT
		_, readErr := io.ReadAll(client)
		return errors.Join(err, readErr, client.Close())
	})
	return from
}

// Nothing is answered in the name of a socket that is bound to the pod's device. Whether it is found depends on the indexes of the two
// ends of the veth, because the lookup uses that of the host end.
func TestBoundToThePodsDevice(t *testing.T) {
	s := knockable(t, newWorld(t))
	s.listens(socket{backlog: 128, set: boundTo("eth0")})(t)
	s.armTCP(t, knockPort)
	for _, addr := range s.families() {
		if ok, passed := s.knock(t, netip.AddrPortFrom(addr, knockPort)); !ok || !passed {
			t.Errorf("%v: succeeded: %v, passed on: %v", addr, ok, passed)
		}
		if o := s.obstacle(t, knockPort); o != "special" && o != "no_listener" {
			t.Errorf("%v: passed on because of %q", addr, o)
		}
	}
}

// A server that has stopped accepting is detected as by plain probes, at most K probes later: a connection that reaches it stays in its
// queue, and probes fail once that is full.
func TestStoppedServer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	for _, family := range []string{"IPv4", "IPv6"} {
		t.Run(family, func(t *testing.T) {
			s := knockable(t, w.withNewPod(t))
			plain := s.Node.AddPod(t)
			from, to := plain.IPv4, s.IPv4
			if family == "IPv6" {
				from, to = plain.IPv6, s.IPv6
			}
			plain.Listen(t, knockPort)
			bpftest.Dial(t, s.Node.NS, netip.AddrPortFrom(from, knockPort).String()) // resolves the neighbour
			for _, c := range []struct{ backlog, most int }{{0, 0}, {1, 1}, {5, 1}, {15, 1}, {16, 2}, {128, 9}} {
				for i, delay := range []int{0, 30} {
					server := socket{port: knockPort + 1 + 2*c.backlog + i, backlog: c.backlog, set: option(unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, delay)}
					server.listen(t, plain.NS)
					server.listen(t, s.NS)
					s.armTCP(t, uint16(server.port))
					t.Run(fmt.Sprintf("backlog %d, delayed until data for %d s", c.backlog, delay), func(t *testing.T) {
						t.Parallel()
						without := untilFailure(t, s.Node, netip.AddrPortFrom(from, uint16(server.port)), 0)
						pause := []time.Duration{0, accepted}[i]
						with := untilFailure(t, s.Node, netip.AddrPortFrom(to, uint16(server.port)), pause)
						if without != c.backlog+2 || with != without+c.most {
							t.Errorf("first failure without answers: probe %d; with answers: probe %d", without, with)
						}
						if port := s.tally(t, datapath.PortKey(uint16(server.port))); int(port.AnsweredMax) != c.most {
							t.Errorf("K is %d, want %d", port.AnsweredMax, c.most)
						}
					})
				}
			}
		})
	}
}

// A pod may give connections to another socket than the one that is found: by a netfilter rule, by a program that selects among sockets
// sharing the port, or because one is bound to the device. Whatever else accepts, once the process of that socket has stopped, at most
// K probes are answered.
func TestStoppedServerElsewhere(t *testing.T) {
	const backlog, most, elsewhere = 16, 2, 7000
	shared := option(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	chosen := func(fd int) error {
		first := unix.SockFilter{Code: unix.BPF_RET, K: 0}
		program := &unix.SockFprog{Len: 1, Filter: &first}
		return errors.Join(shared(fd), unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_REUSEPORT_CBPF, program))
	}
	bound := func(fd int) error { return errors.Join(shared(fd), boundTo("eth0")(fd)) }
	w := newWorld(t)
	for name, c := range map[string]struct {
		stopped, found socket
		redirected     bool
		most           int
	}{
		"chosen by a program": {stopped: socket{set: chosen}, found: socket{set: shared}, most: 1},
		"bound to the device": {stopped: socket{set: bound}, found: socket{set: shared}, most: 1},
		"redirected":          {stopped: socket{port: elsewhere}, redirected: true, most: most},
	} {
		t.Run(name, func(t *testing.T) {
			w := w.withNewPod(t)
			w.pod = w.pod.Node.AddPod(t) // the ends of its veth have different indexes, or a bound socket would be found
			s := knockable(t, w)
			if c.redirected {
				newFirewall(t, &bpftest.Node{NS: s.NS}).redirect(knockPort, elsewhere)
			}
			c.stopped.backlog, c.found.backlog = backlog, backlog
			c.stopped.listen(t, s.NS)
			bpftest.AcceptAll(c.found.listen(t, s.NS))
			s.armTCP(t, knockPort)
			if n := untilFailure(t, s.Node, netip.AddrPortFrom(s.IPv4, knockPort), accepted); n != backlog+2+c.most {
				t.Errorf("first failure: probe %d, want %d", n, backlog+2+c.most)
			}
		})
	}
}

// untilFailure probes until a probe fails, and returns its number, counting from 1.
func untilFailure(t testing.TB, node *bpftest.Node, to netip.AddrPort, pause time.Duration) int {
	t.Helper()
	for i := 1; i < 10_000; i++ {
		if !connects(t, node, to) {
			return i
		}
		time.Sleep(pause)
	}
	t.Fatal("10,000 probes succeeded")
	return 0
}

// If a server accepts, K probes out of K + 1 are answered. If sockets share a port only some are, because only the socket that this
// probe would meet is examined, which reveals nothing about a connection with another one.
func TestAcceptingServer(t *testing.T) {
	s := knockable(t, newWorld(t))
	shared := option(unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
	for i, c := range []struct {
		sockets []socket
		most    int
	}{
		{[]socket{{backlog: 5}}, 1},
		{[]socket{{backlog: 16}}, 2},
		{[]socket{{backlog: 4096}}, 9},
		{[]socket{{backlog: 16, protocol: unix.IPPROTO_MPTCP}}, 2},
		{[]socket{{backlog: 4096, set: shared}, {backlog: 4096, set: shared}}, 1},
	} {
		port := uint16(knockPort + i)
		for j := range c.sockets {
			c.sockets[j].port = int(port)
		}
		s.listens(c.sockets...)(t)
		s.armTCP(t, port)
		for _, addr := range s.families() {
			answered, due, all, isShared := 0, 0, 0, len(c.sockets) > 1
			for n := 0; due < 3 || all < 2*c.most; n++ {
				ok, passed := s.knock(t, netip.AddrPortFrom(addr, port))
				obstacle := s.obstacle(t, port)
				if !passed {
					answered++
					all++
				}
				if !ok || n > 100 || answered > c.most || passed && obstacle == "real_due" && answered < c.most && !isShared {
					t.Fatalf("%v, port %d, probe %d: succeeded: %v, passed on: %v, because of %q", addr, port, n, ok, passed, obstacle)
				}
				if !passed {
					continue
				}
				if obstacle == "real_due" { // on a busy machine also head_old
					due++
				}
				answered = 0
				time.Sleep(accepted)
			}
		}
	}
}

// Real connections that arrive more often than acceptance can be confirmed do not keep probes from being answered.
func TestFrequentProbes(t *testing.T) {
	s := knockable(t, newWorld(t))
	s.listens(socket{backlog: 5})(t) // K is 1
	s.armTCP(t, knockPort)
	to := netip.AddrPortFrom(s.IPv4, knockPort)
	for range 3 {
		for n := 0; ; n++ {
			if _, passed := s.knock(t, to); !passed {
				break
			}
			if n == 100 {
				t.Fatalf("no probe of 100 was answered, because of %q", s.obstacle(t, knockPort))
			}
			time.Sleep(accepted / 4)
		}
	}
}

// A probe is passed on if a queue is more than half full, either that of connections waiting to be accepted or that of connections in
// the making.
func TestLongQueues(t *testing.T) {
	const backlog = 8
	s := knockable(t, newWorld(t))
	for name, delay := range map[string]int{"waiting to be accepted": 0, "being made": 30} {
		t.Run(name, func(t *testing.T) {
			s.armTCP(t, knockPort)
			listener := socket{backlog: backlog, set: option(unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, delay)}.listen(t, s.NS)
			to := netip.AddrPortFrom(s.IPv4, knockPort)
			for range backlog / 2 {
				bpftest.Dial(t, s.NS, to.String())
			}
			if _, passed := s.knock(t, to); passed && s.obstacle(t, knockPort) != "head_old" { // on a busy machine
				t.Errorf("half full: passed on because of %q", s.obstacle(t, knockPort))
			}
			polltest.Eventually(t, "the queue is long, but has not been so for long", func() bool {
				for delay == 0 && acceptsNow(listener) {
				}
				for range backlog/2 + 1 {
					bpftest.Dial(t, s.NS, to.String())
				}
				_, passed := s.knock(t, to)
				return passed && s.obstacle(t, knockPort) == "queue_long"
			})
		})
	}
}

// acceptsNow accepts a connection if one is waiting.
func acceptsNow(l net.Listener) bool {
	_ = l.(*net.TCPListener).SetDeadline(time.Now().Add(time.Millisecond))
	conn, err := l.Accept()
	if err == nil {
		_ = conn.Close()
	}
	return err == nil
}

// A handed-over connection counts as a real one.
func TestHandedOverCountsAsReal(t *testing.T) {
	s := knockable(t, newWorld(t))
	serveEcho(socket{backlog: 16}.listen(t, s.NS)) // K is 2
	s.armTCP(t, knockPort)
	for _, addr := range s.families() {
		to := netip.AddrPortFrom(addr, knockPort)
		before := s.counters(t)["handed_over"]
		if _, passed := s.knock(t, to); passed {
			t.Fatalf("%v: passed on because of %q", to, s.obstacle(t, knockPort))
		}
		conn := s.Dial(t, to.String())
		if _, err := io.WriteString(conn, "hello"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, make([]byte, 5)); err != nil || s.counters(t)["handed_over"] != before+1 {
			t.Fatalf("%v: not handed over, %v", to, err)
		}
		_ = conn.Close()
		time.Sleep(accepted)
		for range 2 {
			if _, passed := s.knock(t, to); passed {
				t.Errorf("%v: passed on because of %q", to, s.obstacle(t, knockPort))
			}
		}
		if _, passed := s.knock(t, to); !passed {
			t.Errorf("%v: a third was answered", to)
		}
		time.Sleep(accepted)
	}
}

// A connection of the daemon's own counts as a real one where it is accepted by the socket that probes would meet.
func TestOwnConnectionsCountAsReal(t *testing.T) {
	const backlog, most, elsewhere = 16, 2, 7000
	for name, c := range map[string]struct {
		stopped, redirected bool
		counts              bool
	}{
		"accepted":               {counts: true},
		"waiting to be accepted": {stopped: true},
		"accepted elsewhere":     {redirected: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := knockable(t, newWorld(t))
			if c.redirected {
				bpftest.AcceptAll(socket{port: elsewhere, backlog: backlog}.listen(t, s.NS))
				newFirewall(t, &bpftest.Node{NS: s.NS}).redirect(knockPort, elsewhere)
			}
			l := socket{backlog: backlog}.listen(t, s.NS)
			if !c.stopped {
				bpftest.AcceptAll(l)
			}
			s.armTCP(t, knockPort)
			for _, addr := range s.families() {
				to := netip.AddrPortFrom(addr, knockPort)
				for n := range most {
					if _, passed := s.knock(t, to); passed && addr == s.IPv4 {
						t.Fatalf("%v: probe %d was passed on because of %q", to, n, s.obstacle(t, knockPort))
					}
				}
				before := s.counters(t)["passed_own"]
				if err := s.connectAsDaemon(to); err != nil {
					t.Fatal(err)
				}
				if passed := s.counters(t)["passed_own"] - before; passed != 1 {
					t.Fatalf("%v: %d connections were exempt", to, passed)
				}
				if !c.stopped { // otherwise the queue's age would keep the probe from being answered
					time.Sleep(accepted)
				}
				_, passed := s.knock(t, to)
				obstacle := s.obstacle(t, knockPort)
				due := obstacle == "real_due" || c.stopped && obstacle == "head_old" // on a busy machine
				if passed == c.counts || passed && !due {
					t.Errorf("%v: after the daemon's connection: passed on %t, because of %q", to, passed, obstacle)
				}
				polltest.Eventually(t, "all flows have ended", func() bool {
					n, err := s.d.Flows()
					return err == nil && n == 0
				})
			}
		})
	}
}

// The daemon's connections are followed only on ports with a TCP endpoint, and only until the pod replies.
func TestOwnConnectionsEnd(t *testing.T) {
	for name, c := range map[string]struct {
		arm                     func(s *served, t testing.TB, port uint16)
		listens, refused, noted bool
	}{
		"refused":                {arm: (*served).armTCP, refused: true},
		"accepted":               {arm: (*served).armTCP, listens: true, noted: true},
		"without a TCP endpoint": {arm: (*served).armPort, listens: true},
	} {
		t.Run(name, func(t *testing.T) {
			s := knockable(t, newWorld(t))
			if c.listens {
				bpftest.AcceptAll(socket{backlog: 16}.listen(t, s.NS))
			}
			c.arm(s, t, knockPort)
			for _, addr := range s.families() {
				err := s.connectAsDaemon(netip.AddrPortFrom(addr, knockPort))
				if errors.Is(err, unix.ECONNREFUSED) != c.refused || err != nil && !c.refused {
					t.Errorf("%v: %v", addr, err)
				}
				if n, err := s.d.Flows(); err != nil || n != 0 {
					t.Errorf("%v: %d flows, %v", addr, n, err)
				}
				port := s.tally(t, datapath.PortKey(knockPort))
				if port.WithdrawnAt != 0 {
					t.Errorf("%v: withdrawn by the daemon's connection", addr)
				}
				if noted := port.ConnectedAt != 0; noted != c.noted {
					t.Errorf("%v: noted as a connection to be accepted: %t, want %t", addr, noted, c.noted)
				}
			}
		})
	}
}

// connectAsDaemon sends something on a connection as the daemon does.
func (s *served) connectAsDaemon(to netip.AddrPort) error {
	dialer := net.Dialer{Control: func(_, _ string, raw syscall.RawConn) (err error) {
		controlled := raw.Control(func(fd uintptr) {
			var cookie uint64
			if cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE); err == nil {
				err = s.d.ExemptSocket(cookie)
			}
		})
		return errors.Join(controlled, err)
	}}
	return inNS(s.Node.NS, func() error {
		conn, err := dialer.Dial("tcp", to.String())
		if err != nil {
			return err
		}
		_, err = conn.Write([]byte("a request"))
		return errors.Join(err, conn.(*net.TCPConn).SetLinger(0), conn.Close()) // reset, as refresh does
	})
}

// Whenever a server stops, the answers given before do not grant it more than K.
func TestServerThatStops(t *testing.T) {
	t.Parallel()
	const backlog, most = 16, 2
	s := knockable(t, newWorld(t))
	for stops := range 2 * (most + 1) {
		server := socket{port: knockPort + stops, backlog: backlog}
		listener := server.listen(t, s.NS)
		s.armTCP(t, uint16(server.port))
		t.Run(fmt.Sprintf("after %d probes", stops), func(t *testing.T) {
			t.Parallel()
			to := netip.AddrPortFrom(s.families()[stops%2], uint16(server.port))
			for range stops {
				if _, passed := s.knock(t, to); !passed {
					continue
				}
				conn, err := listener.Accept()
				if err != nil {
					t.Fatal(err)
				}
				_ = conn.Close()
				time.Sleep(accepted)
			}
			if n := untilFailure(t, s.Node, to, accepted); n < backlog+2 || n > backlog+2+most {
				t.Errorf("first failure: probe %d, want %d to %d", n, backlog+2, backlog+2+most)
			}
		})
	}
}

// A process is stopped, and its queue has the length that Go chooses.
func TestStoppedProcess(t *testing.T) {
	const backlog, most = 4096, 9
	if limit, err := os.ReadFile("/proc/sys/net/core/somaxconn"); err != nil || string(limit) != "4096\n" {
		t.Skipf("Go listens with a backlog of %s, %v", limit, err)
	}
	s := knockable(t, newWorld(t))
	server := startServer(t, s.Pod, fmt.Sprint(":", knockPort))
	s.armTCP(t, knockPort)
	if ok, passed := s.knock(t, netip.AddrPortFrom(s.IPv4, knockPort)); !ok || passed {
		t.Fatalf("running: succeeded: %v, passed on: %v", ok, passed)
	}
	if err := server.Process.Signal(unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if n := untilFailure(t, s.Node, netip.AddrPortFrom(s.IPv4, knockPort), 0); n < backlog+2 || n > backlog+2+most {
		t.Errorf("first failure: probe %d, want %d to %d", n, backlog+2, backlog+2+most)
	}
	if o := s.obstacle(t, knockPort); o != "head_old" {
		t.Errorf("passed on last because of %q", o)
	}
}

// For an HTTP probe the listening socket has only a veto.
func TestListenerVeto(t *testing.T) {
	s := knockable(t, newWorld(t))
	wantPassed := func(to netip.AddrPort, obstacle string) {
		t.Helper()
		before := s.counters(t)
		connects(t, s.Node, to)
		after := s.counters(t)
		if obstacle == "" && after["answered_tcp"] != before["answered_tcp"]+1 {
			t.Errorf("%v: not taken, because of %q", to, s.obstacle(t, knockPort))
		}
		if obstacle != "" && after["passed_"+obstacle] != before["passed_"+obstacle]+1 {
			t.Errorf("%v: not passed on because of %q, but %q", to, obstacle, s.obstacle(t, knockPort))
		}
	}
	for _, addr := range s.families() {
		to := netip.AddrPortFrom(addr, knockPort)
		s.armPort(t, knockPort)
		wantPassed(to, "no_listener")
		s.armPort(t, knockPort) // again, after a refusal
		listener := socket{backlog: 5, set: filtered}.listen(t, s.NS)
		for range 20 { // no K, and a filter is nothing special
			wantPassed(to, "")
		}
		waiting := bpftest.Dial(t, s.NS, to.String())
		wantPassed(to, "")
		time.Sleep(accepted)
		wantPassed(to, "head_old")
		bpftest.AcceptAll(listener)
		polltest.Eventually(t, "the queue is empty", func() bool {
			before := s.counters(t)["answered_tcp"]
			connects(t, s.Node, to)
			return s.counters(t)["answered_tcp"] > before
		})
		if err := errors.Join(waiting.Close(), listener.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// Without a cookie, steer adopts that of the first socket in the namespace with the right inode number. With a cookie it looks into no
// other namespace.
func TestOnlyThePodsSocketsCount(t *testing.T) {
	w := newWorld(t)
	for name, c := range map[string]struct {
		target func(target *attach.Target, cookie uint64)
		passed bool
	}{
		"its cookie":              {func(target *attach.Target, cookie uint64) { target.NetnsCookie = cookie }, false},
		"another cookie":          {func(target *attach.Target, cookie uint64) { target.NetnsCookie = cookie + 1 }, true},
		"its inode number":        {func(*attach.Target, uint64) {}, false},
		"another inode number":    {func(target *attach.Target, _ uint64) { target.PodNetns++ }, true},
		"its cookie, which alone": {func(target *attach.Target, cookie uint64) { target.NetnsCookie, target.PodNetns = cookie, 1 }, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := knockable(t, w.withNewPod(t))
			s.listens(socket{backlog: 128})(t)
			cookie := bpftest.NetnsCookie(t, s.NS)
			target := s.world(t).target(attach.HookTC)
			c.target(&target, cookie)
			s.world(t).must(inNS(s.Node.NS, func() error { return attach.Attach(s.d, s.bpfDir, servedID, target, attach.ViaAuto) }))
			s.armTCP(t, knockPort)
			ok, passed := s.knock(t, netip.AddrPortFrom(s.IPv4, knockPort)) // on trial
			if !ok || passed != c.passed {
				t.Errorf("succeeded: %v, passed on: %v, because of %q", ok, passed, s.obstacle(t, knockPort))
			}
			if got := s.device(t).NetnsCookie; !c.passed && got != cookie {
				t.Errorf("the cookie is %d, want %d", got, cookie)
			}
		})
	}
}

// A pod's namespace is gone, and the next pod's has received its id and listens there. The device still exists, because its other
// end was moved elsewhere.
func TestReusedNamespaceID(t *testing.T) {
	w := newWorld(t)
	node, elsewhere := w.pod.Node, w.pod.NS
	gone, err := testutils.NewNS()
	w.must(err)
	pod := &bpftest.Pod{Node: node, IPv4: netip.MustParseAddr("10.99.0.8")}
	bpftest.Do(t, node.NS, func() error {
		return netlink.LinkAdd(&netlink.Veth{
			LinkAttrs: netlink.LinkAttrs{Name: "host9"}, PeerName: "pod9", PeerNamespace: netlink.NsFd(int(gone.Fd())),
		})
	})
	bpftest.Do(t, node.NS, func() error {
		device, err := netlink.LinkByName("host9")
		pod.IfIndex = device.Attrs().Index
		return errors.Join(err, bpftest.Configure("host9", netip.MustParseAddr("10.99.0.1")))
	})
	w.pod, w.id = pod, servedID
	target := attach.Target{IfIndex: pod.IfIndex, NetnsCookie: bpftest.NetnsCookie(t, gone)}
	w.must(w.inNode(func() error { return attach.Attach(w.d, w.bpfDir, w.id, target, attach.ViaAuto) }))
	w.wantWhole()

	bpftest.Do(t, gone, func() error {
		device, err := netlink.LinkByName("pod9")
		return errors.Join(err, netlink.LinkSetNsFd(device, int(elsewhere.Fd())))
	})
	bpftest.Do(t, elsewhere, func() error { return bpftest.Configure("pod9", pod.IPv4) })
	w.must(errors.Join(gone.Close(), unix.Unmount(gone.Path(), unix.MNT_DETACH), os.Remove(gone.Path())))
	next := bpftest.NewNode(t).NS
	s := &served{Pod: pod, d: w.d, bpfDir: w.bpfDir}
	id := s.device(t).NSID
	polltest.Eventually(t, "the id is free", func() bool {
		return w.inNode(func() error { return netlink.SetNetNsIdByFd(int(next.Fd()), id) }) == nil
	})
	bpftest.AcceptAll(socket{backlog: 128}.listen(t, next))

	w.must(w.d.SetProber(datapath.Prober{AnyLocal: true}))
	s.armTCP(t, knockPort)
	to := netip.AddrPortFrom(pod.IPv4, knockPort)
	if ok, passed := s.knock(t, to); ok || !passed || s.obstacle(t, knockPort) != "no_listener" {
		t.Errorf("succeeded: %v, passed on: %v, because of %q", ok, passed, s.obstacle(t, knockPort))
	}
	if err := w.check(); !errors.Is(err, attach.ErrIncomplete) {
		t.Errorf("the device leads elsewhere: %v", err)
	}
	// Proves that this is a test: without the cookie the socket would have been mistaken for the pod's.
	w.must(w.d.LookInto(s.device(t).Key, id, bpftest.NetnsCookie(t, next)))
	s.armTCP(t, knockPort)
	if ok, passed := s.knock(t, to); !ok || passed {
		t.Errorf("with the next pod's cookie: succeeded: %v, passed on: %v", ok, passed)
	}
}

// A listening socket that closes while its device is put on trial again still voids the pod's evidence.
func TestTrustAgainKeepsWithdrawals(t *testing.T) {
	s := knockable(t, newWorld(t))
	key := s.device(t).Key
	for range 100 {
		listener := socket{port: knockPort, address: netip.IPv4Unspecified(), backlog: 5}.listen(t, s.NS)
		before := datapath.Now()
		closed := make(chan error)
		go func() { closed <- listener.Close() }()
		for open := true; open; {
			select {
			case err := <-closed:
				if err != nil {
					t.Fatal(err)
				}
				open = false
			default:
			}
			if err := s.d.TrustAgain(key); err != nil {
				t.Fatal(err)
			}
		}
		if at := s.device(t).WithdrawnAt; at < before {
			t.Fatalf("withdrawn at %d, but a listening socket was closed after %d", at, before)
		}
	}
}
