// Package docs checks the project's documentation against the repository: links, names and examples.
package docs

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"unicode/utf8"

	"sigs.k8s.io/yaml"
)

const root = ".."

// files returns the repository's files whose names match the pattern, by their paths from its root.
func files(t *testing.T, pattern string) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
		switch name := entry.Name(); {
		case err != nil:
			return err
		case entry.IsDir() && slices.Contains([]string{".git", "bin", "testdata"}, name):
			return filepath.SkipDir
		case entry.IsDir():
			return nil
		case path == filepath.Join(root, "bench/page.md"): // the template of docs/benchmarks.md
			return nil
		}
		if matches, err := filepath.Match(pattern, entry.Name()); err != nil || !matches {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		relative, err := filepath.Rel(root, path)
		found[relative] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(found) == 0 {
		t.Fatalf("no file matches %s", pattern)
	}
	return found
}

var (
	fence   = regexp.MustCompile("(?ms)^[ \t]*(```+|~~~+).*?^[ \t]*(```+|~~~+)[ \t]*$")
	code    = regexp.MustCompile("`[^`\n]+`")
	heading = regexp.MustCompile(`(?m)^#{1,6} +(.+?) *$`)
	link    = regexp.MustCompile(`\]\(([^()\s]+)\)`)
	ours    = regexp.MustCompile(`https://github\.com/probelet/probelet/(?:blob|tree)/main/([\w./-]+)`)
)

// prose returns a page without its code.
func prose(page string) string {
	return code.ReplaceAllString(fence.ReplaceAllString(page, ""), "")
}

// anchors returns what GitHub makes of a page's headings.
func anchors(page string) map[string]bool {
	all := map[string]bool{}
	for _, h := range heading.FindAllStringSubmatch(fence.ReplaceAllString(page, ""), -1) {
		title := link.ReplaceAllString(h[1], "")
		slug := strings.ToLower(regexp.MustCompile(`[^\pL\pN _-]`).ReplaceAllString(title, ""))
		slug = strings.ReplaceAll(slug, " ", "-")
		for unique, n := slug, 1; ; n++ {
			if !all[unique] {
				all[unique] = true
				break
			}
			unique = fmt.Sprintf("%s-%d", slug, n)
		}
	}
	return all
}

func TestLinksResolve(t *testing.T) {
	pages := files(t, "*.md")
	checked := 0
	for name, page := range pages {
		for _, found := range link.FindAllStringSubmatch(prose(page), -1) {
			target := found[1]
			if strings.Contains(target, "://") || strings.HasPrefix(target, "mailto:") {
				continue
			}
			checked++
			path, anchor, hasAnchor := strings.Cut(target, "#")
			file := name
			if path != "" {
				file = filepath.Join(filepath.Dir(name), path)
			}
			if _, err := os.Stat(filepath.Join(root, file)); err != nil {
				t.Errorf("%s: %s: %v", name, target, err)
				continue
			}
			if page, isPage := pages[file]; hasAnchor && (!isPage || !anchors(page)[anchor]) {
				t.Errorf("%s: %s: no such heading", name, target)
			}
		}
	}
	if checked < 100 {
		t.Errorf("only %d links were found", checked)
	}
}

// Absolute links into the repository resolve, too.
func TestLinksToThisRepositoryResolve(t *testing.T) {
	checked := 0
	for _, pattern := range []string{"*.md", "*.yml", "*.yaml", "*.go", "*.txt", "Dockerfile"} {
		for name, text := range files(t, pattern) {
			for _, found := range ours.FindAllStringSubmatch(text, -1) {
				checked++
				if _, err := os.Stat(filepath.Join(root, strings.TrimRight(found[1], "."))); err != nil {
					t.Errorf("%s: %s: %v", name, found[0], err)
				}
			}
		}
	}
	if checked == 0 {
		t.Error("no link was found")
	}
}

// Pages, workflows and templates name only make targets that exist.
func TestMakeTargetsExist(t *testing.T) {
	makefile, err := os.ReadFile(filepath.Join(root, "Makefile"))
	if err != nil {
		t.Fatal(err)
	}
	targets := map[string]bool{}
	for _, target := range regexp.MustCompile(`(?m)^([a-z0-9-]+):`).FindAllStringSubmatch(string(makefile), -1) {
		targets[target[1]] = true
	}
	// In code: `make x`, an indented line, or a step of a workflow.
	command := regexp.MustCompile("(?m)(?:`|^ {4,}|^- +run: |run: |PATH\" )make ((?:[a-z0-9-]+ )*[a-z0-9-]+)")
	checked := 0
	for _, pattern := range []string{"*.md", "*.yml", "*.yaml"} {
		for name, text := range files(t, pattern) {
			for _, found := range command.FindAllStringSubmatch(text, -1) {
				for _, target := range strings.Fields(found[1]) {
					checked++
					if !targets[target] {
						t.Errorf("%s: there is no target of %q", name, found[0])
					}
				}
			}
		}
	}
	if checked < 20 {
		t.Errorf("only %d commands were found", checked)
	}
}

// Tests and benchmarks that pages name as proof exist.
func TestNamedTestsExist(t *testing.T) {
	defined := map[string]bool{}
	for _, text := range files(t, "*_test.go") {
		for _, f := range regexp.MustCompile(`(?m)^func ((?:Test|Benchmark|Fuzz)\w+)\(`).FindAllStringSubmatch(text, -1) {
			defined[f[1]] = true
		}
	}
	pages := files(t, "*.md")
	checked := 0
	for name, page := range pages {
		for _, found := range regexp.MustCompile("`((?:Test|Benchmark|Fuzz)[A-Z]\\w+)`").FindAllStringSubmatch(page, -1) {
			checked++
			if !defined[found[1]] {
				t.Errorf("%s: there is no %s", name, found[1])
			}
		}
		// A test that is linked is in the file that the link leads to.
		for _, found := range regexp.MustCompile("\\[`(Test\\w+)`\\]\\(([\\w./-]+)\\)").FindAllStringSubmatch(page, -1) {
			text, err := os.ReadFile(filepath.Join(root, filepath.Dir(name), found[2]))
			if err != nil || !strings.Contains(string(text), "func "+found[1]+"(") {
				t.Errorf("%s: %s is not in %s", name, found[1], found[2])
			}
		}
	}
	if checked < 20 {
		t.Errorf("only %d names were found", checked)
	}
}

// Paths in code that begin with one of the repository's directories exist.
func TestNamedPathsExist(t *testing.T) {
	path := regexp.MustCompile("`(?:\\./)?((?:bench|bpf|cni-conf|daemon|docs|e2e|internal|plugin)/[\\w./-]*?)(?:/?\\.\\.\\.)?/?`")
	arguments := regexp.MustCompile(`\bgo (?:test|build|run) [^` + "`" + `\n]*`)
	checked := 0
	for name, page := range files(t, "*.md") {
		var named []string
		for _, found := range path.FindAllStringSubmatch(page, -1) {
			named = append(named, found[1])
		}
		for _, found := range arguments.FindAllString(page, -1) {
			for _, argument := range strings.Fields(found) {
				if directory, relative := strings.CutPrefix(argument, "./"); relative {
					named = append(named, strings.TrimSuffix(strings.Trim(directory, ")`"), "/..."))
				}
			}
		}
		for _, directory := range named {
			checked++
			matches, err := filepath.Glob(filepath.Join(root, directory))
			nearby, _ := filepath.Glob(filepath.Join(root, filepath.Dir(name), directory)) // the same pattern
			if err != nil || len(matches)+len(nearby) == 0 {
				t.Errorf("%s: there is no %s: %v", name, directory, err)
			}
		}
	}
	if checked < 30 {
		t.Errorf("only %d paths were found", checked)
	}
}

// ARCHITECTURE.md names every part.
func TestPartsAreNamed(t *testing.T) {
	page := files(t, "ARCHITECTURE.md")["ARCHITECTURE.md"]
	for _, pattern := range []string{"bpf/*", "daemon/*", "daemon/internal/*"} {
		matches, err := filepath.Glob(filepath.Join(root, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, match := range matches {
			name, err := filepath.Rel(root, match)
			if err != nil {
				t.Fatal(err)
			}
			if info, err := os.Stat(match); err == nil && info.IsDir() && name != "daemon/internal" && !strings.Contains(page, "`"+name+"`") {
				t.Errorf("ARCHITECTURE.md does not name %s", name)
			}
		}
	}
}

// Every flag of the programs is documented, and the table of flags has no others.
func TestFlagsAreDocumented(t *testing.T) {
	registered := map[string]bool{}
	for name, text := range files(t, "*.go") {
		if !strings.HasPrefix(name, "daemon/") || strings.HasSuffix(name, "_test.go") || strings.HasPrefix(name, "daemon/simulate/") {
			continue
		}
		for _, flag := range regexp.MustCompile(`\.\w*VarP?\([^,\n]+, "([a-z][a-z-]+)"`).FindAllStringSubmatch(text, -1) {
			registered[flag[1]] = true
		}
	}
	if len(registered) < 40 {
		t.Fatalf("only %d flags were found", len(registered))
	}
	var pages strings.Builder
	for name, page := range files(t, "*.md") {
		if strings.HasPrefix(name, "docs/") || strings.HasPrefix(name, "cni-conf/") {
			pages.WriteString(page)
		}
	}
	for flag := range registered {
		if !regexp.MustCompile(`--` + flag + `\b`).MatchString(pages.String()) {
			t.Errorf("--%s is not documented", flag)
		}
	}
	for row := range strings.Lines(files(t, "configuration.md")["docs/configuration.md"]) {
		cell, isFlag := strings.CutPrefix(row, "| `--")
		if !isFlag {
			continue
		}
		cell, _, _ = strings.Cut(cell, "|")
		for _, flag := range regexp.MustCompile(`([a-z][a-z-]+)`+"`").FindAllStringSubmatch(cell, -1) {
			if !registered[flag[1]] {
				t.Errorf("docs/configuration.md: there is no --%s", flag[1])
			}
		}
	}
}

// Pages quote the programs verbatim: doctor's rows and lines of the log.
func TestQuotedOutputExists(t *testing.T) {
	var source strings.Builder
	for name, text := range files(t, "*.go") {
		if strings.HasPrefix(name, "daemon/") && !strings.HasSuffix(name, "_test.go") {
			source.WriteString(text)
		}
	}
	pages := files(t, "*.md")
	quote := regexp.MustCompile("`([^`]+)`")
	_, table, ok := strings.Cut(pages["docs/operations.md"], "\n| row | checks |")
	table, _, ended := strings.Cut(table, "\n\n")
	if !ok || !ended {
		t.Fatal("docs/operations.md: the table of doctor's rows is missing")
	}
	for row := range strings.Lines(table) {
		first, _, _ := strings.Cut(strings.TrimPrefix(row, "| "), " |")
		for _, name := range quote.FindAllStringSubmatch(first, -1) {
			if !strings.Contains(source.String(), `"`+name[1]+`"`) {
				t.Errorf("docs/operations.md: doctor has no row %q", name[1])
			}
		}
	}
	for name, page := range pages {
		if !strings.HasPrefix(name, "docs/runbooks/") {
			continue
		}
		for line := range strings.Lines(page) {
			if !strings.Contains(line, "daemon's log") {
				continue
			}
			for _, quoted := range quote.FindAllStringSubmatch(line, -1) {
				if !strings.Contains(source.String(), quoted[1]) {
					t.Errorf("%s: the daemon never logs %q", name, quoted[1])
				}
			}
		}
	}
}

// The README is the first screen, not the manual, and begins with what a reader can try.
func TestReadmeIsShort(t *testing.T) {
	readme := files(t, "README.md")["README.md"]
	if words := len(strings.Fields(readme)); words > 1700 {
		t.Errorf("README.md has %d words, want 1700 at most", words)
	}
	lines := strings.Split(readme, "\n")
	if !strings.Contains(strings.Join(lines[:15], "\n"), "`make demo`") {
		t.Error("README.md: the demo is not in the first 15 lines")
	}
	for i, line := range lines {
		if columns := utf8.RuneCountInString(line); columns > 142 && !strings.HasPrefix(line, "|") {
			t.Errorf("README.md:%d: %d columns, want 142 at most outside tables", i+1, columns)
		}
	}
}

// The page of benchmarks explains each mark that the last run missed. What else it names is close to its mark, and is called that.
func TestMissedMarksAreExplained(t *testing.T) {
	measures := map[string]string{ // by what the page calls them: measure|variant|against
		"Time in the BPF programs": `^BPF time, answered`, "Memory": `^kernel memory`, "CNI ADD": `^CNI ADD, time added by probelet`,
		"Handed-over GETs": `^handed-over GET, IPv.\|`, "TCP probes among 1,000 pods": `^answered TCP probe\|.* 1000 pods`,
		"Plain probes at twice the period": `^CPU of the node\|.*\|plain, 2 s`, "Ports, by TCP": `by TCP, ports in TIME_WAIT`,
	}
	var rows []struct {
		Measure, Variant, Against, Mark string
		Value                           float64
		Holds, explained                bool
	}
	if err := yaml.Unmarshal([]byte(files(t, "results.json")["bench/results.json"]), &rows); err != nil {
		t.Fatal(err)
	}
	_, text, found := strings.Cut(files(t, "benchmarks.md")["docs/benchmarks.md"], "\n## Why marks are missed\n")
	if template, err := os.ReadFile(filepath.Join(root, "bench/page.md")); err != nil || !found || !strings.HasSuffix(string(template), text) {
		t.Fatalf("docs/benchmarks.md does not end as its template, bench/page.md: %v", err)
	}
	for sentence := range strings.SplitSeq(strings.Join(strings.Fields(strings.Split(text, "\n## ")[0]), " "), ". ") {
		for _, bold := range regexp.MustCompile(`\*\*(.+?)\*\*`).FindAllStringSubmatch(sentence, -1) {
			pattern, named := measures[bold[1]]
			missed, near := false, named && strings.Contains(sentence, "close to")
			for i, r := range rows {
				if r.Mark != "" && named && regexp.MustCompile(pattern).MatchString(r.Measure+"|"+r.Variant+"|"+r.Against) {
					limit, err := strconv.ParseFloat(strings.Fields(r.Mark)[1], 64)
					near = near && err == nil && 0.9*limit <= r.Value && r.Value <= 1.1*limit
					missed, rows[i].explained = missed || !r.Holds, true
				}
			}
			if !missed && !near {
				t.Errorf("docs/benchmarks.md names %q, whose marks are met", bold[1])
			}
		}
	}
	for _, r := range rows {
		if r.Mark != "" && !r.Holds && !r.explained {
			t.Errorf("docs/benchmarks.md does not explain why this mark is missed: %+v", r)
		}
	}
}

// What other pages say about the size of the simulation matches its page, which make simulate writes.
func TestSimulationIsQuoted(t *testing.T) {
	pages := files(t, "*.md")
	size := regexp.MustCompile(`(?m)^(\d+) pods, (\d+)h0m0s each`).FindStringSubmatch(pages["docs/simulation.md"])
	_, table, found := strings.Cut(pages["docs/simulation.md"], "\n| pods |")
	table, _, ended := strings.Cut(table, "\n\n")
	if size == nil || !found || !ended {
		t.Fatal("docs/simulation.md: the results are missing")
	}
	if !strings.Contains(pages["README.md"], size[1]+" pods over three simulated days") || size[2] != "72" {
		t.Errorf("README.md does not say how much is simulated: %s pods, %s hours", size[1], size[2])
	}
	if rows := strings.Count(table, "\n| "); !strings.Contains(pages["docs/limits.md"], fmt.Sprintf("of %d combinations", rows)) {
		t.Errorf("docs/limits.md does not say how many combinations are simulated: %d", rows)
	}
}

func TestPicturesAreXML(t *testing.T) {
	for name, text := range files(t, "*.svg") {
		decoder := xml.NewDecoder(strings.NewReader(text))
		for {
			if _, err := decoder.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Errorf("%s: %v", name, err)
				break
			}
		}
	}
}

// Workflows have read permissions only, and run actions by their commits, which cannot be moved.
func TestWorkflows(t *testing.T) {
	workflows, err := filepath.Glob(filepath.Join(root, ".github/workflows/*.y*ml"))
	if err != nil || len(workflows) == 0 {
		t.Fatal(workflows, err)
	}
	pinned := regexp.MustCompile(`^[\w./-]+@[0-9a-f]{40}$`)
	for _, path := range workflows {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var workflow struct {
			Permissions map[string]string
			Jobs        map[string]struct {
				Permissions map[string]string
				Timeout     int `json:"timeout-minutes"`
				Steps       []struct{ Uses, Run string }
			}
		}
		if err := yaml.Unmarshal(text, &workflow); err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		if len(workflow.Permissions) != 1 || workflow.Permissions["contents"] != "read" {
			t.Errorf("%s: permissions %v, want contents: read and nothing else", path, workflow.Permissions)
		}
		if len(workflow.Jobs) == 0 {
			t.Errorf("%s: no jobs", path)
		}
		for name, job := range workflow.Jobs {
			if job.Permissions != nil || job.Timeout == 0 || len(job.Steps) == 0 {
				t.Errorf("%s: job %s: permissions %v, timeout %d, %d steps", path, name, job.Permissions, job.Timeout, len(job.Steps))
			}
			for _, step := range job.Steps {
				if (step.Uses == "") == (step.Run == "") || step.Uses != "" && !pinned.MatchString(step.Uses) {
					t.Errorf("%s: job %s: step %+v", path, name, step)
				}
			}
		}
	}
}

func TestIssueTemplates(t *testing.T) {
	templates, err := filepath.Glob(filepath.Join(root, ".github/ISSUE_TEMPLATE/*.yml"))
	if err != nil || len(templates) != 4 {
		t.Fatal(templates, err)
	}
	for _, path := range templates {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var form struct {
			Name, Description string
			Body              []struct {
				Type, ID   string
				Attributes map[string]any
			}
		}
		if err := yaml.Unmarshal(text, &form); err != nil {
			t.Errorf("%s: %v", path, err)
			continue
		}
		if filepath.Base(path) == "config.yml" {
			continue
		}
		if form.Name == "" || form.Description == "" || len(form.Body) == 0 {
			t.Errorf("%s: %+v", path, form)
		}
		for _, field := range form.Body {
			if field.Type != "markdown" && (field.ID == "" || field.Attributes["label"] == nil) {
				t.Errorf("%s: %+v", path, field)
			}
		}
	}
}

// The walks of ARCHITECTURE.md lead to where things are: each step defines what it names.
func TestWalksLeadThere(t *testing.T) {
	_, walks, ok := strings.Cut(files(t, "ARCHITECTURE.md")["ARCHITECTURE.md"], "\n## Three walks\n")
	walks, _, ended := strings.Cut(walks, "\n## ")
	if !ok || !ended {
		t.Fatal("ARCHITECTURE.md has no section of three walks")
	}
	sources := files(t, "*.go")
	var programs strings.Builder
	for _, pattern := range []string{"*.c", "*.h"} {
		for _, text := range files(t, pattern) {
			programs.WriteString(text)
		}
	}
	quote := regexp.MustCompile("`([^`]+)`")
	isPath := regexp.MustCompile(`^(bpf|daemon|plugin)/`)
	isName := regexp.MustCompile(`^(?:([A-Z]\w+)\.)?([A-Za-z]\w+)$`)
	checked := 0
	for _, step := range regexp.MustCompile(`(?m)^\d\. (?:.+\n(?:   .+\n)*)`).FindAllString(walks, -1) {
		var text strings.Builder
		var named [][]string
		for _, found := range quote.FindAllStringSubmatch(step, -1) {
			if name := isName.FindStringSubmatch(found[1]); name != nil {
				named = append(named, name)
			} else if isPath.MatchString(found[1]) {
				for file, source := range sources {
					if !strings.HasSuffix(file, "_test.go") && (file == found[1] || filepath.Dir(file) == found[1]) {
						text.WriteString(source)
					}
				}
			}
		}
		for _, name := range named {
			checked++
			definition := `(?m)^(?:func (?:\(\w+ \*?\w+\) )?|type )` + name[2] + `\b`
			if name[1] != "" {
				definition = `(?m)^func \(\w+ \*?` + name[1] + `\) ` + name[2] + `\(`
			}
			inKernel := regexp.MustCompile(`(?m)^int ` + name[2] + `\(|^} ` + name[2] + ` SEC\(|\b` + name[2] + `;`).MatchString(programs.String())
			if !inKernel && !regexp.MustCompile(definition).MatchString(text.String()) {
				t.Errorf("%s is not where this step is:\n%s", name[0], step)
			}
		}
	}
	if checked < 20 {
		t.Errorf("only %d names were found", checked)
	}
}
