//go:build linux

package ctl

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
	"github.com/probelet/probelet/daemon/internal/table"
)

const statusHelp = `Shows every attachment on this node and every endpoint that is probed behind it, whether or not the daemon is running.

  STATE  fresh    a success was observed and may be answered, unless the last column gives a reason; if that reason is
                  "mode observe", it would be answered, and so would as many probes as the column says
         stale    a success was observed, but it has expired, was withdrawn or is never answered
         failed   the last probe failed; probes reach the pod until one succeeds
         unknown  nothing conclusive was observed
  AGE    time since that observation
  BOUND  how long after its observation a success is answered
  HITS   probes answered in the kernel

On a narrow terminal the table drops columns; -o wide never does. If the daemon is not running, the last lines say what is still
answered and until when, and the exit code is 3.

Below the table follow the pods that are not answered because answers through their device did not arrive, with the other
programs on the device, and how many of the prober's connections reached pods without a certain outcome, and why.

With -o wide the table also shows HOOK (where answers are made), TRUST (whether they are known to arrive: proven, lost, or
unproven if none was tried yet) and, for each of the PROBES:

  DETECTED WITHIN  the longest time from the start of a failure to the prober's verdict, and after the slash what it would
                   be without probelet: failureThreshold × period + timeout (counting the timeout as the period where it
                   is longer). With probelet, a success may be answered for the BOUND before that time begins to
                   count; in mode observe, it would be
  LISTENER         for ports with a TCP probe: how many probes in a row were answered, and after the slash how many may
                   be before a connection must have been accepted; then what last kept a fresh probe from being answered:
                   no_listener, queue_long, head_old, special, real_due (the maximum was reached) or unanswered
  SETTINGS         mode, staleness and refresh where they differ from the defaults, and what set them

The fields of -o json are described in docs/status.schema.json.`

func statusCommand(env *environment) *cobra.Command {
	var output *string
	var summary bool
	var where place
	var only namespaceFilter
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Show attachments, endpoints and what is answered",
		Long:  statusHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if summary {
				return summarize(cmd.Context(), env, where, *output == "json")
			}
			s, err := env.readWithNeighbours(where)
			if err != nil {
				return err
			}
			s = only.of(s)
			if *output == "json" {
				err = status.PrintJSON(env.stdout, s)
			} else {
				err = printTable(env, s, *output == "wide")
			}
			if err != nil {
				return err
			}
			return daemonDown(s.Daemon)
		},
	}
	output = status.OutputFlag(cmd, "table", "json", "table", "wide")
	cmd.Flags().BoolVar(&summary, "summary", false, "only the node's totals, and the pods that are not attached")
	only.flags(cmd)
	where.flags(cmd)
	return cmd
}

// summarize shows the node's totals.
func summarize(ctx context.Context, env *environment, where place, asJSON bool) error {
	s, err := env.read(where)
	if err != nil {
		return err
	}
	n := s.Node()
	if s.Daemon.Running {
		if n.NotReady, err = api.NewClient(where.stateDir).Ready(ctx); err != nil {
			n.NotReady = []string{err.Error()}
		}
	}
	if asJSON {
		err = status.PrintJSON(env.stdout, n)
	} else {
		err = printNode(env, s, n)
	}
	if err != nil {
		return err
	}
	return daemonDown(s.Daemon)
}

func printNode(env *environment, s survey.Status, n status.Node) error {
	var text table.Text
	text.Pair("version", n.Version)
	text.Pair("daemon", strings.TrimPrefix(s.Daemon.String(), "probeletd: "))
	text.Pair("attached", fmt.Sprintf("%s with %s, %d answered now", status.Count(n.Attached, "pod"), status.Count(n.Endpoints, "endpoint"), n.Answered))
	text.Pair("answered", fmt.Sprintf("%s of %d probes", n.Probes.Share(), n.Probes.Answered+n.Probes.Passed))
	if n.Running { // otherwise the line about the daemon has said so
		for _, why := range n.NotReady {
			text.Pair("not ready", why)
		}
	}
	for _, u := range n.Unattached {
		text.Pair("not attached", strings.TrimSuffix(u.Pod+": "+u.Why, ": "))
	}
	return text.Write(env.stdout, env.width)
}
