//go:build linux

package ctl

import (
	"context"
	"fmt"
	"io"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/probelet/probelet/daemon/internal/doctor"
	"github.com/probelet/probelet/daemon/internal/install/chain"
	"github.com/probelet/probelet/daemon/internal/status"
)

const doctorHelp = `Checks everything that probelet needs on this node, and says what to do about what is wrong. It changes nothing. Before an
install it checks what the install needs, and says what it would do.

  ok        as it should be
  note      probelet works, but you may want to know
  would     an install would do this
  PROBLEM   something is not answered, is not attached, or prevents an install; the exit code is then 1

It needs root, on the node or in the daemon's pod, and sees what a process there sees.`

func doctorCommand(env *environment) *cobra.Command {
	var where place
	var output *string
	node := chain.Node{Runtimes: env.host.Runtimes, Log: slog.New(slog.DiscardHandler)}
	cmd := &cobra.Command{
		Use:   "doctor",
		Short: "Check what probelet needs on this node, and say what to do",
		Long:  doctorHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return examine(cmd.Context(), env, doctor.Doctor{Source: env.at(where), Chain: node, Host: env.host}, *output == "json")
		},
	}
	where.flags(cmd)
	output = status.OutputFlag(cmd, "text", "json", "text")
	cmd.Flags().StringVar(&node.NetDir, "cni-net-dir", "/etc/cni/net.d", "`directory` of CNI network configurations")
	cmd.Flags().StringVar(&node.BinDir, "cni-bin-dir", "/opt/cni/bin", "`directory` of CNI plugins")
	return cmd
}

// examine prints each finding as it is made, or all of them in JSON at the end.
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
		if err := status.PrintJSON(env.stdout, findings); err != nil {
			return err
		}
	}
	if n := status.Problems(findings); n > 0 {
		return fmt.Errorf("%s found", status.Count(n, "problem"))
	}
	return nil
}
