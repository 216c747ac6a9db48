package statedir

import (
	"errors"
	"os"
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
	unlock, err := Lock(dir)
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
	if err := unlock(); err != nil {
		t.Fatal(err)
	}
	if _, running, err := Running(dir); running || err != nil {
		t.Fatalf("after: %v, %v", running, err)
	}
	if unlock, err = Lock(dir); err != nil {
		t.Fatal(err)
	}
	if err := unlock(); err != nil {
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
				Endpoint:  probe.Endpoint{Port: 80, Kind: probe.HTTP, Path: "/x"},
				Askers:    []probe.Asker{{Container: "c", Type: probe.Liveness}},
				Period:    10 * time.Second,
				Timeout:   time.Second,
				Staleness: 11 * time.Second,
				Headers:   "abc", Observed: true, Startup: true, Reason: "because",
			}),
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
