package bench

import (
	"bytes"
	"fmt"
	"html"
	"math"
	"slices"
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

// picture begins a picture of plotWidth and a height in pixels, and returns a function that adds elements to it.
func picture(out *bytes.Buffer, height int, title, subtitle string) (add func(format string, a ...any)) {
	add = func(format string, a ...any) { fmt.Fprintf(out, format+"\n", a...) }
	add(`<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %[1]d %[2]d" font-family="sans-serif" font-size="12">`, plotWidth, height)
	add(`<rect width="100%%" height="100%%" fill="white"/>`)
	add(`<text x="10" y="24" font-size="16" font-weight="bold">%s</text>`, html.EscapeString(title))
	add(`<text x="10" y="44" fill="#555">%s</text>`, html.EscapeString(subtitle))
	return add
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
	add := picture(&out, bottom+40, "Measurements and their marks", "value ÷ mark, or mark ÷ value for ≥ (logarithmic); left of the line: met (dot), right of it: missed (square); beyond the scale: at its end (◂ ▸); bars: 95 % intervals")
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
	switch strain := r.Mark.strain(r.Value); {
	case strain < strainMin:
		add(`<text x="%.1f" y="%.1f" text-anchor="end" fill="%s">◂</text>`, x-4, y+4, colour)
	case strain > strainMax:
		add(`<text x="%.1f" y="%.1f" fill="%s">▸</text>`, x+5, y+4, colour)
	}
	add(`<text x="%d" y="%.1f">%s</text>`, plotWidth-plotRight+12, y+4,
		html.EscapeString(fmt.Sprintf("%s, mark %s", r.value(), r.Mark)))
}

// Measures of policies that the plot shows.
const (
	nodeCPU     = "CPU of the node"
	connections = "connections to pods"
	stopped     = "a stopped server is detected"
	erring      = "an error of the health path alone is detected"
	longest     = ", longest measured"
	stated      = ", longest stated"
)

// Layout of the plot of policies, in pixels: two panels with a common axis of delays, whose ends are in seconds.
const (
	panelLeft, panelWidth, panelApart, panelTop, panelBottom = 60, 465, 70, 70, 410
	delayMin, delayMax                                       = 2, 100
)

// delayY returns the position of a delay on its logarithmic axis.
func delayY(seconds float64) float64 {
	within := min(max(seconds, delayMin), delayMax)
	return panelBottom - math.Log(within/delayMin)/math.Log(delayMax/delayMin)*(panelBottom-panelTop)
}

// policyDots are the policies of the plot with the longest delays measured and stated, in seconds.
type policyDots struct {
	policies        []variant
	measured, bound map[variant]float64
}

// panel is a part of the plot: delays against a measure of cost.
type panel struct {
	policyDots
	left       int // pixels
	measure    string
	label      string
	cost       map[variant]float64
	step, most float64 // of its axis
}

// costs sets the panel's costs and its axis.
func (p *panel) costs(rows []row) {
	p.cost = map[variant]float64{}
	for _, r := range rows {
		if r.cell && r.Measure == p.measure {
			p.cost[r.Variant] = r.Value
			p.most = max(p.most, r.Value)
		}
	}
	p.step = math.Pow(10, math.Floor(math.Log10(p.most)))
	if p.most > 5*p.step {
		p.step *= 2
	}
	p.most = p.step * math.Ceil(p.most*1.2/p.step) // leaves room for the last name
}

func (p *panel) x(cost float64) float64 { return float64(p.left) + max(cost, 0)/p.most*panelWidth }

// plotPolicies draws the delay in detecting a failure against two measures of the cost of probing, with a dot per policy; nil if there
// are none.
func plotPolicies(rows []row) []byte {
	dots := policyDots{measured: map[variant]float64{}, bound: map[variant]float64{}}
	for _, r := range rows {
		switch {
		case !r.cell:
		case strings.HasSuffix(r.Measure, longest):
			dots.measured[r.Variant] = max(dots.measured[r.Variant], r.Value)
		case strings.HasSuffix(r.Measure, stated):
			dots.bound[r.Variant] = max(dots.bound[r.Variant], r.Value)
		}
		if r.cell && r.Measure == stopped+stated {
			dots.policies = append(dots.policies, r.Variant)
		}
	}
	if dots.policies == nil {
		return nil
	}
	var out bytes.Buffer
	add := picture(&out, panelBottom+60, "How soon failures are detected, and what probing costs",
		"time until a restart (logarithmic); dots: longest measured of two kinds of failure, dashes: longest stated; lower left is better")
	for i, p := range []*panel{
		{measure: nodeCPU, label: "CPU of kubelet, daemon and servers, % of a core"},
		{measure: connections, label: "connections that reach the pods, per second"},
	} {
		p.policyDots, p.left = dots, panelLeft+i*(panelWidth+panelApart)
		p.costs(rows)
		p.draw(add)
	}
	add("</svg>")
	return out.Bytes()
}

func (p *panel) draw(add func(string, ...any)) {
	const line = `<line x1="%.1f" y1="%.1f" x2="%.1f" y2="%.1f" stroke="%s"/>`
	right := p.x(p.most)
	for c := 0.0; c <= p.most+p.step/2; c += p.step {
		add(line, p.x(c), float64(panelTop), p.x(c), float64(panelBottom), "#ddd")
		add(`<text x="%.1f" y="%d" text-anchor="middle">%s</text>`, p.x(c), panelBottom+18, short(c))
	}
	for _, d := range []float64{2, 5, 10, 20, 50, 100} {
		add(line, p.x(0), delayY(d), right, delayY(d), "#ddd")
		add(`<text x="%.1f" y="%.1f" text-anchor="end">%s s</text>`, p.x(0)-8, delayY(d)+4, short(d))
	}
	add(`<text x="%.1f" y="%d" text-anchor="middle">%s</text>`, (p.x(0)+right)/2, panelBottom+40, html.EscapeString(p.label))
	for _, v := range p.policies {
		if _, known := p.cost[v]; !known {
			continue
		}
		x, y, bound, colour := p.x(p.cost[v]), delayY(p.measured[v]), delayY(p.bound[v]), "#b5471b"
		if strings.HasPrefix(string(v), "plain") {
			colour = "#1f5fa8"
		}
		add(line, x, y, x, bound, colour)
		add(line, x-5, bound, x+5, bound, colour)
		add(`<circle cx="%.1f" cy="%.1f" r="5" fill="%s"/>`, x, y, colour)
		anchor, at, base := "start", x+9, y+4
		switch crowded := p.crowded(x, y); {
		case crowded && x-p.x(0) < 80:
			base = (y+bound)/2 + 4 // between it and its dash
		case crowded:
			anchor, at = "end", x-9
		}
		add(`<text x="%.1f" y="%.1f" text-anchor="%s" fill="%s">%s</text>`, at, base, anchor, colour, html.EscapeString(string(v)))
	}
}

// crowded reports whether a dot's name would cover a neighbour on its right.
func (p *panel) crowded(x, y float64) bool {
	return slices.ContainsFunc(p.policies, func(v variant) bool {
		right := p.x(p.cost[v]) - x
		near := func(delay float64) bool { return math.Abs(delayY(delay)-y) < 14 }
		return right > 0 && right < 100 && (near(p.measured[v]) || near(p.bound[v]))
	})
}
