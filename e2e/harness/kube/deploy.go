package kube

import (
	"context"
	"fmt"
	"maps"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/probelet/probelet/e2e/harness/image"
	"github.com/probelet/probelet/e2e/harness/manifests"
)

// Chart is the directory of the Helm chart, relative to the directory of the tests.
const Chart = "../../cni-conf/helm/probelet"

// System is the namespace that probelet runs in.
const System = "kube-system"

// Deploy does what "helm upgrade --install --wait" does: it applies the objects that the chart renders for the values, and
// returns the daemon's pod once it is Ready.
func (c *Cluster) Deploy(ctx context.Context, values map[string]any) (*corev1.Pod, error) {
	text, err := manifests.Render(Chart, "probelet", System, Values(values))
	if err != nil {
		return nil, err
	}
	objects, err := manifests.Decode(text)
	if err != nil {
		return nil, err
	}
	var set *appsv1.DaemonSet
	for _, object := range objects {
		switch o := object.(type) {
		case *appsv1.DaemonSet:
			set = o
			client := c.Client.AppsV1().DaemonSets(System)
			_, err = createOrUpdate(ctx, o, client.Create, client.Update)
		case *corev1.ServiceAccount:
			client := c.Client.CoreV1().ServiceAccounts(System)
			_, err = createOrUpdate(ctx, o, client.Create, client.Update)
		case *rbacv1.ClusterRole:
			client := c.Client.RbacV1().ClusterRoles()
			_, err = createOrUpdate(ctx, o, client.Create, client.Update)
		case *rbacv1.ClusterRoleBinding:
			client := c.Client.RbacV1().ClusterRoleBindings()
			_, err = createOrUpdate(ctx, o, client.Create, client.Update)
		default:
			err = fmt.Errorf("unexpected object of type %T", o)
		}
		if err != nil {
			return nil, err
		}
	}
	return c.awaitRollout(ctx, set)
}

// Values adds the image that the cluster has to values of the chart.
func Values(values map[string]any) map[string]any {
	repository, _, _ := strings.Cut(image.Reference, ":")
	all := map[string]any{"image": map[string]any{"repository": repository, "pullPolicy": "Never"}}
	maps.Copy(all, values)
	return all
}

// createOrUpdate applies an object.
func createOrUpdate[T any](ctx context.Context, object T, create func(context.Context, T, metav1.CreateOptions) (T, error),
	update func(context.Context, T, metav1.UpdateOptions) (T, error),
) (T, error) {
	made, err := create(ctx, object, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return update(ctx, object, metav1.UpdateOptions{})
	}
	return made, err
}

// awaitRollout waits until the controller has rolled out the set.
func (c *Cluster) awaitRollout(ctx context.Context, set *appsv1.DaemonSet) (*corev1.Pod, error) {
	err := Until(ctx, 3*time.Minute, func(ctx context.Context) error {
		now, err := c.Client.AppsV1().DaemonSets(System).Get(ctx, set.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		if s := now.Status; s.ObservedGeneration != now.Generation || s.DesiredNumberScheduled == 0 ||
			s.UpdatedNumberScheduled != s.DesiredNumberScheduled || s.NumberReady != s.DesiredNumberScheduled {
			return fmt.Errorf("DaemonSet %s: %+v", set.Name, s)
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	pods, err := c.DaemonPods(ctx)
	if err != nil || len(pods) == 0 {
		return nil, fmt.Errorf("pods of DaemonSet %s: %d, %w", set.Name, len(pods), err)
	}
	return &pods[0], nil
}

// DaemonPods returns the pods that the controller created.
func (c *Cluster) DaemonPods(ctx context.Context) ([]corev1.Pod, error) {
	list, err := c.Client.CoreV1().Pods(System).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=probelet"})
	if err != nil {
		return nil, err
	}
	return list.Items, nil
}

// Undeploy deletes the DaemonSet, and waits until the daemon's pod, if any, has shut down.
func (c *Cluster) Undeploy(ctx context.Context) error {
	sets := c.Client.AppsV1().DaemonSets(System)
	list, err := sets.List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=probelet"})
	if err != nil {
		return err
	}
	for _, set := range list.Items {
		if err := sets.Delete(ctx, set.Name, metav1.DeleteOptions{}); err != nil {
			return err
		}
	}
	return Until(ctx, time.Minute, func(ctx context.Context) error {
		pods, err := c.DaemonPods(ctx)
		if err == nil && len(pods) > 0 {
			err = fmt.Errorf("pod %s still exists", pods[0].Name)
		}
		return err
	})
}
