// Package status has the words that probeletctl uses on a node and kubectl-probelet reads from it: exit codes, findings, and a
// node in a few numbers. It knows nothing of the kernel, so a workstation of any system can read them.
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
	Usage      = 2 // an unknown command or flag, or a value that it does not take
	DaemonDown = 3 // what is known without the daemon was shown
	NotFound   = 4 // no such pod or node, or the pod is not attached
	NotAllowed = 5 // the command needs root, or rights at the API server
)

// Error is an error that a command ends with a code of its own for.
type Error struct {
	Code int
	Err  error
	// Shown: what the error says has been printed already.
	Shown bool
}

// Errorf returns an Error with a message.
func Errorf(code int, format string, a ...any) error {
	return &Error{Code: code, Err: fmt.Errorf(format, a...)}
}

// Error implements error.
func (e *Error) Error() string { return e.Err.Error() }

// Unwrap returns the error within.
func (e *Error) Unwrap() error { return e.Err }

// Code returns the exit code for an error: Failed for one that is no Error.
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

// Verdict is what doctor thinks of something that it has looked at.
type Verdict string

// Verdicts.
const (
	Well    Verdict = "ok"
	Note    Verdict = "note"
	Problem Verdict = "PROBLEM"
	// Would: an install would do this.
	Would Verdict = "would"
)

// Finding is a line of doctor's.
type Finding struct {
	Verdict Verdict `json:"verdict"`
	About   string  `json:"about"`
	What    string  `json:"what"`
	// Do says what to do about it; empty: nothing.
	Do string `json:"do,omitempty"`
}

// Text is a finding in lines of at most width characters; 0: any number.
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

// Node is a node in a few numbers.
type Node struct {
	Version string `json:"version"`
	Running bool   `json:"running"` // the daemon
	// NotReady says why probes cannot be answered; empty if they can be.
	NotReady []string `json:"notReady"`
	// Attached counts attachments, Endpoints what is probed behind them, and Answered the endpoints whose next probe is answered
	// in the kernel.
	Attached  int `json:"attached"`
	Endpoints int `json:"endpoints"`
	Answered  int `json:"answered"`
	// Probes counts the probers' connections to attached pods since the BPF objects were loaded.
	Probes Probes `json:"probes"`
	// Unattached are pods that should be attached and are not, by namespace/name; empty: no reason is known.
	Unattached []Unattached `json:"unattached"`
	// Still is what is answered while the daemon is down; null while it runs.
	Still *Still `json:"still"`
}

// Unattached is a pod that has probes and is not attached.
type Unattached struct {
	Pod string `json:"pod"` // namespace/name
	Why string `json:"why,omitempty"`
}

// Probes counts connections of probers.
type Probes struct {
	Answered uint64 `json:"answered"` // in the kernel
	Passed   uint64 `json:"passed"`   // to the pods
}

// Share is the part of all probes that was answered in the kernel, such as "74 %"; "-" if there were none.
func (p Probes) Share() string {
	all := p.Answered + p.Passed
	if all == 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f %%", 100*float64(p.Answered)/float64(all))
}

// Plus adds two counts.
func (p Probes) Plus(o Probes) Probes { return Probes{p.Answered + o.Answered, p.Passed + o.Passed} }

// Still is what the kernel goes on answering without a daemon.
type Still struct {
	Endpoints int `json:"endpoints"`
	// For is how many seconds from now the last of them expires.
	For float64 `json:"forSeconds"`
}

// Words says what is answered until when, by a clock that shows now; of nil, that it is not known.
func (s *Still) Words(now time.Time) string {
	if s == nil {
		return "what the kernel still answers is not known"
	}
	if s.Endpoints == 0 {
		return "nothing is answered, every probe reaches its pod"
	}
	left := time.Duration(s.For * float64(time.Second))
	what := "1 endpoint is"
	if s.Endpoints > 1 {
		what = fmt.Sprintf("%d endpoints are", s.Endpoints)
	}
	return fmt.Sprintf("%s still answered in the kernel, until %s (%s from now) at the latest; nothing renews that",
		what, now.Add(left).Format("15:04:05 MST"), left.Round(100*time.Millisecond))
}

// SortUnattached sorts by name.
func SortUnattached(all []Unattached) {
	slices.SortFunc(all, func(a, b Unattached) int { return cmp.Compare(a.Pod, b.Pod) })
}

// Exit prints an error that has not been shown yet, after the name of the program, and returns the exit code.
func Exit(stderr io.Writer, program string, err error) int {
	var coded *Error
	if err != nil && (!errors.As(err, &coded) || !coded.Shown) {
		_, _ = fmt.Fprintf(stderr, "%s: %v\n", program, err)
	}
	return Code(err)
}
