package main

import (
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// A runtime starts the plugin twice per pod, and each time pays for the initialization of every package.
func TestLinksNothingHeavy(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Skipf("go list: %v", err)
	}
	packages := strings.Fields(string(out))
	for _, heavy := range []string{"net/http", "crypto/tls", "text/template", "github.com/spf13/cobra", "google.golang.org/protobuf/proto"} {
		if slices.Contains(packages, heavy) {
			t.Errorf("the plugin links %s", heavy)
		}
	}
	if len(packages) < 50 {
		t.Errorf("go list names %d packages only", len(packages))
	}
}
