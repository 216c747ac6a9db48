package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// result is the outcome of a variant.
type result struct {
	variant string
	took    time.Duration
	specs   map[string]spec // by name
}

// spec is the outcome of a spec.
type spec struct {
	passed   bool
	why      string // if not passed
	took     time.Duration
	restarts int // of the container that it watches
	answered int // probes of its pods, at least
}

// report is the part of ginkgo's report that is read here.
type report struct {
	RunTime     time.Duration
	SpecReports []struct {
		ContainerHierarchyTexts                                       []string
		LeafNodeType, LeafNodeText, State, CapturedGinkgoWriterOutput string
		RunTime                                                       time.Duration
		Failure                                                       struct{ Message string }
	}
}

// load reads the files that a variant left in a directory.
func load(variant, dir string) (r result, err error) {
	answered := map[string]int{}
	var reports []report
	for file, into := range map[string]any{reportFile: &reports, answersFile: &answered} {
		text, err := os.ReadFile(filepath.Join(dir, file))
		if err != nil {
			return r, err
		}
		if err := json.Unmarshal(text, into); err != nil {
			return r, fmt.Errorf("%s: %w", file, err)
		}
	}
	r = result{variant: variant, specs: map[string]spec{}}
	for _, report := range reports {
		r.took += report.RunTime
		for _, s := range report.SpecReports {
			if s.LeafNodeType != "It" || s.State == "skipped" || s.State == "pending" {
				continue
			}
			name := strings.Join(append(s.ContainerHierarchyTexts, s.LeafNodeText), " ")
			r.specs[name] = spec{
				passed: s.State == "passed", why: s.State + ": " + s.Failure.Message, took: s.RunTime,
				restarts: restarts(s.CapturedGinkgoWriterOutput), answered: answeredIn(s.CapturedGinkgoWriterOutput, answered),
			}
		}
	}
	if len(r.specs) == 0 {
		return r, fmt.Errorf("variant %s: no specs were run", variant)
	}
	return r, nil
}

// The e2e framework logs these (runLivenessTest in test/e2e/common/node/container_probe.go; framework.CreateTestingNS).
var (
	restarted = regexp.MustCompile(`Restart count of pod \S+ is now (\d+)`)
	namespace = regexp.MustCompile(`\b[a-z][a-z-]*-\d+\b`)
)

// restarts returns the last count in a spec's log.
func restarts(log string) (n int) {
	for _, match := range restarted.FindAllStringSubmatch(log, -1) {
		n, _ = strconv.Atoi(match[1]) // digits
	}
	return n
}

// answeredIn counts the answers in the namespaces that appear in a spec's log.
func answeredIn(log string, answered map[string]int) (n int) {
	names := namespace.FindAllString(log, -1)
	slices.Sort(names)
	for _, name := range slices.Compact(names) {
		n += answered[name]
	}
	return n
}

func find(results []result, variant string) result {
	for _, r := range results {
		if r.variant == variant {
			return r
		}
	}
	return result{}
}

// compare describes failures, and differences from the run without probelet, if there is one.
func compare(results []result) (problems []string) {
	without := find(results, plain)
	for _, r := range results {
		for _, name := range names(r) {
			s := r.specs[name]
			was, ran := without.specs[name]
			switch {
			case !s.passed:
				problems = append(problems, fmt.Sprintf("%s: failed: %s\n%s", r.variant, name, s.why))
			case ran && was.passed && s.restarts != was.restarts:
				problems = append(problems, fmt.Sprintf("%s: %d restarts, %d without: %s", r.variant, s.restarts, was.restarts, name))
			}
		}
		for _, name := range names(without) {
			if _, ran := r.specs[name]; !ran {
				problems = append(problems, fmt.Sprintf("%s: did not run: %s", r.variant, name))
			}
		}
	}
	return problems
}

// idle describes variants with probelet that answered no probe.
func idle(results []result) (problems []string) {
	for _, r := range results {
		answered := 0
		for _, s := range r.specs {
			answered += s.answered
		}
		if r.variant != plain && answered == 0 {
			problems = append(problems, r.variant+": no probe was answered, so nothing was tested")
		}
	}
	return problems
}

// With probelet's defaults, a spec may take up to slowest times as long as without. Since probelet adds a probe period or
// two, the ratio is only meaningful for specs that take at least longEnough without it.
const (
	slowest    = 1.6
	longEnough = 20 * time.Second
)

// slower returns the names of the specs that took too long.
func slower(without, with result) (slow []string) {
	for _, name := range names(with) {
		was, ran := without.specs[name]
		if ran && was.took >= longEnough && with.specs[name].took.Seconds() > slowest*was.took.Seconds() {
			slow = append(slow, name)
		}
	}
	return slow
}

// names returns the sorted names of the specs.
func names(r result) (names []string) {
	for name := range r.specs {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// tag matches the labels in the names of specs.
var tag = regexp.MustCompile(`\s*\[[^]]*\]`)

// table returns a table with a row per spec and a column per variant.
func table(results []result) string {
	var text strings.Builder
	text.WriteString("seconds of each spec; r: restarts of its container; a: probes answered in the kernel, at least\n")
	w := tabwriter.NewWriter(&text, 0, 0, 2, ' ', 0)
	all := result{specs: map[string]spec{}}
	line := func(cells []string, what string) { _, _ = fmt.Fprintf(w, "%s\t%s\n", strings.Join(cells, "\t"), what) }
	var head []string
	for _, r := range results {
		head = append(head, r.variant)
		for name := range r.specs {
			all.specs[name] = spec{}
		}
	}
	line(head, "")
	for _, name := range names(all) {
		var cells []string
		for _, r := range results {
			cells = append(cells, cell(r, name))
		}
		line(cells, strings.TrimSpace(tag.ReplaceAllString(name, "")))
	}
	var sums []string
	for _, r := range results {
		sums = append(sums, sum(r))
	}
	line(sums, "all")
	_ = w.Flush()
	return text.String()
}

func cell(r result, name string) string {
	s, ran := r.specs[name]
	if !ran {
		return "-"
	}
	text := fmt.Sprintf("%.0f", s.took.Seconds())
	if s.restarts > 0 {
		text += fmt.Sprintf(" r%d", s.restarts)
	}
	if s.answered > 0 {
		text += fmt.Sprintf(" a%d", s.answered)
	}
	if !s.passed {
		text += " FAILED"
	}
	return text
}

// sum returns the cell of the last row: the sums, and how many specs passed out of how many.
func sum(r result) string {
	passed, restarts, answered := 0, 0, 0
	for _, s := range r.specs {
		if s.passed {
			passed++
		}
		restarts += s.restarts
		answered += s.answered
	}
	return fmt.Sprintf("%.0f r%d a%d %d/%d", r.took.Seconds(), restarts, answered, passed, len(r.specs))
}
