// Package table prints tables and labelled prose that fit the width of a terminal.
package table

import (
	"io"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Table is a table whose last column is prose.
type Table struct {
	Header []string
	Rows   [][]string // no cell is empty; see Blank
	// Optional lists the columns that are dropped on a narrow terminal, in that order.
	Optional []int
}

const (
	gap = "   " // between columns
	// leastProse is how many characters of prose must fit in a line before the table drops another column.
	leastProse = 30
	// Blank fills a cell without a value.
	Blank = "-"
)

// Printable escapes control characters, and others that are not visible, as Go does. Names may have them before the API server has
// checked them.
func Printable(text string) string {
	if utf8.ValidString(text) && !strings.ContainsFunc(text, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return text
	}
	quoted := strconv.Quote(text)
	return quoted[1 : len(quoted)-1]
}

// Write prints the table in at most width characters per line; 0 means no limit. To fit, it wraps the prose, then drops columns, and
// finally prints each row in lines of its own.
func (t Table) Write(w io.Writer, width int) error {
	t.Rows = slices.Clone(t.Rows)
	for i, row := range t.Rows {
		t.Rows[i] = slices.Clone(row)
		for j, cell := range row {
			t.Rows[i][j] = Printable(cell)
		}
	}
	var b strings.Builder
	if columns, room := t.fit(width); columns == nil {
		t.stack(&b, width)
	} else {
		for _, row := range append([][]string{t.Header}, t.Rows...) {
			t.writeRow(&b, row, columns, room)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// fit chooses columns, and how wide the last one may be (0: no limit). It returns no columns if the table cannot be that narrow.
func (t Table) fit(width int) (columns []int, room int) {
	for i := range t.Header {
		columns = append(columns, i)
	}
	if width == 0 {
		return columns, 0
	}
	last := len(t.Header) - 1
	for left := 0; left <= len(t.Optional); left++ {
		kept := slices.DeleteFunc(slices.Clone(columns), func(i int) bool { return slices.Contains(t.Optional[:left], i) })
		room = width
		for _, i := range kept[:len(kept)-1] {
			room -= t.width(i) + len(gap)
		}
		if room >= min(t.width(last), leastProse) {
			return kept, room
		}
	}
	return nil, 0
}

func (t Table) width(column int) int {
	widest := length(t.Header[column])
	for _, row := range t.Rows {
		widest = max(widest, length(row[column]))
	}
	return widest
}

func (t Table) writeRow(b *strings.Builder, row []string, columns []int, room int) {
	var prefix strings.Builder
	for _, i := range columns[:len(columns)-1] {
		prefix.WriteString(pad(row[i], t.width(i)) + gap)
	}
	hang(b, prefix.String(), row[columns[len(columns)-1]], room)
}

// stack prints each row below its first cell, once for consecutive rows that share it.
func (t Table) stack(b *strings.Builder, width int) {
	before, last := "", len(t.Header)-1
	for _, row := range t.Rows {
		if row[0] != before {
			block(b, "", row[0], width)
			before = row[0]
		}
		var said []string
		for i := 1; i < last; i++ {
			if !slices.Contains(t.Optional, i) && row[i] != Blank {
				said = append(said, strings.ToLower(t.Header[i])+" "+row[i])
			}
		}
		if len(said) > 0 {
			block(b, "  ", strings.Join(said, ", "), width)
		}
		if row[last] != Blank {
			block(b, "    ", row[last], width)
		}
	}
}

// Text is prose, partly with labels beside it.
type Text struct{ lines []line }

type line struct{ label, text string }

// Line adds a line without a label. It ends a block of pairs; labels within a block are padded to the same width.
func (t *Text) Line(text string) { t.lines = append(t.lines, line{text: Printable(text)}) }

// Pair adds a label with prose beside it.
func (t *Text) Pair(label, text string) {
	t.lines = append(t.lines, line{Printable(label), Printable(text)})
}

// Write prints the text, wrapped at width characters; 0 means no limit.
func (t *Text) Write(w io.Writer, width int) error {
	var b strings.Builder
	labels := 0
	for i, l := range t.lines {
		if l.label == "" {
			labels = 0
			block(&b, "", l.text, width)
			continue
		}
		if labels == 0 {
			for _, other := range t.lines[i:] {
				if other.label == "" {
					break
				}
				labels = max(labels, length(other.label))
			}
		}
		Hang(&b, "  "+pad(l.label, labels)+"  ", l.text, width)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// Hang prints text to the right of a prefix, or below it if that leaves too little room. With width 0 it prints one line.
func Hang(b *strings.Builder, prefix, text string, width int) {
	room := width - length(prefix)
	if width > 0 && room < min(leastProse, length(text)) {
		block(b, "", strings.TrimRight(prefix, " "), width)
		block(b, "    ", text, width)
		return
	}
	hang(b, prefix, text, max(room, 0))
}

// hang prints text to the right of a prefix in lines of at most room characters; with room 0 it prints one line.
func hang(b *strings.Builder, prefix, text string, room int) {
	for i, l := range Wrap(text, room) {
		if i > 0 {
			prefix = strings.Repeat(" ", length(prefix))
		}
		b.WriteString(strings.TrimRight(prefix+l, " ") + "\n")
	}
}

// block prints text in indented lines.
func block(b *strings.Builder, indent, text string, width int) {
	if width > 0 {
		width = max(1, width-len(indent))
	}
	for _, l := range Wrap(text, width) {
		b.WriteString(strings.TrimRight(indent+l, " ") + "\n")
	}
}

// Wrap splits text into lines of at most width characters, at blanks where possible. With width 0 it returns one line.
func Wrap(text string, width int) []string {
	if width == 0 || length(text) <= width {
		return []string{text}
	}
	var lines []string
	current := ""
	for word := range strings.FieldsSeq(text) {
		switch {
		case current == "":
			current = word
		case length(current)+1+length(word) <= width:
			current += " " + word
		default:
			lines = append(lines, current)
			current = word
		}
		for length(current) > width {
			cut := runes(current, width)
			lines = append(lines, current[:cut])
			current = current[cut:]
		}
	}
	return append(lines, current)
}

func length(s string) int { return utf8.RuneCountInString(s) }

// runes returns how many bytes the first n characters take.
func runes(s string, n int) int {
	for i := range s {
		if n == 0 {
			return i
		}
		n--
	}
	return len(s)
}

func pad(s string, width int) string { return s + strings.Repeat(" ", max(0, width-length(s))) }
