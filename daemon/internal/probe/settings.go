package probe

import (
	"cmp"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// AnnotationPrefix begins the names of the annotations that are for probelet.
const AnnotationPrefix = "probelet.dev/"

// Annotations of a pod.
const (
	AnnotationMode      = AnnotationPrefix + "mode"
	AnnotationStaleness = AnnotationPrefix + "staleness"
	AnnotationRefresh   = AnnotationPrefix + "refresh"
)

// OwnAnnotations are those for probelet; nil if there are none.
func OwnAnnotations(all map[string]string) map[string]string {
	var own map[string]string
	for name, value := range all {
		if strings.HasPrefix(name, AnnotationPrefix) {
			if own == nil {
				own = map[string]string{}
			}
			own[name] = value
		}
	}
	return own
}

// Mode is what is done for a pod.
type Mode string

// Modes.
const (
	Answer  Mode = "answer"  // probes are observed, and answered while fresh
	Observe Mode = "observe" // probes are observed, and none is answered
	Off     Mode = "off"     // neither
)

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *Mode) UnmarshalText(text []byte) error {
	switch mode := Mode(text); mode {
	case Answer, Observe, Off:
		*m = mode
		return nil
	}
	return fmt.Errorf("%q: must be %s, %s or %s", text, Answer, Observe, Off)
}

// MarshalText implements encoding.TextMarshaler.
func (m Mode) MarshalText() ([]byte, error) { return []byte(m), nil }

// Staleness is how long a success may be answered, as a person says it: in periods of the shortest probe of its
// endpoint, and with PlusTimeout the smallest timeout of those probes besides.
type Staleness struct {
	Periods     float64
	PlusTimeout bool
}

// Periods of a Staleness.
const (
	minPeriods = 0.5
	maxPeriods = 5
)

// DefaultStaleness reaches to the end of the next probe. So of a lone prober's probes every second one reaches the pod.
// Without the timeout it would end when the next probe is due, and chance would say which of them comes first.
var DefaultStaleness = Staleness{1, true}

// MaxStaleness is the longest that can be said.
var MaxStaleness = Staleness{maxPeriods, true}

const plusTimeout = "+timeout"

// UnmarshalText implements encoding.TextUnmarshaler: "0.5" to "5", and "0.5+timeout" to "5+timeout".
func (s *Staleness) UnmarshalText(text []byte) error {
	number, plus := strings.CutSuffix(string(text), plusTimeout)
	periods, err := strconv.ParseFloat(number, 64)
	// Written so that NaN is refused.
	if err != nil || !(periods >= minPeriods && periods <= maxPeriods) || strings.ContainsAny(number, "_xX+") {
		return fmt.Errorf("%q: must be a number of periods from %v to %v, with or without %s after it",
			shorten(string(text)), minPeriods, float64(maxPeriods), plusTimeout)
	}
	*s = Staleness{periods, plus}
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (s Staleness) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

func (s Staleness) String() string {
	text := strconv.FormatFloat(s.Periods, 'f', -1, 64)
	if s.PlusTimeout {
		text += plusTimeout
	}
	return text
}

// Of is the staleness of an endpoint with these shortest times.
func (s Staleness) Of(period, timeout time.Duration) time.Duration {
	d := time.Duration(s.Periods * float64(period))
	if s.PlusTimeout {
		d += timeout
	}
	return d
}

// Refresh is whether the daemon asks by itself, and how often, as a person says it.
type Refresh struct {
	On bool
	// Interval is 0 for half of the endpoint's shortest period.
	Interval time.Duration
}

// minRefresh is the shortest interval.
const minRefresh = 100 * time.Millisecond

// UnmarshalText implements encoding.TextUnmarshaler: "true", "false", or an interval such as "500ms".
func (r *Refresh) UnmarshalText(text []byte) error {
	switch string(text) {
	case "true":
		*r = Refresh{On: true}
		return nil
	case "false":
		*r = Refresh{}
		return nil
	}
	interval, err := time.ParseDuration(string(text))
	if err != nil || interval < minRefresh {
		return fmt.Errorf("%q: must be true, false or an interval of at least %s", shorten(string(text)), minRefresh)
	}
	*r = Refresh{true, interval}
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (r Refresh) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

func (r Refresh) String() string {
	if r.Interval > 0 {
		return r.Interval.String()
	}
	return strconv.FormatBool(r.On)
}

// Of is how often an endpoint with this shortest period is asked; 0: never. It is half of the period at the most, and of
// the staleness, so that a success is renewed before it expires.
func (r Refresh) Of(period, staleness time.Duration) time.Duration {
	if !r.On {
		return 0
	}
	interval := min(period, staleness) / 2
	if r.Interval > 0 {
		interval = min(interval, r.Interval)
	}
	return max(interval, minRefresh)
}

// shorten keeps a foreign text from filling a log.
func shorten(text string) string {
	const most = 40
	if len(text) > most {
		return text[:most] + "…"
	}
	return text
}

// Origin is who said something.
type Origin string

// Origins.
const (
	FromDefault    Origin = "default"
	FromNode       Origin = "node"
	FromAnnotation Origin = "annotation"
)

// Defaults hold for a node's pods, where their annotations do not say otherwise.
type Defaults struct {
	Mode      Mode
	Staleness Staleness
	// Ceiling is what no pod exceeds, whoever asks for it.
	Ceiling Staleness
	Refresh Refresh
}

// NewDefaults returns those of a node of which nobody has said anything.
func NewDefaults() Defaults { return Defaults{Answer, DefaultStaleness, MaxStaleness, Refresh{}} }

// Settings are what holds for a pod.
type Settings struct {
	Mode          Mode
	ModeFrom      Origin
	Staleness     Staleness
	StalenessFrom Origin
	Ceiling       Staleness
	Refresh       Refresh
	RefreshFrom   Origin
	// Problem names an annotation that cannot be used, its value, and what it should be; empty if there is none.
	Problem string
}

// Settings of a pod with these annotations. Whoever wrote one that cannot be used wanted something else than the
// defaults, perhaps less; what it was is not known. So of such a pod nothing is answered until it is put right: it is
// observed, if it is not off.
func (d Defaults) Settings(annotations map[string]string) Settings {
	s := Settings{
		Mode: d.Mode, ModeFrom: FromDefault,
		Staleness: d.Staleness, StalenessFrom: FromDefault, Ceiling: d.Ceiling,
		Refresh: d.Refresh, RefreshFrom: FromDefault,
	}
	if d.Mode != Answer {
		s.ModeFrom = FromNode
	}
	if d.Staleness != DefaultStaleness {
		s.StalenessFrom = FromNode
	}
	if d.Refresh.On {
		s.RefreshFrom = FromNode
	}
	var problems []error
	if text, ok := annotations[AnnotationMode]; ok {
		s.ModeFrom = FromAnnotation
		if err := s.Mode.UnmarshalText([]byte(shorten(text))); err != nil {
			problems = append(problems, fmt.Errorf("annotation %s: %w", AnnotationMode, err))
		}
	}
	if text, ok := annotations[AnnotationStaleness]; ok {
		s.StalenessFrom = FromAnnotation
		if err := s.Staleness.UnmarshalText([]byte(text)); err != nil {
			problems = append(problems, fmt.Errorf("annotation %s: %w", AnnotationStaleness, err))
		}
	}
	if text, ok := annotations[AnnotationRefresh]; ok {
		s.RefreshFrom = FromAnnotation
		if err := s.Refresh.UnmarshalText([]byte(text)); err != nil {
			problems = append(problems, fmt.Errorf("annotation %s: %w", AnnotationRefresh, err))
		}
	}
	if len(problems) > 0 {
		s.Problem = strings.ReplaceAll(errors.Join(problems...).Error(), "\n", "; ")
		if s.Mode == Answer {
			s.Mode = Observe
		}
	}
	return s
}

// staleness of an endpoint with these shortest times, and whether the ceiling lowered it.
func (s Settings) staleness(period, timeout time.Duration) (time.Duration, bool) {
	asked, most := s.Staleness.Of(period, timeout), s.Ceiling.Of(period, timeout)
	return min(asked, most), asked > most
}

// reason is why nothing of the pod is answered; empty if something may be.
func (s Settings) reason() string {
	if s.Mode == Answer {
		return ""
	}
	return cmp.Or(s.Problem, "mode "+string(s.Mode))
}

// Withheld is whether the reason why an endpoint is not answered is the mode alone: what would be answered is to be seen
// before anything is.
func Withheld(reason string) bool { return reason == "mode "+string(Observe) }

// apply puts the settings into endpoints that are otherwise complete. What could never be answered anyway says so
// still, because in mode observe it is to be seen what answering would bring.
func (s Settings) apply(specs []EndpointSpec) {
	for i := range specs {
		specs[i].Staleness, specs[i].Capped = s.staleness(specs[i].Period, specs[i].Timeout)
		specs[i].Reason = cmp.Or(specs[i].Reason, s.reason())
		if s.Mode == Off {
			specs[i].Observed, specs[i].Reason = false, s.reason()
		}
		if specs[i].Reason == "" {
			specs[i].Refresh = s.Refresh.Of(specs[i].Period, specs[i].Staleness)
		}
	}
}
