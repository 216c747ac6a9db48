// Package api implements the daemon's HTTP API, on a Unix socket and optionally over TLS with client certificates. It knows neither
// maps nor policy.
package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// InvalidateRequest is the body of POST /v1/invalidate, which discards what is known about some endpoints.
type InvalidateRequest struct {
	Namespace string `json:"namespace"`
	Pod       string `json:"pod"`
	// Port and Path select endpoints of the pod; 0 and empty select all. Path is the path and query as probed.
	Port uint16 `json:"port,omitempty"`
	Path string `json:"path,omitempty"`
}

// InvalidateReply lists the endpoints that were selected. None of them is answered until a probe of it has succeeded.
type InvalidateReply struct {
	Pod       string   `json:"pod"` // namespace/name
	Withdrawn []string `json:"withdrawn"`
}

// LogLevel is the body of PUT /v1/log-level and of its reply: the lowest level that the daemon logs from then on.
type LogLevel struct {
	Level slog.Level `json:"level"`
}

// Event is a change of what is known about an endpoint.
type Event struct {
	// Time is that of the last of Count consecutive events that differ in nothing else.
	Time  time.Time  `json:"time"`
	Count int        `json:"count"`
	Kind  probe.Kind `json:"kind"`
	Port  uint16     `json:"port"`
	Path  string     `json:"path,omitempty"`
	// HeadersID is a digest of the probe's custom headers; empty if it has none.
	HeadersID string         `json:"headersID,omitempty"`
	Result    string         `json:"result"`           // success, failure, or unknown if evidence was dropped
	Status    int            `json:"status,omitempty"` // HTTP
	Cause     probe.Cause    `json:"cause"`
	Took      *time.Duration `json:"tookNanoseconds,omitempty"` // duration of the probe or request
}

// EventsReply is the reply to GET /v1/pods/{namespace}/{pod}/events: the last few events of each endpoint, oldest first.
type EventsReply struct {
	Pod    string  `json:"pod"` // namespace/name
	Events []Event `json:"events"`
}

// Endpoint has what the daemon knows about an endpoint beyond the contents of the kernel's maps.
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
	// WouldAnswer is null in modes other than observe, and if no probe was seen.
	WouldAnswer *WouldAnswer `json:"estimate,omitempty"`
}

// WouldAnswer says what mode answer would have done with the probes seen in mode observe since the daemon started or the endpoint
// appeared.
type WouldAnswer struct {
	// Answered counts the probes that would have been answered. Hidden counts those among them that failed: their prober would have
	// found out later.
	Answered uint64 `json:"answered"`
	Hidden   uint64 `json:"hidden"`
	// Passed counts the probes that would have reached the pod, by reason: never, unknown, failed, threshold, withdrawn, expired, tcp or
	// limit.
	Passed map[probe.Why]uint64 `json:"passed"`
}

// Probes returns how many probes were seen; 0 if w is nil.
func (w *WouldAnswer) Probes() uint64 {
	if w == nil {
		return 0
	}
	n := w.Answered
	for _, passed := range w.Passed {
		n += passed
	}
	return n
}

// EndpointsReply is the reply to GET /v1/endpoints. The daemon brings its file of endpoints (package statedir) up to date before it
// replies.
type EndpointsReply struct {
	Endpoints    []Endpoint     `json:"endpoints"`
	Inconclusive []Inconclusive `json:"inconclusive"`
}

// Inconclusive counts an attachment's observed connections that had no certain outcome, by the reasons of the metric
// probelet_inconclusive_probes_total.
type Inconclusive struct {
	ContainerID string            `json:"containerID"`
	IfName      string            `json:"ifName"`
	Reasons     map[string]uint64 `json:"reasons"`
}

// SourceReply is the reply to GET /v1/source. It says whether changes of containers' states are pushed to the daemon as they happen,
// and if not, why.
type SourceReply struct {
	Pushed bool   `json:"pushed"`
	Why    string `json:"why,omitempty"`
}

// ErrNotFound is returned for a pod that does not exist, or that has nothing that matches the request.
var ErrNotFound = errors.New("not found")

// NotFound returns an error that is ErrNotFound and says what was not found.
func NotFound(format string, a ...any) error { return notFound(fmt.Sprintf(format, a...)) }

type notFound string

func (n notFound) Error() string      { return string(n) }
func (notFound) Is(target error) bool { return target == ErrNotFound }

// Node handles requests to the daemon. Errors are ErrNotFound if what was requested does not exist.
type Node interface {
	Invalidate(ctx context.Context, r InvalidateRequest) (InvalidateReply, error)
	Events(ctx context.Context, namespace, pod string) (EventsReply, error)
	Endpoints(ctx context.Context) (EndpointsReply, error)
	Source() SourceReply
	// Alive returns an error if the daemon's loop does not respond.
	Alive(ctx context.Context) error
	// Unready lists what keeps probes from being answered, or new pods from being attached.
	Unready(ctx context.Context) ([]string, error)
}
