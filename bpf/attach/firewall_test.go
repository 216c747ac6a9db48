package attach_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
)

// firewall is an nftables table in a node's namespace.
type firewall struct {
	t     testing.TB
	conn  *nftables.Conn
	table *nftables.Table
}

// newFirewall creates an empty table, or skips the test if the kernel has no nftables.
func newFirewall(t testing.TB, node *bpftest.Node) *firewall {
	t.Helper()
	conn, err := nftables.New(nftables.WithNetNSFd(int(node.NS.Fd())))
	if err != nil {
		t.Fatal(err)
	}
	f := &firewall{t: t, conn: conn}
	f.table = conn.AddTable(&nftables.Table{Name: "test", Family: nftables.TableFamilyINet})
	if err := conn.Flush(); err != nil {
		t.Skipf("this kernel has no nftables: %v", err)
	}
	return f
}

// Hooks of a firewall where filters can be attached, by name.
var (
	prerouting = nftables.ChainHookPrerouting
	filterHook = map[string]*nftables.ChainHook{
		"input": nftables.ChainHookInput, "output": nftables.ChainHookOutput, "forward": nftables.ChainHookForward,
		"prerouting": prerouting,
	}
)

// chain adds rules at a hook, in a chain with the given name.
func (f *firewall) chain(name string, hook *nftables.ChainHook, rules ...[]expr.Any) {
	f.t.Helper()
	chain := f.conn.AddChain(&nftables.Chain{
		Name: name, Table: f.table, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter,
	})
	for _, rule := range rules {
		f.conn.AddRule(&nftables.Rule{Table: f.table, Chain: chain, Exprs: rule})
	}
	if err := f.conn.Flush(); err != nil {
		f.t.Fatal(err)
	}
}

// redirect redirects connections from one port to another.
func (f *firewall) redirect(from, to uint16) {
	f.t.Helper()
	chain := f.conn.AddChain(&nftables.Chain{
		Name: "redirect", Table: f.table, Type: nftables.ChainTypeNAT, Hooknum: prerouting, Priority: nftables.ChainPriorityNATDest,
	})
	f.conn.AddRule(&nftables.Rule{Table: f.table, Chain: chain, Exprs: then(
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(from)},
		&expr.Immediate{Register: 1, Data: binaryutil.BigEndian.PutUint16(to)},
		&expr.Redir{RegisterProtoMin: 1},
	)})
	if err := f.conn.Flush(); err != nil {
		f.t.Skipf("this kernel cannot redirect: %v", err)
	}
}

// counted returns the value of the first counter in a chain.
func (f *firewall) counted(name string) (packets uint64) {
	f.t.Helper()
	rules, err := f.conn.GetRules(f.table, &nftables.Chain{Name: name, Table: f.table})
	if err != nil || len(rules) == 0 {
		f.t.Fatalf("rules of %s: %v, %v", name, rules, err)
	}
	for _, e := range rules[0].Exprs {
		if c, ok := e.(*expr.Counter); ok {
			return c.Packets
		}
	}
	f.t.Fatalf("chain %s counts nothing", name)
	return 0
}

func (f *firewall) remove() {
	f.t.Helper()
	f.conn.DelTable(f.table)
	if err := f.conn.Flush(); err != nil {
		f.t.Fatal(err)
	}
}

var drop = &expr.Verdict{Kind: expr.VerdictDrop}

// rule concatenates the parts of a rule.
func rule(parts ...[]expr.Any) (all []expr.Any) {
	for _, part := range parts {
		all = append(all, part...)
	}
	return all
}

func then(parts ...expr.Any) []expr.Any { return parts }

// tcpFlags matches segments in which, of the flags in mask, exactly those in flags are set. Both cover the two bytes that begin
// with the header's length.
func tcpFlags(mask, flags uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 12, Len: 2},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 2, Mask: binaryutil.BigEndian.PutUint16(mask), Xor: []byte{0, 0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(flags)},
	}
}

// connState matches packets that connection tracking classifies as one of these states.
func connState(bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Bitwise{
			SourceRegister: 1, DestRegister: 1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: []byte{0, 0, 0, 0},
		},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0, 0, 0, 0}},
	}
}

// marked matches packets with a mark.
func marked() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: 1},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0, 0, 0, 0}},
	}
}

// noRouteBack matches packets whose source is not reachable through the device that received them: rp_filter for both families.
func noRouteBack() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: 1, FlagSADDR: true, FlagIIF: true, ResultOIF: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0, 0, 0, 0}},
	}
}

// sysctl sets values in a node's namespace, as far as the kernel has them.
func sysctl(t testing.TB, node *bpftest.Node, values map[string]string) {
	t.Helper()
	bpftest.Do(t, node.NS, func() error {
		for name, value := range values {
			err := os.WriteFile(filepath.Join("/proc/sys/net", name), []byte(value), 0o644)
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return err
			}
		}
		return nil
	})
}

// The strictest netfilter rules find nothing wrong with answers or with handed-over connections.
func TestStrictNetfilter(t *testing.T) {
	for _, way := range ways {
		for _, bridged := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s bridged %v", way, bridged), func(t *testing.T) {
				node := bpftest.NewNode(t)
				pod := node.AddPod(t)
				if bridged {
					node.Bridge(t, pod)
				}
				f := newFirewall(t, node)
				for name, hook := range filterHook {
					f.chain(name, hook, rule(connState(expr.CtStateBitINVALID), then(&expr.Counter{}, drop)))
				}
				f.chain("spoofed", prerouting, rule(noRouteBack(), then(&expr.Counter{}, drop)))
				f.chain("tracked", filterHook["input"], rule(connState(expr.CtStateBitESTABLISHED), then(&expr.Counter{})))
				sysctl(t, node, map[string]string{
					"ipv4/conf/all/rp_filter": "1", "netfilter/nf_conntrack_tcp_loose": "0",
					"netfilter/nf_conntrack_tcp_be_liberal": "0", "netfilter/nf_conntrack_checksum": "1",
					"bridge/bridge-nf-call-iptables": "1", "bridge/bridge-nf-call-ip6tables": "1",
				})
				s := serve(t, pod, way)
				s.serveEcho(t)
				s.wantAll(t)
				for _, addr := range []netip.Addr{pod.IPv4, pod.IPv6} {
					stop := make(chan struct{})
					close(stop)
					if err := echo(s.Dial(t, netip.AddrPortFrom(addr, echoPort).String()), stop); err != nil {
						t.Errorf("%v: %v", addr, err)
					}
				}
				for name := range filterHook {
					if n := f.counted(name); n > 0 {
						t.Errorf("%d packets were invalid at %s", n, name)
					}
				}
				if n := f.counted("spoofed"); n > 0 {
					t.Errorf("%d packets arrived on a device that does not lead to their source", n)
				}
				if f.counted("tracked") == 0 {
					t.Error("no connection was tracked")
				}
			})
		}
	}
}
