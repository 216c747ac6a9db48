package bench

import (
	"bytes"
	"fmt"
	"html"
	"math"
)

// Layout of the plot, in pixels. strainMin and strainMax are the ends of its logarithmic axis.
const (
	plotWidth, plotLeft, plotRight, plotTop = 1080, 560, 250, 76
	lineHeight                              = 20
	strainMin, strainMax                    = 0.1, 10
)

// strainX returns the position of a strain. Values beyond an end of the axis, including negative ones, are drawn at that end.
func strainX(strain float64) float64 {
	within := min(max(strain, strainMin), strainMax)
	return plotLeft + math.Log(within/strainMin)/math.Log(strainMax/strainMin)*(plotWidth-plotLeft-plotRight)
}

// plot draws, for each row with a mark, how close the value is to it: the line is the mark, and values to its left meet it.
func plot(rows []row) []byte {
	var marked []row
	for _, r := range rows {
		if r.Mark != nil {
			marked = append(marked, r)
		}
	}
	bottom := plotTop + lineHeight*len(marked)
	var out bytes.Buffer
	add := func(format string, a ...any) { fmt.Fprintf(&out, format+"\n", a...) }
	add(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="12">`, plotWidth, bottom+40)
	add(`<rect width="100%%" height="100%%" fill="white"/>`)
	add(`<text x="10" y="24" font-size="16" font-weight="bold">Measurements and their marks</text>`)
	add(`<text x="10" y="44" fill="#555">left of the line: met (dot); right of it: missed (square); bars: 95 %% intervals; logarithmic scale</text>`)
	for _, strain := range []float64{0.1, 0.2, 0.5, 1, 2, 5, 10} {
		colour := "#ddd"
		if strain == 1 {
			colour = "#000"
		}
		x := strainX(strain)
		add(`<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="%s"/>`, x, plotTop-8, x, bottom, colour)
		add(`<text x="%.1f" y="%d" text-anchor="middle">%s</text>`, x, bottom+18, number(strain))
	}
	for i, r := range marked {
		plotRow(add, r, float64(plotTop+lineHeight*i)+lineHeight/2)
	}
	add("</svg>")
	return out.Bytes()
}

func plotRow(add func(string, ...any), r row, y float64) {
	what := r.Measure + ", " + string(r.Variant)
	switch {
	case r.Against != "" && r.Unit == ratio:
		what += " ÷ " + string(r.Against)
	case r.Against != "":
		what += " − " + string(r.Against)
	}
	add(`<text x="%d" y="%.1f" text-anchor="end">%s</text>`, plotLeft-10, y+4, html.EscapeString(what))
	x, low, high := strainX(r.Mark.strain(r.Value)), strainX(r.Mark.strain(r.Low)), strainX(r.Mark.strain(r.High))
	colour, dot := "#1f5fa8", fmt.Sprintf(`<circle cx="%.1f" cy="%.1f" r="4"`, x, y)
	if r.missed() {
		colour, dot = "#b5471b", fmt.Sprintf(`<rect x="%.1f" y="%.1f" width="8" height="8"`, x-4, y-4)
	}
	add(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s" stroke-width="2"/>`, low, y, high, y, colour)
	add(`%s fill="%s"/>`, dot, colour)
	add(`<text x="%d" y="%.1f">%s</text>`, plotWidth-plotRight+12, y+4,
		html.EscapeString(fmt.Sprintf("%s %s, mark %s", number(r.Value), r.Unit, r.Mark)))
}
