package cluster

import (
	"context"
	"fmt"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/probelet/probelet/e2e/manifests"
)

// Chart is the Helm chart's directory, as seen from here.
const Chart = "../../cni-conf/helm/probelet"

// System is the namespace that probelet is in.
const System = "kube-system"

// Deploy does what helm and the DaemonSet's controller do together, on the one node: it applies what the chart gives for
// the values, ends the pod of the release before, and starts the new one. It returns when that runs.
func (c *Cluster) Deploy(ctx context.Context, values map[string]any) (*corev1.Pod, error) {
	all := map[string]any{"image": map[string]any{"pullPolicy": "Never"}}
	for name, value := range values {
		all[name] = value
	}
	text, err := manifests.Render(Chart, "probelet", System, all)
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
		case *corev1.ConfigMap:
			client := c.Client.CoreV1().ConfigMaps(System)
			_, err = createOrUpdate(ctx, o, client.Create, client.Update)
		case *rbacv1.ClusterRole:
			client := c.Client.RbacV1().ClusterRoles()
			_, err = createOrUpdate(ctx, o, client.Create, client.Update)
		case *rbacv1.ClusterRoleBinding:
			client := c.Client.RbacV1().ClusterRoleBindings()
			_, err = createOrUpdate(ctx, o, client.Create, client.Update)
		default:
			err = fmt.Errorf("nobody knows what to do with a %T", o)
		}
		if err != nil {
			return nil, err
		}
	}
	if err := c.Undeploy(ctx); err != nil {
		return nil, err
	}
	return c.startDaemonPod(ctx, set)
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

// daemonPod is what the DaemonSet's pods are called: there is one at a time.
const daemonPod = "probelet-node1"

// Undeploy ends the daemon's pod, if there is one, in an orderly manner.
func (c *Cluster) Undeploy(ctx context.Context) error {
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: daemonPod, Namespace: System}}
	err := c.Delete(ctx, pod)
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// startDaemonPod does what the DaemonSet's controller does.
func (c *Cluster) startDaemonPod(ctx context.Context, set *appsv1.DaemonSet) (*corev1.Pod, error) {
	pod := &corev1.Pod{ObjectMeta: set.Spec.Template.ObjectMeta, Spec: set.Spec.Template.Spec}
	pod.Name, pod.Namespace = daemonPod, System
	pod.Spec.NodeName = NodeName
	pod, err := c.Create(ctx, pod)
	if err != nil {
		return nil, err
	}
	return c.Await(ctx, pod, time.Minute, "ready", Ready)
}
