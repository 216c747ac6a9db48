//go:build linux

package ctl

import (
	"cmp"
	"fmt"
	"strconv"
	"strings"

	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/table"
)

// row is a line of the table: an endpoint, or an attachment or pod without any.
type row struct {
	pod, device, endpoint, state, age, bound, hits    string
	probes, ifindex, status, period, timeout, sandbox string
	detection, by, hook, trust, listener, settings    string
	why                                               string
}

var header = row{
	"NAMESPACE/POD", "HOST VETH", "ENDPOINT", "STATE", "AGE", "BOUND", "HITS",
	"PROBES", "IFINDEX", "STATUS", "PERIOD", "TIMEOUT", "CONTAINER ID",
	"DETECTED WITHIN", "ATTACHED BY", "HOOK", "TRUST", "LISTENER", "SETTINGS", "WHY NOT ANSWERED",
}

func (r row) columns(wide bool) []string {
	columns := []string{r.pod, r.device, r.endpoint, r.state, r.age, r.bound, r.hits}
	if wide {
		columns = append(columns, r.probes, r.ifindex, r.status, r.period, r.timeout, r.sandbox, r.detection, r.by,
			r.hook, r.trust, r.listener, r.settings)
	}
	columns = append(columns, r.why)
	for i := range columns {
		columns[i] = cmp.Or(columns[i], "-")
	}
	return columns
}

// optional lists the columns that a narrow terminal drops, first one first.
var optional = []int{1, 5, 6} // HOST VETH, BOUND, HITS

func printTable(env *environment, s survey.Status, wide bool) error {
	w := env.stdout
	rows := rowsOf(s)
	if len(rows) == 0 {
		if _, err := fmt.Fprintln(w, "nothing attached"); err != nil {
			return err
		}
		return printSummary(env, s)
	}
	t, width := table.Table{Header: header.columns(wide), Optional: optional}, env.width
	if wide {
		width = 0
	}
	for _, r := range rows {
		t.Rows = append(t.Rows, r.columns(wide))
	}
	if err := t.Write(w, width); err != nil {
		return err
	}
	if _, err := fmt.Fprintln(w); err != nil {
		return err
	}
	if err := printLost(env, s); err != nil {
		return err
	}
	return printSummary(env, s)
}

// printLost lists the pods whose answers did not arrive, with the neighbours on their devices.
func printLost(env *environment, s survey.Status) error {
	var text table.Text
	for _, a := range s.Attachments {
		if a.Trust != survey.TrustLost {
			continue
		}
		text.Line(fmt.Sprintf("%s is not answered: %s", a.Name(), a.Answers()))
		for _, n := range a.Neighbours {
			text.Line("  " + n.String())
		}
		text.Line("")
	}
	return text.Write(env.stdout, env.width)
}

func rowsOf(s survey.Status) []row {
	var rows []row
	for _, a := range s.Attachments {
		rows = append(rows, attachmentRows(a)...)
	}
	for _, pod := range s.Unattached {
		rows = append(rows, row{pod: pod, why: "not attached"})
	}
	return rows
}

func attachmentRows(a survey.Attachment) []row {
	blank := row{
		pod: a.Pod, device: a.HostIfName, sandbox: a.ContainerID,
		settings: settings(a.Settings), why: a.WhyNotAnswered, by: "ADD", hook: a.Hook, trust: a.Trust,
	}
	if a.Adopted {
		blank.by = "daemon"
	}
	if a.IfIndex != 0 {
		blank.ifindex = strconv.Itoa(a.IfIndex)
	}
	if len(a.Endpoints) == 0 {
		return []row{blank}
	}
	var rows []row
	for _, e := range a.Endpoints {
		r := blank
		r.fill(e)
		rows = append(rows, r)
	}
	return rows
}

// settings formats the settings that are not the default, with what set them.
func settings(s *statedir.Settings) string {
	if s == nil {
		return ""
	}
	var said []string
	if s.ModeFrom != probe.FromDefault {
		said = append(said, fmt.Sprintf("mode %s (%s)", s.Mode, s.ModeFrom))
	}
	if s.StalenessFrom != probe.FromDefault {
		said = append(said, fmt.Sprintf("staleness %s (%s)", s.Staleness, s.StalenessFrom))
	}
	if s.RefreshFrom != probe.FromDefault {
		said = append(said, fmt.Sprintf("refresh %s (%s)", s.Refresh, s.RefreshFrom))
	}
	return strings.Join(said, ", ")
}

func (r *row) fill(e survey.Endpoint) {
	r.endpoint, r.state = e.Endpoint.Endpoint().String(), string(e.State)
	r.hits = strconv.FormatUint(e.Hits, 10)
	r.why = cmp.Or(e.WhyNotAnswered, r.why)
	if e.Age != nil {
		r.age = status.Duration(*e.Age).String()
	}
	if e.MayBeAnswered() {
		r.bound = status.Duration(e.StalenessBound).String()
	}
	if e.RefreshOff != "" { // belongs to refresh, which is last
		r.settings += ", but off: " + e.RefreshOff
	}
	if e.StalenessCapped {
		r.settings = strings.TrimPrefix(r.settings+", lowered to the node's ceiling", ", ")
	}
	if l := e.Listener; l != nil {
		r.listener = l.Obstacle
		if l.Most > 0 || e.Kind.Keying() == probe.KeyedByPort {
			r.listener = strings.TrimSuffix(fmt.Sprintf("%d/%d %s", l.Answered, l.Most, l.Obstacle), " ")
		}
	}
	if e.Status != 0 {
		r.status = strconv.Itoa(int(e.Status))
	}
	r.period, r.timeout = status.Duration(e.Period).String(), status.Duration(e.Timeout).String()
	var probes, detection []string
	for _, p := range e.Probes {
		probes = append(probes, p.String())
		detection = append(detection, fmt.Sprintf("%s/%s", status.Duration(p.DetectionAnswered), status.Duration(p.DetectionPlain)))
	}
	r.probes, r.detection = strings.Join(probes, ","), strings.Join(detection, ",")
}

// printSummary prints the lines below the table.
func printSummary(env *environment, s survey.Status) error {
	var summary table.Text
	summary.Line(s.Daemon.String())
	if s.Prober == nil {
		summary.Line("kernel: the BPF objects are not loaded")
	} else {
		summary.Line("prober: " + s.Prober.String())
		summary.Line(fmt.Sprintf("answered: %d HTTP, %d TCP; observed: %d; handed over: %d", s.Counters["answered_http"],
			s.Counters["answered_tcp"], s.Counters["observed"], s.Counters["handed_over"]))
	}
	all := map[string]uint64{}
	for _, a := range s.Attachments {
		for reason, n := range a.Inconclusive {
			all[reason] += n
		}
	}
	if text := inconclusive(all); text != "" {
		summary.Line(text)
	}
	return summary.Write(env.stdout, env.width)
}

// inconclusive says how many connections had no certain outcome and why; it returns "" if there were none.
func inconclusive(reasons map[string]uint64) string {
	var total uint64
	var why []string
	for _, doubt := range evidence.Doubts() {
		if n := reasons[string(doubt)]; n > 0 {
			total += n
			why = append(why, fmt.Sprintf("%d %s", n, status.DoubtText(string(doubt))))
		}
	}
	if total == 0 {
		return ""
	}
	return fmt.Sprintf("inconclusive: %d (%s)", total, strings.Join(why, ", "))
}
