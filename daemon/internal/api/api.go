// Package api is how people and programs speak with a running daemon: HTTP on a unix socket, and if that is asked for, on
// TLS with client certificates. It knows neither maps nor policy.
package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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

// LogLevel is the body of PUT /v1/log-level, and its answer: the least level that the daemon logs from now on.
type LogLevel struct {
	Level slog.Level `json:"level"`
}

// Event is what happened to what is known of an endpoint.
type Event struct {
	// Time is of the last of Count events of the same kind in a row.
	Time  time.Time  `json:"time"`
	Count int        `json:"count"`
	Kind  probe.Kind `json:"kind"`
	Port  uint16     `json:"port"`
	Path  string     `json:"path,omitempty"`
	// HeadersID is a digest of the probe's custom headers, empty if there are none.
	HeadersID string         `json:"headersID,omitempty"`
	Result    string         `json:"result"`           // success, failure, or unknown for evidence that was dropped
	Status    int            `json:"status,omitempty"` // HTTP
	Cause     probe.Cause    `json:"cause"`
	Took      *time.Duration `json:"tookNanoseconds,omitempty"` // of a probe or a request
}

// EventsReply is the answer to GET /v1/pods/{namespace}/{pod}/events: oldest first, the last few of each endpoint.
type EventsReply struct {
	Pod    string  `json:"pod"` // namespace/name
	Events []Event `json:"events"`
}

// Endpoint is what the daemon knows of an endpoint beside what is in the kernel's maps.
type Endpoint struct {
	ContainerID string     `json:"containerID"`
	IfName      string     `json:"ifName"`
	Kind        probe.Kind `json:"kind"`
	Port        uint16     `json:"port,omitempty"`
	Path        string     `json:"path,omitempty"`
	HeadersID   string     `json:"headersID,omitempty"`
	Result      string     `json:"result"` // success, failure or unknown
	Status      int        `json:"status,omitempty"`
	ObservedAt  uint64     `json:"observedAt,omitempty"` // in ns of CLOCK_BOOTTIME
	// Estimate is null in other modes than observe, and if no probe was seen.
	Estimate *Estimate `json:"estimate,omitempty"`
}

// Estimate is what mode answer would have made of the probes that were seen in mode observe, since the daemon started or
// the endpoint came up.
type Estimate struct {
	// Answered is how many would have been answered, and Hidden how many of these failed, so that their prober would have
	// learned of it later.
	Answered uint64 `json:"answered"`
	Hidden   uint64 `json:"hidden"`
	// Passed is how many would have reached the pod, by why: never, unknown, failed, threshold, withdrawn, expired, tcp or
	// limit.
	Passed map[probe.Why]uint64 `json:"passed"`
}

// Probes is how many were seen; none if there is no estimate.
func (e *Estimate) Probes() uint64 {
	if e == nil {
		return 0
	}
	n := e.Answered
	for _, passed := range e.Passed {
		n += passed
	}
	return n
}

// EndpointsReply is the answer to GET /v1/endpoints. When it arrives, statedir.Endpoints are up to date too.
type EndpointsReply struct {
	Endpoints    []Endpoint     `json:"endpoints"`
	Inconclusive []Inconclusive `json:"inconclusive"`
}

// Inconclusive is how many of an attachment's observed connections had no certain outcome, by why: the reasons of the metric
// probelet_inconclusive_probes_total.
type Inconclusive struct {
	ContainerID string            `json:"containerID"`
	IfName      string            `json:"ifName"`
	Reasons     map[string]uint64 `json:"reasons"`
}

// SourceReply is the answer to GET /v1/source: whether the daemon hears of each change of a container's state when it happens,
// and why it does not.
type SourceReply struct {
	Pushed bool   `json:"pushed"`
	Why    string `json:"why,omitempty"`
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
	Endpoints(ctx context.Context) (EndpointsReply, error)
	Source() SourceReply
	// Alive is nil while the daemon decides.
	Alive(ctx context.Context) error
	// Unready says what is missing for probes to be answered; nothing if they may be.
	Unready(ctx context.Context) ([]string, error)
}
