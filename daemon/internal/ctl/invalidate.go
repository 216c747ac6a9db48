//go:build linux

package ctl

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
)

const invalidateHelp = `Makes probelet forget what it knows about a pod's endpoints: the next probes reach the pod, and an endpoint is answered again
only after a probe of it has succeeded. This has taken effect when the command returns. It needs the daemon.`

func invalidateCommand(env *environment) *cobra.Command {
	var where place
	var pod podArgument
	var r api.InvalidateRequest
	cmd := &cobra.Command{
		Use:   "invalidate NAMESPACE/POD",
		Short: "Make a pod's next probes reach it",
		Long:  invalidateHelp,
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if cmd.Flags().Changed("port") && r.Port == 0 {
				return status.Errorf(status.Usage, "--port 0: must be from 1 to 65535")
			}
			r.Namespace, r.Pod, _ = pod.parse(args[0])
			reply, err := api.NewClient(where.stateDir).Invalidate(cmd.Context(), r)
			if errors.Is(err, api.ErrDown) {
				return fmt.Errorf("%w, and only it can withdraw evidence; %s", err, stillOf(env, where, pod.name(args[0])))
			}
			if err != nil {
				return err
			}
			if len(reply.Withdrawn) == 0 {
				reply.Withdrawn = []string{"nothing: none of its endpoints is attached and observed"}
			}
			_, err = fmt.Fprintf(env.stdout, "withdrawn for %s:\n  %s\n", reply.Pod, strings.Join(reply.Withdrawn, "\n  "))
			return err
		},
	}
	cmd.Flags().Uint16Var(&r.Port, "port", 0, "only endpoints on this `PORT`")
	cmd.Flags().StringVar(&r.Path, "path", "", "only endpoints with this `PATH` (and query), as probed")
	pod.flags(cmd, &where)
	where.flags(cmd)
	return cmd
}

// stillOf says what is still answered for a pod if nothing changes.
func stillOf(env *environment, where place, pod string) string {
	s, err := env.read(where)
	if err != nil {
		return err.Error()
	}
	attachments, _ := s.OfPod(pod) // without any, nothing is answered
	return pod + ": " + survey.Still(attachments).Words(time.Now())
}
