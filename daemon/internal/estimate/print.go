package estimate

import (
	"cmp"
	"fmt"
	"io"
	"math"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/table"
)

// print writes the report for humans.
func (r Report) print(w io.Writer, width int, wide bool) error {
	if wide {
		width = 0
	}
	kinds := kindsOf(r.Total)
	if err := r.probes(kinds).Write(w, width); err != nil {
		return err
	}
	groups := []Group{r.Total}
	if wide {
		groups = slices.Concat(r.Namespaces, []Group{r.Total})
	}
	var b strings.Builder
	b.WriteString("\n")
	if err := loads(groups, kinds, wide).Write(&b, width); err != nil {
		return err
	}
	b.WriteString("\n")
	if err := r.prose().Write(&b, width); err != nil {
		return err
	}
	if _, err := io.WriteString(w, b.String()); err != nil {
		return err
	}
	return constantTable(r.Constants).Write(w, width)
}

// kindsOf returns the kinds of the group's probes.
func kindsOf(g Group) (kinds []probe.Kind) {
	for _, k := range g.Probes {
		kinds = append(kinds, k.Kind)
	}
	return kinds
}

const everything = "all" // namespaces

// probes returns a table with a row for each namespace.
func (r Report) probes(kinds []probe.Kind) table.Table {
	t := table.Table{Header: []string{"NAMESPACE", "PODS", "PROBED", "PROBES/s"}, Optional: []int{1, 2}}
	for _, k := range kinds {
		t.Header = append(t.Header, string(k)+"/s")
	}
	t.Header = append(t.Header, "ANSWERABLE", "NOT ANSWERABLE")
	for _, g := range slices.Concat(r.Namespaces, []Group{r.Total}) {
		byKind := map[probe.Kind]float64{}
		for _, k := range g.Probes {
			byKind[k.Kind] = k.PerSecond
		}
		row := []string{cmp.Or(g.Name, everything), fmt.Sprint(g.Pods), fmt.Sprint(g.Probed), rateText(g.perSecond())}
		for _, k := range kinds {
			row = append(row, rateText(byKind[k]))
		}
		row = append(row, percent(g.Answerable.PerSecond, g.perSecond()), g.why())
		t.Rows = append(t.Rows, row)
	}
	return t
}

func (g Group) perSecond() (sum float64) {
	for _, k := range g.Probes {
		sum += k.PerSecond
	}
	return sum
}

// why lists the reasons why probes are not answered.
func (g Group) why() string {
	var all []string
	for _, c := range g.NotAnswerable {
		all = append(all, fmt.Sprintf("%s: %d (%s/s)", c.Code, c.Probes, rateText(c.PerSecond)))
	}
	if g.Startup.Probes > 0 {
		all = append(all, fmt.Sprintf("%s: %d (until their first success)", probe.ReasonStartup, g.Startup.Probes))
	}
	return cmp.Or(strings.Join(all, ", "), table.Blank)
}

// loads returns a table with a row for each policy of each group.
func loads(groups []Group, kinds []probe.Kind, wide bool) table.Table {
	t := table.Table{Header: []string{"POLICY", "ANSWERED"}}
	if wide {
		t.Header = append([]string{"NAMESPACE"}, t.Header...)
	}
	for _, k := range kinds {
		if k.Observable() {
			t.Header = append(t.Header, string(k))
		}
	}
	t.Header = append(t.Header, "CONNECTIONS/s", "TIME_WAIT NODES", "TIME_WAIT PODS", "CONNTRACK", "CPU CORES")
	if wide {
		t.Header = append(t.Header, "KUBELETS", "SERVERS", "DAEMONS")
	}
	for _, g := range groups {
		without := Outcome{Policy: "without probelet", Load: g.Without}
		for _, o := range append([]Outcome{without}, g.Policies...) {
			row := []string{string(o.Policy), percent(o.Answered, 1)}
			if wide {
				row = append([]string{cmp.Or(g.Name, everything)}, row...)
			}
			for _, k := range kinds {
				if k.Observable() {
					row = append(row, percent(o.AnsweredByKind[k], 1))
				}
			}
			t.Rows = append(t.Rows, append(row, o.Load.columns(wide)...))
		}
	}
	return t
}

func (l Load) columns(wide bool) []string {
	columns := []string{
		rateText(l.Connections), fmt.Sprintf("%.0f", l.TimeWaitNodes), fmt.Sprintf("%.0f", l.TimeWaitPods),
		fmt.Sprintf("%.0f", l.Conntrack), cores(l.CPU.Sum()),
	}
	if wide {
		columns = append(columns, cores(l.CPU.Kubelets), cores(l.CPU.Servers), cores(l.CPU.Daemons))
	}
	return columns
}

// prose returns what is printed between the tables.
func (r Report) prose() *table.Text {
	const maxAnnotations = 10
	var text table.Text
	text.Line("Maximum delay in detecting a failure that nothing but a probe shows:")
	for _, o := range r.Total.Policies {
		text.Pair(string(o.Policy), o.later())
	}
	text.Line("")
	if n := r.BusiestNode; r.Nodes > 1 {
		d := n.Policies[0].Load
		text.Line(fmt.Sprintf("The pods are on %d nodes. The busiest, %s, has %d of them, %s probes/s and %s connections/s, %.0f sockets in TIME_WAIT and "+
			"%.0f conntrack entries; by default %s connections/s, %.0f and %.0f.",
			r.Nodes, n.Name, n.Pods, rateText(n.perSecond()), rateText(n.Without.Connections), n.Without.TimeWaitNodes, n.Without.Conntrack,
			rateText(d.Connections), d.TimeWaitNodes, d.Conntrack))
		text.Line("")
	}
	if n := r.NotCounted.Ended; n > 0 {
		text.Line(fmt.Sprintf("Not counted: %d pods, which have ended.", n))
	}
	if found := others(r.NotCounted.Others); found != "" {
		text.Line("Not counted, because they are not pods: " + found + ".")
	}
	if r.NotCounted.Ended > 0 || len(r.NotCounted.Others) > 0 {
		text.Line("")
	}
	if all := r.InvalidAnnotations; len(all) > 0 {
		text.Line("Annotations that cannot be used; nothing of these pods is answered:")
		for _, a := range all[:min(len(all), maxAnnotations)] {
			text.Pair("-", a)
		}
		if more := len(all) - maxAnnotations; more > 0 {
			text.Pair("-", fmt.Sprintf("%d more (-o json has all)", more))
		}
		text.Line("")
	}
	text.Line("Assumptions:")
	for _, a := range r.Assumptions {
		text.Pair("-", a)
	}
	text.Line("")
	return &text
}

// later describes how much later failures are detected.
func (o Outcome) later() string {
	var all []string
	for _, d := range o.Delays {
		all = append(all, fmt.Sprintf("%s by %s (within %s instead of %s: %s)", seconds(d.Added), d.Kind, seconds(d.Plain+d.Added), seconds(d.Plain), d.Probe))
	}
	if len(all) == 0 {
		return "none, since nothing is answered"
	}
	text := strings.Join(all, ", ")
	switch {
	case o.Policy != Traffic:
	case o.ByTraffic == 0:
		text += "; traffic is evidence for none of these probes, so nothing changes"
	default:
		text += "; a probe that would time out while the pod serves other requests is not a failure then"
	}
	return text
}

func constantTable(all []Constant) table.Table {
	t := table.Table{Header: []string{"CONSTANT", "VALUE", "SOURCE"}}
	for _, c := range all {
		t.Rows = append(t.Rows, []string{c.Name, fmt.Sprintf("%g %s", c.Value, c.Unit), c.Source})
	}
	return t
}

// rateText prints a number per second, with two decimals where it is small and none where it is large.
func rateText(perSecond float64) string {
	decimals := 2
	switch {
	case perSecond >= 99.95 || perSecond == 0:
		decimals = 0
	case perSecond >= 9.995:
		decimals = 1
	}
	return strconv.FormatFloat(perSecond, 'f', decimals, 64)
}

func percent(part, whole float64) string {
	if whole == 0 {
		return table.Blank
	}
	return fmt.Sprintf("%.0f %%", 100*part/whole)
}

func cores(n float64) string { return fmt.Sprintf("%.3f", n) }

// seconds prints a time in seconds.
func seconds(s float64) string {
	const most = math.MaxInt64 / int64(time.Second) // 292 years
	return time.Duration(min(s, float64(most)) * float64(time.Second)).Round(100 * time.Millisecond).String()
}
