package agent

import (
	"net/netip"
	"os"
	"testing"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/daemon/internal/probe"
)

func TestMain(m *testing.M) {
	bpftest.RunInOwnCgroup(func() int {
		defer func() { _ = os.RemoveAll(programDir) }()
		return m.Run()
	})
}

func TestMatch(t *testing.T) {
	pods := []probe.Pod{
		{Namespace: "shop", Name: "web", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.7"), netip.MustParseAddr("fd00::7")}},
		{Namespace: "shop", Name: "api"},
		{Namespace: "test", Name: "api"},
		{Namespace: "test", Name: "db-0", UID: "new", IPs: []netip.Addr{netip.MustParseAddr("10.0.0.9")}},
	}
	for name, test := range map[string]struct {
		record attach.Record
		want   int // index into pods; -1: none
	}{
		"by name":                   {attach.Record{PodNamespace: "test", PodName: "api"}, 2},
		"another namespace":         {attach.Record{PodNamespace: "prod", PodName: "api"}, -1},
		"a name, and a foreign IP":  {attach.Record{PodNamespace: "prod", PodName: "api", PodIPs: []string{"10.0.0.7"}}, -1},
		"by IPv4":                   {attach.Record{PodIPs: []string{"10.0.0.1", "10.0.0.7"}}, 0},
		"by IPv6":                   {attach.Record{PodIPs: []string{"fd00:0::7"}}, 0},
		"by mapped IPv4":            {attach.Record{PodIPs: []string{"::ffff:10.0.0.7"}}, 0},
		"another IP":                {attach.Record{PodIPs: []string{"10.0.0.8", "nonsense"}}, -1},
		"by name and UID":           {attach.Record{PodNamespace: "test", PodName: "db-0", PodUID: "new"}, 3},
		"its predecessor":           {attach.Record{PodNamespace: "test", PodName: "db-0", PodUID: "old"}, -1},
		"its predecessor, by IP":    {attach.Record{PodUID: "old", PodIPs: []string{"10.0.0.9"}}, -1},
		"of a runtime without UIDs": {attach.Record{PodNamespace: "test", PodName: "db-0"}, 3},
		"of a source without UIDs":  {attach.Record{PodNamespace: "test", PodName: "api", PodUID: "x"}, 2},
		"nothing known":             {attach.Record{}, -1},
	} {
		t.Run(name, func(t *testing.T) {
			got := index(pods).match(test.record)
			switch {
			case test.want < 0 && got != nil:
				t.Errorf("got %s, want none", got)
			case test.want >= 0 && got != &pods[test.want]:
				t.Errorf("got %v, want %s", got, pods[test.want])
			}
		})
	}
}
