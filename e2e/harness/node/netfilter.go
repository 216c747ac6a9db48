package node

import (
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TrackConnections makes the kernel track the connections of the current network namespace, as it does where kube-proxy runs, until
// stop is called.
func TrackConnections() (stop func() error, err error) {
	return AddRule("track", nftables.TableFamilyINet, nftables.ChainHookOutput, &expr.Ct{Key: expr.CtKeySTATE, Register: 1})
}

// AddRule adds a rule to a netfilter hook of the current network namespace, in a table of its own that remove removes.
func AddRule(table string, family nftables.TableFamily, hook *nftables.ChainHook, rule ...expr.Any) (remove func() error, err error) {
	c, err := nftables.New()
	if err != nil {
		return nil, err
	}
	t := c.AddTable(&nftables.Table{Name: table, Family: family})
	chain := c.AddChain(&nftables.Chain{
		Name: "filter", Table: t, Type: nftables.ChainTypeFilter, Hooknum: hook, Priority: nftables.ChainPriorityFilter,
	})
	c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: rule})
	return func() error {
		c.DelTable(t)
		return c.Flush()
	}, c.Flush()
}

// Tracked returns the number of tracked connections to addresses in a prefix of IPv4, in the current network namespace.
func Tracked(to netip.Prefix) (count int, err error) {
	entries, err := netlink.ConntrackTableList(netlink.ConntrackTable, unix.AF_INET) //nolint:forbidigo // netlinksafe has none
	for _, entry := range entries {
		if ip, ok := netip.AddrFromSlice(entry.Forward.DstIP.To4()); ok && to.Contains(ip) {
			count++
		}
	}
	return count, err
}
