// Package e2e tests probelet the way it is used: built binaries, real CNI plugins, real sockets, the kubelet's prober.
package e2e

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/probelet/probelet/e2e/harness/node"
	"github.com/probelet/probelet/e2e/harness/role"
)

// machine is shared by all tests.
var machine *node.Machine

// skipAll is why all tests but TestMachine are skipped, if they are.
var skipAll error

// TestMachine reports all end-to-end tests as skipped where the machine is unsuited.
func TestMachine(t *testing.T) {
	if skipAll != nil {
		t.Skip("all end-to-end tests: ", skipAll)
	}
}

func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == slowPlugin {
		runSlowPlugin()
		return
	}
	role.Main()
	if err := node.Suited(); errors.Is(err, node.ErrUnsuited) && os.Getenv("CI") == "" {
		skipAll = err
		flag.Parse()
		_ = flag.Set("test.run", "^TestMachine$")
		os.Exit(m.Run())
	}
	if os.Getenv("PROBELET_BIN") == "" {
		_ = os.Setenv("PROBELET_BIN", "../bin")
	}
	if _, err := os.Stat(filepath.Join(os.Getenv("PROBELET_BIN"), "probeletd")); err != nil {
		fmt.Println("the binaries are not built (make build):", err)
		os.Exit(1)
	}
	os.Exit(node.Run(func(inner *node.Machine) int {
		machine = inner
		return m.Run()
	}))
}
