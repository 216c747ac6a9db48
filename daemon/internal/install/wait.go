package install

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"time"

	"github.com/spf13/cobra"
	appsv1 "k8s.io/api/apps/v1"
	"k8s.io/client-go/rest"

	"github.com/probelet/probelet/daemon/internal/kubeapi"
)

// WaitCommand is what the pods of a DaemonSet run that have nothing to do any more, but must not end, and what the Job runs
// that waits for all of them.
func WaitCommand(stderr io.Writer) *cobra.Command {
	var daemonSet string
	cmd := &cobra.Command{
		Use:    "wait",
		Short:  "Do nothing until SIGTERM, or until a DaemonSet is ready on all nodes",
		Args:   cobra.NoArgs,
		Hidden: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if daemonSet == "" {
				<-cmd.Context().Done()
				return nil
			}
			namespace, name, ok := strings.Cut(daemonSet, "/")
			if !ok || namespace == "" || name == "" {
				return fmt.Errorf("--daemonset %q: must be NAMESPACE/NAME", daemonSet)
			}
			config, err := kubeapi.Config("")
			if err != nil {
				return err
			}
			client, err := kubeapi.Apps(config)
			if err != nil {
				return err
			}
			return waitForDaemonSet(cmd.Context(), client, namespace, name, slog.New(slog.NewTextHandler(stderr, nil)))
		},
	}
	cmd.Flags().StringVar(&daemonSet, "daemonset", "", "`NAMESPACE/NAME` of a DaemonSet whose pods are waited for")
	return cmd
}

// rolloutInterval is how often a DaemonSet is looked at.
const rolloutInterval = time.Second

// waitForDaemonSet waits until the DaemonSet's pods are ready on all nodes that are to have one. The error is ctx's, or the API
// server's last one.
func waitForDaemonSet(ctx context.Context, client rest.Interface, namespace, name string, log *slog.Logger) error {
	said := ""
	for {
		set := &appsv1.DaemonSet{}
		err := client.Get().Namespace(namespace).Resource("daemonsets").Name(name).Do(ctx).Into(set)
		word := ""
		switch {
		case err != nil:
			word = err.Error()
		case isRolledOut(set):
			log.Info("done", "nodes", set.Status.NumberReady)
			return nil
		default:
			word = fmt.Sprintf("%d of %d nodes are done", set.Status.NumberReady, set.Status.DesiredNumberScheduled)
		}
		if word != said {
			said = word
			log.Info("waiting", "daemonset", namespace+"/"+name, "status", word)
		}
		if !wait(ctx, rolloutInterval) {
			return errors.Join(ctx.Err(), err)
		}
	}
}

// isRolledOut is true as for "kubectl rollout status" (k8s.io/kubectl/pkg/polymorphichelpers/rollout_status.go), with all pods
// ready.
func isRolledOut(set *appsv1.DaemonSet) bool {
	s := set.Status
	return s.ObservedGeneration >= set.Generation && s.UpdatedNumberScheduled >= s.DesiredNumberScheduled && s.NumberReady >= s.DesiredNumberScheduled
}

// wait is false if ctx ended before.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
