package bench

import (
	"bytes"
	"fmt"
	"html"
	"math"
	"strings"
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

// Measures of policies that the plot shows.
const (
	nodeCPU = "CPU of the node"
	stopped = "detection of a stopped server, worst"
	erring  = "detection of an error of the health path alone, worst"
	stated  = "detection of any silent failure, stated"
)

// Layout of the plot of policies, in pixels, and the ends of its logarithmic axis of delays, in seconds.
const (
	policyLeft, policyRight, policyTop, policyBottom = 70, 700, 70, 410
	delayMin, delayMax                               = 2, 100
)

func delayY(seconds float64) float64 {
	within := min(max(seconds, delayMin), delayMax)
	return policyBottom - math.Log(within/delayMin)/math.Log(delayMax/delayMin)*(policyBottom-policyTop)
}

// plotPolicies draws the delay in detecting a failure against the cost of probing, with a dot per policy; nil if there are none.
func plotPolicies(rows []row) []byte {
	cost, delay, bound := map[variant]float64{}, map[variant]float64{}, map[variant]float64{}
	var policies []variant
	most := 0.0
	for _, r := range rows {
		switch {
		case !r.cell:
		case r.Measure == nodeCPU:
			cost[r.Variant] = r.Value
			most = max(most, r.Value)
		case r.Measure == stopped, r.Measure == erring:
			delay[r.Variant] = max(delay[r.Variant], r.Value)
		case r.Measure == stated:
			bound[r.Variant] = r.Value
			policies = append(policies, r.Variant)
		}
	}
	if policies == nil {
		return nil
	}
	step := math.Pow(10, math.Floor(math.Log10(most)))
	if most < 5*step {
		step /= 2
	}
	end := step * math.Ceil(most*1.05/step)
	costX := func(c float64) float64 { return policyLeft + max(c, 0)/end*(policyRight-policyLeft) }

	var out bytes.Buffer
	add := func(format string, a ...any) { fmt.Fprintf(&out, format+"\n", a...) }
	add(`<svg xmlns="http://www.w3.org/2000/svg" width="840" height="470" viewBox="0 0 840 470" font-family="sans-serif" font-size="12">`)
	add(`<rect width="100%%" height="100%%" fill="white"/>`)
	add(`<text x="10" y="24" font-size="16" font-weight="bold">How soon failures are detected, and what probing costs</text>`)
	add(`<text x="10" y="44" fill="#555">dots: longest delay measured, dashes: longest delay stated; nearer to the lower left corner is better</text>`)
	for c := 0.0; c <= end+step/2; c += step {
		add(`<line x1="%.1f" y1="%d" x2="%.1[1]f" y2="%d" stroke="#ddd"/>`, costX(c), policyTop, policyBottom)
		add(`<text x="%.1f" y="%d" text-anchor="middle">%s</text>`, costX(c), policyBottom+18, short(c))
	}
	for _, d := range []float64{2, 5, 10, 20, 50, 100} {
		add(`<line x1="%d" y1="%.1f" x2="%d" y2="%.1[2]f" stroke="#ddd"/>`, policyLeft, delayY(d), policyRight)
		add(`<text x="%d" y="%.1f" text-anchor="end">%s s</text>`, policyLeft-8, delayY(d)+4, short(d))
	}
	add(`<text x="%d" y="%d" text-anchor="middle">%s: kubelet, daemon and servers, %% of a core</text>`, (policyLeft+policyRight)/2, policyBottom+40, nodeCPU)
	for _, v := range policies {
		x, y, colour := costX(cost[v]), delayY(delay[v]), "#b5471b"
		if strings.HasPrefix(string(v), "plain") {
			colour = "#1f5fa8"
		}
		add(`<line x1="%.1f" y1="%.1f" x2="%.1[1]f" y2="%.1f" stroke="%s"/>`, x, y, delayY(bound[v]), colour)
		add(`<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1[2]f" stroke="%s" stroke-width="2"/>`, x-5, delayY(bound[v]), x+5, colour)
		add(`<circle cx="%.1f" cy="%.1f" r="5" fill="%s"/>`, x, y, colour)
		add(`<text x="%.1f" y="%.1f" fill="%s">%s</text>`, x+9, y+4, colour, html.EscapeString(string(v)))
	}
	add("</svg>")
	return out.Bytes()
}
