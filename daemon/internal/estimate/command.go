package estimate

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"k8s.io/client-go/rest"

	"github.com/probelet/probelet/daemon/internal/kubeapi"
	"github.com/probelet/probelet/daemon/internal/status"
)

const help = `Computes what probelet would save, from the specs of pods alone. It lists pods through the API server, or reads them from a file; there,
manifests of Deployments, ReplicaSets, StatefulSets and Jobs count as the pods that they create. It installs nothing, and needs neither
root nor a node.

  kubectl probelet estimate
  kubectl get pods --all-namespaces -o json | kubectl probelet estimate --file -

For each namespace and in total, it shows the probes per second, how many of them may be answered in the kernel, and why others may
not. Without probelet and under several policies, it shows the share of answered probes, new connections to pods per second, sockets
in TIME_WAIT, conntrack entries and CPU, and how much later a failure may be detected. Assumptions follow, and all constants with
their sources.

  default      a success is answered for one period, and TCP probes while the listening socket would accept a connection
  staleness 5  a success is answered for five periods
  refresh      the daemon keeps successes fresh with requests of its own
  traffic      a pod's own traffic answers its liveness probes, except every tenth

With -o wide, policies are shown for each namespace too, and CPU is split up. With -o json, docs/estimate.schema.json describes the
fields.`

// Environment provides what the command needs from the program that it is part of.
type Environment struct {
	Stdin  io.Reader
	Stdout io.Writer
	// Width returns the maximum length of a line in characters; 0 means no limit.
	Width func() int
	// Config returns how to reach the API server.
	Config func() (*rest.Config, error)
	// Namespace returns the selected namespace; empty means all.
	Namespace func() (string, error)
}

// Command returns the command estimate.
func Command(env Environment) *cobra.Command {
	var output *string
	var file string
	cmd := &cobra.Command{
		Use:   "estimate",
		Short: "Compute what probelet would save, from the specs of pods",
		Long:  help,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if file != "" {
				for _, name := range []string{"kubeconfig", "context"} {
					if flag := cmd.Flags().Lookup(name); flag != nil && flag.Changed {
						return status.Errorf(status.Usage, "--file %q: cannot be combined with --%s %q", file, name, flag.Value)
					}
				}
			}
			namespace, err := env.Namespace()
			if err != nil {
				return err
			}
			report, err := until(cmd.Context(), func() (Report, error) { return env.report(cmd.Context(), file, namespace) })
			if err != nil {
				return err
			}
			if *output == "json" {
				return status.PrintJSON(env.Stdout, report)
			}
			return report.print(env.Stdout, env.Width(), *output == "wide")
		},
	}
	output = status.OutputFlag(cmd, "table", "table", "wide", "json")
	cmd.Flags().StringVarP(&file, "file", "f", "", "`FILE` of pods or manifests in JSON or YAML, instead of the API server; - is standard input")
	return cmd
}

// until returns what work returns, or an error as soon as ctx ends: reading a terminal or a pipe cannot be interrupted.
func until[T any](ctx context.Context, work func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := work()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
}

// report returns the estimate for the pods of a file, or of the API server. It is an error if there are none.
func (env Environment) report(ctx context.Context, file, namespace string) (Report, error) {
	in, from, err := env.read(ctx, file, namespace)
	if err != nil {
		return Report{}, err
	}
	r := in.of(namespace).Estimate()
	if r.Total.Pods == 0 {
		err = empty(r, from, namespace)
	}
	return r, err
}

// read returns pods and the name of their source.
func (env Environment) read(ctx context.Context, file, namespace string) (in Input, from string, err error) {
	switch file {
	case "":
		config, err := env.Config()
		if err != nil {
			return in, "", kubeapi.ConfigError(err, ", or a file of pods with --file")
		}
		in, err = List(ctx, config, namespace)
		return in, config.Host, err
	case "-":
		from = "standard input"
		in, err = Read(env.Stdin)
	default:
		from = fmt.Sprintf("--file %q", file)
		var f *os.File
		if f, err = os.Open(file); err == nil {
			defer f.Close() //nolint:errcheck // only read
			in, err = Read(f)
		}
	}
	var path *os.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	if err != nil {
		err = fmt.Errorf("%s: %w", from, err)
	}
	return in, from, err
}

// Estimate returns the estimate for the input.
func (in Input) Estimate() Report {
	r := Pods(in.Pods)
	for kind, n := range in.Others {
		r.NotCounted.Others[kind] += n
	}
	return r
}

// empty returns the error for an input without pods.
func empty(r Report, from, namespace string) error {
	text := from + ": no pods"
	if namespace != "" {
		text += " in namespace " + namespace
	}
	if n := r.NotCounted.Ended; n > 0 {
		text += fmt.Sprintf("; %d have ended", n)
	}
	if found := others(r.NotCounted.Others); found != "" {
		text += "; other objects: " + found + "; only pods, and manifests of Deployments, ReplicaSets, StatefulSets and Jobs, are counted " +
			"(kubectl get pods --all-namespaces -o json lists a cluster's pods)"
	}
	return status.Errorf(status.NotFound, "%s", text)
}
