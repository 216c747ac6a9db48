package api

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/probelet/probelet/daemon/internal/statedir"
)

// The modes decide who may connect: the main socket belongs to root, the other one is for a pod that runs as nobody and sees only its
// directory. Remove removes both.
func TestSockets(t *testing.T) {
	stateDir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(stateDir, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, listen := range []func(string) (net.Listener, error){Listen, ListenMetrics, Listen, ListenMetrics} { // the second time as the next daemon
		l, err := listen(stateDir)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close() //nolint:errcheck // its file is removed
	}
	socket := statedir.MetricsSocketPath(stateDir)
	for path, want := range map[string]os.FileMode{
		statedir.SocketPath(stateDir): 0o600, socket: 0o666, filepath.Dir(socket): 0o755,
	} {
		info, err := os.Stat(path)
		if err != nil || info.Mode().Perm() != want {
			t.Errorf("%s: %v, %v", path, info, err)
		}
	}
	if err := statedir.Remove(stateDir); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(stateDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v: still exists", err)
	}
}
