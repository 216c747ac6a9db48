// Package kubectl implements the kubectl plugin. It asks the daemons on the nodes through the API server, with the user's kubeconfig and
// permissions, and runs on any system.
package kubectl

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/probelet/probelet/daemon/internal/kubeapi"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/table"
	"github.com/probelet/probelet/daemon/internal/versioncmd"
	"github.com/probelet/probelet/internal/version"

	_ "k8s.io/client-go/plugin/pkg/client/auth" // auth providers that a kubeconfig may name
)

const (
	pluginName = "kubectl-probelet"
	// completeName is the program that kubectl runs to complete the plugin's arguments.
	completeName = "kubectl_complete-probelet"
)

const help = `Asks the daemons on the nodes through the API server, with your kubeconfig and permissions. You need permission to list pods in
probelet's namespace and to run commands in them (create pods/exec), which amounts to root on the nodes. You also need permission
to get the pod that you ask about, and to list nodes; without the latter, nodes that have no daemon are not shown.
estimate asks no daemon: it only lists pods, before an install too.

Exit codes:
  0  success
  1  a node is not ready or has a problem, or the command failed
  2  an unknown command or flag, or an invalid value
  3  no daemon is running there
  4  no such pod or node, or the pod is not attached
  5  you lack a permission at the API server`

// Named reports whether a program was started under one of the plugin's names.
func Named(program string) bool {
	return name(program) == pluginName || name(program) == completeName
}

func name(program string) string { return strings.TrimSuffix(filepath.Base(program), ".exe") }

// Main runs the plugin with the arguments of the process and returns its exit code.
func Main(ctx context.Context, args []string) int {
	completing := name(args[0]) == completeName
	if args = args[1:]; completing {
		args = append([]string{cobra.ShellCompRequestCmd}, args...)
	}
	env := environment{stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr, width: table.WidthOf(os.Stdout)}
	return status.Exit(os.Stderr, pluginName, execute(ctx, env, args))
}

type environment struct {
	stdin          io.Reader
	stdout, stderr io.Writer
	width          int // maximum length of a line; 0: no limit
}

// session has what all commands share.
type session struct {
	environment
	rules           *clientcmd.ClientConfigLoadingRules
	overrides       *clientcmd.ConfigOverrides
	daemonNamespace string
	patience        time.Duration
	node            string
}

func execute(ctx context.Context, env environment, args []string) error {
	s := &session{environment: env, rules: clientcmd.NewDefaultClientConfigLoadingRules(), overrides: &clientcmd.ConfigOverrides{}}
	root := &cobra.Command{
		Use:           "probelet",
		Short:         "Show what probelet knows and does on a cluster's nodes",
		Long:          help,
		Version:       version.String(),
		Annotations:   map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl probelet"},
		SilenceUsage:  true,
		SilenceErrors: true,
	}
	flags := root.PersistentFlags()
	flags.StringVar(&s.rules.ExplicitPath, "kubeconfig", "", "kubeconfig `FILE` for the API server (default: that of kubectl)")
	clientcmd.BindOverrideFlags(s.overrides, flags, clientcmd.RecommendedConfigOverrideFlags(""))
	flags.StringVar(&s.daemonNamespace, "daemon-namespace", "", "`NAMESPACE` of probelet's DaemonSet (default: search all)")
	flags.DurationVar(&s.patience, "node-timeout", 20*time.Second, "maximum `TIME` to wait for a node")
	flags.IntVar(&s.width, "width", s.width, "maximum `LENGTH` of a line in characters; 0: no limit (default: the terminal's width)")
	root.AddCommand(s.statusCommand(), s.explainCommand(), s.doctorCommand(), s.estimateCommand())
	root.AddCommand(versioncmd.New())
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if s.width < 0 {
			return fmt.Errorf("--width %d: must not be negative", s.width)
		}
		if s.patience <= 0 {
			return fmt.Errorf("--node-timeout %s: must be more than 0", s.patience)
		}
		return nil
	}
	root.SetArgs(args)
	root.SetOut(env.stdout)
	root.SetErr(env.stderr)
	return status.Execute(ctx, root)
}

func (s *session) config() clientcmd.ClientConfig {
	return clientcmd.NewNonInteractiveDeferredLoadingClientConfig(s.rules, s.overrides)
}

func (s *session) connect() (*cluster, error) {
	config, err := s.config().ClientConfig()
	if err != nil {
		return nil, kubeapi.ConfigError(err, "")
	}
	return connect(config, s.daemonNamespace)
}

// nodeFlag adds --node.
func (s *session) nodeFlag(cmd *cobra.Command, usage string) {
	cmd.Flags().StringVar(&s.node, "node", "", usage)
	_ = cmd.RegisterFlagCompletionFunc("node", func(cmd *cobra.Command, _ []string, _ string) ([]string, cobra.ShellCompDirective) {
		return s.complete(cmd, func(ctx context.Context, c *cluster) []string {
			names, _ := c.nodes(ctx) // best effort
			return names
		})
	}) // fails only if the flag does not exist
}

func (s *session) complete(cmd *cobra.Command, names func(context.Context, *cluster) []string) ([]string, cobra.ShellCompDirective) {
	c, err := s.connect()
	if err != nil {
		return nil, cobra.ShellCompDirectiveError
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), 3*time.Second)
	defer cancel()
	return names(ctx, c), cobra.ShellCompDirectiveNoFileComp
}

const explainHelp = `Finds the pod's node and shows what its daemon knows about the pod: each endpoint with the probes that ask it, whether the next
probe is answered and if not why, how long a failure can go unnoticed by each probe, and recent events.`

func (s *session) explainCommand() *cobra.Command {
	var output *string
	cmd := &cobra.Command{
		Use:   "explain [NAMESPACE/]POD",
		Short: "Show what is known about a pod, and why it is answered or not",
		Long:  explainHelp,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 1 {
				return fmt.Errorf("%d arguments: must be one, [NAMESPACE/]POD", len(args))
			}
			return nil
		},
		ValidArgsFunction: func(cmd *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
			namespace, _, err := s.config().Namespace()
			if len(args) > 0 || err != nil {
				return nil, cobra.ShellCompDirectiveNoFileComp
			}
			return s.complete(cmd, func(ctx context.Context, c *cluster) []string { return c.pods(ctx, namespace) })
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			namespace, pod, err := s.podName(args[0])
			if err != nil {
				return err
			}
			return s.explain(cmd.Context(), namespace, pod, *output)
		},
	}
	output = status.OutputFlag(cmd, "text", "text", "json")
	return cmd
}

// podName parses [NAMESPACE/]POD. The default namespace is kubectl's.
func (s *session) podName(text string) (namespace, pod string, err error) {
	if namespace, pod, full := strings.Cut(text, "/"); full {
		given := s.overrides.Context.Namespace
		if namespace == "" || pod == "" || strings.Contains(pod, "/") || given != "" && given != namespace {
			return "", "", status.Errorf(status.Usage, "%q: must be POD or NAMESPACE/POD, in --namespace %s if that is given", text, cmp.Or(given, "NAMESPACE"))
		}
		return namespace, pod, nil
	}
	namespace, _, err = s.config().Namespace()
	return namespace, text, kubeapi.ConfigError(err, "")
}

func (s *session) explain(ctx context.Context, namespace, name, output string) error {
	c, err := s.connect()
	if err != nil {
		return err
	}
	pod, err := c.pod(ctx, namespace, name)
	if err != nil {
		return err
	}
	if pod.Spec.HostNetwork {
		return status.Errorf(status.NotFound, "pod %s/%s has hostNetwork, so there is no device to attach to, and all of its probes reach it", namespace, name)
	}
	return s.relay(ctx, c, pod.Spec.NodeName, "explain", namespace+"/"+name, "-o", output)
}

// patient bounds the wait for a node.
func (s *session) patient(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, s.patience, fmt.Errorf("no answer within %s", s.patience))
}

// relay runs probeletctl on a node and copies its output.
func (s *session) relay(ctx context.Context, c *cluster, node string, args ...string) error {
	daemons, err := c.daemons(ctx, node)
	if err != nil {
		return err
	}
	daemon := daemons[node]
	if why, reachable := trouble(daemon); !reachable {
		return status.Errorf(status.DaemonDown, "node %s: pod %s/%s: %s; probeletctl on the node shows what the kernel still answers", node, daemon.Namespace, daemon.Name, why)
	}
	ctx, cancel := s.patient(ctx)
	defer cancel()
	err = c.ask(ctx, daemon, s.stdout, s.stderr, append(args, fmt.Sprintf("--width=%d", s.width))...)
	var coded *status.Error
	if err != nil && !errors.As(err, &coded) {
		err = fmt.Errorf("node %s: %w", node, err)
	}
	return err
}
