package source

import (
	"context"
	"errors"
	"log/slog"
	"maps"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/runtime"
	apiwatch "k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/cache"

	"github.com/probelet/probelet/daemon/internal/kubeapi"
	"github.com/probelet/probelet/daemon/internal/podspec"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// APIServer watches the node's pods at the API server.
type APIServer struct {
	client rest.Interface
	node   string
	health
	changed chan struct{}
	last    publisher
}

// NewAPIServer returns a source that connects as a kubeconfig file says; empty means as in a pod of the cluster. It does
// not connect yet.
func NewAPIServer(kubeconfig, node string, log *slog.Logger) (*APIServer, error) {
	if node == "" {
		return nil, errors.New("--node-name: must be set, here or as $NODE_NAME")
	}
	config, err := kubeapi.Config(kubeconfig)
	if err != nil {
		return nil, err
	}
	client, err := kubeapi.Core(config)
	if err != nil {
		return nil, err
	}
	return &APIServer{
		client: client, node: node, changed: make(chan struct{}, 1),
		health: health{log: log.With("source", config.Host)},
	}, nil
}

// Delivery implements Source.
func (*APIServer) Delivery() Delivery { return Delivery{Pushed: true} }

// Refresh implements Source. It does nothing, because the API server is watched.
func (*APIServer) Refresh() {}

// Run implements Source.
func (a *APIServer) Run(ctx context.Context, snapshots chan<- []probe.Pod) error {
	informer := cache.NewSharedIndexInformer(a.listWatch(), &corev1.Pod{}, 0, nil)
	if err := informer.SetTransform(strip); err != nil {
		return err
	}
	// health logs these errors
	if err := informer.SetWatchErrorHandlerWithContext(func(context.Context, *cache.Reflector, error) {}); err != nil {
		return err
	}
	registration, err := informer.AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { a.notify() },
		UpdateFunc: func(any, any) { a.notify() },
		DeleteFunc: func(any) { a.notify() },
	})
	if err != nil {
		return err
	}
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		informer.RunWithContext(ctx)
	}()
	defer func() { <-stopped }()
	if !cache.WaitForCacheSync(ctx.Done(), registration.HasSynced) {
		return nil
	}
	a.notify() // with no pods at all, no handler does
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-a.changed:
		}
		gather(ctx)
		if !a.last.send(ctx, snapshots, a.pods(informer.GetStore())) {
			return nil
		}
	}
}

func (a *APIServer) notify() {
	select {
	case a.changed <- struct{}{}:
	default: // a notification is pending
	}
}

func (*APIServer) pods(store cache.Store) []probe.Pod {
	var pods []probe.Pod
	for _, object := range store.List() {
		if p, ok := object.(*corev1.Pod); ok {
			if pod, matters := podspec.OnNode(p); matters {
				pods = append(pods, pod)
			}
		}
	}
	return pods
}

// listWatch lists and watches the node's pods, and notes whether the API server answers.
func (a *APIServer) listWatch() *cache.ListWatch {
	selector := fields.OneTermEqualSelector("spec.nodeName", a.node)
	from := cache.NewListWatchFromClient(a.client, "pods", metav1.NamespaceAll, selector)
	return &cache.ListWatch{
		ListWithContextFunc: func(ctx context.Context, options metav1.ListOptions) (runtime.Object, error) {
			list, err := from.ListWithContext(ctx, options)
			a.note(ctx, "fails to list pods", err)
			return list, err
		},
		WatchFuncWithContext: func(ctx context.Context, options metav1.ListOptions) (apiwatch.Interface, error) {
			w, err := from.WatchWithContext(ctx, options)
			a.note(ctx, "refuses to watch pods", err)
			return w, err
		},
	}
}

func (a *APIServer) note(ctx context.Context, kind string, err error) {
	switch {
	case ctx.Err() != nil:
	case err == nil:
		a.set("", nil)
	default:
		a.set(kind, err)
	}
}

// strip removes the fields of a pod that are not used, to save memory.
func strip(object any) (any, error) {
	p, ok := object.(*corev1.Pod)
	if !ok {
		return object, nil
	}
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{
			Namespace: p.Namespace, Name: p.Name, UID: p.UID,
			ResourceVersion: p.ResourceVersion, DeletionTimestamp: p.DeletionTimestamp,
			Annotations: stripAnnotations(p.Annotations),
		},
		Spec: corev1.PodSpec{
			HostNetwork: p.Spec.HostNetwork,
			Containers:  stripContainers(p.Spec.Containers), InitContainers: stripContainers(p.Spec.InitContainers),
		},
		Status: corev1.PodStatus{
			Phase: p.Status.Phase, PodIP: p.Status.PodIP, PodIPs: p.Status.PodIPs,
			ContainerStatuses:     stripStatuses(p.Status.ContainerStatuses),
			InitContainerStatuses: stripStatuses(p.Status.InitContainerStatuses),
		},
	}, nil
}

func stripAnnotations(all map[string]string) map[string]string {
	kept := map[string]string{}
	maps.Copy(kept, probe.OwnAnnotations(all))
	if mirror, ok := all[corev1.MirrorPodAnnotationKey]; ok {
		kept[corev1.MirrorPodAnnotationKey] = mirror
	}
	return kept
}

func stripStatuses(all []corev1.ContainerStatus) []corev1.ContainerStatus {
	kept := make([]corev1.ContainerStatus, 0, len(all))
	for i := range all {
		c := &all[i]
		kept = append(kept, corev1.ContainerStatus{
			Name: c.Name, ContainerID: c.ContainerID, RestartCount: c.RestartCount,
			State: corev1.ContainerState{Running: c.State.Running},
		})
	}
	return kept
}

func stripContainers(all []corev1.Container) []corev1.Container {
	kept := make([]corev1.Container, 0, len(all))
	for i := range all {
		c := &all[i]
		kept = append(kept, corev1.Container{
			Name: c.Name, Ports: c.Ports, RestartPolicy: c.RestartPolicy, Lifecycle: c.Lifecycle,
			StartupProbe: c.StartupProbe, ReadinessProbe: c.ReadinessProbe, LivenessProbe: c.LivenessProbe,
		})
	}
	return kept
}
