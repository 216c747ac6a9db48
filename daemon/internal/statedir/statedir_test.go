package statedir

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

func TestLock(t *testing.T) {
	dir := t.TempDir()
	if _, running, err := Running(dir); running || err != nil {
		t.Fatalf("before: %v, %v", running, err)
	}
	held, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	for range 2 { // asking does not release it
		if pid, running, err := Running(dir); pid != os.Getpid() || !running || err != nil {
			t.Fatalf("running: %d, %v, %v", pid, running, err)
		}
	}
	if _, err := Lock(dir); !errors.Is(err, ErrRunning) || !strings.Contains(err.Error(), dir) {
		t.Fatalf("second lock: %v", err)
	}
	if err := held.Release(); err != nil {
		t.Fatal(err)
	}
	if _, running, err := Running(dir); running || err != nil {
		t.Fatalf("after: %v, %v", running, err)
	}
	if held, err = Lock(dir); err != nil {
		t.Fatal(err)
	}
	if err := held.Release(); err != nil {
		t.Fatal(err)
	}
}

func TestEndpoints(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadEndpoints(dir); !errors.Is(err, os.ErrNotExist) {
		t.Fatalf("before: %v", err)
	}
	want := Endpoints{
		Attachments: []Attachment{{ContainerID: "c", IfName: "eth0", Pod: "shop/web", Endpoints: []Endpoint{
			EndpointOf(probe.EndpointSpec{
				Endpoint:  probe.Endpoint{Port: 80, Kind: probe.HTTP, Path: "/x", Headers: "abc"},
				Askers:    []probe.Asker{{Container: "c", Type: probe.Liveness}},
				Period:    10 * time.Second,
				Timeout:   time.Second,
				Staleness: 11 * time.Second,
				Observed:  true, Startup: true, Reason: probe.Reason{Text: "because"},
			}, probe.Question{Hash: 1<<64 - 1, Check: 2}),
		}}},
		Unattached: []string{"shop/api"},
	}
	if err := WriteEndpoints(dir, want); err != nil {
		t.Fatal(err)
	}
	got, err := ReadEndpoints(dir)
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v; want %+v", got, err, want)
	}
}

func TestEndpointOf(t *testing.T) {
	specs, err := probe.Endpoints(probe.Pod{Probes: []probe.Spec{{
		Container: "c", Type: probe.Liveness, Kind: probe.TCP, Port: 80,
		Period: 10 * time.Second, Timeout: time.Second, FailureThreshold: 3,
	}}}, probe.NewDefaults().Settings(nil), probe.Limits{Records: 64})
	if err != nil {
		t.Fatal(err)
	}
	got, err := json.Marshal(EndpointOf(specs[0], probe.Question{}))
	want := `{"kind":"TCP","port":80,"probes":[{"container":"c","type":"liveness","periodSeconds":10,"timeoutSeconds":1,` +
		`"failureThreshold":3,"worstDetectionSeconds":42,"worstDetectionPlainSeconds":31,"worstDetectionAnsweredSeconds":42,"worstDetectionHangSeconds":42}],` +
		`"periodSeconds":10,"timeoutSeconds":1,"stalenessBoundSeconds":11,"successesNeeded":1,"observed":true}`
	if err != nil || string(got) != want {
		t.Errorf("got  %s, %v\nwant %s", got, err, want)
	}
}

// Files that a killed daemon left unfinished are removed by the next one, and by uninstall.
func TestUnfinished(t *testing.T) {
	for name, test := range map[string]struct {
		end  func(stateDir string) error
		left int // files
	}{
		"the next daemon": {func(dir string) error {
			held, err := Lock(dir)
			if err != nil {
				return err
			}
			return held.Release()
		}, 2},
		"uninstall": {Remove, 0},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "state")
			err := errors.Join(os.MkdirAll(filepath.Join(dir, "api123"), 0o700), WriteEndpoints(dir, Endpoints{}))
			for _, name := range []string{"api123/s", ".endpoints.json4711"} {
				err = errors.Join(err, os.WriteFile(filepath.Join(dir, name), nil, 0o600))
			}
			if err = errors.Join(err, test.end(dir)); err != nil {
				t.Fatal(err)
			}
			if left, _ := os.ReadDir(dir); len(left) != test.left {
				t.Errorf("left: %v", left)
			}
		})
	}
}

// The holder of a state directory notices that others see another one, or none.
func TestHeld(t *testing.T) {
	for name, lose := range map[string]func(dir string) error{
		"removed":  os.RemoveAll,
		"replaced": func(dir string) error { return errors.Join(os.Rename(dir, dir+".old"), os.Mkdir(dir, 0o700)) },
		"its lock was replaced": func(dir string) error {
			err := os.Remove(lockPath(dir))
			if err != nil {
				return err
			}
			other, err := Lock(dir)
			if err != nil {
				return err
			}
			return other.Release()
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "state")
			if err := os.Mkdir(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			held, err := Lock(dir)
			if err != nil {
				t.Fatal(err)
			}
			defer held.Release() //nolint:errcheck // a test's
			if err := held.Check(); err != nil {
				t.Fatal(err)
			}
			if err := lose(dir); err != nil {
				t.Fatal(err)
			}
			if err := held.Check(); !errors.Is(err, ErrRemoved) || !strings.Contains(err.Error(), dir) {
				t.Error(err)
			}
		})
	}
}
