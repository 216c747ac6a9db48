// Package podevents reports invalid annotations where users look at their pods: as Events, which kubectl describe shows.
package podevents

import (
	"context"
	"fmt"
	"hash/fnv"
	"log/slog"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/probelet/probelet/daemon/internal/probe"
)

const (
	// interval is the shortest time between two Events from this node, whatever its pods do.
	interval = time.Second
	// queued is how many Events may wait. More are dropped: the log and probeletctl status have them, too.
	queued = 64
	// timeout is for one request to the API server.
	timeout = 5 * time.Second
	// maxMessage is the longest message that the API server accepts, in bytes (pkg/apis/core/validation/events.go: NoteLengthLimit).
	maxMessage = 1024
)

// Reporter writes Events (core/v1). A nil Reporter reports nothing.
type Reporter struct {
	client rest.Interface
	node   string
	log    *slog.Logger
	events chan *corev1.Event
	failed bool // to write the last one, which was logged
}

// New returns a reporter, whose Run must be called. node is the name of the node, which is the source of the Events.
func New(client rest.Interface, node string, log *slog.Logger) *Reporter {
	return &Reporter{client: client, node: node, log: log, events: make(chan *corev1.Event, queued)}
}

// BadAnnotation reports an invalid annotation. It does not block. Reporting the same message for the same pod again has no effect, even
// from another daemon.
func (r *Reporter) BadAnnotation(pod probe.Pod, message string) {
	if r == nil || pod.UID == "" {
		return
	}
	select {
	case r.events <- r.event(pod, "ProbeletBadAnnotation", message, time.Now()):
	default:
		r.log.Debug("too many Events; dropping this one", "pod", pod, "message", message)
	}
}

func (r *Reporter) event(pod probe.Pod, reason, message string, now time.Time) *corev1.Event {
	if len(message) > maxMessage {
		message = message[:maxMessage]
	}
	digest := fnv.New64a()
	_, _ = fmt.Fprint(digest, pod.UID, reason, message)
	return &corev1.Event{
		ObjectMeta:     metav1.ObjectMeta{Namespace: pod.Namespace, Name: fmt.Sprintf("%.230s.%016x", pod.Name, digest.Sum64())},
		InvolvedObject: corev1.ObjectReference{APIVersion: "v1", Kind: "Pod", Namespace: pod.Namespace, Name: pod.Name, UID: types.UID(pod.UID)},
		Type:           corev1.EventTypeWarning, Reason: reason, Message: message, Count: 1,
		FirstTimestamp: metav1.NewTime(now), LastTimestamp: metav1.NewTime(now),
		Source:              corev1.EventSource{Component: "probelet", Host: r.node},
		ReportingController: "probelet.dev/probeletd", ReportingInstance: r.node,
	}
}

// Run writes Events until ctx ends.
func (r *Reporter) Run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case e := <-r.events:
			r.write(ctx, e)
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(interval):
		}
	}
}

// write makes one attempt, because the problem is reported elsewhere, too.
func (r *Reporter) write(ctx context.Context, e *corev1.Event) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	err := r.client.Post().Namespace(e.Namespace).Resource("events").Body(e).Do(ctx).Error()
	if apierrors.IsAlreadyExists(err) {
		err = nil
	}
	if err != nil && !r.failed {
		r.log.Info("failed to write an Event about a pod; its problem is in this log and in probeletctl status", "error", err)
	}
	r.failed = err != nil
}
