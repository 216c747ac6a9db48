package attach_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/internal/polltest"
)

// placement describes where and when a neighbour attaches its program.
type placement struct {
	name     string
	earlier  bool // than ours
	tcx      bool
	anchor   link.Anchor // for tcx; nil: after existing programs
	priority uint16      // of a filter
	// Whether it then runs before ours, if those are tcx links or filters.
	beforeTCX, beforeFilters bool
}

var placements = []placement{
	{name: "tcx, earlier", earlier: true, tcx: true, beforeFilters: true},
	{name: "tcx, later", tcx: true, beforeFilters: true},
	{name: "tcx, later, at the head", tcx: true, anchor: link.Head(), beforeTCX: true, beforeFilters: true},
	{name: "filter, earlier, priority 1", earlier: true, priority: 1, beforeFilters: true},
	{name: "filter, later, priority 1", priority: 1, beforeFilters: true},
	{name: "filter, later, priority 100", priority: 100},
}

// put attaches the neighbour's program.
func (p placement) put(w *world, program *ebpf.Program, side string) {
	w.t.Helper()
	if p.tcx {
		w.tcx(program, tcxSides[side], p.anchor)
		return
	}
	w.do(func(device netlink.Link) error {
		if err := netlink.QdiscAdd(clsactQdisc(device.Attrs().Index)); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		return netlink.FilterAdd(bpfFilter(device.Attrs().Index, parents[side], p.priority, program))
	})
}

// beside attaches to the pod, and a neighbour's program to each of the given sides before or after that. It reports whether the
// neighbour's program runs first.
func (p placement) beside(w *world, way way, program *ebpf.Program, sides ...string) (s *served, first bool) {
	w.t.Helper()
	if p.tcx {
		requireTCX(w.t)
	}
	put := func(now bool) {
		if now {
			for _, side := range sides {
				p.put(w, program, side)
			}
		}
	}
	put(p.earlier)
	s = w.serve(way)
	put(!p.earlier)
	if w.isTCX() {
		return s, p.beforeTCX
	}
	return s, p.beforeFilters
}

// eachPlacement runs a test for each placement and each way of ours. IPv4 suffices, because both families pass the same programs.
func eachPlacement(t *testing.T, test func(t *testing.T, w *world, p placement, way way)) {
	t.Helper()
	w := newWorld(t)
	for _, p := range placements {
		for _, way := range ways {
			t.Run(p.name+", "+way.String(), func(t *testing.T) { test(t, w.withNewPod(t), p, way) })
		}
	}
}

// A neighbour that ends the chain hides what the node sends from us if it runs first. Then nothing is answered, and everything works.
func TestNeighbourEndsTheChainAtEgress(t *testing.T) {
	eachPlacement(t, func(t *testing.T, w *world, p placement, way way) {
		s, first := p.beside(w, way, verdictProgram(t, verdictOK), "egress")
		if !first {
			s.wantAllBy(t, s.IPv4)
			return
		}
		s.wantPassedBy(t, s.IPv4)
		w.wantTrust(datapath.TrustUnproven)
	})
}

// At ingress it hides what the pod sends. Answers arrive, but connections could not be handed over, so we stop taking them
// after the first one.
func TestNeighbourEndsTheChainAtIngress(t *testing.T) {
	eachPlacement(t, func(t *testing.T, w *world, p placement, way way) {
		s, first := p.beside(w, way, verdictProgram(t, verdictOK), "ingress")
		if !first {
			s.wantAllBy(t, s.IPv4)
			return
		}
		r := probeFrom(s.Node.NS, netip.AddrPortFrom(s.IPv4, 8080).String(), patience)
		if r.err != nil || r.delayed || !strings.Contains(r.reply, hit) {
			t.Errorf("the first: %v", r)
		}
		w.wantTrust(datapath.TrustLost, "unobserved")
		s.wantPassedBy(t, s.IPv4)
	})
}

// If the first connection cannot be answered, only that one is lost.
func TestOneProbeIsLostWhereNothingIsObserved(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		s := w.serve(way)
		head := placement{tcx: true, anchor: link.Head()}
		if !hasTCX(t) {
			head = placement{priority: 1}
		}
		head.put(w, verdictProgram(t, verdictOK), "ingress")
		conn := s.Dial(t, netip.AddrPortFrom(s.IPv4, 8080).String())
		if _, err := io.WriteString(conn, unknown); err != nil {
			t.Fatal(err)
		}
		polltest.Eventually(t, "trust is lost", func() bool { return w.device().Trust == datapath.TrustLost })
		s.wantPassedBy(t, s.IPv4)
		w.wantTrust(datapath.TrustLost, "unobserved")
	})
}

// A neighbour that passes every packet changes nothing, wherever it is. We name it and report whether it comes before ours.
func TestNeighbourPassesEverything(t *testing.T) {
	eachPlacement(t, func(t *testing.T, w *world, p placement, way way) {
		s, first := p.beside(w, way, verdictProgram(t, verdictNext), "ingress", "egress")
		s.wantAllBy(t, s.IPv4)
		w.wantWhole()
		p.wantNamed(w, w.checker(), first)

		// Where ours are not attached, or not even loaded, nothing comes before them.
		w.detach()
		p.wantNamed(w, w.checker(), false)
		p.wantNamed(w, &attach.Checker{}, false)
	})
}

// wantNamed asserts that the neighbour is named on both sides.
func (p placement) wantNamed(w *world, c *attach.Checker, before bool) {
	w.t.Helper()
	got := w.neighboursOf(c)
	if len(got) != 2 {
		w.t.Fatalf("%+v, want two", got)
	}
	for i, side := range []string{"ingress", "egress"} {
		hook, what := "tc filter "+side, fmt.Sprintf("bpf filter, priority %d, theirs", p.priority)
		if p.tcx {
			hook, what = "tcx "+side, "(theirs)"
		}
		if n := got[i]; n.Hook != hook || !strings.HasSuffix(n.What, what) || n.Before != before {
			w.t.Errorf("%+v, want %s, %s, before ours: %v", n, hook, what, before)
		}
	}
}

// Cilium's legacy loader and the AWS network policy agent replace the filter with priority 1 and handle 1.
func TestNeighbourReplacesPriorityOne(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		s := w.serve(way)
		theirs := verdictProgram(t, verdictNext)
		for range 2 {
			w.do(func(device netlink.Link) error {
				if err := netlink.QdiscAdd(clsactQdisc(device.Attrs().Index)); err != nil && !errors.Is(err, unix.EEXIST) {
					return err
				}
				return errors.Join(
					netlink.FilterReplace(bpfFilter(device.Attrs().Index, netlink.HANDLE_MIN_EGRESS, 1, theirs)),
					netlink.FilterReplace(bpfFilter(device.Attrs().Index, netlink.HANDLE_MIN_INGRESS, 1, theirs)),
				)
			})
			w.wantWhole()
			s.wantAllBy(t, s.IPv4)
		}
		if state := w.state(); state["filter at egress, priority 1"] != 1 || state["filter at ingress, priority 1"] != 1 {
			t.Errorf("theirs is gone: %v", state)
		}
	})
}

// wipers remove all filters, including ours.
var wipers = map[string]func(device netlink.Link) error{
	"filters": func(device netlink.Link) error {
		return errors.Join(deleteFilters(device, netlink.HANDLE_MIN_EGRESS, ""), deleteFilters(device, netlink.HANDLE_MIN_INGRESS, ""))
	},
	"egress only":  func(device netlink.Link) error { return deleteFilters(device, netlink.HANDLE_MIN_EGRESS, "") },
	"ingress only": func(device netlink.Link) error { return deleteFilters(device, netlink.HANDLE_MIN_INGRESS, "") },
	"qdisc":        func(device netlink.Link) error { return netlink.QdiscDel(clsactQdisc(device.Attrs().Index)) },
}

func TestNeighbourRemovesAllFilters(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		for name, wipe := range wipers {
			t.Run(name, func(t *testing.T) {
				w := w.withNewPod(t)
				s := w.serve(way)
				s.wantAllBy(t, s.IPv4)
				if w.isTCX() {
					w.do(func(device netlink.Link) error {
						return errors.Join(netlink.QdiscAdd(clsactQdisc(device.Attrs().Index)), wipe(device))
					})
					w.wantWhole()
					s.wantAllBy(t, s.IPv4)
					return
				}
				w.do(wipe)
				if err := w.check(); !errors.Is(err, attach.ErrIncomplete) {
					t.Errorf("%v, want %v", err, attach.ErrIncomplete)
				}
				w.attach(way)
				w.wantWhole()
				s.arm(t)
				s.wantAllBy(t, s.IPv4)
			})
		}
	})
}

// bandwidth shapes a pod's traffic like the CNI plugin of that name (containernetworking/plugins, plugins/meta/bandwidth):
// a token bucket at the host-side veth for what is sent to the pod, and one at an ifb device for what the pod sends, which an
// ingress qdisc redirects there.
func (w *world) bandwidth() error {
	w.t.Helper()
	err := w.inNode(func() error {
		ifb, err := addIfb()
		if err != nil {
			return err
		}
		if err := netlink.QdiscAdd(ingressQdisc(w.pod.IfIndex)); err != nil {
			return fmt.Errorf("ingress qdisc: %w", err)
		}
		return errors.Join(
			netlink.FilterAdd(&netlink.U32{
				FilterAttrs: netlink.FilterAttrs{
					LinkIndex: w.pod.IfIndex, Parent: netlink.MakeHandle(0xffff, 0), Priority: 1, Protocol: unix.ETH_P_ALL,
				},
				ClassId: netlink.MakeHandle(1, 1), RedirIndex: ifb,
				Actions: []netlink.Action{&netlink.MirredAction{MirredAction: netlink.TCA_EGRESS_REDIR, Ifindex: ifb}},
			}),
			addTokenBucket(ifb), addTokenBucket(w.pod.IfIndex),
		)
	})
	if errors.Is(err, unix.EOPNOTSUPP) {
		w.t.Skip("this kernel has no ifb")
	}
	return err
}

// addIfb creates the device if it does not exist yet.
func addIfb() (ifindex int, err error) {
	ifb := &netlink.Ifb{LinkAttrs: netlink.LinkAttrs{Name: "bwp0", Flags: net.FlagUp}}
	if err := netlink.LinkAdd(ifb); err != nil && !errors.Is(err, unix.EEXIST) {
		return 0, err
	}
	device, err := netlink.LinkByName(ifb.Name)
	if err != nil {
		return 0, err
	}
	return device.Attrs().Index, nil
}

func addTokenBucket(ifindex int) error {
	const rate, burst = 50 << 20, 1 << 20 // bytes per second, bytes
	return netlink.QdiscAdd(&netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: ifindex, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate, Limit: rate/40 + burst, Buffer: netlink.Xmittime(rate, burst),
	})
}

func (s *served) wantEcho(t testing.TB) {
	t.Helper()
	for _, addr := range []netip.Addr{s.IPv4, s.IPv6} {
		stop := make(chan struct{})
		close(stop)
		if err := echo(s.Dial(t, netip.AddrPortFrom(addr, echoPort).String()), stop); err != nil {
			t.Errorf("%v: %v", addr, err)
		}
	}
}

func TestBandwidthBeforeUs(t *testing.T) {
	requireTCX(t)
	eachWay(t, func(t *testing.T, w *world, way way) {
		w.must(w.bandwidth())
		s := w.serve(way)
		s.besideBandwidth(t)
	})
}

func TestBandwidthAfterUs(t *testing.T) {
	requireTCX(t)
	eachWay(t, func(t *testing.T, w *world, way way) {
		s := w.serve(way)
		if way.via == attach.ViaClsact { // why the plugin avoids it where bandwidth may follow
			if err := w.bandwidth(); !errors.Is(err, unix.EEXIST) {
				t.Errorf("beside clsact: %v", err)
			}
			return
		}
		w.must(w.bandwidth())
		s.besideBandwidth(t)
	})
}

func (s *served) besideBandwidth(t *testing.T) {
	t.Helper()
	w := s.world(t)
	w.wantWhole()
	if !w.isTCX() {
		t.Error("not attached by tcx")
	}
	s.serveEcho(t)
	s.wantAll(t)
	s.wantEcho(t)
	w.detach()
	state := w.state()
	for _, theirs := range []string{"qdisc ingress", "qdisc tbf", "filter at ingress, priority 1"} {
		if state[theirs] != 1 {
			t.Errorf("%s is gone: %v", theirs, state)
		}
	}
	s.wantPassed(t)
}

// An ingress qdisc that has replaced our clsact is not ours to remove.
func TestReplacingIngressQdiscStays(t *testing.T) {
	w := newWorld(t)
	w.attach(way{attach.HookTC, attach.ViaClsact})
	w.do(func(device netlink.Link) error {
		return errors.Join(netlink.QdiscDel(clsactQdisc(device.Attrs().Index)), netlink.QdiscAdd(ingressQdisc(device.Attrs().Index)))
	})
	w.detach()
	if s := w.state(); s["qdisc ingress"] != 1 {
		t.Errorf("%v", s)
	}
}

// neighboursOf returns what a checker reports about neighbours on the pod's device.
func (w *world) neighboursOf(c *attach.Checker) (all []attach.Neighbour) {
	w.t.Helper()
	w.must(w.inNode(func() (err error) {
		all, err = c.Neighbours(w.pod.IfIndex)
		return err
	}))
	return all
}

func (w *world) checker() *attach.Checker {
	w.t.Helper()
	c, err := attach.NewChecker(w.d, w.bpfDir)
	w.must(err)
	return c
}

func TestNoNeighbours(t *testing.T) {
	eachWay(t, func(t *testing.T, w *world, way way) {
		w.attach(way)
		if got := w.neighboursOf(w.checker()); len(got) > 0 {
			t.Errorf("%+v", got)
		}
	})
}

func TestNeighboursAreNamedInOrder(t *testing.T) {
	requireTCX(t)
	w := newWorld(t)
	names := []string{"first", "second", "third", "fourth"}
	programs := map[string]*ebpf.Program{}
	for _, name := range names {
		programs[name] = loadProgram(t, ebpf.SchedCLS, name, returns(verdictNext))
	}
	w.tcx(programs["third"], ebpf.AttachTCXEgress, nil)
	w.attach(way{attach.HookTC, attach.ViaTCX})
	w.tcx(programs["second"], ebpf.AttachTCXEgress, link.Head())
	w.tcx(programs["first"], ebpf.AttachTCXEgress, link.Head())
	placement{priority: 1}.put(w, programs["fourth"], "egress")
	got := w.neighboursOf(w.checker())
	if len(got) != len(names) {
		t.Fatalf("%+v", got)
	}
	for i, name := range names[:3] {
		if !strings.HasSuffix(got[i].What, "("+name+")") || got[i].Before != (i < 2) {
			t.Errorf("%d: %+v, want %s", i, got[i], name)
		}
	}
	if got[3].Hook != "tc filter egress" || got[3].Before {
		t.Errorf("%+v", got[3])
	}
}

// An ingress qdisc lists its filter on both sides, but has only one.
func TestBandwidthIsANeighbour(t *testing.T) {
	requireTCX(t)
	eachWay(t, func(t *testing.T, w *world, way way) {
		w.must(w.bandwidth())
		w.attach(way)
		for _, c := range []*attach.Checker{w.checker(), {}} { // a checker without programs considers all of them neighbours
			got := w.neighboursOf(c)
			filters := 0
			for _, n := range got {
				if n.Before {
					t.Errorf("%+v", n)
				}
				if strings.HasPrefix(n.Hook, "tc filter") {
					filters++
					if n != (attach.Neighbour{Hook: "tc filter ingress", What: "u32 filter, priority 1"}) {
						t.Errorf("%+v", n)
					}
				}
			}
			if filters != 1 {
				t.Errorf("%+v", got)
			}
		}
	})
}

func TestXDPProgramIsANeighbour(t *testing.T) {
	for mode, flags := range map[string]int{"generic": unix.XDP_FLAGS_SKB_MODE, "native": unix.XDP_FLAGS_DRV_MODE} {
		w := newWorld(t)
		program := loadProgram(t, ebpf.XDP, "theirs", returns(2)) // XDP_PASS
		w.do(func(device netlink.Link) error { return netlink.LinkSetXdpFdWithFlags(device, program.FD(), flags) })
		for _, attached := range []bool{false, true} {
			if attached {
				w.attach(way{attach.HookTC, attach.ViaAuto})
			}
			got := w.neighboursOf(w.checker())
			if len(got) != 1 || got[0].Hook != "xdp" || !strings.HasSuffix(got[0].What, "(theirs)") || got[0].Before != attached {
				t.Errorf("%s, attached %v: %+v", mode, attached, got)
			}
		}
	}
}

// Another XDP program on the device does not affect hook tc.
func TestNeighbourWithXDP(t *testing.T) {
	all := newWorld(t)
	for mode, flags := range map[string]int{"generic": unix.XDP_FLAGS_SKB_MODE, "native": unix.XDP_FLAGS_DRV_MODE} {
		for _, via := range []attach.Via{attach.ViaAuto, attach.ViaClsact} {
			t.Run(fmt.Sprintf("%s %s", mode, via), func(t *testing.T) {
				w := all.withNewPod(t)
				program := loadProgram(t, ebpf.XDP, "theirs", returns(2)) // XDP_PASS
				w.do(func(device netlink.Link) error { return netlink.LinkSetXdpFdWithFlags(device, program.FD(), flags) })
				w.serve(way{attach.HookTC, via}).wantAllBy(t, w.pod.IPv4)
			})
		}
	}
}
