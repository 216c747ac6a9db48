package source

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/daemon/internal/logtest"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/internal/polltest"
)

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// watch runs a File on path.
func watch(t *testing.T, path string) (<-chan []probe.Pod, *logtest.Log) {
	t.Helper()
	log := &logtest.Log{}
	f, err := NewFile(path, slog.New(slog.NewTextHandler(log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	snapshots := make(chan []probe.Pod)
	done := make(chan error)
	go func() { done <- f.Run(ctx, snapshots) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return snapshots, log
}

// next expects a snapshot of one pod with this name.
func next(t *testing.T, snapshots <-chan []probe.Pod, name string) {
	t.Helper()
	select {
	case pods := <-snapshots:
		if len(pods) != 1 || pods[0].Name != name {
			t.Fatalf("got %v, want pod %s", pods, name)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("no snapshot; want pod %s", name)
	}
}

const podA, podB, podC = "pods: [{name: a}]", "pods: [{name: b}]", "pods: [{name: c}]"

func TestReload(t *testing.T) {
	path := filepath.Join(t.TempDir(), "specs.yaml")
	write(t, path, podA)
	snapshots, _ := watch(t, path)
	next(t, snapshots, "a")

	write(t, path, podB)
	next(t, snapshots, "b")

	// The file is replaced, and then written to: the new file must be watched.
	write(t, path+".new", podA)
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	next(t, snapshots, "a")
	write(t, path, podC)
	next(t, snapshots, "c")

	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	write(t, path, podA)
	next(t, snapshots, "a")
}

// In a ConfigMap volume the file is a link through a directory link that is replaced.
func TestReloadConfigMap(t *testing.T) {
	dir := t.TempDir()
	version := func(name, text string) {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, name, "specs.yaml"), text)
		if err := os.Symlink(name, filepath.Join(dir, "..tmp")); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(filepath.Join(dir, "..tmp"), filepath.Join(dir, "..data")); err != nil {
			t.Fatal(err)
		}
	}
	version("..1", podA)
	path := filepath.Join(dir, "specs.yaml")
	if err := os.Symlink("..data/specs.yaml", path); err != nil {
		t.Fatal(err)
	}
	snapshots, _ := watch(t, path)
	next(t, snapshots, "a")
	version("..2", podB)
	next(t, snapshots, "b")
}

func TestReloadKeepsTheLastGoodState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "specs.yaml")
	write(t, path, podA)
	snapshots, log := watch(t, path)
	next(t, snapshots, "a")

	for i, bad := range []string{"", "pods: [{name: broken, ips: [x]}]"} {
		write(t, path, bad)
		polltest.Eventually(t, "an error is logged", func() bool { return log.Count("level=ERROR") == i+1 })
		write(t, filepath.Join(filepath.Dir(path), "other"), bad) // an event without a change
		time.Sleep(3 * settle)
		if n := log.Count("level=ERROR"); n != i+1 {
			t.Errorf("%q: %d errors logged, want %d", bad, n, i+1)
		}
	}
	select {
	case pods := <-snapshots:
		t.Fatalf("a snapshot from an invalid file: %v", pods)
	default:
	}
	write(t, path, podB)
	next(t, snapshots, "b")
}

func TestNewFileErrors(t *testing.T) {
	dir := t.TempDir()
	bad := filepath.Join(dir, "bad")
	write(t, bad, "pods: 5")
	for _, path := range []string{bad, filepath.Join(dir, "missing"), filepath.Join(dir, "missing", "specs")} {
		if _, err := NewFile(path, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), dir) {
			t.Errorf("%s: error %v does not name it", path, err)
		}
	}
}
