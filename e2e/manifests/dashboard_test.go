package manifests_test

import (
	"encoding/json"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/promql/parser"
)

// dashboard is the part of a dashboard that is checked here.
type dashboard struct {
	Templating struct {
		List []struct {
			Name, Type string
			Query      json.RawMessage
		}
	}
	Panels []struct {
		Title      string
		Datasource datasource
		Targets    []struct {
			Datasource         datasource
			Expr, LegendFormat string
		}
	}
}

type datasource struct{ Type, UID string }

// documented returns the documented labels of each metric, plus those that Prometheus adds.
func documented(t *testing.T) map[string][]string {
	t.Helper()
	text, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	metrics := map[string][]string{}
	for _, row := range regexp.MustCompile("(?m)^\\| `(probelet_\\w+)` \\|([^|]*)\\|").FindAllStringSubmatch(string(text), -1) {
		labels := []string{"instance", "job", "le"}
		for _, label := range regexp.MustCompile("`(\\w+)`").FindAllStringSubmatch(row[2], -1) {
			labels = append(labels, label[1])
		}
		metrics[row[1]] = labels
	}
	for name, labels := range metrics {
		metrics[name+"_bucket"] = labels
	}
	return metrics
}

// The dashboard's queries are valid PromQL about existing metrics and labels.
func TestDashboard(t *testing.T) {
	text, err := os.ReadFile("../../cni-conf/grafana/probelet.json")
	if err != nil {
		t.Fatal(err)
	}
	var d dashboard
	if err := json.Unmarshal(text, &d); err != nil {
		t.Fatal(err)
	}
	for _, v := range d.Templating.List {
		if (v.Name == "datasource") != (v.Type == "datasource") || v.Type == "datasource" && string(v.Query) != `"prometheus"` {
			t.Errorf("variable %s: %s %s", v.Name, v.Type, v.Query)
		}
	}
	ours := datasource{"prometheus", "${datasource}"}
	metrics := documented(t)
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			if p.Datasource != ours || target.Datasource != ours {
				t.Errorf("%s: data source %+v, %+v", p.Title, p.Datasource, target.Datasource)
			}
			expectQuery(t, p.Title, target.Expr, target.LegendFormat, metrics)
		}
	}
	expectShown(t, string(text))
	if len(d.Panels) < 10 || len(d.Templating.List) == 0 {
		t.Errorf("%d panels, %d variables", len(d.Panels), len(d.Templating.List))
	}
}

// expectShown expects the metrics used by alerts, and those that explain why probes are not answered.
func expectShown(t *testing.T, dashboard string) {
	t.Helper()
	wanted := []string{"probelet_ineligible_endpoints", "probelet_estimated_probes_total"}
	for _, rule := range rules(t) {
		wanted = append(wanted, regexp.MustCompile(`\bprobelet_\w+`).FindAllString(rule.Expr, -1)...)
	}
	for _, name := range wanted {
		if !strings.Contains(dashboard, name) {
			t.Errorf("%s is not shown", name)
		}
	}
}

func expectQuery(t *testing.T, title, query, legend string, metrics map[string][]string) {
	t.Helper()
	root, err := parser.NewParser(parser.Options{}).ParseExpr(strings.NewReplacer("$__rate_interval", "5m", "$__range", "3h").Replace(query))
	if err != nil {
		t.Errorf("%s: %s: %v", title, query, err)
		return
	}
	var shown []string // labels of the result
	parser.Inspect(root, func(node parser.Node, above []parser.Node) error {
		selector, ok := node.(*parser.VectorSelector)
		if !ok {
			return nil
		}
		labels, known := metrics[selector.Name]
		if !known {
			t.Errorf("%s: %s is not documented", title, selector.Name)
		}
		used := []string{}
		for _, m := range selector.LabelMatchers {
			used = append(used, m.Name)
		}
		left := labels
		for _, node := range above {
			if a, ok := node.(*parser.AggregateExpr); ok {
				used, left = append(used, a.Grouping...), a.Grouping
			}
		}
		for _, label := range used {
			if label != "__name__" && !slices.Contains(labels, label) {
				t.Errorf("%s: %s has no label %s: %s", title, selector.Name, label, query)
			}
		}
		shown = append(shown, left...)
		return nil
	})
	for _, label := range regexp.MustCompile(`{{(\w+)}}`).FindAllStringSubmatch(legend, -1) {
		if !slices.Contains(shown, label[1]) {
			t.Errorf("%s: the legend's label %s is not in %s", title, label[0], query)
		}
	}
}
