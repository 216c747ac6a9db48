//go:build linux

package ctl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/store"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/table"
)

const explainHelp = `Shows what is known about a pod: each endpoint with the probes that ask it, whether the next probe is answered and if not why,
how long a failure can go unnoticed by each probe, and recent events.

The daemon remembers events. Without it, only those that the kernel records are shown: the last answer and the last
withdrawal.

With -o json, attachments have the fields described in docs/status.schema.json.`

// Explanation is the output of probeletctl explain.
type Explanation struct {
	Daemon      survey.Daemon       `json:"daemon"`
	Attachments []survey.Attachment `json:"attachments"`
	// Events lists the recent events of each endpoint, oldest first; null if the daemon is not running.
	Events []api.Event `json:"events"`
}

func explainCommand(env *environment) *cobra.Command {
	var where place
	var pod podArgument
	var output *string
	cmd := &cobra.Command{
		Use:   "explain NAMESPACE/POD",
		Short: "Show what is known about a pod, and why it is answered or not",
		Long:  explainHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			x, err := explain(cmd.Context(), env, where, pod.name(args[0]))
			if err != nil {
				return err
			}
			if *output == "json" {
				err = status.PrintJSON(env.stdout, x)
			} else {
				err = x.print(env)
			}
			if err != nil {
				return err
			}
			return daemonDown(x.Daemon)
		},
	}
	output = status.OutputFlag(cmd, "text", "json", "text")
	pod.flags(cmd, &where)
	where.flags(cmd)
	return cmd
}

func explain(ctx context.Context, env *environment, where place, name string) (Explanation, error) {
	s, err := env.readWithNeighbours(where)
	if err != nil {
		return Explanation{}, err
	}
	x := Explanation{Daemon: s.Daemon}
	if x.Attachments, err = s.OfPod(name); err != nil {
		return x, err
	}
	if !x.Daemon.Running {
		x.Daemon.Still = survey.Still(x.Attachments)
	}
	namespace, pod, _ := strings.Cut(name, "/")
	reply, err := api.NewClient(where.stateDir).Events(ctx, namespace, pod)
	switch {
	case err == nil:
		x.Events = reply.Events
	case !errors.Is(err, api.ErrDown) && !errors.Is(err, api.ErrNotFound):
		env.warn(err)
	}
	return x, nil
}

func (x Explanation) print(env *environment) error {
	var text table.Text
	line := text.Line
	line(x.Daemon.String())
	for _, a := range x.Attachments {
		line("")
		line(fmt.Sprintf("%s  device %s, container %s", a.Pod, cmp.Or(a.HostIfName, "-"), a.ContainerID))
		if a.Adopted {
			line("attached by the daemon: the pod is older than probelet on this node")
		}
		if s := a.Settings; s != nil {
			line(fmt.Sprintf("mode %s (%s), staleness %s (%s), refresh %s (%s), liveness %s (%s)",
				s.Mode, s.ModeFrom, s.Staleness, s.StalenessFrom, s.Refresh, s.RefreshFrom, s.Liveness, s.LivenessFrom))
		}
		if a.Trust != "" {
			line(fmt.Sprintf("hook %s; %s", a.Hook, a.Answers()))
		}
		for _, n := range a.Neighbours {
			line("also on the device: " + n.String())
		}
		if a.WhyNotAnsweredCode != "" {
			line("not answered: " + a.WhyNotAnswered)
		}
		if doubts := inconclusive(a.Inconclusive); doubts != "" {
			line(doubts)
		}
		for _, e := range a.Endpoints {
			line("")
			x.printEndpoint(&text, e)
		}
	}
	return text.Write(env.stdout, env.width)
}

func (x Explanation) printEndpoint(text *table.Text, e survey.Endpoint) {
	text.Line(e.Endpoint.Endpoint().String())
	state := string(e.State)
	if e.Status != 0 {
		state += fmt.Sprintf(", status %d", e.Status)
	}
	if e.Age != nil {
		state += fmt.Sprintf(", observed %s ago", status.Duration(*e.Age))
	}
	text.Pair("state", state)
	if e.WhyNotAnsweredCode == "" {
		next := fmt.Sprintf("answered in the kernel, for another %s", status.Duration(*e.FreshFor))
		if e.Listener != nil {
			next += ", if the listening socket would accept it"
		}
		text.Pair("next probe", next)
	} else {
		text.Pair("next probe", "reaches the pod: "+e.WhyNotAnswered)
	}
	if e.MayBeAnswered() {
		text.Pair("bound", bound(e))
	}
	if e.Listener != nil {
		text.Pair("listening socket", listener(*e.Listener))
	}
	if e.Traffic > 0 {
		text.Pair("traffic", traffic(e))
	} else if e.TrafficOff != "" {
		text.Pair("traffic", "not evidence: "+e.TrafficOff)
	}
	if e.RefreshOff != "" {
		text.Pair("refresh", "off: "+e.RefreshOff)
	}
	if e.NotCompared != "" {
		text.Pair("kubelet's verdict", "not compared: "+e.NotCompared)
	}
	if n := e.WouldAnswer.Probes(); n > 0 {
		text.Pair("mode answer", wouldAnswer(*e.WouldAnswer, n))
	}
	for _, p := range e.Probes {
		text.Pair(p.String(), fmt.Sprintf("every %s, timeout %s, threshold %d: a failure %s detected within %s (%s without probelet)",
			status.Duration(p.Period), status.Duration(p.Timeout), p.FailureThreshold, would(e), status.Duration(p.DetectionAnswered), status.Duration(p.DetectionPlain)))
		if e.Traffic > 0 && p.DetectionHang > 0 { // an older daemon does not state it
			text.Pair("", fmt.Sprintf("that is for errors; a pod that no longer serves anyone is detected within %s, "+
				"and timeouts of this probe alone are not detected while it serves others", status.Duration(p.DetectionHang)))
		}
	}
	for _, event := range x.eventsOf(e) {
		text.Pair(status.Duration(event.age).String()+" ago", event.text)
	}
}

// would returns "is", or "would be" for an endpoint in mode observe.
func would(e survey.Endpoint) string {
	if e.Withheld {
		return "would be"
	}
	return "is"
}

// bound says how long a success is answered, and what else limits that.
func bound(e survey.Endpoint) string {
	text := fmt.Sprintf("a success %s answered for %s", would(e), status.Duration(e.StalenessBound))
	if e.SteadyBound != 0 {
		text += fmt.Sprintf(", and for %s once it has succeeded for %s", status.Duration(e.SteadyBound), probe.SteadyAfter)
	}
	if e.StalenessCapped {
		text += ", the node's ceiling"
	}
	if e.Live > 0 {
		text += fmt.Sprintf(", while the listening socket accepts, and at most %d times in a row", e.Live)
	}
	if e.Successes > 1 {
		text += fmt.Sprintf("; after a failure, only once %d in a row were observed", e.Successes)
	}
	if e.Refresh != 0 {
		text += fmt.Sprintf("; the daemon refreshes it every %s", status.Duration(e.Refresh))
	}
	return text
}

// traffic says what the pod's traffic means for an endpoint.
func traffic(e survey.Endpoint) string {
	text := "not seen serving yet"
	if e.ServedAge != nil {
		text = fmt.Sprintf("last seen serving %s ago", status.Duration(*e.ServedAge))
	}
	return text + fmt.Sprintf("; within %s of that, probes are answered even if the last one timed out, at most %d in a row and for %s after a real one began",
		status.Duration(e.TrafficWindow), e.Traffic, status.Duration(e.TrafficBound))
}

// listener describes the checks of a listening socket.
func listener(l store.Listener) string {
	var said []string
	if l.Most > 0 || l.Answered > 0 {
		text := fmt.Sprintf("%d of at most %d probes were answered since a connection was last known to be accepted", l.Answered, l.Most)
		if l.Pending && l.Answered >= l.Most {
			text += ", and another has reached the pod since"
		}
		said = append(said, text)
	}
	if l.Obstacle != "" {
		which := "the last one passed on: "
		if len(said) == 0 {
			which = "the last probe passed on because of it: "
		}
		said = append(said, which+status.ObstacleText(l.Obstacle))
	}
	return cmp.Or(strings.Join(said, "; "), "not checked yet")
}

// wouldAnswer says what mode answer would have done with probes.
func wouldAnswer(e api.WouldAnswer, probes uint64) string {
	text := fmt.Sprintf("would have answered %d of %d probes", e.Answered, probes)
	if e.Hidden > 0 {
		text += fmt.Sprintf(" (%d of which failed)", e.Hidden)
	}
	separator := "; the others would have reached the pod: "
	for _, why := range probe.Whys() {
		if n := e.Passed[why]; n > 0 {
			text += fmt.Sprintf("%s%d %s", separator, n, status.WhyText(why))
			separator = ", "
		}
	}
	return text
}

// happening is an event as it is shown.
type happening struct {
	age  float64 // in seconds
	text string
}

// eventsOf returns the daemon's and the kernel's events of an endpoint, oldest first.
func (x Explanation) eventsOf(e survey.Endpoint) []happening {
	var all []happening
	for _, event := range x.Events {
		if (probe.Endpoint{Port: event.Port, Kind: event.Kind, Path: event.Path, Headers: event.HeadersID}) == e.Endpoint.Endpoint() {
			all = append(all, happening{time.Since(event.Time).Seconds(), describe(event)})
		}
	}
	if e.LastHitAge != nil {
		all = append(all, happening{*e.LastHitAge, fmt.Sprintf("answered in the kernel (%d so far)", e.Hits)})
	}
	if e.WithdrawnAge != nil {
		all = append(all, happening{*e.WithdrawnAge, "withdrawn by the kernel: " + status.WithdrawalText(e.WithdrawnCause)})
	}
	slices.SortStableFunc(all, func(a, b happening) int { return cmp.Compare(b.age, a.age) })
	return all
}

func describe(e api.Event) string {
	var text string
	switch e.Cause {
	case probe.ByProbe, probe.ByRefresh:
		text = fmt.Sprintf("observed by %s: %s", e.Cause, e.Result)
		if e.Status != 0 {
			text += fmt.Sprintf(" %d", e.Status)
		}
	case probe.ByRestart:
		text = "forgotten: a container started, ended or was replaced"
	case probe.BySpec:
		text = "reset: probes or settings changed"
	case probe.ByRequest:
		text = "withdrawn on request"
	case probe.ByRepair:
		text = "withdrawn: the attachment was incomplete"
	case probe.ByVerdict:
		text = "withdrawn: the kubelet's verdict differed"
	default:
		text = fmt.Sprintf("%s by %s", e.Result, e.Cause)
	}
	if e.Took != nil {
		text += fmt.Sprintf(", took %s", e.Took.Round(10*time.Microsecond))
	}
	if e.Count > 1 {
		text += fmt.Sprintf(" (the last of %d)", e.Count)
	}
	return text
}
