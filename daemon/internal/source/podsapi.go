package source

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/types"
	podsv1alpha1 "k8s.io/kubelet/pkg/apis/pods/v1alpha1"

	"github.com/probelet/probelet/daemon/internal/kubelet"
	"github.com/probelet/probelet/daemon/internal/podspec"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// watch follows the pods API, reconnecting as needed, until it is unavailable, and returns why.
func (k *Kubelet) watch(ctx context.Context, snapshots chan<- []probe.Pod) (why string) {
	if k.config.Socket == "" {
		return "--kubelet-pods-socket is empty"
	}
	for ctx.Err() == nil {
		start := time.Now()
		err := k.follow(ctx, snapshots)
		if ctx.Err() != nil {
			break
		}
		starting := status.Code(err) == codes.FailedPrecondition // the kubelet does not know all of its pods yet
		if !starting && time.Since(k.watched) > k.patient {
			return fmt.Sprintf("the kubelet's pods API at %s (--kubelet-pods-socket), which Kubernetes 1.37 serves by default, is unavailable: %s",
				k.config.Socket, status.Convert(err).Message())
		}
		k.fail(podsAPIError(err))
		select {
		case <-ctx.Done():
		case <-time.After(time.Until(start.Add(k.shortest))):
		}
	}
	return ""
}

func podsAPIError(err error) error {
	switch status.Code(err) {
	case codes.FailedPrecondition:
		return &kubelet.Error{Kind: "is starting", Err: err}
	case codes.Unavailable, codes.DeadlineExceeded, codes.ResourceExhausted, codes.Canceled:
		return &kubelet.Error{Kind: kubelet.Unreachable, Err: err}
	}
	return err
}

// follow follows the pods API over one connection, until that fails.
func (k *Kubelet) follow(ctx context.Context, snapshots chan<- []probe.Pod) error {
	conn, err := dialPodsAPI(k.config.Socket)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	w := newPodsWatch(podsv1alpha1.NewPodsClient(conn))
	go func() { cancel(w.receive(ctx)) }()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-w.synced:
	case <-time.After(k.timeout):
		return status.Errorf(codes.DeadlineExceeded, "no complete list of pods within %s", k.timeout)
	}
	k.set("", nil)
	k.deliver(Delivery{Pushed: true})
	defer func() { k.watched = time.Now() }()
	return k.publish(ctx, w, snapshots)
}

func dialPodsAPI(socket string) (*grpc.ClientConn, error) {
	return grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithNoProxy(), grpc.WithUserAgent("probeletd"),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(kubelet.MaxAnswer)))
}

// publish sends a snapshot after each change. It also lists all pods, no more often than it would poll without the pods
// API, to find what is not pushed: the kubelet pushes changes of a pod's status, but not of its annotations, and drops
// events if it has too many.
func (k *Kubelet) publish(ctx context.Context, w *podsWatch, snapshots chan<- []probe.Pod) error {
	listed, due := make(chan error, 1), time.After(k.config.Poll)
	var took time.Duration // of the last list
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-w.changed:
			gather(ctx)
			k.last.send(ctx, snapshots, w.snapshot())
		case <-due: // concurrently, so that events need not wait for it
			go func() {
				start := time.Now()
				err := w.list(ctx, k.timeout)
				took = time.Since(start)
				listed <- err
			}()
		case err := <-listed:
			if err != nil {
				return err
			}
			due = time.After(max(k.config.Poll, kubelet.Share*took))
		}
	}
}

// podsWatch holds the node's pods, as received from the pods API over one connection.
type podsWatch struct {
	client  podsv1alpha1.PodsClient
	changed chan struct{}
	synced  chan struct{} // closed when all pods are known
	sync    sync.Once

	mutex sync.Mutex
	pods  map[types.UID]probe.Pod
	// newer holds the pods with events since the current list was requested.
	newer map[types.UID]bool
}

func newPodsWatch(client podsv1alpha1.PodsClient) *podsWatch {
	return &podsWatch{
		client: client, changed: make(chan struct{}, 1), synced: make(chan struct{}),
		pods: map[types.UID]probe.Pod{}, newer: map[types.UID]bool{},
	}
}

// receive takes events as fast as they arrive: the kubelet drops a client that is 100 events behind.
func (w *podsWatch) receive(ctx context.Context) error {
	stream, err := w.client.WatchPods(ctx, &podsv1alpha1.WatchPodsRequest{})
	if err != nil {
		return err
	}
	for {
		event, err := stream.Recv()
		if err != nil {
			return err
		}
		switch event.Type {
		case podsv1alpha1.EventType_ADDED, podsv1alpha1.EventType_MODIFIED, podsv1alpha1.EventType_DELETED:
			err = w.apply(event)
		case podsv1alpha1.EventType_INITIAL_SYNC_COMPLETE:
			w.sync.Do(func() { close(w.synced) })
		}
		if err != nil {
			return err
		}
		w.notify()
	}
}

func (w *podsWatch) notify() {
	select {
	case w.changed <- struct{}{}:
	default: // a notification is pending
	}
}

func (w *podsWatch) apply(event *podsv1alpha1.WatchPodsEvent) error {
	p, err := decodePod(event.Pod)
	if err != nil {
		return err
	}
	pod, matters := podspec.OnNode(p)
	w.mutex.Lock()
	defer w.mutex.Unlock()
	w.newer[p.UID] = true
	if !matters || event.Type == podsv1alpha1.EventType_DELETED {
		delete(w.pods, p.UID)
		return nil
	}
	w.pods[p.UID] = pod
	return nil
}

func decodePod(text []byte) (*corev1.Pod, error) {
	var p corev1.Pod
	if err := p.Unmarshal(text); err != nil {
		return nil, fmt.Errorf("pod: %w", err)
	}
	if p.Name == "" || p.Namespace == "" || p.UID == "" {
		return nil, errors.New("a pod without name, namespace or UID")
	}
	return &p, nil
}

func (w *podsWatch) snapshot() []probe.Pod {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	return slices.Collect(maps.Values(w.pods))
}

// list replaces all pods with those of a list, except for pods with events since the list was requested.
func (w *podsWatch) list(ctx context.Context, timeout time.Duration) error {
	w.mutex.Lock()
	clear(w.newer)
	w.mutex.Unlock()
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	response, err := w.client.ListPods(ctx, &podsv1alpha1.ListPodsRequest{})
	if err != nil {
		return err
	}
	listed := map[types.UID]probe.Pod{}
	for _, text := range response.Pods {
		p, err := decodePod(text)
		if err != nil {
			return err
		}
		if pod, matters := podspec.OnNode(p); matters {
			listed[p.UID] = pod
		}
	}
	w.mutex.Lock()
	defer w.mutex.Unlock()
	for uid := range w.newer {
		delete(listed, uid)
		if pod, ok := w.pods[uid]; ok {
			listed[uid] = pod
		}
	}
	w.pods = listed
	w.notify()
	return nil
}
