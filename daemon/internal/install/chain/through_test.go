package chain

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// multus is a network that has its own by a path.
const multus = `{"cniVersion":"1.0.0","name":"multus","type":"multus","clusterNetwork":"%s"}`

// A network that takes its own from our copy, or has what was in it, gets the plugin once, and the copy stays where it is.
func TestThroughAnother(t *testing.T) {
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
		"its path":    fmt.Sprintf(multus, j.File),
		"its content": fmt.Sprintf(`{"cniVersion":"1.0.0","name":"multus","type":"multus","delegates":[%s]}`, copied),
	} {
		n.write(t, "00-multus.conf", text)
		for range 2 {
			again, err := n.Join(t.Context(), Copy)
			if err != nil || again.File != j.File || again.Changed {
				t.Fatalf("%s: %+v, %v", name, again, err)
			}
		}
		if got := n.chainIn(t); got != "multus: multus" {
			t.Errorf("%s: the chain is %q", name, got)
		}
		if planned, err := n.Plan(DropIn); err != nil || planned.File != j.File {
			t.Errorf("%s: planned %+v, %v", name, planned, err)
		}
		if found, in, err := n.Look(); err != nil || !in || found.File != j.File {
			t.Errorf("%s: %+v, %v, %v", name, found, in, err)
		}
		n.write(t, "10-pods.conflist", strings.Replace(list, "portmap", "firewall", 1))
		if again, err := n.Join(t.Context(), Copy); err != nil || !again.Changed {
			t.Errorf("%s: its original has changed: %+v, %v", name, again, err)
		}
		if text, err := os.ReadFile(j.File); err != nil || !strings.Contains(string(text), "firewall") {
			t.Errorf("%s: %s, %v", name, text, err)
		}
		n.write(t, "10-pods.conflist", list)
		if _, err := n.Join(t.Context(), Copy); err != nil {
			t.Fatal(err)
		}
	}
	// Without a copy of ours nothing is added to what has the plugin in it.
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

// A copy by whose path another plugin finds its network is not taken away under it, whatever becomes of the chain. It loses the plugin
// where that would stop pods, and goes when nobody names it any more.
func TestCopyThatIsNamedStays(t *testing.T) {
	for name, test := range map[string]struct {
		change func(*testing.T, Node)
		err    error
		armed  bool
	}{
		"the plugin is gone":        {func(_ *testing.T, n Node) { _ = os.Remove(n.pluginFile()) }, ErrMisplaced, false},
		"its original is gone":      {func(_ *testing.T, n Node) { _ = os.Remove(filepath.Join(n.NetDir, "10-pods.conflist")) }, ErrUnusable, true},
		"its original is not whole": {func(t *testing.T, n Node) { n.write(t, "10-pods.conflist", list[:20]) }, ErrUnusable, true},
		"its original has it": {func(t *testing.T, n Node) {
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
					t.Fatalf("the copy: %+v, %v", w, err)
				}
			}
			n.addProgram(t, PluginType)
			n.write(t, "10-pods.conflist", list)
			if again, err := n.Join(t.Context(), Copy); err != nil || again.File != j.File || again.Changed == test.armed {
				t.Errorf("all is well again: %+v, %v", again, err)
			}
			if err := os.Remove(filepath.Join(n.NetDir, "00-multus.conf")); err != nil {
				t.Fatal(err)
			}
			if _, err := n.Leave(t.Context()); err != nil || len(n.ours()) > 0 {
				t.Errorf("left %v, %v", n.ours(), err)
			}
		})
	}
}
