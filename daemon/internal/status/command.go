package status

import (
	"context"

	"github.com/spf13/cobra"

	"github.com/probelet/probelet/daemon/internal/flagenv"
)

// Execute runs a command. An error that occurs before a subcommand has started is about the command line, so its code is Usage.
func Execute(ctx context.Context, root *cobra.Command) error {
	started := false
	for _, cmd := range root.Commands() {
		if run := cmd.RunE; run != nil {
			cmd.RunE = func(cmd *cobra.Command, args []string) error {
				started = true
				return run(cmd, args)
			}
		}
	}
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return flagenv.Reword(err) })
	err := root.ExecuteContext(ctx)
	if err != nil && !started {
		return &Error{Code: Usage, Err: err}
	}
	return err
}
