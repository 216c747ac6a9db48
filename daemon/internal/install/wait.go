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

// WaitCommand returns the wait command. Pods of a DaemonSet run it once they have nothing left to do but must not exit; the Job that
// waits for all of these pods runs it too.
func WaitCommand(stderr io.Writer) *cobra.Command {
	var daemonSet string
	cmd := &cobra.Command{
		Use:    "wait",
		Short:  "Do nothing until SIGTERM, or wait until a DaemonSet is ready on all nodes",
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
	cmd.Flags().StringVar(&daemonSet, "daemonset", "", "`NAMESPACE/NAME` of a DaemonSet to wait for")
	return cmd
}

// rolloutInterval is the interval at which waitForDaemonSet polls.
const rolloutInterval = time.Second

// waitForDaemonSet waits until the DaemonSet's pods are ready on all nodes that it selects. If ctx ends first, the error includes the
// API server's last one.
func waitForDaemonSet(ctx context.Context, client rest.Interface, namespace, name string, log *slog.Logger) error {
	last := ""
	for {
		set := &appsv1.DaemonSet{}
		err := client.Get().Namespace(namespace).Resource("daemonsets").Name(name).Do(ctx).Into(set)
		word := ""
		switch {
		case err != nil:
			word = err.Error()
		case isRolledOut(set):
			log.Info("DaemonSet ready", "daemonset", namespace+"/"+name, "nodes", set.Status.NumberReady)
			return nil
		default:
			word = fmt.Sprintf("%d of %d nodes ready", set.Status.NumberReady, set.Status.DesiredNumberScheduled)
		}
		if word != last {
			last = word
			log.Info("waiting for the DaemonSet", "daemonset", namespace+"/"+name, "status", word)
		}
		if !wait(ctx, rolloutInterval) {
			return errors.Join(ctx.Err(), err)
		}
	}
}

// isRolledOut applies the rule of "kubectl rollout status" (k8s.io/kubectl/pkg/polymorphichelpers/rollout_status.go), and requires that
// all pods are ready.
func isRolledOut(set *appsv1.DaemonSet) bool {
	s := set.Status
	return s.ObservedGeneration >= set.Generation && s.UpdatedNumberScheduled >= s.DesiredNumberScheduled && s.NumberReady >= s.DesiredNumberScheduled
}

// wait waits for d. It returns false if ctx ended first.
func wait(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
