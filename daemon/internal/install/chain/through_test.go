package chain

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// multus is a network that delegates to another one by path.
const multus = `{"cniVersion":"1.0.0","name":"multus","type":"multus","clusterNetwork":"%s"}`

// If the primary network delegates to our copy, by path or by content, the plugin is added only once and the copy stays.
func TestThroughOther(t *testing.T) {
	n := newNode(t, files{"10-pods.conflist": list})
	n.addProgram(t, "multus")
	j, err := n.Join(t.Context(), Copy)
	if err != nil {
		t.Fatal(err)
	}
	copied, err := os.ReadFile(j.File)
	if err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{
		"path":    fmt.Sprintf(multus, j.File),
		"content": fmt.Sprintf(`{"cniVersion":"1.0.0","name":"multus","type":"multus","delegates":[%s]}`, copied),
	} {
		n.write(t, "00-multus.conf", text)
		for range 2 {
			again, err := n.Join(t.Context(), Copy)
			if err != nil || again.File != j.File || again.Changed {
				t.Fatalf("%s: %+v, %v", name, again, err)
			}
		}
		if got := n.chainIn(t); got != "multus: multus" {
			t.Errorf("%s: chain %q", name, got)
		}
		if planned, err := n.Plan(DropIn); err != nil || planned.File != j.File {
			t.Errorf("%s: planned %+v, %v", name, planned, err)
		}
		if found, in, err := n.Look(); err != nil || !in || found.File != j.File {
			t.Errorf("%s: %+v, %v, %v", name, found, in, err)
		}
		n.write(t, "10-pods.conflist", strings.Replace(list, "portmap", "firewall", 1))
		if again, err := n.Join(t.Context(), Copy); err != nil || !again.Changed {
			t.Errorf("%s: original changed: %+v, %v", name, again, err)
		}
		if text, err := os.ReadFile(j.File); err != nil || !strings.Contains(string(text), "firewall") {
			t.Errorf("%s: %s, %v", name, text, err)
		}
		n.write(t, "10-pods.conflist", list)
		if _, err := n.Join(t.Context(), Copy); err != nil {
			t.Fatal(err)
		}
	}
	// A network that has the plugin without a copy of ours stays unchanged.
	n = newNode(t, files{"00-multus.conf": `{"cniVersion":"1.0.0","name":"m","type":"multus","delegates":[{"name":"n","plugins":[{"type":"probelet"}]}]}`})
	n.addProgram(t, "multus")
	for _, way := range []Way{Copy, DropIn} {
		if j, err := n.Plan(way); err != nil || j.File != "" {
			t.Errorf("planned: %+v, %v", j, err)
		}
		if j, err := n.Join(t.Context(), way); err != nil || j.File != "" || j.Changed {
			t.Errorf("%+v, %v", j, err)
		}
	}
}

// A copy whose path another configuration names is never removed while it is named. It loses the plugin if pods could not start with it.
func TestNamedCopyStays(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*testing.T, Node)
		err    error
		armed  bool
	}{
		"plugin removed":     {func(_ *testing.T, n Node) { _ = os.Remove(n.pluginFile()) }, ErrMisplaced, false},
		"original removed":   {func(_ *testing.T, n Node) { _ = os.Remove(filepath.Join(n.NetDir, "10-pods.conflist")) }, ErrUnusable, true},
		"original truncated": {func(t *testing.T, n Node) { n.write(t, "10-pods.conflist", list[:20]) }, ErrUnusable, true},
		"original has the plugin": {func(t *testing.T, n Node) {
			n.write(t, "10-pods.conflist", strings.Replace(list, "portmap", PluginType, 1))
		}, ErrUnusable, true},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t, files{"10-pods.conflist": list})
			n.addProgram(t, "multus")
			j, err := n.Join(t.Context(), Copy)
			if err != nil {
				t.Fatal(err)
			}
			n.write(t, "00-multus.conf", fmt.Sprintf(multus, j.File))
			test.change(t, n)
			for range 2 {
				if _, err := n.Join(t.Context(), Copy); !errors.Is(err, test.err) {
					t.Errorf("%v, want %v", err, test.err)
				}
				w, err := read(j.File)
				if err != nil || w.has() != test.armed || len(w.plugins) < 2 {
					t.Fatalf("copy: %+v, %v", w, err)
				}
			}
			n.addProgram(t, PluginType)
			n.write(t, "10-pods.conflist", list)
			if again, err := n.Join(t.Context(), Copy); err != nil || again.File != j.File || again.Changed == test.armed {
				t.Errorf("after recovery: %+v, %v", again, err)
			}
			if err := os.Remove(filepath.Join(n.NetDir, "00-multus.conf")); err != nil {
				t.Fatal(err)
			}
			if _, err := n.Leave(t.Context()); err != nil || len(n.ours()) > 0 {
				t.Errorf("leftover files: %v, %v", n.ours(), err)
			}
		})
	}
}
