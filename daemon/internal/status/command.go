package status

import (
	"context"
	"encoding/json"
	"io"
	"slices"
	"strings"

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

// OutputFlag adds -o, whose value must be one of values. Any other is an error with the code Usage, before the command runs.
func OutputFlag(cmd *cobra.Command, value string, values ...string) *string {
	allowed := strings.Join(values, "|")
	output := cmd.Flags().StringP("output", "o", value, "`format`: "+allowed)
	cmd.PreRunE = func(*cobra.Command, []string) error {
		if !slices.Contains(values, *output) {
			return Errorf(Usage, "--output %q: must be one of %s", *output, allowed)
		}
		return nil
	}
	return output
}

// PrintJSON writes v for people and programs: indented, with a newline at the end.
func PrintJSON(w io.Writer, v any) error {
	encoder := json.NewEncoder(w)
	encoder.SetIndent("", "  ")
	return encoder.Encode(v)
}
