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

// AnnotationPrefix is the prefix of probelet's annotations.
const AnnotationPrefix = "probelet.dev/"

// Annotations of a pod.
const (
	AnnotationMode      = AnnotationPrefix + "mode"
	AnnotationStaleness = AnnotationPrefix + "staleness"
	AnnotationRefresh   = AnnotationPrefix + "refresh"
	AnnotationLiveness  = AnnotationPrefix + "liveness"
)

// OwnAnnotations returns the annotations with AnnotationPrefix, or nil if there are none.
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

// Mode selects what probelet does for a pod.
type Mode string

// Modes.
const (
	Answer  Mode = "answer"  // probes are observed, and answered while fresh
	Observe Mode = "observe" // probes are observed, but never answered
	Off     Mode = "off"     // probes are neither observed nor answered
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

// Staleness limits how long a success may be answered, in periods of the shortest probe of its endpoint. A slack is added
// to the resulting time.
type Staleness float64

// Bounds and default of a Staleness. With the default, every second probe of a lone prober reaches the pod.
const (
	MinStaleness     Staleness = 0.5
	DefaultStaleness Staleness = 1
	MaxStaleness     Staleness = 5
)

// UnmarshalText implements encoding.TextUnmarshaler. It accepts "0.5" to "5".
func (s *Staleness) UnmarshalText(text []byte) error {
	periods, err := strconv.ParseFloat(string(text), 64)
	// Written this way, the condition rejects NaN.
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

// Of returns the staleness in time of an endpoint with these shortest period and timeout.
func (s Staleness) Of(period, timeout time.Duration) time.Duration {
	return sum(time.Duration(min(float64(s)*float64(period), float64(longest/2))), slack(period, timeout))
}

// slack makes a success outlast the start of the next probe, which would otherwise fall on either side of the bound by
// chance. Limited to half a period, it excludes the probe after that one, however long the timeout.
func slack(period, timeout time.Duration) time.Duration { return min(timeout, period/2) }

// StalenessRange is the staleness that a person asks for: Short until an endpoint is steady, and Long from then on. They are
// the same where one number is given.
type StalenessRange struct{ Short, Long Staleness }

// SteadyAfter is how long an endpoint must have succeeded without a failure, in one container, to be steady.
const SteadyAfter = 10 * time.Minute

// UnmarshalText implements encoding.TextUnmarshaler. It accepts "0.5" to "5", or two such numbers, as in "0.5-5".
func (r *StalenessRange) UnmarshalText(text []byte) error {
	short, long, two := bytes.Cut(text, []byte("-"))
	if !two {
		long = short
	}
	var parsed StalenessRange
	if err := errors.Join(parsed.Short.UnmarshalText(short), parsed.Long.UnmarshalText(long)); two && err != nil {
		return fmt.Errorf("%q: must be one or two numbers of periods from %s to %s, as in 1-5", shorten(string(text)), MinStaleness, MaxStaleness)
	}
	if err := parsed.Short.UnmarshalText(short); err != nil {
		return err
	}
	if parsed.Short > parsed.Long {
		return fmt.Errorf("%q: the staleness of a steady endpoint, after the hyphen, must not be the smaller one", shorten(string(text)))
	}
	*r = parsed
	return nil
}

// MarshalText implements encoding.TextMarshaler.
func (r StalenessRange) MarshalText() ([]byte, error) { return []byte(r.String()), nil }

func (r StalenessRange) String() string {
	if r.Short == r.Long {
		return r.Short.String()
	}
	return r.Short.String() + "-" + r.Long.String()
}

// Refresh configures whether, and how often, the daemon sends requests of its own.
type Refresh struct {
	On bool
	// Interval is the time between requests; 0 means as seldom as keeps a success fresh.
	Interval time.Duration
}

// minRefresh is the shortest interval.
const minRefresh = 100 * time.Millisecond

// UnmarshalText implements encoding.TextUnmarshaler. It accepts "true", "false", or an interval such as "500ms".
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

// Of returns how often to refresh an endpoint; 0 means never. The interval never exceeds the staleness, given without the
// slack, so that a success is renewed before it expires.
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

// shorten keeps user-supplied text from filling a log.
func shorten(text string) string {
	const most = 40
	if len(text) > most {
		return text[:most] + "…"
	}
	return text
}

// Origin names the source of a setting.
type Origin string

// Origins.
const (
	FromDefault    Origin = "default"
	FromNode       Origin = "node"
	FromAnnotation Origin = "annotation"
	FromProblem    Origin = "invalid annotation"
)

// Defaults are the settings of a node's pods, unless their annotations override them.
type Defaults struct {
	Mode      Mode
	Staleness StalenessRange
	// Ceiling limits the staleness of every pod, whatever its annotations ask for.
	Ceiling Staleness
	Refresh Refresh
	// RefreshByAnnotation lets annotations turn refresh on. Otherwise they can only turn it off, because the node bears
	// its cost.
	RefreshByAnnotation bool
	Liveness            LivenessEvidence
	// StalenessSet and CeilingSet report whether these were configured, even if to the built-in values.
	StalenessSet, CeilingSet bool
}

// NewDefaults returns the built-in defaults.
func NewDefaults() Defaults {
	return Defaults{
		Mode: Answer, Staleness: StalenessRange{DefaultStaleness, DefaultStaleness}, Ceiling: MaxStaleness, Liveness: LivenessByProbes,
	}
}

// Settings are the settings of one pod.
type Settings struct {
	Mode          Mode
	ModeFrom      Origin
	Staleness     StalenessRange
	StalenessFrom Origin
	Ceiling       Staleness
	CeilingSet    bool
	Refresh       Refresh
	RefreshFrom   Origin
	// RefreshDenied: the pod requests refresh, but the node does not allow that.
	RefreshDenied bool
	Liveness      LivenessEvidence
	LivenessFrom  Origin
	// Problem names an invalid annotation, its value, and what was expected; empty if all are valid.
	Problem string
}

// Settings returns the settings of a pod with these annotations. An invalid annotation means that its author wanted
// something other than the defaults, perhaps less. So no probe of such a pod is answered until the annotation is
// corrected; the pod is still observed, unless it is off.
func (d Defaults) Settings(annotations map[string]string) Settings {
	s := Settings{
		Mode: d.Mode, ModeFrom: FromDefault,
		Staleness: d.Staleness, StalenessFrom: FromDefault, Ceiling: d.Ceiling, CeilingSet: d.CeilingSet,
		Refresh: d.Refresh, RefreshFrom: FromDefault, Liveness: d.Liveness, LivenessFrom: FromDefault,
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
	if d.Liveness == LivenessByTraffic {
		s.LivenessFrom = FromNode
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
	if text, ok := annotations[AnnotationLiveness]; ok {
		if err := s.Liveness.UnmarshalText([]byte(text)); err != nil {
			problems = append(problems, fmt.Errorf("annotation %s: %w", AnnotationLiveness, err))
		} else {
			s.LivenessFrom = FromAnnotation
		}
	}
	if len(problems) > 0 {
		s.Problem = strings.ReplaceAll(errors.Join(problems...).Error(), "\n", "; ")
		if s.Mode == Answer {
			s.Mode, s.ModeFrom = Observe, FromProblem
		}
	}
	return s
}

// refreshByAnnotation applies a refresh annotation; allowed is Defaults.RefreshByAnnotation.
func (s *Settings) refreshByAnnotation(text string, allowed bool) error {
	var asked Refresh
	if err := asked.UnmarshalText([]byte(text)); err != nil {
		return err
	}
	if asked.On && !allowed && s.Refresh.On {
		return nil // keep the node's own setting
	}
	s.Refresh, s.RefreshFrom, s.RefreshDenied = asked, FromAnnotation, asked.On && !allowed
	return nil
}

// misspelt returns an error for each unknown annotation with our prefix.
func misspelt(annotations map[string]string) (errs []error) {
	known := []string{AnnotationMode, AnnotationStaleness, AnnotationRefresh, AnnotationLiveness}
	for _, name := range slices.Sorted(maps.Keys(annotations)) {
		if strings.HasPrefix(name, AnnotationPrefix) && !slices.Contains(known, name) {
			errs = append(errs, fmt.Errorf("annotation %s: unknown; the known ones are %s", shorten(name), strings.Join(known, ", ")))
		}
	}
	return errs
}

// setStaleness sets the staleness of an endpoint, as far as the ceiling allows. If the kernel side checks the endpoint's
// listening socket, the default covers the longest run of probes answered that way.
func (s Settings) setStaleness(e *EndpointSpec) {
	asked, most := s.Staleness, s.Ceiling
	if e.Live > 0 && s.StalenessFrom == FromDefault {
		asked = StalenessRange{Staleness(e.Live + 1), Staleness(e.Live + 1)}
		if !s.CeilingSet {
			most = asked.Long
		}
	}
	e.Staleness = min(asked.Short, most).Of(e.Period, e.Timeout)
	e.SteadyStaleness = min(asked.Long, most).Of(e.Period, e.Timeout)
	e.Capped = asked.Long > most
}

// reason returns why none of the pod's probes is answered, or the zero Reason if some may be.
func (s Settings) reason() Reason {
	switch {
	case s.Mode == Answer:
		return Reason{}
	case s.Problem != "":
		return Reason{ReasonAnnotation, s.Problem}
	}
	return Reason{ReasonMode, "mode " + string(s.Mode)}
}

// apply applies the settings to endpoints that are otherwise complete. An endpoint that could never be answered keeps its
// own reason, because mode observe is to show what answering would bring.
func (s Settings) apply(specs []EndpointSpec) {
	for i := range specs {
		s.setStaleness(&specs[i])
		specs[i].Withheld = specs[i].Reason == (Reason{}) && s.Mode == Observe && s.Problem == ""
		specs[i].Reason = cmp.Or(specs[i].Reason, s.reason())
		if s.Mode == Off {
			specs[i].Observed, specs[i].Reason = false, s.reason()
		}
	}
}
