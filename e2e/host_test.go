package e2e

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"

	"github.com/probelet/probelet/e2e/harness/node"
	"github.com/probelet/probelet/e2e/harness/role"
)

// way is how another pod's probe refers to a pod.
type way int

const (
	byIPv4 way = iota
	byIPv6
	byName
	byClusterIP // of a Service with another port
)

const servicePort = 80

// named is a pod that can be probed in all these ways.
type named struct {
	*pod
	name      string
	clusterIP netip.Addr
}

// newNamed creates pods, plus another pod and a hostNetwork pod whose probes refer to them.
func (s *scene) newNamed(count int) (all []*named) {
	s.t.Helper()
	var hosts strings.Builder
	for i := range count {
		n := &named{pod: s.newPod(), name: fmt.Sprintf("pod%d.example", i)}
		ip := n.IPv4.As4()
		n.clusterIP = netip.AddrFrom4([4]byte{10, 96, ip[2], ip[3]})
		fmt.Fprintln(&hosts, n.IPv4, n.name)
		all = append(all, n)
	}
	file := filepath.Join(s.t.TempDir(), "hosts")
	must(s.t, os.WriteFile(file, []byte(hosts.String()), 0o644))
	must(s.t, unix.Mount(file, "/etc/hosts", "", unix.MS_BIND, ""))
	s.t.Cleanup(func() { must(s.t, unix.Unmount("/etc/hosts", unix.MNT_DETACH)) })
	s.addServices(all)
	return all
}

// addServices does the work of kube-proxy.
func (s *scene) addServices(pods []*named) {
	s.t.Helper()
	c, err := nftables.New()
	must(s.t, err)
	table := c.AddTable(&nftables.Table{Name: "services", Family: nftables.TableFamilyIPv4})
	s.t.Cleanup(func() {
		c.DelTable(table)
		must(s.t, c.Flush())
	})
	chain := c.AddChain(&nftables.Chain{
		Name: "output", Table: table, Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest,
	})
	for _, n := range pods {
		const destination, destinationPort = 16, 2 // offsets in the headers of IPv4 and TCP
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: destination, Len: 4},
			&expr.Cmp{Register: 1, Data: n.clusterIP.AsSlice()},
			&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: destinationPort, Len: 2},
			&expr.Cmp{Register: 1, Data: binary.BigEndian.AppendUint16(nil, servicePort)},
			&expr.Immediate{Register: 1, Data: n.IPv4.AsSlice()},
			&expr.Immediate{Register: 2, Data: binary.BigEndian.AppendUint16(nil, httpPort)},
			&expr.NAT{Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: 1, RegProtoMin: 2},
		}})
		device, err := netlink.LinkByName(n.HostDevice)
		must(s.t, err)
		must(s.t, netlink.RouteAdd(&netlink.Route{ // on a real node, the default route does
			LinkIndex: device.Attrs().Index, Scope: netlink.SCOPE_LINK,
			Dst: &net.IPNet{IP: n.clusterIP.AsSlice(), Mask: net.CIDRMask(32, 32)},
		}))
	}
	must(s.t, c.Flush())
}

// host returns the address and port that such a probe dials.
func (n *named) host(w way) (string, int) {
	switch w {
	case byIPv6:
		return n.IPv6.String(), httpPort
	case byName:
		return n.name, httpPort
	case byClusterIP:
		return n.clusterIP.String(), servicePort
	}
	return n.IPv4.String(), httpPort
}

// only returns the path at which the pod answers only these probes.
func (n *named) only(w way, headers []v1.HTTPHeader) string {
	host, port := n.host(w)
	sent := http.Header{"Host": {net.JoinHostPort(host, strconv.Itoa(port))}}
	for _, h := range headers {
		sent.Set(h.Name, h.Value)
	}
	address := n.IPv4
	if w == byIPv6 {
		address = n.IPv6
	}
	return role.OnlyPath(sent.Get("Host"), sent.Get(role.OnlyHeader), address.String())
}

// ownProbe returns a probe of the pod itself.
func (n *named) ownProbe(path string, headers []v1.HTTPHeader) node.Probe {
	return node.Probe{Port: httpPort, Path: path, Headers: headers, PeriodSeconds: 2, TimeoutSeconds: 1}
}

// hostProbe returns another pod's probe that refers to the pod.
func (n *named) hostProbe(w way, path string, headers []v1.HTTPHeader) node.Probe {
	p := n.ownProbe(path, headers)
	p.Host, p.Port = n.host(w)
	return p
}

// succeeds makes a client send a probe and reports whether it succeeded.
func (n *named) succeeds(t *testing.T, c *role.Client, p node.Probe) bool {
	t.Helper()
	result, err := c.Probe(role.Probes{
		Address: cmp.Or(p.Host, n.IPv4.String()), Port: p.Port, Path: p.Path, Headers: p.Headers, Count: 1, Timeout: time.Second,
	})
	must(t, err)
	return result.Failures == 0
}

// asker is the owner of a probe that refers to a pod.
type asker int

const (
	anotherPod asker = iota
	hostNetworkPod
	theSamePod // a sidecar
)

// probes are the pod's own probes, and those that refer to it.
type probes struct {
	*named
	by          asker
	own, theirs []node.Probe
}

// writeSpecs writes the specs of the pods, of another pod and of a hostNetwork pod.
func (s *scene) writeSpecs(all []probes) {
	s.t.Helper()
	other := node.Probed{Pod: s.newPod().Pod}
	hostNetwork := node.Probed{Pod: &node.Pod{Name: "hostnetwork", IPv4: netip.MustParseAddr("127.0.0.1"), IPv6: netip.IPv6Loopback()}}
	var specs []node.Probed
	for _, p := range all {
		own := node.Probed{Pod: p.Pod, Readiness: p.own}
		by := map[asker]*node.Probed{anotherPod: &other, hostNetworkPod: &hostNetwork, theSamePod: &own}[p.by]
		by.Readiness = append(by.Readiness, p.theirs...)
		specs = append(specs, own)
	}
	must(s.t, s.WriteSpecs(append(specs, other, hostNetwork)...))
	for _, p := range all {
		must(s.t, s.AwaitState(p.Pod, p.own[0].Port, p.own[0].Path, node.Unknown))
	}
}

func header(name, value string) []v1.HTTPHeader { return []v1.HTTPHeader{{Name: name, Value: value}} }

// A probe that refers to another pod, and sends a request different from that pod's own probe, neither adds to nor uses the
// evidence of the own probe. Both get the same verdicts as without probelet, whichever of the two the pod answers.
func TestHostProbesWithDifferentRequests(t *testing.T) {
	auth, other, host := header(role.OnlyHeader, "yes"), header(role.OnlyHeader, "no"), header("Host", "x")
	cases := []struct {
		name        string
		by          asker
		way         way
		own, theirs []v1.HTTPHeader
		answered    bool // the pod's own probe
	}{
		{"with a header", anotherPod, byIPv4, nil, auth, true},
		{"without the header", anotherPod, byIPv4, auth, nil, true},
		{"with another value", anotherPod, byIPv4, auth, other, true},
		{"of a hostNetwork pod", hostNetworkPod, byIPv4, nil, auth, true},
		{"of a sidecar", theSamePod, byIPv4, nil, auth, true},
		{"at a name", anotherPod, byName, nil, nil, true},
		{"at a ClusterIP", anotherPod, byClusterIP, nil, nil, true},
		{"at the IPv6 address", anotherPod, byIPv6, nil, nil, true},
		{"at the IPv6 address, with the same bytes", anotherPod, byIPv6, host, host, false},
	}
	s := newScene(t, node.PTP)
	pods := s.newNamed(len(cases))
	var all []probes
	for i, c := range cases {
		p := probes{named: pods[i], by: c.by}
		for _, path := range []string{p.only(byIPv4, c.own), p.only(c.way, c.theirs)} { // accepts only the own, only the other
			p.own = append(p.own, p.ownProbe(path, c.own))
			p.theirs = append(p.theirs, p.hostProbe(c.way, path, c.theirs))
		}
		all = append(all, p)
	}
	s.writeSpecs(all)
	const seconds = 8 // four periods
	for range seconds {
		next := time.After(time.Second)
		for i, c := range cases {
			for which := range all[i].own {
				all[i].expectSame(t, c.name+", the pod's own", all[i].own[which], which == 0)
				all[i].expectSame(t, c.name, all[i].theirs[which], which == 1)
			}
		}
		<-next
	}
	for i, c := range cases {
		if hits := all[i].hits(all[i].own[0]); hits > 0 != c.answered {
			t.Errorf("%s: %d of the pod's own probes were answered", c.name, hits)
		}
	}
}

// expectSame compares the prober's verdict with that of a prober unknown to probelet.
func (n *named) expectSame(t *testing.T, name string, p node.Probe, success bool) {
	t.Helper()
	if alone := n.succeeds(t, n.s.other, p); alone != success {
		t.Fatalf("%s: success without probelet: %t, want %t: %+v", name, alone, success, p)
	}
	if with := n.succeeds(t, n.s.prober, p); with != success {
		t.Errorf("%s: success: %t, without probelet: %t: %+v", name, with, success, p)
	}
}

// A pod whose own probe another pod's probe repeats is not answered: the other one may have a shorter timeout. Among a pod's own probes
// the same request is the same endpoint. A TCP probe that does not name the pod's address cannot be told apart from its own.
func TestHostProbesWithTheSameRequest(t *testing.T) {
	cases := []struct {
		name   string
		by     asker
		way    way
		tcp    bool
		shared bool
	}{
		{"HTTP", anotherPod, byIPv4, false, false},
		{"HTTP of a hostNetwork pod", hostNetworkPod, byIPv4, false, false},
		{"HTTP of a sidecar", theSamePod, byIPv4, false, true},
		{"HTTP at a name", anotherPod, byName, false, false},
		{"HTTP at a ClusterIP", anotherPod, byClusterIP, false, false},
		{"TCP", anotherPod, byIPv4, true, false},
		{"TCP of a hostNetwork pod", hostNetworkPod, byIPv4, true, false},
		{"TCP at a name", anotherPod, byName, true, true},
		{"TCP at a ClusterIP", anotherPod, byClusterIP, true, true},
	}
	s := newScene(t, node.PTP)
	pods := s.newNamed(len(cases))
	var all []probes
	for i, c := range cases {
		p := probes{named: pods[i], by: c.by}
		own, theirs := p.ownProbe(healthz, nil), p.hostProbe(c.way, healthz, nil)
		own.PeriodSeconds, theirs.PeriodSeconds = 600, 600
		if c.way != byIPv4 {
			theirs.Headers = header("Host", p.address(httpPort))
		}
		if c.tcp {
			own.Path, theirs.Path = "", ""
		}
		p.own, p.theirs = []node.Probe{own}, []node.Probe{theirs}
		all = append(all, p)
	}
	s.writeSpecs(all)
	for i, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			p := all[i]
			p.expectEvidence(t, p.theirs[0], p.own[0], c.shared)
			p.expectEvidence(t, p.own[0], p.theirs[0], c.shared)
		})
	}
}

// expectEvidence sends a probe that reaches the pod, then another, which is answered because of the first if evidence is shared.
func (p *probes) expectEvidence(t *testing.T, first, second node.Probe, shared bool) {
	t.Helper()
	_, err := p.s.Ctl("invalidate", node.Namespace+"/"+p.Name)
	must(t, err)
	own := p.own[0]
	before := p.hits(own)
	p.expectSame(t, "first", first, true)
	state, answered := node.Stale, 0
	if shared {
		state, answered = node.Fresh, 1
	}
	must(t, p.s.AwaitState(p.Pod, own.Port, own.Path, state))
	p.expectSame(t, "second", second, true)
	if got := p.hits(own) - before; got != answered {
		t.Errorf("%d probes were answered, want %d: only the second may be", got, answered)
	}
}
