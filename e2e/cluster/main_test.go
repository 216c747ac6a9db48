// Package cluster tests probelet on a real kubelet, API server and containerd (make e2e), or on the node of a kind cluster
// (make e2e-kind).
package cluster

import (
	"context"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/probelet/probelet/e2e/harness/kube"
	"github.com/probelet/probelet/e2e/harness/node"
)

// cluster is shared by all tests.
var cluster *kube.Cluster

// hook is the chart's value of that name in every release that the tests deploy.
var hook = flag.String("hook", "tc", "where answers are made: `tc|xdp`")

var begin = time.Now()

// say prints progress.
func say(format string, args ...any) {
	fmt.Printf("%4.0fs %s\n", time.Since(begin).Seconds(), fmt.Sprintf(format, args...))
}

// TestCluster reports all tests on a cluster as skipped where there is none.
func TestCluster(t *testing.T) {
	if cluster == nil {
		t.Skip("all tests on a cluster: make e2e builds and runs them")
	}
}

func TestMain(m *testing.M) {
	flag.Parse()
	// Parallel tests spend most of their time waiting.
	if err := flag.Set("test.parallel", "32"); err != nil {
		panic(err)
	}
	if os.Getenv("PROBELET_KIND") != "" {
		var err error
		cluster, err = kube.OnKind(context.Background(), os.Getenv("PROBELET_BIN"), func(what string) { say("preparing: %s", what) })
		os.Exit(runAll(m, err))
	}
	tools := os.Getenv("PROBELET_CLUSTER")
	if tools == "" {
		_ = flag.Set("test.run", "^TestCluster$")
		os.Exit(m.Run())
	}
	os.Exit(node.Run(func(inner *node.Machine) int {
		tools, err := filepath.Abs(tools)
		if err == nil {
			cluster, err = kube.Start(context.Background(), inner, tools, kube.Network("ptp", kube.IPv4, kube.IPv6), "", func(what string) { say("starting: %s", what) })
		}
		code := runAll(m, err)
		if code != 0 && cluster != nil {
			dir := filepath.Join(cluster.Bin, "e2e-logs")
			say("logs of the cluster's components and pods are in %s (%v)", dir, cluster.KeepLogs(dir))
		}
		return code
	}))
}

// runAll runs the tests, unless the cluster failed to start.
func runAll(m *testing.M, err error) int {
	if err == nil {
		pristine, err = snapshot()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	code := m.Run()
	say("all tests finished")
	return code
}
