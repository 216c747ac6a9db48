package attach_test

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/vishvananda/netlink"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/internal/polltest"
)

const echoPort = 7

// serveEcho makes the pod echo on echoPort, and connections to it taken.
func (s *served) serveEcho(t testing.TB) {
	t.Helper()
	s.serveEchoOn(t, echoPort)
}

// echo sends bytes until stop is closed, and compares what comes back.
func echo(conn net.Conn, stop <-chan struct{}) error {
	defer conn.Close() //nolint:errcheck // a test's
	if err := conn.SetDeadline(time.Now().Add(time.Minute)); err != nil {
		return err
	}
	var seed [32]byte
	sent := make(chan error, 1)
	go func() {
		block, source := make([]byte, 32<<10), rand.NewChaCha8(seed)
		for {
			_, _ = source.Read(block)
			if _, err := conn.Write(block); err != nil {
				sent <- err
				return
			}
			select {
			case <-stop:
				sent <- conn.(*net.TCPConn).CloseWrite()
				return
			default:
			}
		}
	}()
	got, want, source := make([]byte, 32<<10), make([]byte, 32<<10), rand.NewChaCha8(seed)
	for received := 0; ; received += len(got) {
		_, err := io.ReadFull(conn, got)
		if errors.Is(err, io.EOF) {
			return <-sent
		}
		if err != nil {
			return fmt.Errorf("after %d bytes: %w", received, err)
		}
		if _, _ = source.Read(want); !bytes.Equal(got, want) {
			return fmt.Errorf("received different bytes within 32 KiB after %d", received)
		}
	}
}

// request sends a request from the current namespace and returns everything that comes back.
func request(address, text string) (string, error) {
	conn, err := net.DialTimeout("tcp", address, 20*time.Second)
	if err != nil {
		return "", err
	}
	defer conn.Close() //nolint:errcheck // a test's
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(conn, text); err != nil {
		return "", err
	}
	reply, err := io.ReadAll(conn)
	return string(reply), err
}

const (
	fresh   = probe // answered
	unknown = "GET /x HTTP/1.1\r\nHost: pod\r\nConnection: close\r\n\r\n"
)

// mixed sends requests that are answered and requests that are handed over, alternately.
func mixed(address string) error {
	reply, err := request(address, fresh)
	if err != nil || !strings.Contains(reply, hit) {
		return fmt.Errorf("answered: %q, %w", reply, err)
	}
	reply, err = request(address, unknown)
	if err != nil || !strings.HasSuffix(reply, "GET /x 0") {
		return fmt.Errorf("handed over: %q, %w", reply, err)
	}
	return nil
}

// keptAlive makes several requests on one connection, which is handed over.
func keptAlive(address string) error {
	conn, err := net.DialTimeout("tcp", address, 20*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // a test's
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		return err
	}
	replies := bufio.NewReader(conn)
	for i := range 5 {
		body := strings.Repeat("x", 3000*i)
		if _, err := fmt.Fprintf(conn, "POST /%d HTTP/1.1\r\nHost: pod\r\nContent-Length: %d\r\n\r\n%s", i, len(body), body); err != nil {
			return err
		}
		reply, err := http.ReadResponse(replies, nil)
		if err != nil {
			return err
		}
		got, err := io.ReadAll(reply.Body)
		if want := fmt.Sprintf("POST /%d %d", i, len(body)); err != nil || string(got) != want {
			return fmt.Errorf("got %q, want %q, %w", got, want, err)
		}
	}
	return nil
}

// wantAll asserts, over both families, that answers and handed-over connections work, and that requests are treated as expected.
func (s *served) wantAll(t testing.TB) {
	t.Helper()
	s.wantAllBy(t, s.IPv4, s.IPv6)
}

func (s *served) wantAllBy(t testing.TB, addrs ...netip.Addr) {
	t.Helper()
	answered, handed := s.counted(t, func() {
		for _, addr := range addrs {
			address := netip.AddrPortFrom(addr, 8080).String()
			bpftest.Do(t, s.Node.NS, func() error {
				for range 3 {
					if err := mixed(address); err != nil {
						return fmt.Errorf("%s: %w", address, err)
					}
				}
				if err := keptAlive(address); err != nil {
					return fmt.Errorf("%s, kept alive: %w", address, err)
				}
				return nil
			})
		}
	})
	if n := uint64(len(addrs)); answered != 3*n || handed != 4*n {
		t.Errorf("answered %d, handed over %d; want %d, %d", answered, handed, 3*n, 4*n)
	}
}

// counted returns how many HTTP probes were answered, and how many connections were handed over, while f ran.
func (s *served) counted(t testing.TB, f func()) (answered, handed uint64) {
	t.Helper()
	before, err := s.d.Counters()
	if err != nil {
		t.Fatal(err)
	}
	f()
	after, err := s.d.Counters()
	if err != nil {
		t.Fatal(err)
	}
	return after["answered_http"] - before["answered_http"], after["handed_over"] - before["handed_over"]
}

// During promotion each program is attached twice.
func TestAttachedTwiceBehavesLikeOnce(t *testing.T) {
	requireTCX(t)
	for _, hook := range []attach.Hook{attach.HookTC, attach.HookXDP} {
		t.Run(string(hook), func(t *testing.T) {
			s := serve(t, bpftest.NewNode(t).AddPod(t), way{hook, attach.ViaClsact})
			w := s.world(t)
			w.tcx(s.d.Observe(), ebpf.AttachTCXIngress, link.Head())
			w.tcx(s.d.Steer(), ebpf.AttachTCXEgress, link.Head())
			s.wantAll(t)
			polltest.Eventually(t, "the flow table is empty", func() bool {
				n, err := s.d.Flows()
				return err == nil && n == 0
			})
		})
	}
}

// tcx attaches a program until the test ends.
func (w *world) tcx(program *ebpf.Program, side ebpf.AttachType, where link.Anchor) link.Link {
	w.t.Helper()
	var l link.Link
	w.do(func(device netlink.Link) (err error) {
		l, err = link.AttachTCX(link.TCXOptions{Program: program, Interface: device.Attrs().Index, Attach: side, Anchor: where})
		return err
	})
	w.t.Cleanup(func() { _ = l.Close() })
	return l
}

func (w *world) promote() error {
	w.t.Helper()
	return w.inNode(func() error { return attach.Promote(w.d, w.bpfDir, w.id) })
}

func TestPromoteUnderTraffic(t *testing.T) {
	requireTCX(t)
	for _, hook := range []attach.Hook{attach.HookTC, attach.HookXDP} {
		t.Run(string(hook), func(t *testing.T) {
			clsact := way{hook, attach.ViaClsact}
			s := serve(t, bpftest.NewNode(t).AddPod(t), clsact)
			s.serveEcho(t)
			w := s.world(t)
			for range 5 {
				s.wantAll(t)
				before, err := s.d.Counters()
				w.must(err)
				end := s.traffic(t)
				w.must(w.promote())
				if attach.Promotable(w.bpfDir, w.id) || !w.isTCX() {
					t.Error("still on clsact")
				}
				end()
				w.wantWhole()
				for thing := range w.state() {
					if strings.HasPrefix(thing, "filter") {
						t.Errorf("left: %s", thing)
					}
				}
				after, err := s.d.Counters()
				w.must(err)
				if after["devices_lost"] != before["devices_lost"] {
					t.Error("trust was lost")
				}
				s.wantAll(t)
				w.attach(clsact) // which discards the evidence
				s.arm(t)
				s.armPort(t, echoPort)
			}
		})
	}
}

// traffic starts all kinds of traffic with the pod. The returned function stops it, and fails the test if any connection
// broke.
func (s *served) traffic(t *testing.T) (end func()) {
	t.Helper()
	stop := make(chan struct{})
	var running sync.WaitGroup
	var begun sync.WaitGroup
	run := func(f func() error) {
		running.Add(1)
		begun.Add(1)
		go func() {
			defer running.Done()
			if err := s.Node.NS.Do(func(ns.NetNS) error { begun.Done(); return f() }); err != nil {
				t.Error(err)
			}
		}()
	}
	for _, addr := range []netip.Addr{s.IPv4, s.IPv6} {
		bulk := s.Dial(t, netip.AddrPortFrom(addr, echoPort).String())
		run(func() error { return echo(bulk, stop) })
		address := netip.AddrPortFrom(addr, 8080).String()
		run(func() error {
			for {
				if err := errors.Join(mixed(address), keptAlive(address)); err != nil {
					return fmt.Errorf("%s: %w", address, err)
				}
				select {
				case <-stop:
					return nil
				default:
				}
			}
		})
	}
	begun.Wait()
	return func() {
		t.Helper()
		close(stop)
		running.Wait()
	}
}

// The daemon repairs an attachment by attaching again, which handed-over connections survive.
func TestConnectionsOutliveReattach(t *testing.T) {
	for _, way := range ways {
		t.Run(way.String(), func(t *testing.T) {
			s := serve(t, bpftest.NewNode(t).AddPod(t), way)
			s.serveEcho(t)
			w := s.world(t)
			s.wantAll(t)
			stop, done := make(chan struct{}), make(chan error, 2)
			for _, addr := range []netip.Addr{s.IPv4, s.IPv6} {
				conn := s.Dial(t, netip.AddrPortFrom(addr, echoPort).String())
				go func() { done <- echo(conn, stop) }()
			}
			polltest.Eventually(t, "the connections are handed over", func() bool {
				counters, err := s.d.Counters()
				return err == nil && counters["handed_over"] == 8+2
			})
			for range 3 {
				w.attach(way)
			}
			w.wantWhole()
			close(stop)
			w.must(errors.Join(<-done, <-done))
		})
	}
}

// A tcx program that ends the chain keeps clsact from running. After promotion we run before it.
func TestPromotedRunsFirst(t *testing.T) {
	requireTCX(t)
	for side, hook := range tcxSides {
		t.Run(side, func(t *testing.T) {
			s := serve(t, bpftest.NewNode(t).AddPod(t), way{attach.HookTC, attach.ViaClsact})
			w := s.world(t)
			w.tcx(verdictProgram(t, verdictOK), hook, nil)
			_, _ = w.ask(fresh) // if answers bypass observe, the first one reveals that
			if reply, err := w.ask(fresh); err != nil || strings.Contains(reply, hit) {
				t.Errorf("before: %q, %v", reply, err)
			}
			w.must(w.promote())
			w.wantWhole()
			_, _ = w.ask(fresh) // observe did not see the pod answer the connection last passed on
			s.wantAll(t)
		})
	}
}

// ask sends a request to the pod's port 8080 from the node.
func (w *world) ask(text string) (reply string, err error) {
	w.t.Helper()
	err = w.inNode(func() (err error) {
		reply, err = request(netip.AddrPortFrom(w.pod.IPv4, 8080).String(), text)
		return err
	})
	return reply, err
}

// An interrupted promotion is completed by the next one.
func TestInterruptedPromotion(t *testing.T) {
	requireTCX(t)
	pin := func(w *world, name string, program *ebpf.Program, side ebpf.AttachType) {
		l := w.tcx(program, side, link.Head())
		w.must(errors.Join(l.Pin(filepath.Join(w.dir(), name)), l.Close()))
	}
	observe := func(w *world) { pin(w, "observe", w.d.Observe(), ebpf.AttachTCXIngress) }
	steer := func(w *world) { pin(w, "steer", w.d.Steer(), ebpf.AttachTCXEgress) }
	filters := func(w *world) {
		w.do(func(device netlink.Link) error {
			return errors.Join(deleteFilters(device, netlink.HANDLE_MIN_INGRESS, "probelet/"), deleteFilters(device, netlink.HANDLE_MIN_EGRESS, "probelet/"))
		})
	}
	qdisc := func(w *world) {
		w.do(func(device netlink.Link) error { return netlink.QdiscDel(clsactQdisc(device.Attrs().Index)) })
	}
	for name, done := range map[string][]func(*world){
		"nothing": {}, "observe": {observe}, "both": {observe, steer}, "without filters": {observe, steer, filters},
		"without qdisc": {observe, steer, filters, qdisc},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			before := w.state()
			for _, then := range []func() error{w.promote, func() error { w.detach(); return nil }} {
				w.attach(way{attach.HookTC, attach.ViaClsact})
				for _, do := range done {
					do(w)
				}
				if !attach.Promotable(w.bpfDir, w.id) {
					t.Error("mistaken for promoted")
				}
				w.must(then())
			}
			w.wantState(before)
			w.attach(way{attach.HookTC, attach.ViaClsact})
			for _, do := range done {
				do(w)
			}
			w.must(w.promote())
			w.wantWhole()
			promoted := w.state()
			w.attach(way{attach.HookTC, attach.ViaTCX})
			if fresh := w.state(); len(fresh) != len(promoted) {
				t.Errorf("left behind: %v; a fresh attachment has %v", promoted, fresh)
			}
		})
	}
}

func TestPromoteIsIdempotent(t *testing.T) {
	requireTCX(t)
	w := newWorld(t)
	if err := w.promote(); !errors.Is(err, os.ErrNotExist) || attach.Promotable(w.bpfDir, w.id) {
		t.Errorf("not attached: %v", err)
	}
	w.attach(way{attach.HookTC, attach.ViaTCX})
	before := w.state()
	if attach.Promotable(w.bpfDir, w.id) {
		t.Error("promotable although it has tcx links")
	}
	w.must(w.promote())
	w.wantState(before)
}

// Adding or removing a qdisc makes the kernel drop what the host sends to the pod for some milliseconds.
func TestAttachingLosesNoPackets(t *testing.T) {
	requireTCX(t)
	w := newWorld(t)
	for range 5 {
		w.release() // removes the qdisc
		w.attach(way{attach.HookTC, attach.ViaClsact})
		for _, change := range []struct {
			name string
			do   func()
		}{
			{"promoting", func() { w.must(w.promote()) }},
			{"attaching again", func() { w.attach(way{attach.HookTC, attach.ViaAuto}) }},
			{"detaching", w.detach},
		} {
			sent, received := w.countDatagrams(change.do)
			if sent == 0 || received != sent {
				t.Errorf("%s: %d of %d datagrams arrived", change.name, received, sent)
			}
		}
	}
}

// countDatagrams sends datagrams to the pod one by one while f runs, and returns how many were sent and how many arrived.
func (w *world) countDatagrams(f func()) (sent, received int) {
	w.t.Helper()
	var to net.PacketConn
	w.must(w.pod.NS.Do(func(ns.NetNS) (err error) {
		to, err = net.ListenPacket("udp", netip.AddrPortFrom(w.pod.IPv4, 0).String())
		return err
	}))
	defer to.Close() //nolint:errcheck // a test's
	var from net.Conn
	w.must(w.inNode(func() (err error) { from, err = net.Dial("udp", to.LocalAddr().String()); return err }))
	defer from.Close() //nolint:errcheck // a test's

	begun, stop, counted := make(chan struct{}), make(chan struct{}), make(chan int)
	go func() {
		n := 0
		for buffer := make([]byte, 1); ; n++ {
			if _, _, err := to.ReadFrom(buffer); err != nil || buffer[0] == 1 {
				counted <- n
				return
			}
		}
	}()
	go func() {
		n := 0
		for ; ; n++ {
			select {
			case <-stop:
				counted <- n
				return
			default:
			}
			_, _ = from.Write([]byte{0})
			if n == 0 {
				close(begun)
			}
			if n%64 == 0 {
				time.Sleep(time.Millisecond) // so that the receive buffer is never full
			}
		}
	}()
	<-begun
	f()
	close(stop)
	sent = <-counted
	_, err := from.Write([]byte{1})
	w.must(err)
	w.must(to.SetReadDeadline(time.Now().Add(10 * time.Second)))
	return sent, <-counted
}

// Releasing a device that is about to be removed also removes our qdisc, whether promoted or not.
func TestReleaseRemovesTheQdisc(t *testing.T) {
	requireTCX(t)
	for name, promoted := range map[string]bool{"clsact": false, "promoted": true} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.attach(way{attach.HookTC, attach.ViaClsact})
			if promoted {
				w.must(w.promote())
			}
			if w.state()[clsactKey] != 1 {
				t.Fatal("no qdisc")
			}
			w.release()
			if s := w.state(); s[clsactKey] != 0 {
				t.Errorf("left: %v", s)
			}
		})
	}
}

// Our qdisc stays as long as others use it.
func TestPromoteLeavesASharedQdisc(t *testing.T) {
	requireTCX(t)
	w := newWorld(t)
	before := w.state()
	w.attach(way{attach.HookTC, attach.ViaClsact})
	theirs := verdictProgram(t, verdictNext)
	w.do(func(device netlink.Link) error {
		return netlink.FilterAdd(bpfFilter(device.Attrs().Index, netlink.HANDLE_MIN_INGRESS, 7, theirs))
	})
	w.must(w.promote())
	w.wantWhole()
	if s := w.state(); s["qdisc clsact"] != 1 || s["filter at ingress, priority 7"] != 1 || s["filter at egress, priority 2"] != 0 {
		t.Errorf("%v", s)
	}
	w.do(func(device netlink.Link) error { return deleteFilters(device, netlink.HANDLE_MIN_INGRESS, "theirs") })
	w.detach()
	w.wantState(before)
}
