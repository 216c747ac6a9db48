// Package runtimestest makes the traces that a container runtime leaves on a node.
package runtimestest

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Proc makes the /proc directory of a runtime's process, with files below the process' root, and returns its path.
func Proc(t *testing.T, name string, args []string, root map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	write := func(file, text string) {
		t.Helper()
		file = filepath.Join(dir, file)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	write("cmdline", strings.Join(append([]string{name}, args...), "\x00")+"\x00")
	write("root/etc/hostname", "node")
	for file, text := range root {
		write(filepath.Join("root", file), text)
	}
	return dir
}
