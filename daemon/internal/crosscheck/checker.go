package crosscheck

import (
	"context"
	"errors"
	"log/slog"
	"net/http/httptrace"
	"time"

	"github.com/probelet/probelet/daemon/internal/kubelet"
)

// Path is where the kubelet serves its counts of probes.
const Path = "/metrics/probes"

const (
	// settle is how long either side may take to count a probe that has ended. The daemon reads observations 20 times a second.
	settle = time.Second
	// LongestInterval is short enough to keep the connection to the kubelet open, which closes it after 90 s
	// (pkg/kubelet/server/server.go). The same connection means the same kubelet.
	LongestInterval = time.Minute
)

// Node observes probes.
type Node interface {
	// Observed returns the endpoints whose probes are observed.
	Observed(ctx context.Context) (map[ID]Endpoint, error)
	// Disagree is called once for each disagreement.
	Disagree(ctx context.Context, d Disagreement) error
}

// Checker compares the kubelet's verdicts with a node's observations, periodically.
type Checker struct {
	client           *kubelet.Client
	node             Node
	interval, settle time.Duration
	log              *slog.Logger
	history          History
	failing          string // kind of the failure logged last
}

// New returns a checker that asks the kubelet of c at most once per interval.
func New(c kubelet.Config, node Node, interval time.Duration, log *slog.Logger) (*Checker, error) {
	c, err := c.At(Path)
	if err != nil {
		return nil, err
	}
	client, err := kubelet.New(c)
	if err != nil {
		return nil, err
	}
	return &Checker{client: client, node: node, interval: interval, settle: min(settle, interval), log: log.With("url", c.URL)}, nil
}

// Run looks periodically until ctx ends.
func (c *Checker) Run(ctx context.Context) {
	for rest := c.interval; pause(ctx, rest); {
		took, err := c.look(ctx)
		if ctx.Err() != nil {
			return
		}
		c.note(err)
		rest = max(c.interval, kubelet.Share*took)
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}

var errBusy = errors.New("the daemon is too busy to report its observations")

// look looks once. took is how long the kubelet took.
func (c *Checker) look(ctx context.Context) (took time.Duration, err error) {
	var l Look
	if l.Before, err = c.observed(ctx); err != nil || !pause(ctx, c.settle) {
		return 0, err
	}
	l.At = time.Now()
	l.Kubelet, l.Restarted, err = c.verdicts(ctx)
	took = time.Since(l.At)
	if err != nil || !pause(ctx, c.settle) {
		return took, err
	}
	if l.After, err = c.observed(ctx); err != nil {
		return took, err
	}
	for _, d := range c.history.Add(l) {
		err = errors.Join(err, c.node.Disagree(ctx, d))
	}
	return took, err
}

// observed fails if it takes so long that the observations may be out of date.
func (c *Checker) observed(ctx context.Context) (map[ID]Endpoint, error) {
	start := time.Now()
	all, err := c.node.Observed(ctx)
	if err == nil && time.Since(start) > c.settle/2 {
		err = errBusy
	}
	return all, err
}

// verdicts also reports whether the kubelet may have restarted: it has not if the connection is still the same.
func (c *Checker) verdicts(ctx context.Context) (all map[Worker]Verdicts, restarted bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, kubelet.Timeout)
	defer cancel()
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(i httptrace.GotConnInfo) { restarted = !i.Reused },
	})
	response, err := c.client.Get(ctx, "text/plain;version=0.0.4")
	if err != nil {
		return nil, true, err
	}
	defer response.Body.Close() //nolint:errcheck // read only
	all, err = parse(kubelet.Limit(response.Body, kubelet.MaxAnswer))
	return all, restarted, err
}

// note logs when the kubelet's verdicts become unavailable, and when they are available again.
func (c *Checker) note(err error) {
	kind := ""
	var failure *kubelet.Error
	switch {
	case errors.As(err, &failure):
		kind = failure.Kind
	case errors.Is(err, errBusy): // reported elsewhere
	case err != nil:
		kind = "returns no usable response"
	}
	switch kind {
	case c.failing:
	case "":
		c.log.Info("the kubelet's verdicts are available again")
	default:
		c.log.Warn("the kubelet "+kind+"; its verdicts are not compared with what was observed", "error", err)
	}
	c.failing = kind
}
