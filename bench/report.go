package bench

import (
	"bytes"
	_ "embed" // the page's template
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"text/template"
)

// ratio is the unit of quotients of values measured next to each other. Only these carry over to other machines.
const ratio = "×"

// mark is the limit for a measured value.
type mark struct {
	Sign  string // ≤, ≥ or <
	Limit float64
}

func atMost(limit float64) *mark  { return &mark{"≤", limit} }
func atLeast(limit float64) *mark { return &mark{"≥", limit} }
func below(limit float64) *mark   { return &mark{"<", limit} }

func (m mark) holds(value float64) bool {
	switch m.Sign {
	case "≤":
		return value <= m.Limit
	case "≥":
		return value >= m.Limit
	}
	return value < m.Limit
}

// strain returns how close a value is to the mark: 1 is the mark itself, and anything above misses it.
func (m mark) strain(value float64) float64 {
	if m.Sign == "≥" {
		return m.Limit / value
	}
	return value / m.Limit
}

func (m mark) String() string { return m.Sign + " " + number(m.Limit) }

// MarshalText writes the mark as people read it.
func (m mark) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// variant is one of the compared alternatives.
type variant string

// row is a row of the results.
type row struct {
	section string // of the page

	Measure string  `json:"measure"`
	Variant variant `json:"variant"`
	Against variant `json:"against"` // the divisor or, with a unit, what was subtracted; empty: neither
	Value   float64 `json:"value"`
	Low     float64 `json:"low"` // 95 % confidence interval
	High    float64 `json:"high"`
	Unit    string  `json:"unit"`
	Mark    *mark   `json:"mark"`
	Holds   *bool   `json:"holds"` // null without a mark
	Rounds  int     `json:"rounds"`
}

// newRow returns the row for an estimate. m is nil if there is no mark to meet.
func newRow(measure string, v, against variant, e estimate, unit string, m *mark) row {
	r := row{
		Measure: measure, Variant: v, Against: against, Unit: unit, Mark: m, Rounds: e.rounds,
		Value: rounded(e.value), Low: rounded(e.low), High: rounded(e.high),
	}
	if m != nil {
		holds := m.holds(r.Value)
		r.Holds = &holds
	}
	return r
}

func (r row) missed() bool { return r.Holds != nil && !*r.Holds }

// rounded keeps four significant digits.
func rounded(value float64) float64 {
	v, err := strconv.ParseFloat(strconv.FormatFloat(value, 'g', 4, 64), 64)
	if err != nil {
		panic(err) // it was formatted as a number
	}
	return v
}

func number(value float64) string { return strconv.FormatFloat(value, 'f', -1, 64) }

var columns = []string{"MEASURE", "VARIANT", "AGAINST", "VALUE", "95 % INTERVAL", "MARK", "MET", "ROUNDS"}

func (r row) cells() []string {
	against, limit, holds := variant("-"), "-", "-"
	if r.Against != "" {
		against = r.Against
	}
	if r.Mark != nil {
		limit, holds = r.Mark.String(), "yes"
	}
	if r.missed() {
		holds = "MISSED"
	}
	return []string{
		r.Measure, string(r.Variant), string(against), number(r.Value) + " " + r.Unit, number(r.Low) + " to " + number(r.High), limit, holds,
		strconv.Itoa(r.Rounds),
	}
}

// results are the rows of a run, and a description of the machine.
type results struct {
	rows    []row
	machine string
}

// ordered returns the rows section by section, ratios first in each.
func (r *results) ordered() []row {
	sections := map[string]int{}
	for _, row := range r.rows {
		if _, ok := sections[row.section]; !ok {
			sections[row.section] = len(sections)
		}
	}
	key := func(row row) int {
		k := 2 * sections[row.section]
		if row.Unit != ratio {
			k++
		}
		return k
	}
	rows := slices.Clone(r.rows)
	slices.SortStableFunc(rows, func(a, b row) int { return key(a) - key(b) })
	return rows
}

// print writes the rows in a form for terminals.
func (r *results) print(w io.Writer) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, strings.Join(columns, "\t"))
	for _, row := range r.ordered() {
		_, _ = fmt.Fprintln(table, strings.Join(row.cells(), "\t"))
	}
	if err := table.Flush(); err != nil {
		return err
	}
	_, err := fmt.Fprintln(w, "\n"+r.verdict())
	return err
}

// verdict returns how many marks were met.
func (r *results) verdict() string {
	marks, missed := 0, 0
	for _, row := range r.rows {
		if row.Mark != nil {
			marks++
		}
		if row.missed() {
			missed++
		}
	}
	return fmt.Sprintf("%d of %d marks are met.", marks-missed, marks)
}

// write writes bench/results.json, docs/benchmarks.md and docs/benchmarks.svg of the repository at root.
func (r *results) write(root string) error {
	page, err := r.page()
	if err != nil {
		return err
	}
	records, err := r.records()
	if err != nil {
		return err
	}
	for name, text := range map[string][]byte{
		"bench/results.json": records, "docs/benchmarks.md": page, "docs/benchmarks.svg": plot(r.ordered()),
	} {
		if err := os.WriteFile(filepath.Join(root, name), text, 0o644); err != nil {
			return err
		}
	}
	return nil
}

// records returns a JSON array with one row per line.
func (r *results) records() ([]byte, error) {
	var lines []string
	for _, row := range r.ordered() {
		var line strings.Builder
		encoder := json.NewEncoder(&line)
		encoder.SetEscapeHTML(false) // keep "< 1" instead of "\u003c 1"
		if err := encoder.Encode(row); err != nil {
			return nil, err
		}
		lines = append(lines, strings.TrimSpace(line.String()))
	}
	return []byte("[\n" + strings.Join(lines, ",\n") + "\n]\n"), nil
}

//go:embed page.md
var pageTemplate string

// page returns docs/benchmarks.md.
func (r *results) page() ([]byte, error) {
	t, err := template.New("page").Parse(pageTemplate)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	err = t.Execute(&out, map[string]any{"Machine": r.machine, "Verdict": r.verdict(), "Tables": r.tables()})
	return out.Bytes(), err
}

// tables returns a Markdown table for each section.
func (r *results) tables() string {
	var out strings.Builder
	section := ""
	for _, row := range r.ordered() {
		if row.section != section {
			section = row.section
			fmt.Fprintf(&out, "\n## %s\n\n| %s |\n|%s\n", section, strings.ToLower(strings.Join(columns, " | ")), strings.Repeat("---|", len(columns)))
		}
		cells := row.cells()
		if row.missed() {
			cells[6] = "**missed**"
		}
		fmt.Fprintf(&out, "| %s |\n", strings.Join(cells, " | "))
	}
	return out.String()
}
