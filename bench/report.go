package bench

import (
	"bytes"
	_ "embed" // the page's template
	"encoding/json"
	"fmt"
	"io"
	"math"
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
	if m.Limit == 0 && value == 0 {
		return 0
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
	cell    bool   // in the section's matrix of measures and variants

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

// value returns the value with its unit, if it has one.
func (r row) value() string { return strings.TrimSpace(number(r.Value) + " " + r.Unit) }

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
	interval := number(r.Low) + " to " + number(r.High)
	if r.Rounds == 1 {
		interval = "-"
	}
	return []string{
		r.Measure, string(r.Variant), string(against), r.value(), interval, limit, holds,
		strconv.Itoa(r.Rounds),
	}
}

// results are the rows of a run, and a description of the machine.
type results struct {
	rows    []row
	machine string
}

// section is a part of the page: rows, ratios first, and possibly a matrix.
type section struct {
	name        string
	rows, cells []row
}

// sections returns the rows by section.
func (r *results) sections() []section {
	var all []section
	at := map[string]int{}
	for _, row := range r.rows {
		i, ok := at[row.section]
		if !ok {
			i = len(all)
			at[row.section] = i
			all = append(all, section{name: row.section})
		}
		if row.cell {
			all[i].cells = append(all[i].cells, row)
		} else {
			all[i].rows = append(all[i].rows, row)
		}
	}
	for _, s := range all {
		slices.SortStableFunc(s.rows, func(a, b row) int {
			switch {
			case a.Unit == ratio && b.Unit != ratio:
				return -1
			case a.Unit != ratio && b.Unit == ratio:
				return 1
			}
			return 0
		})
	}
	return all
}

// ordered returns the rows section by section.
func (r *results) ordered() (rows []row) {
	for _, s := range r.sections() {
		rows = append(rows, s.rows...)
		rows = append(rows, s.cells...)
	}
	return rows
}

// matrix returns the section's cells with a line per measure and a column per variant, headings included.
func (s section) matrix() [][]string {
	table := [][]string{{"measure"}}
	line, column := map[string]int{}, map[variant]int{}
	for _, c := range s.cells {
		if _, ok := column[c.Variant]; !ok {
			column[c.Variant] = len(table[0])
			table[0] = append(table[0], string(c.Variant))
		}
	}
	for _, c := range s.cells {
		if _, ok := line[c.Measure]; !ok {
			line[c.Measure] = len(table)
			cells := slices.Repeat([]string{"-"}, len(table[0]))
			cells[0] = c.Measure
			if c.Unit != "" {
				cells[0] += " (" + c.Unit + ")"
			}
			table = append(table, cells)
		}
		table[line[c.Measure]][column[c.Variant]] = short(c.Value)
	}
	return table
}

// short returns three digits of a value, and all those before the point.
func short(value float64) string {
	if math.Abs(value) >= 100 {
		return strconv.FormatFloat(value, 'f', 0, 64)
	}
	return strconv.FormatFloat(value, 'g', 3, 64)
}

// print writes the rows in a form for terminals.
func (r *results) print(w io.Writer) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, strings.Join(columns, "\t"))
	for _, s := range r.sections() {
		for _, row := range s.rows {
			_, _ = fmt.Fprintln(table, strings.Join(row.cells(), "\t"))
		}
	}
	if err := table.Flush(); err != nil {
		return err
	}
	for _, s := range r.sections() {
		if s.cells == nil {
			continue
		}
		_, _ = fmt.Fprintf(w, "\n%s\n", s.name)
		for _, line := range s.matrix() {
			_, _ = fmt.Fprintln(table, strings.Join(line, "\t"))
		}
		if err := table.Flush(); err != nil {
			return err
		}
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

// write writes bench/results.json, docs/benchmarks.md and its pictures in the repository at root.
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
		"docs/policies.svg": plotPolicies(r.ordered()),
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

// tables returns the Markdown tables of each section.
func (r *results) tables() string {
	var out strings.Builder
	line := func(cells []string) { fmt.Fprintf(&out, "| %s |\n", strings.Join(cells, " | ")) }
	heading := func(cells []string) {
		out.WriteString("\n")
		line(cells)
		fmt.Fprintf(&out, "|%s\n", strings.Repeat("---|", len(cells)))
	}
	for _, s := range r.sections() {
		fmt.Fprintf(&out, "\n## %s\n", s.name)
		if s.rows != nil {
			heading(strings.Split(strings.ToLower(strings.Join(columns, "|")), "|"))
		}
		for _, row := range s.rows {
			cells := row.cells()
			if row.missed() {
				cells[6] = "**missed**"
			}
			line(cells)
		}
		if s.cells == nil {
			continue
		}
		matrix := s.matrix()
		heading(matrix[0])
		for _, cells := range matrix[1:] {
			line(cells)
		}
	}
	return out.String()
}
