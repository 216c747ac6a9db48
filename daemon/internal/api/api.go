// Package api is how people and programs speak with a running daemon: HTTP on a unix socket, and if that is asked for, on
// TLS with client certificates. It knows neither maps nor policy.
package api

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// InvalidateRequest is the body of POST /v1/invalidate: what is known of these endpoints is not to be believed any more.
type InvalidateRequest struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	// Port and Path say which of the pod's endpoints; 0 and empty: all. Path is path and query as probed.
	Port uint16 `json:"port,omitempty"`
	Path string `json:"path,omitempty"`
}

// InvalidateReply says which endpoints were meant. None of them is answered until a probe of it has succeeded.
type InvalidateReply struct {
	Pod       string   `json:"pod"` // namespace/name
	Withdrawn []string `json:"withdrawn"`
}

// Event is what happened to what is known of an endpoint.
type Event struct {
	// Time is of the last of Count events of the same kind in a row.
	Time   time.Time      `json:"time"`
	Count  int            `json:"count"`
	Kind   probe.Kind     `json:"kind"`
	Port   uint16         `json:"port"`
	Path   string         `json:"path,omitempty"`
	Result string         `json:"result"`           // success, failure, or unknown for evidence that was dropped
	Status int            `json:"status,omitempty"` // HTTP
	Cause  probe.Cause    `json:"cause"`
	Took   *time.Duration `json:"tookNanoseconds,omitempty"` // of a probe or a request
}

// EventsReply is the answer to GET /v1/pods/{namespace}/{pod}/events: oldest first, the last few of each endpoint.
type EventsReply struct {
	Pod    string  `json:"pod"` // namespace/name
	Events []Event `json:"events"`
}

// ErrNotFound: there is no such pod, or nothing of it is as described.
var ErrNotFound = errors.New("not found")

// NotFound is an ErrNotFound that says what there is not.
func NotFound(format string, a ...any) error { return notFound(fmt.Sprintf(format, a...)) }

type notFound string

func (n notFound) Error() string      { return string(n) }
func (notFound) Is(target error) bool { return target == ErrNotFound }

// Node is what the daemon does when it is asked. An error that wraps ErrNotFound says what there is not.
type Node interface {
	Invalidate(ctx context.Context, r InvalidateRequest) (InvalidateReply, error)
	Events(ctx context.Context, namespace, pod string) (EventsReply, error)
	// Alive is nil while the daemon decides.
	Alive(ctx context.Context) error
	// Unready says what is missing for probes to be answered; nothing if they may be.
	Unready(ctx context.Context) ([]string, error)
}
