package manifests_test

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/prometheus/prometheus/model/rulefmt"

	"github.com/probelet/probelet/e2e/harness/alerts"
)

const alertsFile = chart + "/alerts.yaml"

// rules returns the rules in the chart.
func rules(t *testing.T) []rulefmt.Rule {
	t.Helper()
	all, err := alerts.Read(alertsFile)
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// healthy is what a healthy node exposes for two hours, one sample per minute, with a restart of the daemon after the first
// hour.
const healthy = `
  up{instance="n"} 1x120
  probelet_prober_found{instance="n"} 1x120
  probelet_source_up{instance="n"} 1x120
  probelet_chain_joined{instance="n"} 1x120
  probelet_unattached_pods{instance="n"} 0 0 3 0x117
  probelet_disagreements_total{instance="n", kind="failed"} 0x120
  probelet_disagreements_total{instance="n", kind="discarded"} 0x120
  probelet_lost_records_total{instance="n"} 0x59 3x60
  probelet_untrusted_devices{instance="n", noticed="syn_repeated"} 0x120
  probelet_untrusted_devices{instance="n", noticed="unobserved"} 0x120
  probelet_reconcile_errors_total{instance="n"} 0x59 1x60
  probelet_map_entries{instance="n", map="pods"} 100x120
  probelet_map_entries{instance="n", map="flows"} 200x120
  probelet_map_capacity_entries{instance="n", map="pods"} 4096x120
  probelet_map_capacity_entries{instance="n", map="flows"} 4096x120
`

// Each alert fires for its own condition and no other, and none fires for a healthy node.
func TestAlertsFire(t *testing.T) {
	for alert, sick := range map[string]string{
		"":                        "",
		"ProbeletDown":            `up{instance="n"} 1x60 0x60`,
		"ProbeletProberNotFound":  `probelet_prober_found{instance="n"} 1x60 0x60`,
		"ProbeletSourceDown":      `probelet_source_up{instance="n"} 1x60 0x60`,
		"ProbeletNotInChain":      `probelet_chain_joined{instance="n"} 1x60 0x60`,
		"ProbeletPodsNotAttached": `probelet_unattached_pods{instance="n"} 0x60 2x60`,
		"ProbeletDisagreement":    `probelet_disagreements_total{instance="n", kind="failed"} 0x100 1x20`,
		"ProbeletLostExchanges":   `probelet_lost_records_total{instance="n"} 0+5x120`,
		"ProbeletAnswersLost":     `probelet_untrusted_devices{instance="n", noticed="unobserved"} 0x60 1x60`,
		"ProbeletReconcileErrors": `probelet_reconcile_errors_total{instance="n"} 0+1x120`,
		"ProbeletMapFilling":      `probelet_map_entries{instance="n", map="flows"} 200x60 3500x60`,
	} {
		t.Run(alert, func(t *testing.T) { expectFiring(t, series(sick), alert) })
	}
	t.Run("a disagreement before the first scrape", func(t *testing.T) {
		expectFiring(t, series(`probelet_disagreements_total{instance="n", kind="discarded"} _x100 1x20`), "ProbeletDisagreement")
	})
	if n := len(rules(t)); n != 10 {
		t.Errorf("%d alerts, but the table above has 10", n)
	}
}

// series returns the healthy series, replacing those of the sick metric.
func series(sick string) string {
	name, _, _ := strings.Cut(sick, "}")
	var lines []string
	for line := range strings.Lines(healthy) {
		if line = strings.TrimSpace(line); line != "" && (sick == "" || !strings.HasPrefix(line, name+"}")) {
			lines = append(lines, line)
		}
	}
	lines = append(lines, sick)
	return strings.ReplaceAll(strings.Join(lines, "\n  "), `instance="n"`, `instance="n", job="probelet"`)
}

// expectFiring expects one alert to fire (none if want is empty), with the labels that its annotations use.
func expectFiring(t *testing.T, text, want string) {
	t.Helper()
	series, err := alerts.Load(text)
	if err != nil {
		t.Fatal(err)
	}
	all := rules(t)
	firing, err := series.Evaluate(all)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, f := range firing {
		names = append(names, f.Alert)
		rule := all[slices.IndexFunc(all, func(r rulefmt.Rule) bool { return r.Alert == f.Alert })]
		for _, label := range regexp.MustCompile(`\$labels\.(\w+)`).FindAllStringSubmatch(fmt.Sprint(rule.Annotations), -1) {
			if !f.Labels.Has(label[1]) {
				t.Errorf("%s: %s has no label %s", f.Alert, f.Labels, label[1])
			}
		}
	}
	if got := strings.Join(names, " "); got != want {
		t.Errorf("%q fire, want %q", got, want)
	}
}
