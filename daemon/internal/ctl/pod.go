//go:build linux

package ctl

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

// podArgument parses the argument of a command: NAMESPACE/POD, or POD with -n.
type podArgument struct{ namespace string }

func (p *podArgument) flags(cmd *cobra.Command, where *place) {
	cmd.Flags().StringVarP(&p.namespace, "namespace", "n", "", "`NAMESPACE` of the pod, if the argument has none")
	cmd.Args = func(_ *cobra.Command, args []string) error {
		if len(args) != 1 {
			return fmt.Errorf("%d arguments: must be one, NAMESPACE/POD", len(args))
		}
		_, _, err := p.parse(args[0])
		return err
	}
	cmd.ValidArgsFunction = func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 || fromEnvironment(cmd.Flags()) != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return p.complete(*where), cobra.ShellCompDirectiveNoFileComp
	}
}

// parse splits NAMESPACE/POD.
func (p *podArgument) parse(text string) (namespace, pod string, err error) {
	namespace, pod, ok := strings.Cut(text, "/")
	if !ok && p.namespace != "" {
		namespace, pod, ok = p.namespace, text, true
	}
	switch {
	case !ok || namespace == "" || pod == "" || strings.Contains(pod, "/"):
		return "", "", fmt.Errorf("%q: must be NAMESPACE/POD, or POD with --namespace", text)
	case p.namespace != "" && p.namespace != namespace:
		return "", "", fmt.Errorf("%q: is not in --namespace %s", text, p.namespace)
	}
	return namespace, pod, nil
}

// name returns NAMESPACE/POD for an argument that cobra has checked.
func (p *podArgument) name(text string) string {
	namespace, pod, _ := p.parse(text)
	return namespace + "/" + pod
}

// complete returns the pods in the records and the daemon's file.
func (p *podArgument) complete(where place) []string {
	var pods []string
	records, _ := attach.ReadRecords(where.stateDir) // best effort
	for _, r := range records {
		if r.PodName != "" {
			pods = append(pods, r.PodNamespace+"/"+r.PodName)
		}
	}
	described, _ := statedir.ReadEndpoints(where.stateDir)
	for _, a := range described.Attachments {
		pods = append(pods, a.Pod)
	}
	pods = append(pods, described.Unattached...)
	slices.Sort(pods)
	pods = slices.DeleteFunc(slices.Compact(pods), func(pod string) bool {
		return pod == "" || p.namespace != "" && !strings.HasPrefix(pod, p.namespace+"/")
	})
	for i := range pods {
		if p.namespace != "" {
			pods[i] = strings.TrimPrefix(pods[i], p.namespace+"/")
		}
	}
	return pods
}
