// Package versioncmd adds a version command to a program that has a --version flag.
package versioncmd

import (
	"fmt"

	"github.com/spf13/cobra"
)

// New returns the command. It prints what --version prints.
func New() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			root := cmd.Root()
			_, err := fmt.Fprintf(cmd.OutOrStdout(), "%s version %s\n", root.DisplayName(), root.Version)
			return err
		},
	}
}
