package main

import (
	"bytes"
	"fmt"
	"html"
	"strings"
)

// The plot's size and margins, in pixels.
const (
	width, height             = 860, 520
	left, right, top, bottom  = 70, 250, 50, 60
	mostSeconds, secondsSteps = 100, 20
)

// marks distinguish the series even without colours.
var marks = []struct{ shape, colour, dash string }{
	{"circle", "#1f5fa8", ""}, {"square", "#b5471b", "7 4"}, {"triangle", "#2e7d32", "2 4"},
}

// plot draws, for each kind of pod, the share of answered probes over the time that a failure can go unnoticed, from the
// shortest staleness to the longest.
func plot(points []row) []byte {
	x := func(seconds float64) float64 { return left + seconds/mostSeconds*(width-left-right) }
	y := func(share float64) float64 { return height - bottom - share*(height-top-bottom) }
	var out bytes.Buffer
	add := func(format string, a ...any) { fmt.Fprintf(&out, format+"\n", a...) }
	add(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d" font-family="sans-serif" font-size="13">`, width, height, width, height)
	add(`<rect width="%d" height="%d" fill="white"/>`, width, height)
	add(`<text x="%d" y="24" font-size="16" font-weight="bold">What staleness buys, and what it costs</text>`, left)
	for share := 0; share <= 100; share += 20 {
		at := y(float64(share) / 100)
		add(`<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" stroke="#ddd"/>`, left, at, width-right, at)
		add(`<text x="%d" y="%.1f" text-anchor="end">%d %%</text>`, left-8, at+4, share)
	}
	for s := 0; s <= mostSeconds; s += secondsSteps {
		add(`<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#ddd"/>`, x(float64(s)), top, x(float64(s)), height-bottom)
		add(`<text x="%.1f" y="%d" text-anchor="middle">%d s</text>`, x(float64(s)), height-bottom+18, s)
	}
	add(`<text x="%.1f" y="%d" text-anchor="middle">worst detection time of a failure (large mark: stated bound; small mark: longest measured)</text>`,
		float64(left+width-right)/2, height-16)
	add(`<text transform="translate(18 %d) rotate(-90)" text-anchor="middle">share of healthy pods' probes that is answered</text>`, (top+height-bottom)/2)
	plain := points[0].WorstPlain.Seconds()
	add(`<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#555" stroke-dasharray="1 3"/>`, x(plain), top, x(plain), height-bottom)
	add(`<text transform="translate(%.1f %d) rotate(-90)" fill="#555" font-size="11">plain Kubernetes, measured: %.1f s</text>`, x(plain)-5, height-bottom-20, plain)

	series := -1
	var line []string
	flush := func() {
		if len(line) > 0 {
			add(`<polyline points="%s" fill="none" stroke="%s" stroke-dasharray="%s"/>`, strings.Join(line, " "), marks[series].colour, marks[series].dash)
		}
		line = nil
	}
	for i, p := range points {
		if i == 0 || points[i-1].Name != p.Name {
			flush()
			series++
			at := float64(top + 20 + 24*series)
			mark(add, series, width-right+22, at, 5)
			add(`<text x="%d" y="%.1f">%s</text>`, width-right+34, at+4, html.EscapeString(p.Name))
		}
		px, py := x(p.MaxBound.Seconds()), y(p.HitRate())
		line = append(line, fmt.Sprintf("%.1f,%.1f", px, py))
		mark(add, series, px, py, 5)
		mark(add, series, x(p.WorstDelay.Seconds()), py, 2)
		// Label only whole periods, so that the labels do not overlap, below their marks.
		below := py + 18
		if below > height-bottom {
			below = py - 10
		}
		if staleness := p.Why; !strings.Contains(staleness, ".") || staleness == "0.5" {
			add(`<text x="%.1f" y="%.1f" text-anchor="middle" font-size="11" fill="%s">%s</text>`, px, below, marks[series].colour, staleness)
		}
	}
	flush()
	for i, note := range []string{"numbers: staleness in periods,", "without the slack", "", "probes every 10 s, timeout 1 s,", "failureThreshold 3"} {
		add(`<text x="%d" y="%d" fill="#555">%s</text>`, width-right+16, top+120+18*i, note)
	}
	add("</svg>")
	return out.Bytes()
}

func mark(add func(string, ...any), series int, x, y, size float64) {
	m := marks[series]
	switch m.shape {
	case "circle":
		add(`<circle cx="%.1f" cy="%.1f" r="%.1f" fill="%s"/>`, x, y, size, m.colour)
	case "square":
		add(`<rect x="%.1f" y="%.1f" width="%.1f" height="%.1f" fill="%s"/>`, x-size, y-size, 2*size, 2*size, m.colour)
	default:
		add(`<path d="M%.1f %.1f l%.1f %.1f h%.1f z" fill="%s"/>`, x, y-size, size, 2*size, -2*size, m.colour)
	}
}
