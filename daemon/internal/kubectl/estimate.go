package kubectl

import (
	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"

	"github.com/probelet/probelet/daemon/internal/estimate"
	"github.com/probelet/probelet/daemon/internal/status"
)

// estimateCommand returns the only command that asks no daemon.
func (s *session) estimateCommand() *cobra.Command {
	var all bool
	cmd := estimate.Command(estimate.Environment{
		Stdin: s.stdin, Stdout: s.stdout,
		Width:  func() int { return s.width },
		Config: func() (*rest.Config, error) { return s.config().ClientConfig() },
		Namespace: func() (string, error) {
			namespace := s.overrides.Context.Namespace
			if all && namespace != "" {
				return "", status.Errorf(status.Usage, "--namespace %q, --all-namespaces: must be one or the other", namespace)
			}
			return namespace, nil
		},
	})
	cmd.Flags().BoolVarP(&all, "all-namespaces", "A", false, "pods of all namespaces (the default)")
	return cmd
}
