package table

import (
	"strings"
	"testing"

	"pgregory.net/rapid"
)

var pods = Table{
	Header: []string{"NAMESPACE/POD", "HOST VETH", "STATE", "WHY NOT ANSWERED"},
	Rows: [][]string{
		{"shop/web", "veth7", "stale", "withdrawn: a listening socket of the pod was closed"},
		{"shop/web", "veth7", "fresh", Blank},
		{"shop/db", "veth8", "unknown", "nothing observed yet"},
	},
	Optional: []int{1},
}

func TestWidths(t *testing.T) {
	for _, test := range []struct {
		width int
		want  string
	}{
		{0, `NAMESPACE/POD   HOST VETH   STATE     WHY NOT ANSWERED
shop/web        veth7       stale     withdrawn: a listening socket of the pod was closed
shop/web        veth7       fresh     -
shop/db         veth8       unknown   nothing observed yet
`},
		{70, `NAMESPACE/POD   HOST VETH   STATE     WHY NOT ANSWERED
shop/web        veth7       stale     withdrawn: a listening socket of
                                      the pod was closed
shop/web        veth7       fresh     -
shop/db         veth8       unknown   nothing observed yet
`},
		{60, `NAMESPACE/POD   STATE     WHY NOT ANSWERED
shop/web        stale     withdrawn: a listening socket of
                          the pod was closed
shop/web        fresh     -
shop/db         unknown   nothing observed yet
`},
		{30, `shop/web
  state stale
    withdrawn: a listening
    socket of the pod was
    closed
  state fresh
shop/db
  state unknown
    nothing observed yet
`},
	} {
		var b strings.Builder
		if err := pods.Write(&b, test.width); err != nil || b.String() != test.want {
			t.Errorf("%d characters: %v\n%s\nwant\n%s", test.width, err, &b, test.want)
		}
	}
}

func TestText(t *testing.T) {
	var x Text
	x.Line("probeletd: running")
	x.Line("")
	x.Pair("state", "fresh")
	x.Pair("next probe", "reaches the pod: mode observe")
	for _, test := range []struct {
		width int
		want  string
	}{
		{0, "probeletd: running\n\n  state       fresh\n  next probe  reaches the pod: mode observe\n"},
		{44, "probeletd: running\n\n  state       fresh\n  next probe  reaches the pod: mode observe\n"},
		{24, "probeletd: running\n\n  state       fresh\n  next probe\n    reaches the pod:\n    mode observe\n"},
	} {
		var b strings.Builder
		if err := x.Write(&b, test.width); err != nil || b.String() != test.want {
			t.Errorf("%d characters: %v\n%s\nwant\n%s", test.width, err, &b, test.want)
		}
	}
}

// No line exceeds the width, and no prose is lost.
func TestLinesFit(t *testing.T) {
	cell := rapid.StringMatching(`[a-zä/:.]{1,40}`)
	rapid.Check(t, func(t *rapid.T) {
		table := Table{Header: []string{"POD", "DEVICE", "STATE", "WHY"}, Optional: []int{1}}
		var text Text
		var prose []string
		for range rapid.IntRange(1, 4).Draw(t, "rows") {
			why := strings.Join(rapid.SliceOfN(cell, 1, 8).Draw(t, "why"), " ")
			table.Rows = append(table.Rows, []string{cell.Draw(t, "pod"), cell.Draw(t, "device"), cell.Draw(t, "state"), why})
			text.Pair(cell.Draw(t, "label"), why)
			prose = append(prose, why)
		}
		width := rapid.IntRange(10, 200).Draw(t, "width")
		for name, write := range map[string]func(*strings.Builder) error{
			"table": func(b *strings.Builder) error { return table.Write(b, width) },
			"text":  func(b *strings.Builder) error { return text.Write(b, width) },
		} {
			var b strings.Builder
			if err := write(&b); err != nil {
				t.Fatal(err)
			}
			for line := range strings.Lines(b.String()) {
				if got := length(strings.TrimSuffix(line, "\n")); got > width {
					t.Errorf("%s: %d characters of at most %d: %q", name, got, width, line)
				}
			}
			for _, why := range prose {
				if !hasLetters(b.String(), why) {
					t.Errorf("%s of %d characters lacks %q:\n%s", name, width, why, &b)
				}
			}
		}
	})
}

// hasLetters reports whether all contains the letters of text in order, ignoring what other columns put between them.
func hasLetters(all, text string) bool {
	for _, r := range strings.ReplaceAll(text, " ", "") {
		i := strings.IndexRune(all, r)
		if i < 0 {
			return false
		}
		all = all[i+len(string(r)):]
	}
	return true
}

// Whatever a text has, it takes one line, and does nothing to the terminal.
func TestTextTakesOneLine(t *testing.T) {
	rapid.Check(t, func(rt *rapid.T) {
		text := rapid.OneOf(rapid.String(), rapid.SampledFrom([]string{"\x1b[31m", "a\nb", "\u202e", "\xff", "\u0085"})).Draw(rt, "text")
		var out strings.Builder
		if err := (Table{Header: []string{"A", "B"}, Rows: [][]string{{text, text}}}).Write(&out, 0); err != nil {
			rt.Fatal(err)
		}
		var prose Text
		prose.Line(text)
		prose.Pair(text, text)
		if err := prose.Write(&out, 0); err != nil {
			rt.Fatal(err)
		}
		if strings.Count(out.String(), "\n") != 4 || Printable(strings.ReplaceAll(out.String(), "\n", "")) != strings.ReplaceAll(out.String(), "\n", "") {
			rt.Fatalf("%q", out.String())
		}
	})
}
