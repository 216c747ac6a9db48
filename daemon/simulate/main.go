// Command simulate compares the freshness policy with plain Kubernetes, over days of simulated time, and writes the
// results into docs/.
package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/google/renameio/v2"

	"github.com/probelet/probelet/daemon/internal/simulate"
)

func main() {
	pods := flag.Int("pods", 310, "total number of pods, divided among the scenarios")
	days := flag.Float64("days", 3, "days to simulate per pod")
	seed := flag.Uint64("seed", 1, "seed of the random numbers")
	docs := flag.String("docs", "", "directory in which to update simulation.md and simulation.svg; empty to write neither")
	flag.Parse()
	if err := run(*pods, time.Duration(*days*24*float64(time.Hour)), *seed, *docs); err != nil {
		fmt.Fprintln(os.Stderr, "simulate:", err)
		os.Exit(1)
	}
}

func run(pods int, d time.Duration, seed uint64, docs string) error {
	scenarios := simulate.Scenarios()
	each := (pods + len(scenarios) - 1) / len(scenarios)
	var rows []row
	var failed []string
	for i, s := range scenarios {
		r := s.Run(each, d, seed, progress(fmt.Sprintf("scenario %d of %d", i+1, len(scenarios)), each))
		rows = append(rows, row{s, r})
		for _, v := range r.Violations {
			failed = append(failed, s.Name+": "+v)
		}
		if r.HitRate() < s.Demanded {
			failed = append(failed, fmt.Sprintf("%s: %.2f %% answered, want at least %.0f %%", s.Name, 100*r.HitRate(), 100*s.Demanded))
		}
	}
	if _, err := os.Stdout.Write(text(rows)); err != nil {
		return err
	}
	if len(failed) > 0 {
		return fmt.Errorf("promises broken:\n  %s", strings.Join(failed, "\n  "))
	}
	fmt.Printf("\n%d pods, %s each: no answer after its bound or after a failure, no failure verdict that plain Kubernetes would not have reached,\nno failure detected later than stated\n",
		each*len(scenarios), d)
	if docs == "" {
		return nil
	}
	points, err := sweep(d/3, seed)
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(filepath.Join(docs, "simulation.svg"), plot(points), 0o644); err != nil {
		return err
	}
	return writeTable(filepath.Join(docs, "simulation.md"), markdown(rows, each*len(scenarios), d, seed))
}

// sweep runs the scenarios of the plot.
func sweep(d time.Duration, seed uint64) ([]row, error) {
	const each = 6
	var rows []row
	scenarios := simulate.Sweep()
	for i, s := range scenarios {
		r := s.Run(each, d, seed, progress(fmt.Sprintf("plot, %d of %d", i+1, len(scenarios)), each))
		if len(r.Violations) > 0 {
			return nil, fmt.Errorf("%s: %s", s.Name, r.Violations[0])
		}
		rows = append(rows, row{s, r})
	}
	return rows, nil
}

// progress reports the progress of a long run on a terminal.
func progress(what string, pods int) func() {
	info, err := os.Stderr.Stat()
	if err != nil || info.Mode()&os.ModeCharDevice == 0 {
		return nil
	}
	n := 0
	return func() {
		n++
		fmt.Fprintf(os.Stderr, "\r\x1b[K%s: pod %d of %d", what, n, pods)
		if n == pods {
			fmt.Fprint(os.Stderr, "\r\x1b[K")
		}
	}
}

// row is a scenario and its result.
type row struct {
	simulate.Scenario
	simulate.Result
}

var columns = []string{
	"pods", "probes", "answered (healthy)", "expected", "answered (all)", "failures detected", "worst delay", "plain", "bound",
	"worst of bound", "stopped", "connections per probe",
}

func (r row) cells() []string {
	expected := "-"
	if r.Expected > 0 {
		expected = fmt.Sprintf("%.1f %%", 100*r.Expected)
	}
	return []string{
		r.Name, fmt.Sprint(r.Probes), fmt.Sprintf("%.2f %%", 100*r.HitRate()), expected,
		fmt.Sprintf("%.2f %%", 100*r.TotalHitRate()), fmt.Sprint(r.Detected),
		seconds(r.WorstDelay), seconds(r.WorstPlain), seconds(r.MaxBound), fmt.Sprintf("%.0f %%", 100*r.WorstShare),
		fmt.Sprint(r.Stopped), fmt.Sprintf("%.2f", float64(r.Probes-r.Answered+r.Refreshes)/float64(max(r.Probes, 1))),
	}
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }

func text(rows []row) []byte {
	var out bytes.Buffer
	table := tabwriter.NewWriter(&out, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, strings.Join(columns, "\t"))
	for _, r := range rows {
		_, _ = fmt.Fprintln(table, strings.Join(r.cells(), "\t"))
	}
	_ = table.Flush() // cannot fail: writes to memory
	return out.Bytes()
}

func markdown(rows []row, pods int, d time.Duration, seed uint64) string {
	var out strings.Builder
	fmt.Fprintf(&out, "%d pods, %s each, seed %d.\n\n| %s | computed from |\n|%s\n",
		pods, d, seed, strings.Join(columns, " | "), strings.Repeat("---|", len(columns)+1))
	for _, r := range rows {
		fmt.Fprintf(&out, "| %s | %s |\n", strings.Join(r.cells(), " | "), r.Why)
	}
	return out.String()
}

const (
	begin = "<!-- begin of what make simulate generates -->\n"
	end   = "<!-- end of what make simulate generates -->\n"
)

// writeTable replaces the text between the marks.
func writeTable(path, table string) error {
	doc, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(doc), begin)
	_, after, ended := strings.Cut(rest, end)
	if !ok || !ended {
		return fmt.Errorf("%s: the marks around the table are missing", path)
	}
	return renameio.WriteFile(path, []byte(before+begin+"\n"+table+"\n"+end+after), 0o644)
}
