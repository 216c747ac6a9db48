package source

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/probelet/probelet/daemon/internal/kubelet"
	"github.com/probelet/probelet/daemon/internal/podspec"
	"github.com/probelet/probelet/daemon/internal/probe"
)

const (
	// shortestPoll is the shortest time between two polls. It is also the first wait after a pod was announced, because
	// the kubelet learns its address a moment after the plugin; later waits double, up to the poll interval.
	shortestPoll = time.Second
	// podsAPIGrace is how long a pods API that went away may take to come back, before polling starts: a kubelet that has
	// just started lists only some of its pods, whereas its pods API reports that it is starting.
	podsAPIGrace = 10 * time.Second
)

// PodsAPISocket is where the kubelet serves its pods API, unless --root-dir is set (Kubernetes 1.37,
// pkg/kubelet/kubeletconfig/defaults.go, pkg/kubelet/apis/pods/constants.go).
const PodsAPISocket = "/var/lib/kubelet/pods-api/pods-api.sock"

// KubeletConfig configures access to the kubelet.
type KubeletConfig struct {
	kubelet.Config // URL is that of the list of pods
	// Socket is the path of the pods API's socket; empty to not use it.
	Socket string
	// Poll is the longest time between two polls.
	Poll time.Duration
}

// Kubelet reads the pods from this node's kubelet. If the kubelet serves the pods API, which Kubernetes 1.37 does by
// default, it pushes each change of a container's state. Otherwise its list of pods is polled until the API becomes
// available.
type Kubelet struct {
	config                     KubeletConfig
	client                     *kubelet.Client
	timeout, shortest, patient time.Duration
	refresh                    chan struct{}
	health
	last     publisher
	watched  time.Time // when the pods API last worked
	delivery atomic.Pointer[Delivery]
}

// NewKubelet checks the configuration; it does not connect.
func NewKubelet(c KubeletConfig, log *slog.Logger) (*Kubelet, error) {
	client, err := kubelet.New(c.Config)
	if err != nil {
		return nil, err
	}
	if c.Poll <= 0 {
		return nil, fmt.Errorf("poll interval %s: must be positive", c.Poll)
	}
	return &Kubelet{
		config: c, client: client, timeout: kubelet.Timeout, shortest: min(shortestPoll, c.Poll), patient: podsAPIGrace,
		refresh: make(chan struct{}, 1), health: health{log: log.With("source", c.URL)},
	}, nil
}

// Refresh implements Source.
func (k *Kubelet) Refresh() {
	select {
	case k.refresh <- struct{}{}:
	default: // a request is pending
	}
}

// Delivery implements Source.
func (k *Kubelet) Delivery() Delivery {
	if d := k.delivery.Load(); d != nil {
		return *d
	}
	return Delivery{Why: "the kubelet has not answered yet"}
}

// Run implements Source.
func (k *Kubelet) Run(ctx context.Context, snapshots chan<- []probe.Pod) error {
	wait := k.shortest
	for ctx.Err() == nil {
		unwatched := k.watch(ctx, snapshots)
		rest := k.poll(ctx, snapshots, unwatched)
		if announced := k.wait(ctx, rest, wait); announced {
			wait = k.shortest
		} else {
			wait = min(2*wait, k.config.Poll)
		}
	}
	return nil
}

// poll lists the pods once, and returns how long to pause, so that a kubelet with a long list is not kept busy with it.
// unwatched explains why the pods are not watched.
func (k *Kubelet) poll(ctx context.Context, snapshots chan<- []probe.Pod, unwatched string) (rest time.Duration) {
	start := time.Now()
	pods, err := k.fetch(ctx)
	took := time.Since(start)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		k.fail(err)
	default:
		k.set("", nil)
		k.deliver(Delivery{Why: unwatched})
		k.last.send(ctx, snapshots, pods)
		return max(k.shortest, kubelet.Share*took-time.Since(start))
	}
	return k.shortest
}

// wait waits for the longest time, or until a pod is announced, but at least for rest.
func (k *Kubelet) wait(ctx context.Context, rest, longest time.Duration) (announced bool) {
	rested := time.After(rest)
	select {
	case <-ctx.Done():
	case <-k.refresh:
		announced = true
	case <-time.After(longest):
	}
	select {
	case <-ctx.Done():
	case <-rested:
	}
	return announced
}

// deliver records how container states arrive, and logs when that changes.
func (k *Kubelet) deliver(d Delivery) {
	before := k.delivery.Swap(&d)
	switch {
	case before != nil && before.Pushed == d.Pushed:
	case d.Pushed:
		k.log.Info("pod watch established")
	default:
		k.log.Info("polling pods", "because", d.Why)
	}
}

func (k *Kubelet) fail(err error) {
	kind := "returns no usable response"
	var failure *kubelet.Error
	if errors.As(err, &failure) {
		kind = failure.Kind
	}
	k.set(kind, err)
}

// fetch returns the pods that the kubelet lists.
func (k *Kubelet) fetch(ctx context.Context) ([]probe.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, k.timeout)
	defer cancel()
	response, err := k.client.Get(ctx, "application/json")
	if err != nil {
		return nil, err
	}
	defer response.Body.Close() //nolint:errcheck // read only
	var pods []probe.Pod
	err = readPodList(kubelet.Limit(response.Body, kubelet.MaxAnswer), func(p *corev1.Pod) {
		if pod, matters := podspec.OnNode(p); matters {
			pods = append(pods, pod)
		}
	})
	if ctx.Err() != nil {
		return nil, &kubelet.Error{Kind: kubelet.Unreachable, Err: fmt.Errorf("no complete answer within %s", k.timeout)}
	}
	return pods, err
}
