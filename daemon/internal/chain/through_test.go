package chain

import (
	"fmt"
	"os"
	"strings"
	"testing"
)

// A network that takes its own from our copy, or has what was in it, gets the plugin once, and the copy stays where it is.
func TestThroughAnother(t *testing.T) {
	const multus = `{"cniVersion":"1.0.0","name":"multus","type":"multus","clusterNetwork":"%s"}`
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
