package main

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/e2e/harness/kube"
	"github.com/probelet/probelet/e2e/harness/manifests"
)

// Logs of specs, in the format of the e2e framework.
const reported = `[{"RunTime": 90000000000, "SpecReports": [
	{"ContainerHierarchyTexts": ["[sig-node] Probing container"], "LeafNodeType": "It", "LeafNodeText": "should be restarted [Conformance]",
	 "State": "passed", "RunTime": 61000000000, "CapturedGinkgoWriterOutput":
	 "in namespace container-probe-12\nRestart count of pod container-probe-12/x is now 1 (9s elapsed)\nRestart count of pod container-probe-12/x is now 2 (19s elapsed)"},
	{"ContainerHierarchyTexts": ["[sig-node] Probing container"], "LeafNodeType": "It", "LeafNodeText": "should fail",
	 "State": "failed", "RunTime": 1000000000, "Failure": {"Message": "it did not"}, "CapturedGinkgoWriterOutput": "in namespace container-probe-123"},
	{"ContainerHierarchyTexts": ["elsewhere"], "LeafNodeType": "It", "LeafNodeText": "is not selected", "State": "skipped"},
	{"LeafNodeType": "SynchronizedBeforeSuite", "State": "passed"}]}]`

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	for file, text := range map[string]string{
		reportFile: reported, answersFile: `{"container-probe-12": 7, "container-probe-123": 100, "container-probe-1": 1000}`,
	} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	r, err := load("default", dir)
	if err != nil {
		t.Fatal(err)
	}
	restarted := r.specs["[sig-node] Probing container should be restarted [Conformance]"]
	if len(r.specs) != 2 || r.took != 90*time.Second || !restarted.passed || restarted.restarts != 2 || restarted.answered != 7 ||
		restarted.took != 61*time.Second {
		t.Errorf("%+v", r)
	}
	if failed := r.specs["[sig-node] Probing container should fail"]; failed.passed || failed.why != "failed: it did not" || failed.answered != 100 {
		t.Errorf("%+v", failed)
	}
	for _, line := range []string{"61 r2 a7        Probing container should be restarted\n", "1 a100 FAILED", "90 r2 a107 1/2"} {
		if text := table([]result{r}); !strings.Contains(text, line) {
			t.Errorf("no %q in\n%s", line, text)
		}
	}
}

func of(variant string, took time.Duration, change func(*spec)) result {
	s := spec{passed: true, took: took, restarts: 1, answered: 3}
	change(&s)
	return result{variant: variant, specs: map[string]spec{"a": s, "b": {passed: true, took: took, answered: 1}}}
}

func TestCompare(t *testing.T) {
	same := func(*spec) {}
	for _, c := range []struct {
		name    string
		with    result
		problem string
		slow    []string
	}{
		{"the same", of(usual, time.Minute, same), "", nil},
		{"a failure", of(usual, time.Minute, func(s *spec) { s.passed = false }), "default: failed: a", nil},
		{"a restart more", of(usual, time.Minute, func(s *spec) { s.restarts++ }), "default: 2 restarts, 1 without: a", nil},
		{"a restart less", of("xdp", time.Minute, func(s *spec) { s.restarts-- }), "xdp: 0 restarts, 1 without: a", nil},
		{"one was not run", result{variant: usual, specs: map[string]spec{"a": {passed: true, restarts: 1, answered: 1}}}, "default: did not run: b", nil},
		{"longer", of(usual, time.Minute, func(s *spec) { s.took = 95 * time.Second }), "", nil},
		{"too long", of(usual, time.Minute, func(s *spec) { s.took = 97 * time.Second }), "", []string{"a"}},
	} {
		without := of(plain, time.Minute, same)
		problems := strings.Join(compare([]result{without, c.with}), "\n")
		if c.problem == "" && problems != "" || !strings.Contains(problems, c.problem) {
			t.Errorf("%s: %q", c.name, problems)
		}
		if slow := slower(without, c.with); !slices.Equal(slow, c.slow) {
			t.Errorf("%s: slow: %q", c.name, slow)
		}
	}
	short := of(plain, time.Second, same)
	if slow := slower(short, of(usual, 9*time.Second, same)); len(slow) > 0 {
		t.Errorf("slow among short specs: %q", slow)
	}
	// Without a run to compare with, failures are still reported.
	failed := []result{of("xdp", time.Minute, func(s *spec) { s.passed = false })}
	if problems := compare(failed); len(problems) != 1 {
		t.Errorf("alone: %q", problems)
	}
}

// Specs whose probes are never answered may be repeated on their own, but must not be all that ran.
func TestIdle(t *testing.T) {
	unanswered := result{variant: usual, specs: map[string]spec{"a": {passed: true}}}
	without := result{variant: plain, specs: unanswered.specs}
	if problems := compare([]result{without, unanswered}); len(problems) > 0 {
		t.Errorf("compared: %q", problems)
	}
	if problems := idle([]result{without, unanswered, of("xdp", time.Minute, func(*spec) {})}); len(problems) != 1 {
		t.Errorf("idle: %q", problems)
	}
}

// A variant is either a release of the chart or runs without probelet.
func TestVariants(t *testing.T) {
	var without int
	for _, v := range variants {
		if v.values == nil {
			without++
			if v.name != plain {
				t.Errorf("%s runs without probelet", v.name)
			}
		}
		if _, err := manifests.Render(kube.Chart, "probelet", kube.System, kube.Values(v.values)); err != nil {
			t.Errorf("%s: %v", v.name, err)
		}
	}
	if without != 1 {
		t.Errorf("%d variants run without probelet", without)
	}
}
