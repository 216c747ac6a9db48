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

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/store"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/table"
)

// podArgument reads the argument of a command: NAMESPACE/POD, or POD with -n.
type podArgument struct{ namespace string }

func (p *podArgument) flags(cmd *cobra.Command, where *place) {
	cmd.Flags().StringVarP(&p.namespace, "namespace", "n", "", "`NAMESPACE` of the pod, if its name says none")
	cmd.Args = func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("%d arguments: must be one, NAMESPACE/POD", len(args))
		}
		_, _, err := p.parse(args[0])
		return err
	}
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 || fromEnvironment(cmd.Flags()) != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return p.complete(*where), cobra.ShellCompDirectiveNoFileComp
	}
}

// parse splits NAMESPACE/POD.
func (p *podArgument) parse(text string) (namespace, pod string, err error) {
	namespace, pod, ok := strings.Cut(text, "/")
	if !ok && p.namespace != "" {
		namespace, pod, ok = p.namespace, text, true
	}
	switch {
	case !ok || namespace == "" || pod == "" || strings.Contains(pod, "/"):
		return "", "", fmt.Errorf("%q: must be NAMESPACE/POD, or POD with --namespace", text)
	case p.namespace != "" && p.namespace != namespace:
		return "", "", fmt.Errorf("%q: is not in --namespace %s", text, p.namespace)
	}
	return namespace, pod, nil
}

// name is NAMESPACE/POD of an argument that flags has checked.
func (p *podArgument) name(text string) string {
	namespace, pod, _ := p.parse(text)
	return namespace + "/" + pod
}

// complete returns the pods that the records and the daemon's file know.
func (p *podArgument) complete(where place) []string {
	var pods []string
	records, _ := attach.ReadRecords(where.stateDir) // of what cannot be read: nothing
	for _, r := range records {
		if r.PodName != "" {
			pods = append(pods, r.PodNamespace+"/"+r.PodName)
		}
	}
	described, _ := statedir.ReadEndpoints(where.stateDir)
	for _, a := range described.Attachments {
		pods = append(pods, a.Pod)
	}
	pods = append(pods, described.Unattached...)
	slices.Sort(pods)
	pods = slices.DeleteFunc(slices.Compact(pods), func(pod string) bool {
		return pod == "" || p.namespace != "" && !strings.HasPrefix(pod, p.namespace+"/")
	})
	for i := range pods {
		if p.namespace != "" {
			pods[i] = strings.TrimPrefix(pods[i], p.namespace+"/")
		}
	}
	return pods
}

const invalidateHelp = `Has probelet forget what is known of a pod's endpoints: the next probes reach the pod, and an endpoint is answered again
only after a probe of it has succeeded. When the command returns, that is so. It needs the daemon.`

func invalidateCommand(env *environment) *cobra.Command {
	var where place
	var pod podArgument
	var r api.InvalidateRequest
	cmd := &cobra.Command{
		Use:   "invalidate NAMESPACE/POD",
		Short: "Have the next probes of a pod reach it",
		Long:  invalidateHelp,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			r.Namespace, r.Pod, _ = pod.parse(args[0])
			reply, err := api.NewClient(where.stateDir).Invalidate(cmd.Context(), r)
			if errors.Is(err, api.ErrDown) {
				return fmt.Errorf("%w, and nobody else may withdraw; %s", err, stillOf(env, where, pod.name(args[0])))
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
	pod.flags(cmd, &where)
	where.flags(cmd)
	return cmd
}

const trustHelp = `When an answer does not arrive by a pod's device, because another program or a firewall drops it, probelet takes no more
connections there: "probeletctl status" and "doctor" say so, and name who else is on the device. Once that is resolved, this
command has probelet try again, with a single connection at first. It needs root, but not the daemon.`

func trustCommand(env *environment) *cobra.Command {
	var where place
	var pod podArgument
	cmd := &cobra.Command{
		Use:   "trust NAMESPACE/POD",
		Short: "Have a pod answered again after answers did not arrive",
		Long:  trustHelp,
		RunE:  func(_ *cobra.Command, args []string) error { return trust(env, where, pod.name(args[0])) },
	}
	pod.flags(cmd, &where)
	where.flags(cmd)
	return cmd
}

func trust(env *environment, where place, name string) error {
	s, err := env.at(where).Read()
	if err != nil {
		return err
	}
	attachments, err := s.OfPod(name)
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
func trustAgain(k survey.Kernel, a survey.Attachment) (done string, err error) {
	if a.Trust == "" {
		return "", status.Errorf(status.NotFound, "%s", cmp.Or(a.WhyNotAnswered, "not attached any more"))
	}
	if a.Trust != survey.TrustLost {
		return "nothing to do: " + a.Answers(), nil
	}
	device, err := k.AttachedDevice(attach.ID{ContainerID: a.ContainerID, IfName: a.IfName})
	if err != nil {
		return "", err
	}
	return "answers by " + a.HostIfName + " are tried again", k.TrustAgain(device.Key)
}

// stillOf says what is answered of a pod if nothing more happens.
func stillOf(env *environment, where place, pod string) string {
	s, err := env.at(where).Read()
	if err != nil {
		return err.Error()
	}
	attachments, _ := s.OfPod(pod) // none: nothing is answered
	return "of " + pod + " " + survey.Still(attachments).Words(time.Now())
}

const explainHelp = `Shows what is known of a pod: each endpoint with the probes that ask it, whether it is answered and why not, for how long at
most a failure can go unnoticed by each probe, and the last events.

Events are the daemon's memory. Without a daemon those that the kernel notes are shown: the last answer and the last
withdrawal.

With -o json, attachments are those of docs/status.schema.json.`

// Explanation is what probeletctl explain shows.
type Explanation struct {
	Daemon      survey.Daemon       `json:"daemon"`
	Attachments []survey.Attachment `json:"attachments"`
	// Events are the last of each endpoint, oldest first, as the daemon remembers them; null if it is not running.
	Events []api.Event `json:"events"`
}

func explainCommand(env *environment) *cobra.Command {
	var where place
	var pod podArgument
	var output string
	cmd := &cobra.Command{
		Use:   "explain NAMESPACE/POD",
		Short: "Show what is known of a pod, and why it is answered or not",
		Long:  explainHelp,
		RunE: func(cmd *cobra.Command, args []string) error {
			if output != "text" && output != "json" {
				return status.Errorf(status.Usage, "--output %q: must be one of json|text", output)
			}
			x, err := explain(cmd.Context(), env, where, pod.name(args[0]))
			if err != nil {
				return err
			}
			if output == "json" {
				err = printJSON(env.stdout, x)
			} else {
				err = x.print(env)
			}
			if err != nil {
				return err
			}
			return daemonDown(x.Daemon)
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", "text", "`format`: json|text")
	pod.flags(cmd, &where)
	where.flags(cmd)
	return cmd
}

func explain(ctx context.Context, env *environment, where place, name string) (Explanation, error) {
	s, err := env.at(where).ReadAll()
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
		warn(env, err)
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
			line("attached by the daemon: the pod had its network before probelet")
		}
		if s := a.Settings; s != nil {
			line(fmt.Sprintf("mode %s (%s), staleness %s (%s), refresh %s (%s)",
				s.Mode, s.ModeFrom, s.Staleness, s.StalenessFrom, s.Refresh, s.RefreshFrom))
		}
		if a.Trust != "" {
			line(fmt.Sprintf("hook %s; %s", a.Hook, a.Answers()))
		}
		for _, n := range a.Neighbours {
			line("also there: " + n.String())
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
			next += ", unless a look at the listening socket speaks against it"
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
	if e.RefreshOff != "" {
		text.Pair("refresh", "off: "+e.RefreshOff)
	}
	if e.NotCompared != "" {
		text.Pair("kubelet's verdict", "not compared: "+e.NotCompared)
	}
	if n := e.Estimate.Probes(); n > 0 {
		text.Pair("mode answer", wouldAnswer(*e.Estimate, n))
	}
	for _, p := range e.Probes {
		text.Pair(p.String(), fmt.Sprintf("every %s, timeout %s, threshold %d: a failure %s detected within %s (%s without probelet)",
			status.Duration(p.Period), status.Duration(p.Timeout), p.FailureThreshold, would(e), status.Duration(p.DetectionAnswered), status.Duration(p.DetectionPlain)))
	}
	for _, event := range x.eventsOf(e) {
		text.Pair(status.Duration(event.age).String()+" ago", event.text)
	}
}

// would says whether something is so, or in mode observe would be.
func would(e survey.Endpoint) string {
	if e.Withheld {
		return "would be"
	}
	return "is"
}

// bound says for how long a success is answered, and what else bounds it.
func bound(e survey.Endpoint) string {
	text := fmt.Sprintf("a success %s answered for %s", would(e), status.Duration(e.StalenessBound))
	if e.StalenessCapped {
		text += ", the node's ceiling"
	}
	if e.Live > 0 {
		text += fmt.Sprintf(", while the listening socket accepts, and at most %d times in a row", e.Live)
	}
	if e.Successes > 1 {
		text += fmt.Sprintf(", after a failure once %d in a row were observed", e.Successes)
	}
	if e.Refresh != 0 {
		text += fmt.Sprintf("; the daemon asks by itself every %s", status.Duration(e.Refresh))
	}
	return text
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
		said = append(said, which+status.ObstacleText(l.Obstacle))
	}
	return cmp.Or(strings.Join(said, "; "), "not looked at yet")
}

// wouldAnswer says what mode answer would have made of probes.
func wouldAnswer(e api.Estimate, probes uint64) string {
	text := fmt.Sprintf("would have answered %d of %d probes", e.Answered, probes)
	if e.Hidden > 0 {
		text += fmt.Sprintf(" (of these, %d failed)", e.Hidden)
	}
	separator := "; the others reach the pod: "
	for _, why := range probe.Whys() {
		if n := e.Passed[why]; n > 0 {
			text += fmt.Sprintf("%s%d %s", separator, n, status.WhyText(why))
			separator = ", "
		}
	}
	return text
}

// happening is a line of the events.
type happening struct {
	age  float64 // in seconds
	text string
}

// eventsOf are the daemon's and the kernel's, oldest first.
func (x Explanation) eventsOf(e survey.Endpoint) []happening {
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
