package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/probelet/probelet/e2e/harness/node"
)

// The bandwidth plugin adds an ingress qdisc to the device of a pod with an egress limit, which fails if there is a clsact
// qdisc. Wherever the plugin is in the chain, and whether or not probelet finds the chain on disk, pods start and their
// probes are answered.
func TestWithBandwidthPlugin(t *testing.T) {
	bandwidth := func(limits ...string) []map[string]any {
		plugin := map[string]any{"type": "bandwidth"}
		for _, limit := range limits {
			plugin[limit+"Rate"], plugin[limit+"Burst"] = 1_000_000_000, 100_000_000
		}
		return []map[string]any{plugin}
	}
	for _, test := range []struct {
		name          string
		before, after []map[string]any
		egressLimit   bool
	}{
		{"before probelet", bandwidth("ingress", "egress"), nil, true},
		{"after probelet", nil, bandwidth("ingress", "egress"), true},
		{"before probelet, ingress only", bandwidth("ingress"), nil, false},
		{"after probelet, ingress only", nil, bandwidth("ingress"), false},
		{"after probelet, no limits", nil, bandwidth(), false},
	} {
		for _, onDisk := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, chain on disk %v", test.name, onDisk), func(t *testing.T) {
				s := newScene(t, node.PTP)
				must(t, s.WriteChain(test.before, test.after))
				if !onDisk {
					hideChain(t, s)
				}
				expectLifecycle(t, s, test.egressLimit) // loads the objects
				before := remains(t, s)
				expectLifecycle(t, s, test.egressLimit)
				expectRemains(t, s, before)
			})
		}
	}
}

// expectLifecycle adds a pod, checks that its probes are answered, and deletes it.
func expectLifecycle(t *testing.T, s *scene, egressLimit bool) {
	t.Helper()
	p := s.newFreshPod(longHTTP, longTCP)
	must(t, p.Check())
	if got := slices.Contains(remains(t, s), "qdisc ingress of "+p.HostDevice); got != egressLimit {
		t.Errorf("an ingress qdisc on %s: %v, want %v", p.HostDevice, got, egressLimit)
	}
	for _, probe := range []node.Probe{longHTTP, longTCP} {
		expectAnswered(t, p, probe, p.IPv4, 20)
	}
	p.probeByIPv6(longHTTP, longTCP)
	for _, probe := range []node.Probe{longHTTP, longTCP} {
		expectAnswered(t, p, probe, p.IPv6, 20)
	}
	must(t, p.Check())
	must(t, p.Del())
	must(t, p.Del())
	p.Stop() // the server holds the pod's namespace
	must(t, p.Remove())
	must(t, s.WriteSpecs())
}

// hideChain makes probelet look for the network's configuration in an empty directory.
func hideChain(t *testing.T, s *scene) {
	t.Helper()
	must(t, s.OwnPlugins("ptp", "host-local", "bandwidth"))
	probelet, err := filepath.Abs(filepath.Join(s.Bin, "probelet"))
	must(t, err)
	script := strings.Join([]string{"#!/bin/sh", "export NETCONFPATH=/nonexistent", "exec " + probelet}, "\n")
	must(t, os.WriteFile(filepath.Join(s.PluginDir(), "probelet"), []byte(script), 0o755))
}
