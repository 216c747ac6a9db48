// Package status defines what probeletctl, the kubectl plugin and the metrics report: states of endpoints, reasons, findings, node
// summaries and exit codes. It does not depend on the kernel, so that the plugin runs on any system.
package status

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/probelet/probelet/daemon/internal/table"
)

// Exit codes of probeletctl and kubectl-probelet. 3 and 4 are what systemctl status returns in these cases.
const (
	OK         = 0
	Failed     = 1 // doctor found a problem, or the command failed
	Usage      = 2 // an unknown command or flag, or an invalid value
	DaemonDown = 3 // the daemon is not running; what is known without it was shown
	NotFound   = 4 // no such pod or node, or the pod is not attached
	NotAllowed = 5 // the command needs root, or permissions at the API server
)

// Error is an error with an exit code.
type Error struct {
	Code int
	Err  error
	// Shown reports that the user has already been told.
	Shown bool
}

// Errorf returns an Error with a message.
func Errorf(code int, format string, a ...any) error {
	return &Error{Code: code, Err: fmt.Errorf(format, a...)}
}

// Error implements error.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the wrapped error.
func (e *Error) Unwrap() error { return e.Err }

// Code returns the exit code for an error: OK for nil, and Failed for one that does not wrap an Error.
func Code(err error) int {
	var coded *Error
	switch {
	case err == nil:
		return OK
	case errors.As(err, &coded):
		return coded.Code
	}
	return Failed
}

// Verdict rates a finding.
type Verdict string

// Verdicts.
const (
	Well    Verdict = "ok"
	Note    Verdict = "note"
	Problem Verdict = "PROBLEM"
	// Would marks what an install would do.
	Would Verdict = "would"
)

// Finding is the result of one of doctor's checks.
type Finding struct {
	Verdict Verdict `json:"verdict"`
	About   string  `json:"about"`
	What    string  `json:"what"`
	// Do says what to do about it; empty if there is nothing to do.
	Do string `json:"do,omitempty"`
}

// Text formats the finding in lines of at most width characters; 0 means no limit.
func (f Finding) Text(width int) string {
	var b strings.Builder
	table.Hang(&b, fmt.Sprintf("%-8s %-13s ", f.Verdict, f.About), f.What, width)
	if f.Do != "" {
		table.Hang(&b, fmt.Sprintf("%-8s %-13s -> ", "", ""), f.Do, width)
	}
	return b.String()
}

// Problems counts the findings that need attention.
func Problems(findings []Finding) (n int) {
	for _, f := range findings {
		if f.Verdict == Problem {
			n++
		}
	}
	return n
}

// Node summarizes a node.
type Node struct {
	Version string `json:"version"`
	Running bool   `json:"running"` // the daemon
	// NotReady lists what keeps probes from being answered, or new pods from being attached; empty if nothing does.
	NotReady []string `json:"notReady"`
	// Attached counts attachments, Endpoints the endpoints behind them, and Answered those endpoints whose next probe is answered in
	// the kernel.
	Attached  int `json:"attached"`
	Endpoints int `json:"endpoints"`
	Answered  int `json:"answered"`
	// Probes counts the probers' connections to attached pods since the BPF objects were loaded.
	Probes Probes `json:"probes"`
	// Unattached lists the pods that have probes but are not attached, sorted by name.
	Unattached []Unattached `json:"unattached"`
	// Still describes what is answered while the daemon is down; null while it runs.
	Still *Still `json:"still"`
}

// Unattached is a pod that has probes but is not attached. Why is empty if no reason is known.
type Unattached struct {
	Pod string `json:"pod"` // namespace/name
	Why string `json:"why,omitempty"`
}

// Probes counts probers' connections.
type Probes struct {
	Answered uint64 `json:"answered"` // in the kernel
	Passed   uint64 `json:"passed"`   // to the pods
}

// Share returns the share of probes that were answered in the kernel, such as "74 %"; "-" if there were none.
func (p Probes) Share() string {
	all := p.Answered + p.Passed
	if all == 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f %%", 100*float64(p.Answered)/float64(all))
}

// Plus returns the sum of two counts.
func (p Probes) Plus(o Probes) Probes { return Probes{p.Answered + o.Answered, p.Passed + o.Passed} }

// Still describes what the kernel goes on answering without a daemon.
type Still struct {
	Endpoints int `json:"endpoints"`
	// For is the number of seconds until the last of them expires.
	For float64 `json:"forSeconds"`
}

// Words says what is answered and until when, given the current time. A nil Still means that it is unknown.
func (s *Still) Words(now time.Time) string {
	if s == nil {
		return "what the kernel still answers is unknown"
	}
	if s.Endpoints == 0 {
		return "nothing is answered, so every probe reaches its pod"
	}
	left := time.Duration(s.For * float64(time.Second))
	verb := "are"
	if s.Endpoints == 1 {
		verb = "is"
	}
	return fmt.Sprintf("%s %s still answered in the kernel, until %s (%s from now) at the latest; nothing renews that",
		Count(s.Endpoints, "endpoint"), verb, now.Add(left).Format("15:04:05 MST"), left.Round(100*time.Millisecond))
}

// Count returns a number with its noun, such as "1 node" or "2 nodes".
func Count(n int, noun string) string {
	if n != 1 {
		noun += "s"
	}
	return fmt.Sprintf("%d %s", n, noun)
}

// SortUnattached sorts pods by name.
func SortUnattached(all []Unattached) {
	slices.SortFunc(all, func(a, b Unattached) int { return cmp.Compare(a.Pod, b.Pod) })
}

// Exit prints an error that has not been shown yet, prefixed with the program's name, and returns the exit code.
func Exit(stderr io.Writer, program string, err error) int {
	var coded *Error
	if err != nil && (!errors.As(err, &coded) || !coded.Shown) {
		_, _ = fmt.Fprintf(stderr, "%s: %v\n", program, err)
	}
	return Code(err)
}
