package status

import (
	"context"

	"github.com/spf13/cobra"
)

// Execute runs a command. What it says before one of its subcommands runs is of what was typed: the error has code Usage.
func Execute(ctx context.Context, root *cobra.Command) error {
	begun := false
	for _, cmd := range root.Commands() {
		if run := cmd.RunE; run != nil {
			cmd.RunE = func(cmd *cobra.Command, args []string) error {
				begun = true
				return run(cmd, args)
			}
		}
	}
	err := root.ExecuteContext(ctx)
	if err != nil && !begun {
		return &Error{Code: Usage, Err: err}
	}
	return err
}
