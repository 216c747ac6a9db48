package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/store"
)

// parsePod splits NAMESPACE/POD.
func parsePod(text string) (namespace, pod string, err error) {
	namespace, pod, ok := strings.Cut(text, "/")
	if !ok || namespace == "" || pod == "" || strings.Contains(pod, "/") {
		return "", "", fmt.Errorf("%q: must be NAMESPACE/POD", text)
	}
	return namespace, pod, nil
}

// onePod checks that a command has one argument, which parsePod then reads.
func onePod(_ *cobra.Command, args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("%d arguments: must be one, NAMESPACE/POD", len(args))
	}
	return nil
}

const invalidateHelp = `Has probelet forget what is known of a pod's endpoints: the next probes reach the pod, and an endpoint is answered again
only after a probe of it has succeeded. When the command returns, that is so. It needs the daemon.`

func invalidateCommand(env environment) *cobra.Command {
	var where place
	var r api.InvalidateRequest
	cmd := &cobra.Command{
		Use:   "invalidate NAMESPACE/POD",
		Short: "Have the next probes of a pod reach it",
		Long:  invalidateHelp,
		Args:  onePod,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if r.Namespace, r.Pod, err = parsePod(args[0]); err != nil {
				return err
			}
			reply, err := api.NewClient(where.stateDir).Invalidate(cmd.Context(), r)
			if errors.Is(err, api.ErrDown) {
				return fmt.Errorf("%w, and nobody else may withdraw; %s", err, freshUntil(env, where, args[0]))
			}
			if err != nil {
				return err
			}
			if len(reply.Withdrawn) == 0 {
				reply.Withdrawn = []string{"nothing: no endpoint of it is attached and observed"}
			}
			_, err = fmt.Fprintf(env.stdout, "withdrawn of %s:\n  %s\n", reply.Pod, strings.Join(reply.Withdrawn, "\n  "))
			return err
		},
	}
	cmd.Flags().Uint16Var(&r.Port, "port", 0, "only endpoints on this `PORT`")
	cmd.Flags().StringVar(&r.Path, "path", "", "only endpoints of this `PATH` (and query), as probed")
	where.flags(cmd)
	return cmd
}

const trustHelp = `When an answer does not arrive by a pod's device, because another program or a firewall drops it, probelet takes no more
connections there: "probeletctl status" and "doctor" say so, and name who else is on the device. Once that is resolved, this
command has probelet try again, with a single connection at first. It needs root, but not the daemon.`

func trustCommand(env environment) *cobra.Command {
	var where place
	cmd := &cobra.Command{
		Use:   "trust NAMESPACE/POD",
		Short: "Have a pod answered again after answers did not arrive",
		Long:  trustHelp,
		Args:  onePod,
		RunE:  func(_ *cobra.Command, args []string) error { return trust(env, where, args[0]) },
	}
	where.flags(cmd)
	return cmd
}

func trust(env environment, where place, name string) error {
	if _, _, err := parsePod(name); err != nil {
		return err
	}
	s, err := collect(env, where)
	if err != nil {
		return err
	}
	attachments, err := s.ofPod(name)
	if err != nil {
		return err
	}
	k, err := env.open(where.bpfDir)
	if err != nil {
		return err
	}
	if k == nil {
		return errors.New("nothing is attached: the BPF objects are not loaded")
	}
	defer k.Close() //nolint:errcheck // what was written is written
	for _, a := range attachments {
		done, err := trustAgain(k, a)
		if err != nil {
			return fmt.Errorf("pod %s: %w", name, err)
		}
		if _, err := fmt.Fprintf(env.stdout, "%s: %s\n", name, done); err != nil {
			return err
		}
	}
	return nil
}

// trustAgain returns in words what it did.
func trustAgain(k kernel, a Attachment) (done string, err error) {
	if a.Trust == "" {
		return "", errors.New(cmp.Or(a.WhyNotAnswered, "not attached any more"))
	}
	if a.Trust != trustLost {
		return "nothing to do: " + a.trust(), nil
	}
	device, err := k.AttachedDevice(attach.ID{ContainerID: a.ContainerID, IfName: a.IfName})
	if err != nil {
		return "", err
	}
	return "answers by " + a.HostIfName + " are tried again", k.TrustAgain(device.Key)
}

// ofPod returns the attachments of a pod, at least one.
func (s Status) ofPod(name string) ([]Attachment, error) {
	var found []Attachment
	for _, a := range s.Attachments {
		if a.Pod == name {
			found = append(found, a)
		}
	}
	if len(found) > 0 {
		return found, nil
	}
	if slices.Contains(s.Unattached, name) {
		return nil, fmt.Errorf("pod %s is not attached, so all of its probes reach it", name)
	}
	return nil, fmt.Errorf("pod %s is not known on this node", name)
}

// freshUntil says for how long a pod is still answered if nothing more happens.
func freshUntil(env environment, where place, pod string) string {
	s, err := collect(env, where)
	if err != nil {
		return err.Error()
	}
	longest := 0.0
	for _, a := range s.Attachments {
		for _, e := range a.Endpoints {
			if a.Pod == pod && e.FreshFor != nil && e.NotAnswered == "" {
				longest = max(longest, *e.FreshFor)
			}
		}
	}
	if longest == 0 {
		return "nothing of " + pod + " is fresh"
	}
	return fmt.Sprintf("the last of %s expires in %s", pod, duration(longest))
}

const explainHelp = `Shows what is known of a pod: each endpoint with the probes that ask it, whether it is answered and why not, for how long at
most a failure can go unnoticed by each probe, and the last events.

Events are the daemon's memory. Without a daemon those that the kernel notes are shown: the last answer and the last
withdrawal.

With -o json, attachments are those of docs/status.schema.json.`

// Explanation is what probeletctl explain shows.
type Explanation struct {
	Daemon      Daemon       `json:"daemon"`
	Attachments []Attachment `json:"attachments"`
	// Events are the last of each endpoint, oldest first, as the daemon remembers them; null if it is not running.
	Events []api.Event `json:"events"`
}

func explainCommand(env environment) *cobra.Command {
	var where place
	var output string
	cmd := &cobra.Command{
		Use:   "explain NAMESPACE/POD",
		Short: "Show what is known of a pod, and why it is answered or not",
		Long:  explainHelp,
		Args:  onePod,
		RunE: func(cmd *cobra.Command, args []string) error {
			x, err := explain(cmd.Context(), env, where, args[0])
			if err != nil {
				return err
			}
			switch output {
			case "text":
				return x.print(env.stdout)
			case "json":
				return printJSON(env.stdout, x)
			}
			return fmt.Errorf("--output %q: must be one of json|text", output)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "`format`: json|text")
	where.flags(cmd)
	return cmd
}

func explain(ctx context.Context, env environment, where place, name string) (Explanation, error) {
	namespace, pod, err := parsePod(name)
	if err != nil {
		return Explanation{}, err
	}
	s, err := survey(env, where)
	if err != nil {
		return Explanation{}, err
	}
	x := Explanation{Daemon: s.Daemon}
	if x.Attachments, err = s.ofPod(name); err != nil {
		return x, err
	}
	reply, err := api.NewClient(where.stateDir).Events(ctx, namespace, pod)
	switch {
	case err == nil:
		x.Events = reply.Events
	case !errors.Is(err, api.ErrDown) && !errors.Is(err, api.ErrNotFound):
		warn(env, err)
	}
	return x, nil
}

func (x Explanation) print(w io.Writer) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(columns ...string) { _, _ = fmt.Fprintln(table, strings.Join(columns, "\t")) } // Flush tells of errors
	line(x.Daemon.String())
	for _, a := range x.Attachments {
		line()
		line(fmt.Sprintf("%s  device %s, container %s", a.Pod, cmp.Or(a.HostIfName, "-"), a.ContainerID))
		if a.Adopted {
			line("attached by the daemon: the pod had its network before probelet")
		}
		if s := a.Settings; s != nil {
			line(fmt.Sprintf("mode %s (%s), staleness %s (%s), refresh %s (%s)",
				s.Mode, s.ModeFrom, s.Staleness, s.StalenessFrom, s.Refresh, s.RefreshFrom))
		}
		if a.Trust != "" {
			line(fmt.Sprintf("hook %s; %s", a.Hook, a.trust()))
		}
		for _, n := range a.Neighbours {
			line("also there: " + n.String())
		}
		if a.WhyNotAnswered != "" {
			line("not answered: " + a.WhyNotAnswered)
		}
		if text := inconclusive(a.Inconclusive); text != "" {
			line(text)
		}
		for _, e := range a.Endpoints {
			line()
			x.printEndpoint(line, e)
		}
	}
	return table.Flush()
}

func (x Explanation) printEndpoint(line func(...string), e Endpoint) {
	line(e.Endpoint.Endpoint().String())
	state := string(e.State)
	if e.Status != 0 {
		state += fmt.Sprintf(", status %d", e.Status)
	}
	if e.Age != nil {
		state += fmt.Sprintf(", observed %s ago", duration(*e.Age))
	}
	line("", "state", state)
	if e.WhyNotAnswered == "" {
		text := fmt.Sprintf("answered in the kernel, for another %s", duration(*e.FreshFor))
		if e.Listener != nil {
			text += ", unless a look at the listening socket speaks against it"
		}
		line("", "next probe", text)
	} else {
		line("", "next probe", "reaches the pod: "+e.WhyNotAnswered)
	}
	if e.NotAnswered == "" || e.Withheld {
		line("", "bound", e.bound())
	}
	if e.Listener != nil {
		line("", "listening socket", listener(*e.Listener))
	}
	if e.RefreshOff != "" {
		line("", "refresh", "off: "+e.RefreshOff)
	}
	if e.NotCompared != "" {
		line("", "kubelet's verdict", "not compared: "+e.NotCompared)
	}
	if n := e.Estimate.Probes(); n > 0 {
		line("", "mode answer", estimate(*e.Estimate, n))
	}
	for _, p := range e.Probes {
		line("", p.String(), fmt.Sprintf("every %s, timeout %s, threshold %d: a failure %s detected within %s (%s without probelet)",
			duration(p.Period), duration(p.Timeout), p.FailureThreshold, e.is(), duration(p.DetectionAnswered), duration(p.DetectionPlain)))
	}
	for _, event := range x.eventsOf(e) {
		line("", duration(event.age).String()+" ago", event.text)
	}
}

// is says whether something is so, or in mode observe would be.
func (e Endpoint) is() string {
	if e.Withheld {
		return "would be"
	}
	return "is"
}

// bound says for how long a success is answered, and what else bounds it.
func (e Endpoint) bound() string {
	bound := fmt.Sprintf("a success %s answered for %s", e.is(), duration(e.StalenessBound))
	if e.StalenessCapped {
		bound += ", the node's ceiling"
	}
	if e.Live > 0 {
		bound += fmt.Sprintf(", while the listening socket accepts, and at most %d times in a row", e.Live)
	}
	if e.Successes > 1 {
		bound += fmt.Sprintf(", after a failure once %d in a row were observed", e.Successes)
	}
	if e.Refresh != 0 {
		bound += fmt.Sprintf("; the daemon asks by itself every %s", duration(e.Refresh))
	}
	return bound
}

// listener says what looks at a listening socket came to.
func listener(l store.Listener) string {
	var said []string
	if l.Most > 0 || l.Answered > 0 {
		text := fmt.Sprintf("%d of at most %d probes were answered since one was accepted", l.Answered, l.Most)
		if l.Pending && l.Answered >= l.Most {
			text += ", and another has reached it since"
		}
		said = append(said, text)
	}
	if l.Obstacle != "" {
		which := "the last one that was not: "
		if len(said) == 0 {
			which = "the last probe that was not answered for it: "
		}
		said = append(said, which+obstacleInWords[l.Obstacle])
	}
	return cmp.Or(strings.Join(said, "; "), "not looked at yet")
}

// obstacleInWords says why a TCP probe was passed on, by store.Listener's Obstacle.
var obstacleInWords = map[string]string{
	"no_listener": "nothing listened",
	"queue_long":  "the queue was more than half full",
	"head_old":    "a connection had waited for 50 ms",
	"special":     "the socket does not take every packet",
	"real_due":    "as many as may be had been answered",
	"unanswered":  "the pod had not answered the connection before",
}

// estimate says what mode answer would have made of probes.
func estimate(e api.Estimate, probes uint64) string {
	text := fmt.Sprintf("would have answered %d of %d probes", e.Answered, probes)
	if e.Hidden > 0 {
		text += fmt.Sprintf(" (of these, %d failed)", e.Hidden)
	}
	separator := "; the others reach the pod: "
	for _, why := range probe.Whys() {
		if n := e.Passed[why]; n > 0 {
			text += fmt.Sprintf("%s%d %s", separator, n, whyInWords[why])
			separator = ", "
		}
	}
	return text
}

// whyInWords says of probes why they reach the pod.
var whyInWords = map[probe.Why]string{
	probe.WhyNever:     "of what is never answered",
	probe.WhyUnknown:   "before anything was known",
	probe.WhyFailed:    "after a failure",
	probe.WhyThreshold: "before enough had succeeded in a row",
	probe.WhyWithdrawn: "after a listening socket had closed",
	probe.WhyExpired:   "after the bound",
	probe.WhyTCP:       "because the port's TCP probe was not fresh",
	probe.WhyLimit:     "because as many as may be had been answered in a row",
}

// happening is a line of the events.
type happening struct {
	age  float64 // in seconds
	text string
}

// eventsOf are the daemon's and the kernel's, oldest first.
func (x Explanation) eventsOf(e Endpoint) []happening {
	var all []happening
	for _, event := range x.Events {
		if (probe.Endpoint{Port: event.Port, Kind: event.Kind, Path: event.Path, Headers: event.HeadersID}) == e.Endpoint.Endpoint() {
			all = append(all, happening{time.Since(event.Time).Seconds(), describe(event)})
		}
	}
	if e.LastHitAge != nil {
		all = append(all, happening{*e.LastHitAge, fmt.Sprintf("answered in the kernel (%d times so far)", e.Hits)})
	}
	if e.WithdrawnAge != nil {
		all = append(all, happening{*e.WithdrawnAge, "withdrawn by the kernel: " + withdrawal(e.WithdrawnCause)})
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
		text = "forgotten: a container began, ended or was replaced"
	case probe.BySpec:
		text = "changed: other probes or settings"
	case probe.ByRequest:
		text = "withdrawn: somebody asked for it"
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
