package probe

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"maps"
	"slices"
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

// Staleness is how long a success may be answered, in periods of the shortest probe of its endpoint. To each of these
// times a slack is added.
type Staleness float64

// Bounds of a Staleness, and its default: of a lone prober's probes every second one reaches the pod.
const (
	MinStaleness     Staleness = 0.5
	DefaultStaleness Staleness = 1
	MaxStaleness     Staleness = 5
)

// UnmarshalText implements encoding.TextUnmarshaler: "0.5" to "5".
func (s *Staleness) UnmarshalText(text []byte) error {
	periods, err := strconv.ParseFloat(string(text), 64)
	// Written so that NaN is refused.
	if parsed := Staleness(periods); err == nil && parsed >= MinStaleness && parsed <= MaxStaleness && !bytes.ContainsAny(text, "_xX+") {
		*s = parsed
		return nil
	}
	err = fmt.Errorf("%q: must be a number of periods from %s to %s", shorten(string(text)), MinStaleness, MaxStaleness)
	if bytes.HasSuffix(text, []byte("+timeout")) {
		err = fmt.Errorf("%w (\"+timeout\" is no longer supported: a slack is always added)", err)
	}
	return err
}

// MarshalText implements encoding.TextMarshaler.
func (s Staleness) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

func (s Staleness) String() string { return strconv.FormatFloat(float64(s), 'f', -1, 64) }

// Of is the staleness of an endpoint with these shortest times.
func (s Staleness) Of(period, timeout time.Duration) time.Duration {
	return time.Duration(float64(s)*float64(period)) + slack(period, timeout)
}

// slack makes a success outlast the beginning of the next probe, which chance would otherwise bring before or after. Half
// a period keeps the probe after that one out, however long the timeout.
func slack(period, timeout time.Duration) time.Duration { return min(timeout, period/2) }

// Refresh is whether the daemon asks by itself, and how often, as a person says it.
type Refresh struct {
	On bool
	// Interval is 0 for as seldom as keeps a success fresh.
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

// Of is how often an endpoint is asked; 0: never. It is no longer than the staleness, given without the slack, so that a
// success is renewed before it expires.
func (r Refresh) Of(staleness time.Duration) time.Duration {
	if !r.On {
		return 0
	}
	interval := staleness
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
	// RefreshByAnnotation lets annotations ask for refresh. Otherwise they can only do without it: what it costs is the node's.
	RefreshByAnnotation bool
	// StalenessSet and CeilingSet: somebody chose these, even if they chose the built-in ones.
	StalenessSet, CeilingSet bool
}

// NewDefaults returns the built-in defaults.
func NewDefaults() Defaults {
	return Defaults{Mode: Answer, Staleness: DefaultStaleness, Ceiling: MaxStaleness}
}

// Settings are what holds for a pod.
type Settings struct {
	Mode          Mode
	ModeFrom      Origin
	Staleness     Staleness
	StalenessFrom Origin
	Ceiling       Staleness
	CeilingSet    bool
	Refresh       Refresh
	RefreshFrom   Origin
	// RefreshDenied: the pod asks for refresh, and the node does not let pods do so.
	RefreshDenied bool
	// Problem names an annotation that cannot be used, its value, and what it should be; empty if there is none.
	Problem string
}

// Settings of a pod with these annotations. Whoever wrote one that cannot be used wanted something else than the
// defaults, perhaps less; what it was is not known. So of such a pod nothing is answered until it is put right: it is
// observed, if it is not off.
func (d Defaults) Settings(annotations map[string]string) Settings {
	s := Settings{
		Mode: d.Mode, ModeFrom: FromDefault,
		Staleness: d.Staleness, StalenessFrom: FromDefault, Ceiling: d.Ceiling, CeilingSet: d.CeilingSet,
		Refresh: d.Refresh, RefreshFrom: FromDefault,
	}
	if d.Mode != Answer {
		s.ModeFrom = FromNode
	}
	if d.StalenessSet {
		s.StalenessFrom = FromNode
	}
	if d.Refresh.On {
		s.RefreshFrom = FromNode
	}
	problems := misspelt(annotations)
	if text, ok := annotations[AnnotationMode]; ok {
		if err := s.Mode.UnmarshalText([]byte(shorten(text))); err != nil {
			problems = append(problems, fmt.Errorf("annotation %s: %w", AnnotationMode, err))
		} else {
			s.ModeFrom = FromAnnotation
		}
	}
	if text, ok := annotations[AnnotationStaleness]; ok {
		if err := s.Staleness.UnmarshalText([]byte(text)); err != nil {
			problems = append(problems, fmt.Errorf("annotation %s: %w", AnnotationStaleness, err))
		} else {
			s.StalenessFrom = FromAnnotation
		}
	}
	if text, ok := annotations[AnnotationRefresh]; ok {
		if err := s.refreshByAnnotation(text, d.RefreshByAnnotation); err != nil {
			problems = append(problems, fmt.Errorf("annotation %s: %w", AnnotationRefresh, err))
		}
	}
	if len(problems) > 0 {
		s.Problem = strings.ReplaceAll(errors.Join(problems...).Error(), "\n", "; ")
		if s.Mode == Answer {
			s.Mode, s.ModeFrom = Observe, FromAnnotation
		}
	}
	return s
}

// refreshByAnnotation takes what an annotation says of refresh, as far as that is allowed to ask for it.
func (s *Settings) refreshByAnnotation(text string, allowed bool) error {
	var asked Refresh
	if err := asked.UnmarshalText([]byte(text)); err != nil {
		return err
	}
	if asked.On && !allowed && s.Refresh.On {
		return nil // as the node has it for all of its pods
	}
	s.Refresh, s.RefreshFrom, s.RefreshDenied = asked, FromAnnotation, asked.On && !allowed
	return nil
}

// misspelt returns an error for each annotation that has our prefix and is not one of ours.
func misspelt(annotations map[string]string) (errs []error) {
	known := []string{AnnotationMode, AnnotationStaleness, AnnotationRefresh}
	for _, name := range slices.Sorted(maps.Keys(annotations)) {
		if strings.HasPrefix(name, AnnotationPrefix) && !slices.Contains(known, name) {
			errs = append(errs, fmt.Errorf("annotation %s: unknown; the known ones are %s", shorten(name), strings.Join(known, ", ")))
		}
	}
	return errs
}

// staleness of an endpoint, and whether the ceiling lowered it. One that the kernel side asks the listening socket of has
// its success believed for as long as that may go on, if nothing less was asked for.
func (s Settings) staleness(e EndpointSpec) (time.Duration, bool) {
	asked, most := s.Staleness, s.Ceiling
	if e.Live > 0 && s.StalenessFrom == FromDefault {
		asked = Staleness(e.Live + 1)
		if !s.CeilingSet {
			most = asked
		}
	}
	return min(asked, most).Of(e.Period, e.Timeout), asked > most
}

// reason is why nothing of the pod is answered; empty if something may be.
func (s Settings) reason() Reason {
	switch {
	case s.Mode == Answer:
		return Reason{}
	case s.Problem != "":
		return Reason{ReasonAnnotation, s.Problem}
	}
	return Reason{ReasonMode, "mode " + string(s.Mode)}
}

// apply puts the settings into endpoints that are otherwise complete. What could never be answered anyway says so
// still, because in mode observe it is to be seen what answering would bring.
func (s Settings) apply(specs []EndpointSpec) {
	for i := range specs {
		specs[i].Staleness, specs[i].Capped = s.staleness(specs[i])
		specs[i].Withheld = specs[i].Reason == (Reason{}) && s.Mode == Observe && s.Problem == ""
		specs[i].Reason = cmp.Or(specs[i].Reason, s.reason())
		if s.Mode == Off {
			specs[i].Observed, specs[i].Reason = false, s.reason()
		}
	}
}
