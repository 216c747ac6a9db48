//go:build linux

package ctl

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/probelet/probelet/daemon/internal/chain"
	"github.com/probelet/probelet/daemon/internal/doctor"
	"github.com/probelet/probelet/daemon/internal/status"
)

const doctorHelp = `Looks at everything that probelet needs on this node, changes nothing, and says in words what to do about what is not well.
Before an install it looks at what the install needs, and says what that would do.

  ok        as it should be
  note      probelet works, but you may want to know
  would     an install would do this
  PROBLEM   something is not answered, or not attached, or keeps from an install; the command then ends with 1

It needs root, on the node or in the daemon's pod, and looks as the process that it is.`

func doctorCommand(env *environment) *cobra.Command {
	var where place
	var output string
	node := chain.Node{Runtimes: env.host.Runtimes, Log: slog.New(slog.DiscardHandler)}
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Look at everything that probelet needs on this node, and say what to do",
		Long:  doctorHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if output != "text" && output != "json" {
				return status.Errorf(status.Usage, "--output %q: must be one of json|text", output)
			}
			return examine(cmd.Context(), env, doctor.Doctor{Source: env.at(where), Chain: node, Host: env.host}, output == "json")
		},
	}
	where.flags(cmd)
	cmd.Flags().StringVarP(&output, "output", "o", "text", "`format`: json|text")
	cmd.Flags().StringVar(&node.NetDir, "cni-net-dir", "/etc/cni/net.d", "`directory` of network configurations")
	cmd.Flags().StringVar(&node.BinDir, "cni-bin-dir", "/opt/cni/bin", "`directory` of CNI plugins")
	return cmd
}

// examine prints findings as they are made, and below each what to do; in JSON, all of them at the end.
func examine(ctx context.Context, env *environment, d doctor.Doctor, asJSON bool) error {
	var findings []status.Finding
	d.Report = func(f status.Finding) {
		findings = append(findings, f)
		if !asJSON {
			_, _ = io.WriteString(env.stdout, f.Text(env.width))
		}
	}
	if err := d.Examine(ctx); err != nil {
		return err
	}
	if asJSON {
		if err := printJSON(env.stdout, findings); err != nil {
			return err
		}
	}
	if n := status.Problems(findings); n > 0 {
		return fmt.Errorf("%d of these need attention", n)
	}
	return nil
}
