package probe

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestStalenessText(t *testing.T) {
	for text, want := range map[string]Staleness{"0.5": 0.5, "1": 1, "2.25": 2.25, "5": 5} {
		var got Staleness
		if err := got.UnmarshalText([]byte(text)); err != nil || got != want || got.String() != text {
			t.Errorf("%q: %s, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "0", "0.49", "5.01", "-1", "NaN", "Inf", "1s", "1 + timeout", "+timeout", "1+timeout", "0x1p0", "+1",
		"1_0", strings.Repeat("9", 1<<20)} {
		got := DefaultStaleness
		err := got.UnmarshalText([]byte(text))
		if err == nil || got != DefaultStaleness {
			t.Errorf("%.20q: accepted as %s", text, got)
			continue
		}
		if len(err.Error()) > 200 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
		if old := strings.HasSuffix(text, "+timeout"); old != strings.Contains(err.Error(), "no longer") {
			t.Errorf("%.20q: %v", text, err)
		}
	}
}

func TestRefresh(t *testing.T) {
	for text, want := range map[string]struct {
		refresh  Refresh
		interval time.Duration // with a staleness of 10 s
	}{
		"true": {Refresh{true, 0}, 10 * time.Second}, "false": {Refresh{}, 0},
		"100ms": {Refresh{true, 100 * time.Millisecond}, 100 * time.Millisecond},
		"2s":    {Refresh{true, 2 * time.Second}, 2 * time.Second},
		"1m0s":  {Refresh{true, time.Minute}, 10 * time.Second},
	} {
		var got Refresh
		if err := got.UnmarshalText([]byte(text)); err != nil || got != want.refresh || got.String() != text {
			t.Errorf("%q: %+v (%s), %v", text, got, got, err)
		}
		if interval := got.Of(10 * time.Second); interval != want.interval {
			t.Errorf("%q: every %s, want %s", text, interval, want.interval)
		}
	}
	for _, text := range []string{"", "yes", "True", "1", "99ms", "-1s", "NaN", strings.Repeat("9", 1<<20)} {
		got := Refresh{On: true}
		err := got.UnmarshalText([]byte(text))
		if err == nil || got != (Refresh{On: true}) {
			t.Errorf("%.20q: accepted as %s", text, got)
		} else if len(err.Error()) > 200 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
	}
}

func TestStalenessOf(t *testing.T) {
	for text, want := range map[string]struct{ usual, longTimeout time.Duration }{
		"0.5": {6 * time.Second, 10 * time.Second}, "1": {11 * time.Second, 15 * time.Second}, "5": {51 * time.Second, 55 * time.Second},
	} {
		var s Staleness
		if err := s.UnmarshalText([]byte(text)); err != nil {
			t.Fatal(err)
		}
		if got := s.Of(10*time.Second, time.Second); got != want.usual {
			t.Errorf("%s: %s, want %s", text, got, want.usual)
		}
		if got := s.Of(10*time.Second, time.Minute); got != want.longTimeout {
			t.Errorf("%s, a long timeout: %s, want %s", text, got, want.longTimeout)
		}
	}
}

// set returns the defaults of a node with these settings; 0 leaves one unset.
func set(staleness, ceiling Staleness) Defaults {
	d := NewDefaults()
	if d.StalenessSet = staleness != 0; d.StalenessSet {
		d.Staleness = StalenessRange{staleness, staleness}
	}
	if d.CeilingSet = ceiling != 0; d.CeilingSet {
		d.Ceiling = ceiling
	}
	return d
}

// A TCP probe's success stays valid for as long as checks of the listening socket may stand in for it, unless less is
// configured.
func TestLiveStaleness(t *testing.T) {
	live := limits
	live.Live = 9
	for name, test := range map[string]struct {
		defaults    Defaults
		annotations map[string]string
		want        time.Duration
	}{
		"by default":                {NewDefaults(), nil, 101 * time.Second},
		"annotation":                {NewDefaults(), map[string]string{AnnotationStaleness: "1"}, 11 * time.Second},
		"node":                      {set(5, 0), nil, 51 * time.Second},
		"node, as built in":         {set(DefaultStaleness, 0), nil, 11 * time.Second},
		"node ceiling":              {set(0, 2), nil, 21 * time.Second},
		"node ceiling, as built in": {set(0, MaxStaleness), nil, 51 * time.Second},
	} {
		for _, p := range []Spec{tcpProbe(Liveness), httpProbe(Liveness, "/x")} {
			specs, err := Endpoints(Pod{Probes: []Spec{p}}, test.defaults.Settings(test.annotations), live)
			if err != nil {
				t.Fatal(err)
			}
			want := test.want
			if p.Kind == HTTP && name != "node" {
				want = 11 * time.Second
			}
			if specs[0].Staleness != want {
				t.Errorf("%s, %s: %s, want %s", name, p.Kind, specs[0].Staleness, want)
			}
		}
	}
}

func TestSettings(t *testing.T) {
	type texts = map[string]string
	const staleness, mode = AnnotationStaleness, AnnotationMode
	cautious := set(0.5, 2)
	cautious.Mode = Observe
	for name, test := range map[string]struct {
		node        Defaults
		annotations texts
		want        string // mode and its origin, staleness and its origin
		problem     []string
	}{
		"no settings":          {NewDefaults(), nil, "answer default 1 default", nil},
		"of others":            {NewDefaults(), texts{"other/mode": "off"}, "answer default 1 default", nil},
		"annotations":          {NewDefaults(), texts{staleness: "0.5", mode: "off"}, "off annotation 0.5 annotation", nil},
		"node":                 {cautious, nil, "observe node 0.5 node", nil},
		"node, as built in":    {set(DefaultStaleness, 0), nil, "answer default 1 node", nil},
		"annotations go ahead": {cautious, texts{staleness: "5", mode: "answer"}, "answer annotation 5 annotation", nil},
		"bad staleness": {NewDefaults(), texts{staleness: "9"}, "observe invalid annotation 1 default",
			[]string{staleness, `"9"`, "0.5 to 5"}},
		"empty staleness": {NewDefaults(), texts{staleness: ""}, "observe invalid annotation 1 default", []string{staleness, `""`}},
		"bad mode":        {NewDefaults(), texts{mode: "Off"}, "observe invalid annotation 1 default", []string{mode, `"Off"`, "observe"}},
		"bad refresh": {NewDefaults(), texts{AnnotationRefresh: "1ms"}, "observe invalid annotation 1 default",
			[]string{AnnotationRefresh, `"1ms"`, "100ms"}},
		"both bad": {NewDefaults(), texts{mode: "x", staleness: "y"}, "observe invalid annotation 1 default",
			[]string{mode, staleness, `"x"`, `"y"`}},
		"misspelt": {NewDefaults(), texts{"probelet.dev/stalenes": "2"}, "observe invalid annotation 1 default",
			[]string{"probelet.dev/stalenes:", staleness}},
		"misspelt, and off": {NewDefaults(), texts{"probelet.dev/Mode": "answer", mode: "off"}, "off annotation 1 default",
			[]string{"probelet.dev/Mode:"}},
		"range":         {NewDefaults(), texts{staleness: "0.5-5"}, "answer default 0.5-5 annotation", nil},
		"range of one":  {NewDefaults(), texts{staleness: "2-2"}, "answer default 2 annotation", nil},
		"empty range":   {NewDefaults(), texts{staleness: "5-1"}, "observe invalid annotation 1 default", []string{staleness, `"5-1"`, "smaller"}},
		"half a range":  {NewDefaults(), texts{staleness: "1-"}, "observe invalid annotation 1 default", []string{staleness, `"1-"`, "0.5 to 5"}},
		"three numbers": {NewDefaults(), texts{staleness: "1-2-3"}, "observe invalid annotation 1 default", []string{staleness, `"1-2-3"`}},
		"liveness":      {NewDefaults(), texts{AnnotationLiveness: "traffic"}, "answer default 1 default", nil},
		"bad liveness": {NewDefaults(), texts{AnnotationLiveness: "Traffic"}, "observe invalid annotation 1 default",
			[]string{AnnotationLiveness, `"Traffic"`, "probes or traffic"}},
		"off and bad": {NewDefaults(), texts{mode: "off", staleness: "y"}, "off annotation 1 default",
			[]string{staleness}},
	} {
		t.Run(name, func(t *testing.T) {
			s := test.node.Settings(test.annotations)
			got := strings.Join([]string{string(s.Mode), string(s.ModeFrom), s.Staleness.String(), string(s.StalenessFrom)}, " ")
			if got != test.want || (s.Problem != "") != (test.problem != nil) || s.Ceiling != test.node.Ceiling {
				t.Errorf("got %s %q, want %s", got, s.Problem, test.want)
			}
			for _, part := range test.problem {
				if !strings.Contains(s.Problem, part) {
					t.Errorf("problem %q does not name %s", s.Problem, part)
				}
			}
		})
	}
}

// Settings apply to an ordinary endpoint, and to one that is never answered.
func TestSettingsApply(t *testing.T) {
	for name, test := range map[string]struct {
		annotations map[string]string
		ceiling     Staleness
		reason      string // of the ordinary endpoint; the other one keeps its own reason, except in mode off
		staleness   time.Duration
		observed    bool
		capped      bool
	}{
		"default":  {nil, MaxStaleness, "", 11 * time.Second, true, false},
		"longer":   {map[string]string{AnnotationStaleness: "3"}, MaxStaleness, "", 31 * time.Second, true, false},
		"capped":   {map[string]string{AnnotationStaleness: "3"}, 2, "", 21 * time.Second, true, true},
		"observe":  {map[string]string{AnnotationMode: "observe"}, MaxStaleness, "mode observe", 11 * time.Second, true, false},
		"off":      {map[string]string{AnnotationMode: "off"}, MaxStaleness, "mode off", 11 * time.Second, false, false},
		"unusable": {map[string]string{AnnotationStaleness: "x"}, MaxStaleness, AnnotationStaleness, 11 * time.Second, true, false},
	} {
		t.Run(name, func(t *testing.T) {
			https := with(httpProbe(Liveness, "/y"), func(s *Spec) { s.Kind, s.Port = HTTPS, 443 })
			settings := set(0, test.ceiling).Settings(test.annotations)
			specs, err := Endpoints(Pod{Probes: []Spec{httpProbe(Readiness, "/x"), https}}, settings, limits)
			if err != nil {
				t.Fatal(err)
			}
			x, y := specs[0], specs[1]
			if !strings.Contains(x.Reason.Text, test.reason) || test.reason == "" && x.Reason.Text != "" {
				t.Errorf("reason %q, want %q", x.Reason.Text, test.reason)
			}
			if x.Withheld != (name == "observe") || y.Withheld {
				t.Errorf("withheld: %v, %v", x.Withheld, y.Withheld)
			}
			if x.Staleness != test.staleness || x.Observed != test.observed || x.Capped != test.capped {
				t.Errorf("got %+v", x)
			}
			if own := strings.Contains(y.Reason.Text, "HTTPS"); own != (settings.Mode != Off) {
				t.Errorf("the other's reason is %q", y.Reason.Text)
			}
		})
	}
}

// Settings do not prolong evidence, and if they end it, only a new success restores it.
func TestSettingsChange(t *testing.T) {
	set := func(tracker *Tracker, annotations map[string]string) {
		specs, err := Endpoints(Pod{Probes: []Spec{httpProbe(Readiness, "/x")}}, NewDefaults().Settings(annotations), limits)
		if err != nil {
			t.Fatal(err)
		}
		tracker.SetEndpoints(specs, 1015*second)
	}
	for name, test := range map[string]struct {
		annotations map[string]string
		fresh, back uint64 // until when with the annotations, and after removing them again
	}{
		"longer":  {map[string]string{AnnotationStaleness: "5"}, 1021 * second, 1021 * second},
		"shorter": {map[string]string{AnnotationStaleness: "0.5"}, 1016 * second, 1016 * second},
		"observe": {map[string]string{AnnotationMode: "observe"}, 0, 0},
		"off":     {map[string]string{AnnotationMode: "off"}, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			tracker := track(t, httpProbe(Readiness, "/x"))
			tracker.Observe(after(10, x, Answered, 200))
			set(tracker, test.annotations)
			if got := tracker.Evidence()[x].FreshUntil; got != test.fresh {
				t.Errorf("fresh until %d, want %d", got, test.fresh)
			}
			set(tracker, nil)
			if got := tracker.Evidence()[x].FreshUntil; got != test.back {
				t.Errorf("afterwards fresh until %d, want %d", got, test.back)
			}
			tracker.Observe(after(20, x, Answered, 200))
			if got := tracker.Evidence()[x].FreshUntil; got != 1031*second {
				t.Errorf("after the next success fresh until %d", got)
			}
		})
	}
}

// Annotations may turn refresh on only where the node allows it; they may always turn it off.
func TestRefreshByAnnotation(t *testing.T) {
	every := func(interval time.Duration) Refresh { return Refresh{true, interval} }
	for name, test := range map[string]struct {
		node    Refresh
		allowed bool
		asked   string
		want    time.Duration // 0 if off
		off     string
	}{
		"allowed":            {Refresh{}, true, "true", 10 * time.Second, ""},
		"allowed, interval":  {Refresh{}, true, "1s", time.Second, ""},
		"allowed, more":      {every(5 * time.Second), true, "1s", time.Second, ""},
		"denied":             {Refresh{}, false, "true", 0, "--refresh-by-annotation"},
		"denied, interval":   {Refresh{}, false, "100ms", 0, "--refresh-by-annotation"},
		"denied, more":       {every(5 * time.Second), false, "100ms", 5 * time.Second, ""},
		"without":            {every(5 * time.Second), false, "false", 0, ""},
		"without, allowed":   {every(5 * time.Second), true, "false", 0, ""},
		"denied, on already": {every(5 * time.Second), false, "true", 5 * time.Second, ""},
	} {
		t.Run(name, func(t *testing.T) {
			d := NewDefaults()
			d.Refresh, d.RefreshByAnnotation = test.node, test.allowed
			pod := Pod{IPs: []netip.Addr{netip.MustParseAddr("10.0.0.7")}, Probes: []Spec{httpProbe(Readiness, "/x")}}
			settings := d.Settings(map[string]string{AnnotationRefresh: test.asked})
			specs, err := Endpoints(pod, settings, limits)
			if err != nil || settings.Problem != "" {
				t.Fatal(err, settings.Problem)
			}
			if s := specs[0]; s.Refresh != test.want || !strings.Contains(s.RefreshOff, test.off) || test.off == "" && s.RefreshOff != "" {
				t.Errorf("every %s, off: %q", s.Refresh, s.RefreshOff)
			}
			if s := specs[0]; s.Reason != (Reason{}) {
				t.Errorf("not answered: %v", s.Reason)
			}
		})
	}
}

// Refresh that cannot work is reported as off, with the reason.
func TestRefreshOff(t *testing.T) {
	live := limits
	live.Live = 9
	known := []netip.Addr{netip.MustParseAddr("10.0.0.7")}
	for name, test := range map[string]struct {
		ips         []netip.Addr
		probe       Spec
		limits      Limits
		annotations map[string]string
		off         string // empty if it is on
	}{
		"on":               {known, httpProbe(Readiness, "/x"), live, nil, ""},
		"TCP":              {known, tcpProbe(Readiness), limits, nil, ""},
		"TCP, checked":     {known, tcpProbe(Readiness), live, nil, "the listening socket itself"},
		"no address":       {nil, httpProbe(Readiness, "/x"), live, nil, "do not give the pod's address"},
		"never answered":   {known, httpProbe(Startup, "/x"), live, nil, "not answered"},
		"not observed":     {known, with(httpProbe(Liveness, "/x"), func(s *Spec) { s.Kind = HTTPS }), live, nil, "not answered"},
		"observed only":    {known, httpProbe(Readiness, "/x"), live, map[string]string{AnnotationMode: "observe"}, "not answered"},
		"off, not wanted":  {nil, httpProbe(Readiness, "/x"), live, map[string]string{AnnotationRefresh: "false"}, ""},
		"and not answered": {known, httpProbe(Startup, "/x"), live, map[string]string{AnnotationRefresh: "false"}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			defaults := NewDefaults()
			defaults.Refresh.On = true
			specs, err := Endpoints(Pod{IPs: test.ips, Probes: []Spec{test.probe}}, defaults.Settings(test.annotations), test.limits)
			if err != nil {
				t.Fatal(err)
			}
			on := test.off == "" && test.annotations == nil
			if s := specs[0]; (s.Refresh > 0) != on || !strings.Contains(s.RefreshOff, test.off) || test.off == "" && s.RefreshOff != "" {
				t.Errorf("every %s, off: %q; want %q", s.Refresh, s.RefreshOff, test.off)
			}
		})
	}
}
