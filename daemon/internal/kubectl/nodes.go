package kubectl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"

	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/table"
)

// atOnce limits how many nodes are asked at the same time, because each takes a connection of the API server.
const atOnce = 16

// eachNode asks all daemons, a few at a time. The answers are in the order of the nodes' names.
func eachNode[T any](daemons map[string]*corev1.Pod, ask func(node string, daemon *corev1.Pod) T) []T {
	names := slices.Sorted(maps.Keys(daemons))
	answers := make([]T, len(names))
	slots := make(chan struct{}, atOnce)
	var all sync.WaitGroup
	for i, name := range names {
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			answers[i] = ask(name, daemons[name])
		})
	}
	all.Wait()
	return answers
}

// chosen returns the daemons to ask.
func (s *session) chosen(ctx context.Context) (*cluster, map[string]*corev1.Pod, error) {
	c, err := s.connect()
	if err != nil {
		return nil, nil, err
	}
	daemons, err := c.daemons(ctx, s.node)
	return c, daemons, err
}

const statusHelp = `Shows a line per node: the daemon's version, whether probes can be answered and if not why, how many pods are attached, and the share
of probes that was answered in the kernel. Below follow the pods that should be attached but are not, and the totals of all nodes.

With --node it shows every attachment and endpoint of that node, as probeletctl status does there.`

// Cluster is the output of status -o json.
type Cluster struct {
	Nodes []Node `json:"nodes"`
	// Without lists the nodes that have no pod of the daemon.
	Without []string `json:"nodesWithout"`
}

// Node is a node of the cluster.
type Node struct {
	Name  string `json:"name"`
	Ready bool   `json:"ready"`
	// Why says why the node is not ready, as far as that is known; empty if it is.
	Why string `json:"why,omitempty"`
	// Node is the summary from its daemon; null if that could not be asked.
	Node *status.Node `json:"node"`
}

func (s *session) statusCommand() *cobra.Command {
	var all bool
	var output *string
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show the nodes, what they answer and which pods are not attached",
		Long:  statusHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			namespace := s.overrides.Context.Namespace
			if all && namespace != "" {
				return status.Errorf(status.Usage, "--namespace %q, --all-namespaces: must be one or the other", namespace)
			}
			if s.node != "" {
				return s.nodeStatus(cmd.Context(), namespace, *output)
			}
			return s.status(cmd.Context(), namespace, *output)
		},
	}
	output = status.OutputFlag(cmd, "table", "table", "wide", "json")
	s.nodeFlag(cmd, "show the attachments of this `NODE`")
	cmd.Flags().BoolVarP(&all, "all-namespaces", "A", false, "pods in all namespaces (the default)")
	return cmd
}

func (s *session) nodeStatus(ctx context.Context, namespace, output string) error {
	c, err := s.connect()
	if err != nil {
		return err
	}
	args := []string{"status", "-o", output}
	if namespace != "" {
		args = append(args, "-n", namespace)
	}
	return s.relay(ctx, c, s.node, args...)
}

func (s *session) status(ctx context.Context, namespace, output string) error {
	c, daemons, err := s.chosen(ctx)
	if err != nil {
		return err
	}
	result := Cluster{Without: []string{}}
	result.Nodes = eachNode(daemons, func(name string, daemon *corev1.Pod) Node { return s.ask(ctx, c, name, daemon) })
	names, err := c.nodes(ctx)
	if err != nil {
		_, _ = fmt.Fprintf(s.stderr, "%s: warning: nodes without a daemon are not shown: %v\n", pluginName, err)
	}
	for _, name := range names {
		if daemons[name] == nil {
			result.Without = append(result.Without, name)
		}
	}
	result.only(namespace)
	if output == "json" {
		err = status.PrintJSON(s.stdout, result)
	} else {
		err = result.print(s.environment, output == "wide")
	}
	if err != nil {
		return err
	}
	if n := result.notReady(); n > 0 {
		return fmt.Errorf("%d of %s not ready", n, status.Count(len(result.Nodes), "node"))
	}
	return nil
}

// ask asks the daemon of a node.
func (s *session) ask(ctx context.Context, c *cluster, name string, daemon *corev1.Pod) Node {
	n := Node{Name: name}
	why, reachable := trouble(daemon)
	if n.Why = why; !reachable {
		return n
	}
	ctx, cancel := s.patient(ctx)
	defer cancel()
	reply, err := read[status.Node](ctx, c, daemon, "status", "--summary")
	if err != nil {
		n.Why = strings.TrimPrefix(why+"; cannot be asked: "+err.Error(), "; ")
		return n
	}
	n.Node = &reply
	if len(reply.NotReady) > 0 {
		n.Why = strings.Join(reply.NotReady, "; ")
	}
	n.Ready = n.Why == ""
	return n
}

// only keeps the pods of a namespace; an empty one keeps all.
func (c *Cluster) only(namespace string) {
	for _, n := range c.Nodes {
		if n.Node != nil && namespace != "" {
			n.Node.Unattached = slices.DeleteFunc(n.Node.Unattached, func(u status.Unattached) bool {
				return !strings.HasPrefix(u.Pod, namespace+"/")
			})
		}
	}
}

func (c *Cluster) notReady() (n int) {
	for _, node := range c.Nodes {
		if !node.Ready {
			n++
		}
	}
	return n
}

func (c *Cluster) print(env environment, wide bool) error {
	t := table.Table{
		Header:   []string{"NODE", "READY", "ATTACHED", "NOT ATTACHED", "ANSWERED", "OF PROBES", "VERSION", "WHY NOT READY"},
		Optional: []int{5, 6, 3},
	}
	for _, n := range c.Nodes {
		t.Rows = append(t.Rows, n.row())
	}
	for _, name := range c.Without {
		row := slices.Repeat([]string{table.Blank}, len(t.Header))
		row[0], row[len(row)-1] = name, "the daemon has no pod there (taints, node selector)"
		t.Rows = append(t.Rows, row)
	}
	width := env.width
	if wide {
		width = 0
	}
	if err := t.Write(env.stdout, width); err != nil {
		return err
	}
	return c.summary().Write(env.stdout, width)
}

func (n Node) row() []string {
	row := []string{n.Name, "no", table.Blank, table.Blank, table.Blank, table.Blank, table.Blank, cmp.Or(n.Why, table.Blank)}
	if n.Ready {
		row[1] = "yes"
	}
	if d := n.Node; d != nil {
		row[2], row[3] = fmt.Sprint(d.Attached), fmt.Sprint(len(d.Unattached))
		row[4], row[5], row[6] = d.Probes.Share(), fmt.Sprint(d.Probes.Answered+d.Probes.Passed), d.Version
	}
	return row
}

// summary lists the pods that are not attached, and adds up the nodes.
func (c *Cluster) summary() *table.Text {
	var text table.Text
	var probes status.Probes
	versions := map[string]int{}
	attached, unattached := 0, 0
	for _, n := range c.Nodes {
		if n.Node == nil {
			continue
		}
		probes, attached = probes.Plus(n.Node.Probes), attached+n.Node.Attached
		versions[n.Node.Version]++
		for _, u := range n.Node.Unattached {
			if unattached++; unattached == 1 {
				text.Line("")
			}
			text.Line(fmt.Sprintf("not attached: %s on %s%s", u.Pod, n.Name, strings.TrimSuffix(": "+u.Why, ": ")))
		}
	}
	text.Line("")
	share := "no probes yet"
	if all := probes.Answered + probes.Passed; all > 0 {
		share = fmt.Sprintf("%s of %d probes answered in the kernel", probes.Share(), all)
	}
	text.Line(fmt.Sprintf("%d of %s ready; %s attached, %d not attached; %s",
		len(c.Nodes)-c.notReady(), status.Count(len(c.Nodes), "node"), status.Count(attached, "pod"), unattached, share))
	if len(versions) > 1 {
		var each []string
		for _, v := range slices.Sorted(maps.Keys(versions)) {
			each = append(each, fmt.Sprintf("%s on %s", v, status.Count(versions[v], "node")))
		}
		text.Line("versions differ: " + strings.Join(each, ", "))
	}
	return &text
}

const doctorHelp = `Checks everything that probelet needs on each node, and says what to do about what is wrong. It shows only what is not as it should
be; with --node it shows all checks of one node.`

// Examined is the output of doctor -o json for one node.
type Examined struct {
	Node     string           `json:"node"`
	Findings []status.Finding `json:"findings"`
}

func (s *session) doctorCommand() *cobra.Command {
	var output *string
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check what probelet needs on the nodes, and say what to do",
		Long:  doctorHelp,
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return s.doctor(cmd.Context(), *output) },
	}
	output = status.OutputFlag(cmd, "text", "text", "json")
	s.nodeFlag(cmd, "only this `NODE`")
	return cmd
}

func (s *session) doctor(ctx context.Context, output string) error {
	c, daemons, err := s.chosen(ctx)
	if err != nil {
		return err
	}
	all := eachNode(daemons, func(name string, daemon *corev1.Pod) Examined { return s.examine(ctx, c, name, daemon) })
	if output == "json" {
		err = status.PrintJSON(s.stdout, all)
	}
	problems, ill := 0, 0
	for _, e := range all {
		n := status.Problems(e.Findings)
		if problems += n; n > 0 {
			ill++
		}
		if output == "text" {
			err = errors.Join(err, e.print(s.environment, s.node != ""))
		}
	}
	if err == nil && problems > 0 {
		err = fmt.Errorf("%s on %d of %s", status.Count(problems, "problem"), ill, status.Count(len(all), "node"))
	}
	return err
}

// examine runs doctor on one node. A daemon that cannot be asked is a problem.
func (s *session) examine(ctx context.Context, c *cluster, name string, daemon *corev1.Pod) Examined {
	e := Examined{Node: name}
	why, reachable := trouble(daemon)
	if !reachable {
		e.Findings = []status.Finding{{
			Verdict: status.Problem, About: "pod", What: daemon.Namespace + "/" + daemon.Name + ": " + why,
			Do: "see kubectl logs and kubectl describe for the pod; run probeletctl doctor on the node",
		}}
		return e
	}
	ctx, cancel := s.patient(ctx)
	defer cancel()
	findings, err := read[[]status.Finding](ctx, c, daemon, "doctor")
	if err != nil {
		findings = []status.Finding{{Verdict: status.Problem, About: "pod", What: daemon.Namespace + "/" + daemon.Name + ": cannot be asked: " + err.Error()}}
	}
	e.Findings = findings
	return e
}

func (e Examined) print(env environment, all bool) error {
	if _, err := fmt.Fprintf(env.stdout, "%s\n", e.Node); err != nil {
		return err
	}
	shown := 0
	for _, f := range e.Findings {
		if !all && f.Verdict == status.Well {
			continue
		}
		shown++
		if _, err := fmt.Fprint(env.stdout, f.Text(env.width)); err != nil {
			return err
		}
	}
	if shown == 0 {
		_, err := fmt.Fprintf(env.stdout, "%-8s everything\n", status.Well)
		return err
	}
	return nil
}
