//go:build linux

package ctl

import (
	"fmt"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/status"
)

func logLevelCommand(env *environment) *cobra.Command {
	var where place
	cmd := &cobra.Command{
		Use:   "log-level debug|info|warn|error",
		Short: "Change the daemon's log level until it exits",
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("%d arguments: must be one, debug, info, warn or error", len(args))
			}
			return nil
		},
		ValidArgs: []string{"debug", "info", "warn", "error"},
		RunE: func(cmd *cobra.Command, args []string) error {
			var level slog.Level
			if err := level.UnmarshalText([]byte(args[0])); err != nil {
				return status.Errorf(status.Usage, "log level %q: must be debug, info, warn or error", args[0])
			}
			if err := api.NewClient(where.stateDir).SetLogLevel(cmd.Context(), level); err != nil {
				return err
			}
			_, err := fmt.Fprintf(env.stdout, "log level set to %s\n", level)
			return err
		},
	}
	where.flags(cmd)
	return cmd
}
