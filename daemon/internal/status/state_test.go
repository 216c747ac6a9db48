package status

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

const now = uint64(1000 * time.Second)

func at(seconds int64) uint64 { return now + uint64(seconds*int64(time.Second)) }

func TestEndpoint(t *testing.T) {
	success := probe.Evidence{Result: probe.Success, Status: 200, ObservedAt: at(-4), FreshUntil: at(7)}
	expired, unbound, bad, redirected := success, success, success, success
	expired.FreshUntil, unbound.FreshUntil = at(-3), 0
	bad.Result, bad.Status = probe.Failure, 503
	redirected.Result, redirected.Status = probe.Unknown, 302
	kind, observe := probe.Reason{Code: probe.ReasonKind, Text: "x"}, probe.Reason{Code: probe.ReasonMode, Text: "x"}
	for name, test := range map[string]struct {
		endpoint Endpoint
		state    State
		counted  State
		code     probe.ReasonCode
	}{
		"nothing observed":       {Endpoint{}, StateUnknown, StateUnknown, Unobserved},
		"fresh":                  {Endpoint{Evidence: success}, StateFresh, StateFresh, ""},
		"expired":                {Endpoint{Evidence: expired}, StateStale, StateStale, Expired},
		"no bound":               {Endpoint{Evidence: unbound}, StateStale, StateStale, Expired},
		"below the threshold":    {Endpoint{Evidence: unbound, Successes: 3}, StateStale, StateStale, Threshold},
		"withdrawn since":        {Endpoint{Evidence: success, WithdrawnAt: at(-4), Cause: "reset"}, StateStale, StateStale, Withdrawn},
		"withdrawn before":       {Endpoint{Evidence: success, WithdrawnAt: at(-5)}, StateFresh, StateFresh, ""},
		"failed":                 {Endpoint{Evidence: bad}, StateFailed, StateFailed, LastFailed},
		"redirected":             {Endpoint{Evidence: redirected}, StateUnknown, StateUnknown, Redirect},
		"never answered":         {Endpoint{Evidence: unbound, Never: kind, Successes: 3}, StateStale, StateNever, Expired},
		"never answered, failed": {Endpoint{Evidence: bad, Never: kind}, StateFailed, StateNever, LastFailed},
		"observed":               {Endpoint{Evidence: unbound, Never: observe, Withheld: true, Bound: 11 * time.Second}, StateFresh, StateFresh, ""},
		"observed, expired":      {Endpoint{Evidence: unbound, Never: observe, Withheld: true, Bound: 3 * time.Second}, StateStale, StateStale, Expired},
	} {
		t.Run(name, func(t *testing.T) {
			e := test.endpoint
			reason := e.Reason(now)
			if e.State(now) != test.state || e.Counted(now) != test.counted || reason.Code != test.code || (reason.Text == "") != (test.code == "") {
				t.Errorf("%s, counted as %s, %+v; want %s, %s, %s", e.State(now), e.Counted(now), reason, test.state, test.counted, test.code)
			}
			if fresh := e.FreshFor(now); test.state == StateFresh && fresh != 7*time.Second {
				t.Errorf("fresh for %s, want 7s", fresh)
			}
		})
	}
}

func TestAttachment(t *testing.T) {
	for name, test := range map[string]struct {
		change   func(*Attachment)
		code     probe.ReasonCode
		detached bool
	}{
		"works":                    {func(*Attachment) {}, "", false},
		"failed to attach":         {func(a *Attachment) { a.Error = "busy" }, AttachFailed, true},
		"objects gone":             {func(a *Attachment) { a.Loaded = false }, NotLoaded, true},
		"device gone":              {func(a *Attachment) { a.Known = false }, UnknownDevice, true},
		"new":                      {func(a *Attachment) { a.Described = false }, NotSeen, false},
		"new, no daemon":           {func(a *Attachment) { a.Described, a.DaemonRunning = false, false }, NoDaemon, false},
		"no specs":                 {func(a *Attachment) { a.Endpoints = 0 }, NoProbes, false},
		"no prober":                {func(a *Attachment) { a.ProberKnown = false }, NoProber, false},
		"shared cgroup":            {func(a *Attachment) { a.ProberShared = true }, "", false},
		"shared cgroup, no daemon": {func(a *Attachment) { a.ProberShared, a.DaemonRunning = true, false }, ProberShared, false},
		"answers lost":             {func(a *Attachment) { a.Lost, a.Loss = true, "unobserved" }, AnswersLost, false},
	} {
		t.Run(name, func(t *testing.T) {
			a := Attachment{Loaded: true, IfIndex: 7, Known: true, Described: true, Endpoints: 1, DaemonRunning: true, ProberKnown: true}
			test.change(&a)
			reason := a.Reason()
			if _, detached := Detached(reason); reason.Code != test.code || detached != test.detached || (reason.Text == "") != (test.code == "") {
				t.Errorf("%+v, detached: %t; want %q", reason, detached, test.code)
			}
		})
	}
}

// The documentation lists every code once, in no particular order.
func TestReasonCodesAreDocumented(t *testing.T) {
	text, err := os.ReadFile("../../../docs/probeletctl.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Reasons\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var documented, codes []string
	for _, row := range regexp.MustCompile("(?m)^\\| `(\\w+)` \\|").FindAllStringSubmatch(section, -1) {
		documented = append(documented, row[1])
	}
	for _, code := range Codes() {
		codes = append(codes, string(code))
	}
	slices.Sort(documented)
	slices.Sort(codes)
	if !slices.Equal(documented, codes) {
		t.Errorf("documented: %q, want %q", documented, codes)
	}
	if len(slices.Compact(codes)) != len(documented) {
		t.Errorf("a code is used twice: %q", codes)
	}
}
