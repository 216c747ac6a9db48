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
	// settle is how long either side may take to count a probe that has ended. The daemon reads what was observed 20 times
	// a second.
	settle = time.Second
	// LongestInterval keeps the connection to the kubelet open, which it closes after 90 s (pkg/kubelet/server/server.go):
	// as long as it stays it is the same kubelet.
	LongestInterval = time.Minute
)

// Node is what observes probes.
type Node interface {
	// Observed returns the endpoints whose probes are observed.
	Observed(ctx context.Context) (map[ID]Endpoint, error)
	// Disagree is told of each disagreement once.
	Disagree(ctx context.Context, d Disagreement) error
}

// Checker asks the kubelet for its verdicts.
type Checker struct {
	client           *kubelet.Client
	node             Node
	interval, settle time.Duration
	log              *slog.Logger
	history          History
	failing          string // the kind of the failure that was logged last
}

// New returns a checker that asks the kubelet that c is about, at least interval apart.
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

// Run looks again and again until ctx ends.
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

var errBusy = errors.New("the daemon is too busy to say what it observed")

// look returns how long the kubelet took.
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

// observed fails where it takes so long that what is returned may not be up to date.
func (c *Checker) observed(ctx context.Context) (map[ID]Endpoint, error) {
	start := time.Now()
	all, err := c.node.Observed(ctx)
	if err == nil && time.Since(start) > c.settle/2 {
		err = errBusy
	}
	return all, err
}

// verdicts also reports whether another kubelet than before may have answered: it is the same on the same connection.
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

// note logs when the kubelet's verdicts cannot be had, and when they can again.
func (c *Checker) note(err error) {
	kind := ""
	var failure *kubelet.Error
	switch {
	case errors.As(err, &failure):
		kind = failure.Kind
	case errors.Is(err, errBusy): // it says so elsewhere
	case err != nil:
		kind = "gives no usable answer"
	}
	switch kind {
	case c.failing:
	case "":
		c.log.Info("the kubelet's verdicts can be had again")
	default:
		c.log.Warn("the kubelet "+kind+", so its verdicts on probes are not compared with what was observed", "error", err)
	}
	c.failing = kind
}
