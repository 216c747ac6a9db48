package attach_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/containernetworking/plugins/pkg/ns"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
)

// result describes how a probe went.
type result struct {
	reply   string
	err     error
	delayed bool // its SYN or its request was sent again
}

func (r result) String() string { return fmt.Sprintf("%q, %v, delayed %v", r.reply, r.err, r.delayed) }

// probeFrom probes /healthz from a namespace. timeout, if not 0, limits the time to connect.
func probeFrom(from ns.NetNS, address string, timeout time.Duration) (r result) {
	err := from.Do(func(ns.NetNS) error {
		r = probeOnce(address, timeout)
		return nil
	})
	r.err = errors.Join(r.err, err)
	return r
}

func probeOnce(address string, timeout time.Duration) (r result) {
	conn, err := net.DialTimeout("tcp", address, timeout)
	if err != nil {
		return result{err: err}
	}
	defer conn.Close() //nolint:errcheck // a test's
	_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
	if _, err := io.WriteString(conn, fresh); err != nil {
		return result{err: err}
	}
	reply, err := io.ReadAll(conn)
	return result{string(reply), err, retransmitted(conn)}
}

func retransmitted(conn net.Conn) bool {
	socket, err := conn.(*net.TCPConn).SyscallConn()
	if err != nil {
		return false
	}
	var again bool
	_ = socket.Control(func(fd uintptr) {
		info, err := unix.GetsockoptTCPInfo(int(fd), unix.IPPROTO_TCP, unix.TCP_INFO)
		again = err == nil && info.Total_retrans > 0
	})
	return again
}

// device returns what the programs know about the pod's device.
func (w *world) device() datapath.Device {
	w.t.Helper()
	devices, err := w.d.Devices()
	w.must(err)
	return devices[uint32(w.pod.IfIndex)]
}

func (w *world) wantTrust(trust datapath.Trust, losses ...string) {
	w.t.Helper()
	device := w.device()
	known := trust != datapath.TrustLost && device.Loss == "" && device.LostAt == 0
	for _, loss := range losses {
		known = known || device.Loss == loss && device.LostAt != 0
	}
	if device.Trust != trust || !known {
		w.t.Errorf("%+v, want trust %v, loss %v", device, trust, losses)
	}
}

// wantPassed asserts that probes and other requests reach the pod as if we were not there.
func (s *served) wantPassed(t testing.TB) {
	t.Helper()
	s.wantPassedBy(t, s.IPv4, s.IPv6)
}

func (s *served) wantPassedBy(t testing.TB, addrs ...netip.Addr) {
	t.Helper()
	for _, addr := range addrs {
		address := netip.AddrPortFrom(addr, 8080).String()
		for range 3 {
			r := probeFrom(s.Node.NS, address, patience)
			if r.err != nil || r.delayed || !strings.HasSuffix(r.reply, "GET /healthz 0") {
				t.Errorf("%s: %v", address, r)
			}
		}
		bpftest.Do(t, s.Node.NS, func() error { return keptAlive(address) })
	}
}

// culprits drop our answers, but not what the pod sends. Each returns a function that removes it.
var culprits = map[string]func(t *testing.T, s *served) (remove func()){
	// A policy engine that saw no SYN go to the pod accepts no SYN-ACK from it.
	"policy": func(t *testing.T, s *served) func() {
		w, p := s.world(t), newPolicy(t)
		if w.isTCX() {
			egress := w.tcx(p.egress, ebpf.AttachTCXEgress, nil)
			ingress := w.tcx(p.ingress, ebpf.AttachTCXIngress, nil)
			return func() { w.must(errors.Join(egress.Close(), ingress.Close())) }
		}
		w.do(func(device netlink.Link) error {
			return errors.Join(
				netlink.FilterAdd(bpfFilter(device.Attrs().Index, netlink.HANDLE_MIN_EGRESS, 100, p.egress)),
				netlink.FilterAdd(bpfFilter(device.Attrs().Index, netlink.HANDLE_MIN_INGRESS, 100, p.ingress)),
			)
		})
		return func() {
			w.do(func(device netlink.Link) error {
				return errors.Join(deleteFilters(device, netlink.HANDLE_MIN_EGRESS, "theirs"), deleteFilters(device, netlink.HANDLE_MIN_INGRESS, "theirs"))
			})
		}
	},
	// A firewall considers a SYN-ACK with no option but the MSS forged.
	"netfilter": func(t *testing.T, s *served) func() {
		f := newFirewall(t, s.Node)
		f.chain("forged", prerouting, rule(tcpFlags(0xf012, 0x6012), then(drop)))
		return f.remove
	},
}

// eachCulprit runs a test beside each of them, on a new device.
func eachCulprit(t *testing.T, test func(t *testing.T, s *served, remove func())) {
	t.Helper()
	for name, install := range culprits {
		for _, way := range ways {
			t.Run(name+" "+way.String(), func(t *testing.T) {
				t.Parallel()
				s := serve(t, bpftest.NewNode(t).AddPod(t), way)
				test(t, s, install(t, s))
			})
		}
	}
}

// One probe is delayed. Then every probe reaches the pod, until an administrator trusts the device or it is attached again.
func TestTrustIsLostByOneProbe(t *testing.T) {
	eachCulprit(t, func(t *testing.T, s *served, remove func()) {
		w := s.world(t)
		w.wantTrust(datapath.TrustUnproven)
		address := netip.AddrPortFrom(s.IPv4, 8080).String()
		lose := func() {
			t.Helper()
			r := probeFrom(s.Node.NS, address, patience)
			if r.err != nil || !r.delayed || !strings.HasSuffix(r.reply, "GET /healthz 0") {
				t.Errorf("the first: %v", r)
			}
			w.wantTrust(datapath.TrustLost, "syn_repeated")
			s.wantPassed(t)
		}
		lose()
		w.must(w.d.TrustAgain(w.device().Key))
		w.wantTrust(datapath.TrustUnproven)
		lose()

		remove()
		s.wantPassed(t)
		w.must(w.d.TrustAgain(w.device().Key))
		s.wantAll(t)
		w.wantTrust(datapath.TrustProven)
	})
}

// Attaching again starts another trial, too.
func TestReattachRestoresTrust(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		s := w.serve(way)
		remove := culprits["netfilter"](t, s)
		_ = probeFrom(s.Node.NS, netip.AddrPortFrom(s.IPv4, 8080).String(), patience)
		w.wantTrust(datapath.TrustLost, "syn_repeated")
		lost := w.device().Key
		remove()
		w.attach(way)
		s.arm(t)
		w.wantTrust(datapath.TrustUnproven)
		s.wantAll(t)
		w.wantTrust(datapath.TrustProven)
		if err := w.d.TrustAgain(lost); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("previous attachment of the device: %v", err)
		}
	})
}

// Many probes arrive at a new device at once. One becomes the trial, and the others do not wait for it.
func TestOneOfManyProbesIsTheTrial(t *testing.T) {
	eachCulprit(t, func(t *testing.T, s *served, _ func()) {
		bad := 0
		for _, r := range probeAtOnce(s, 50) {
			if r.err != nil || r.delayed {
				bad++
			} else if strings.Contains(r.reply, hit) {
				t.Errorf("answered: %v", r)
			}
		}
		if bad > 1 {
			t.Errorf("%d were delayed or failed, want at most 1", bad)
		}
		s.world(t).wantTrust(datapath.TrustLost, "syn_repeated", "unacknowledged")
		s.wantPassed(t)
	})
}

// With nothing in the way, no probe is delayed, and the device becomes trusted.
func TestConcurrentProbesEarnTrust(t *testing.T) {
	for _, way := range ways {
		s := serve(t, bpftest.NewNode(t).AddPod(t), way)
		for _, r := range probeAtOnce(s, 50) {
			if r.err != nil || r.delayed || r.reply == "" {
				t.Errorf("%s: %v", way, r)
			}
		}
		s.world(t).wantTrust(datapath.TrustProven)
		s.wantAll(t)
	}
}

// probeAtOnce sends n concurrent probes over both families.
func probeAtOnce(s *served, n int) []result {
	results := make([]result, n)
	var running sync.WaitGroup
	start := make(chan struct{})
	for i := range results {
		addr := []netip.Addr{s.IPv4, s.IPv6}[i%2]
		running.Go(func() {
			<-start
			results[i] = probeFrom(s.Node.NS, netip.AddrPortFrom(addr, 8080).String(), patience)
		})
	}
	close(start)
	running.Wait()
	return results
}

// A prober may give up before it repeats its SYN.
func TestTrustIsLostByProbersThatGiveUp(t *testing.T) {
	eachCulprit(t, func(t *testing.T, s *served, _ func()) {
		for _, timeout := range []time.Duration{900 * time.Millisecond, time.Second} {
			w := s.world(t)
			w.must(w.d.TrustAgain(w.device().Key))
			if n := s.failures(4, timeout, 8080)[8080]; n != 1 {
				t.Errorf("%d probes were lost with a timeout of %v, want 1", n, timeout)
			}
			w.wantTrust(datapath.TrustLost, "unacknowledged", "syn_repeated")
		}
		s.wantPassed(t)
	})
}

// failures probes some ports in turn, n times, and returns how many probes of each failed or were delayed.
func (s *served) failures(n int, timeout time.Duration, ports ...uint16) map[uint16]int {
	failed := map[uint16]int{}
	for range n {
		for _, port := range ports {
			r := probeFrom(s.Node.NS, netip.AddrPortFrom(s.IPv4, port).String(), timeout)
			if r.err != nil || r.delayed {
				failed[port]++
			}
		}
	}
	return failed
}

// A firewall that appears when answers have been arriving for a long time costs each port at most one probe.
func TestEarnedTrustIsLost(t *testing.T) {
	for _, timeout := range []time.Duration{900 * time.Millisecond, patience} {
		for _, way := range ways {
			t.Run(fmt.Sprintf("%s timeout %v", way, timeout), func(t *testing.T) {
				t.Parallel()
				s := serve(t, bpftest.NewNode(t).AddPod(t), way)
				listener := s.Listen(t, 8081)
				go answerAll(listener)
				s.armPort(t, 8081)
				s.wantAll(t)
				w := s.world(t)
				w.wantTrust(datapath.TrustProven)
				culprits["netfilter"](t, s)
				for port, n := range s.failures(4, timeout, 8080, 8081) {
					if n > 1 {
						t.Errorf("port %d lost %d probes, want at most 1", port, n)
					}
				}
				w.wantTrust(datapath.TrustLost, "unacknowledged", "syn_repeated")
				s.wantPassed(t)
			})
		}
	}
}

func answerAll(listener net.Listener) {
	for {
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		_, _ = conn.Read(make([]byte, 1024))
		_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
		_ = conn.Close()
	}
}

// If the answer to the request is dropped, but not the one to the SYN, the client's repeated request reaches the pod.
func TestTrustIsLostByARepeatedRequest(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		s := w.serve(way)
		f := newFirewall(t, s.Node)
		f.chain("forged", prerouting, rule(tcpFlags(0x09, 0x09), then(&expr.Counter{}, drop))) // PSH and FIN
		for _, addr := range []netip.Addr{s.IPv4, s.IPv6} {
			if r := probeFrom(s.Node.NS, netip.AddrPortFrom(addr, 8080).String(), patience); !strings.HasSuffix(r.reply, "GET /healthz 0") {
				t.Errorf("%v", r)
			}
		}
		if f.counted("forged") == 0 {
			t.Error("nothing was dropped")
		}
		s.world(t).wantTrust(datapath.TrustLost, "request_repeated")
		s.wantPassed(t)
	})
}
