package bench

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"io"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

func TestMark(t *testing.T) {
	for _, test := range []struct {
		mark  *mark
		value float64
		holds bool
	}{
		{atMost(2), 1.9, true}, {atMost(2), 2, true}, {atMost(2), 2.1, false},
		{below(2), 1.9, true}, {below(2), 2, false}, {below(2), 2.1, false},
		{atMost(0), 0, true}, {atMost(0), 0.1, false},
		{atLeast(2), 1.9, false}, {atLeast(2), 2, true}, {atLeast(2), 2.1, true},
	} {
		if got := test.mark.holds(test.value); got != test.holds {
			t.Errorf("%v holds for %v: %v", test.mark, test.value, got)
		}
		// Unless the value equals the mark, it is drawn on the side of its verdict.
		if strain := test.mark.strain(test.value); test.value != 2 && (strain < 1) != test.holds {
			t.Errorf("the strain of %v with %v is %v", test.mark, test.value, strain)
		}
	}
}

// some returns results with marks that are met, one that is missed, and none.
func some() *results {
	r := &results{machine: "a machine"}
	for _, row := range []row{
		newRow("time", "tc", "", estimate{12345.678, 12000, 13000, 7}, "µs", nil),
		newRow("tax", "tc", "none", estimate{0.98, 0.97, 0.99, 60}, ratio, atLeast(0.97)),
		newRow("tax & more", "xdp", "none", estimate{0.96996, 0.9, 0.98, 60}, ratio, atLeast(0.97)),
		newRow("delay", "tc", "none", estimate{1250, 1000, math.Pi, 9}, ratio, atMost(1.25)),
		newRow("price", "tc", "none", estimate{-0.1, -0.2, 0, 9}, ratio, below(1)),
	} {
		row.section = "Section of " + strings.Fields(row.Measure)[0]
		r.rows = append(r.rows, row)
	}
	return r
}

func TestRecords(t *testing.T) {
	text, err := some().records()
	if err != nil {
		t.Fatal(err)
	}
	var records []map[string]any
	if err := json.Unmarshal(text, &records); err != nil {
		t.Fatalf("%v: %s", err, text)
	}
	if lines := strings.Count(string(text), "\n"); len(records) != 5 || lines != 7 {
		t.Errorf("%d records on %d lines, want 5 on 7, brackets included: %s", len(records), lines, text)
	}
	want := map[string]any{
		"measure": "tax", "variant": "tc", "against": "none", "value": 0.98, "low": 0.97, "high": 0.99, "unit": "×",
		"mark": "≥ 0.97", "holds": true, "rounds": 60.0,
	}
	for name, value := range want {
		if records[1][name] != value {
			t.Errorf("%s is %v, want %v", name, records[1][name], value)
		}
	}
	if len(records[1]) != len(want) {
		t.Errorf("fields are %v, want those of %v", records[1], want)
	}
	if r := records[0]; r["mark"] != nil || r["holds"] != nil || r["value"] != 12350.0 {
		t.Errorf("without a mark: %v", r)
	}
	if !strings.Contains(string(text), `"mark":"< 1"`) {
		t.Errorf("no readable mark: %s", text)
	}
	// The verdict applies to the displayed value.
	if r := records[2]; r["value"] != 0.97 || r["holds"] != true {
		t.Errorf("rounded up to the mark: %v", r)
	}
	if r := records[3]; r["holds"] != false {
		t.Errorf("missed: %v", r)
	}
}

func TestRatiosComeFirst(t *testing.T) {
	r := &results{rows: []row{
		{section: "b", Measure: "1", Unit: "µs"}, {section: "b", Measure: "2", Unit: ratio},
		{section: "a", Measure: "3", Unit: "ns"}, {section: "a", Measure: "4", Unit: ratio}, {section: "b", Measure: "5", Unit: ratio},
	}}
	var order string
	for _, row := range r.ordered() {
		order += row.Measure
	}
	if order != "25143" {
		t.Errorf("order is %s, want 25143", order)
	}
}

// withMatrix returns results with cells of two policies, one of which is cheap and slow, and rows between them.
func withMatrix() *results {
	r := some()
	for _, c := range []struct {
		measure string
		v       variant
		value   float64
		unit    string
	}{
		{nodeCPU, "none & nothing", 0, "%"},
		{nodeCPU, "plain, 1 s", 6.5812, "%"}, {stopped + longest, "plain, 1 s", 4.1, "s"}, {erring + longest, "plain, 1 s", 3, "s"}, {stopped + stated, "plain, 1 s", 4, "s"},
		{nodeCPU, "default, 1 s", 0.66, "%"}, {stopped + longest, "default, 1 s", 5.123, "s"}, {erring + longest, "default, 1 s", 1234.5, "s"}, {stopped + stated, "default, 1 s", 5.5, "s"},
		{connections, "default, 1 s", 60, ""},
	} {
		row := newRow(c.measure, c.v, "", exactly(c.value), c.unit, nil)
		row.section, row.cell = "Section of tax", true
		r.rows = append(r.rows, row)
	}
	return r
}

func TestMatrix(t *testing.T) {
	want := `
| measure | none & nothing | plain, 1 s | default, 1 s |
|---|---|---|---|
| CPU of the node (%) | 0 | 6.58 | 0.66 |
| a stopped server is detected, longest measured (s) | - | 4.1 | 5.12 |
| an error of the health path alone is detected, longest measured (s) | - | 3 | 1234 |
| a stopped server is detected, longest stated (s) | - | 4 | 5.5 |
| connections to pods | - | - | 60 |

## Section of delay
`
	if got := withMatrix().tables(); !strings.Contains(got, want) || strings.Count(got, "## Section of tax") != 1 {
		t.Errorf("tables lack%s:%s", want, got)
	}
	var terminal strings.Builder
	if err := withMatrix().print(&terminal); err != nil || !strings.Contains(terminal.String(), "none & nothing") {
		t.Errorf("%v: %s", err, terminal.String())
	}
}

// Policies without probes have no dot. Dots beyond the axes are drawn at their ends.
func TestPlotPolicies(t *testing.T) {
	if picture := plotPolicies(some().rows); picture != nil {
		t.Errorf("a picture of no policies: %s", picture)
	}
	elements := draw(t, plotPolicies(withMatrix().rows))
	if elements["circle"] != 2+1 { // the number of connections of one of them is unknown
		t.Errorf("the plot has %v, want two dots and one", elements)
	}
}

func TestWrite(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"bench", "docs"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := withMatrix().write(root); err != nil {
		t.Fatal(err)
	}
	page, err := os.ReadFile(filepath.Join(root, "docs/benchmarks.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		"on a machine.", "3 of 4 marks are met.", "## Section of delay",
		"| tax | tc | none | 0.98 × | 0.97 to 0.99 | ≥ 0.97 | yes | 60 |",
		"| delay | tc | none | 1250 × | 1000 to 3.142 | ≤ 1.25 | **missed** | 9 |",
		"| time | tc | - | 12350 µs | 12000 to 13000 | - | - | 7 |",
	} {
		if !strings.Contains(string(page), want) {
			t.Errorf("the page lacks %q:\n%s", want, page)
		}
	}
	picture, err := os.ReadFile(filepath.Join(root, "docs/benchmarks.svg"))
	if err != nil {
		t.Fatal(err)
	}
	elements := draw(t, picture)
	if elements["circle"] != 3 || elements["rect"] != 2 { // including the background
		t.Errorf("the plot has %v, want three dots, and one square in addition to the background", elements)
	}
	if _, err := os.Stat(filepath.Join(root, "docs/policies.svg")); err != nil {
		t.Error(err)
	}
}

// draw returns the number of elements of a picture by name, and fails if one is outside it.
func draw(t *testing.T, picture []byte) map[string]int {
	t.Helper()
	elements := map[string]int{}
	if bytes.Contains(picture, []byte("%!")) {
		t.Errorf("bad formats: %s", picture)
	}
	for d := xml.NewDecoder(bytes.NewReader(picture)); ; {
		token, err := d.Token()
		if errors.Is(err, io.EOF) {
			return elements
		}
		if err != nil {
			t.Fatal(err)
		}
		if e, ok := token.(xml.StartElement); ok {
			elements[e.Name.Local]++
			wantOnCanvas(t, e)
		}
	}
}

// wantOnCanvas fails if a coordinate is invalid or outside the plot.
func wantOnCanvas(t *testing.T, e xml.StartElement) {
	t.Helper()
	for _, a := range e.Attr {
		if !slices.Contains([]string{"x", "x1", "x2", "cx", "y", "y1", "y2", "cy"}, a.Name.Local) {
			continue
		}
		if at, err := strconv.ParseFloat(a.Value, 64); err != nil || !(at >= 0 && at <= plotWidth) {
			t.Errorf("%s of a %s is %q", a.Name.Local, e.Name.Local, a.Value)
		}
	}
}
