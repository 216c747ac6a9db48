package attach_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/probelet/probelet/bpf/attach"
)

// Whatever happens to records, and however old their files are, a reader that rereads only changed files returns the current ones.
func TestReader(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		dir, err := os.MkdirTemp("", "")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir) //nolint:errcheck // a temporary one
		var r attach.Reader
		for step := range rapid.IntRange(1, 20).Draw(t, "steps") {
			id := attach.ID{ContainerID: fmt.Sprint("c", rapid.IntRange(0, 3).Draw(t, "container")), IfName: "eth0"}
			path := filepath.Join(attach.RecordsDir(dir), id.ContainerID+"@eth0.json")
			switch rapid.SampledFrom([]string{"write", "spoil", "age", "remove", "nothing"}).Draw(t, "action") {
			case "write":
				err = attach.WriteRecord(dir, attach.Record{ContainerID: id.ContainerID, IfName: "eth0", IfIndex: step})
			case "spoil": // in place, with the same or another length
				_ = os.WriteFile(path, []byte(rapid.SampledFrom([]string{"{", "{}", "{}\n"}).Draw(t, "text")), 0o600)
			case "age":
				past := time.Now().Add(-time.Hour)
				_ = os.Chtimes(path, past, past)
			case "remove":
				err = attach.RemoveRecord(dir, id)
			}
			if err != nil {
				t.Fatal(err)
			}
			got, gotErr := r.Read(dir)
			want, wantErr := attach.ReadRecords(dir)
			if !reflect.DeepEqual(got, want) || fmt.Sprint(gotErr) != fmt.Sprint(wantErr) {
				t.Fatalf("%v, %v; want %v, %v", got, gotErr, want, wantErr)
			}
			// Old files are not read again.
			if again, err := r.Read(dir); !reflect.DeepEqual(got, again) || errors.Is(err, os.ErrNotExist) {
				t.Fatalf("%v, %v", again, err)
			}
		}
	})
}
