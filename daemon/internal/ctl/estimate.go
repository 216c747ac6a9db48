//go:build linux

package ctl

import (
	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/probelet/probelet/daemon/internal/estimate"
)

// estimateCommand returns the only command that asks the API server instead of the node.
func estimateCommand(env *environment) *cobra.Command {
	rules, overrides := clientcmd.NewDefaultClientConfigLoadingRules(), &clientcmd.ConfigOverrides{}
	var only namespaceFilter
	cmd := estimate.Command(estimate.Environment{
		Stdin: env.stdin, Stdout: env.stdout,
		Width: func() int { return env.width },
		Config: func() (*rest.Config, error) {
			return clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, overrides).ClientConfig()
		},
		Namespace: func() (string, error) { return only.namespace, nil },
	})
	only.flags(cmd)
	cmd.Flags().StringVar(&rules.ExplicitPath, "kubeconfig", "", "`FILE` that says how to reach the API server (default: as kubectl)")
	cmd.Flags().StringVar(&overrides.CurrentContext, "context", "", "`CONTEXT` of the kubeconfig")
	return cmd
}
