package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/probelet/probelet/e2e/node"
)

// cluster is where all tests run.
var cluster *Cluster

var begin = time.Now()

// say shows what is going on.
func say(format string, args ...any) {
	fmt.Printf("%4.0fs %s\n", time.Since(begin).Seconds(), fmt.Sprintf(format, args...))
}

func TestMain(m *testing.M) {
	if os.Getenv("PROBELET_KIND") != "" {
		var err error
		cluster, err = OnKind(context.Background(), os.Getenv("PROBELET_BIN"), func(what string) { say("preparing: %s", what) })
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(m.Run())
	}
	tools := os.Getenv("PROBELET_CLUSTER")
	if tools == "" {
		fmt.Println("SKIPPED: tests on a cluster: make e2e builds and runs them")
		return
	}
	if err := node.Suited(); errors.Is(err, node.ErrUnsuited) && os.Getenv("CI") == "" {
		fmt.Println("SKIPPED: tests on a cluster:", err)
		return
	}
	os.Exit(node.Run(func(inner *node.Machine) int {
		tools, err := filepath.Abs(tools)
		if err == nil {
			cluster, err = Start(context.Background(), inner, tools, Network("ptp", IPv4, IPv6), func(what string) { say("starting: %s", what) })
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		return m.Run()
	}))
}
