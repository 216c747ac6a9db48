// Package refresh asks endpoints what their probes ask, so that evidence of them is always fresh.
package refresh

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"reflect"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
)

// maxResponse is how much of a response is read, in bytes: what the kernel side records of one, so that both know the same.
const maxResponse = datapath.MaxRecorded

// Target is an endpoint to be asked, and how.
type Target struct {
	Endpoint probe.Endpoint // of kind HTTP or TCP
	Address  netip.Addr
	// Request is sent as it is: the recorded request of a probe that succeeded. HTTP only.
	Request  []byte
	Question probe.Question // of Request
	Timeout  time.Duration
	// Interval is the longest time between two requests.
	Interval time.Duration
}

// Outcome is the outcome of a request to a pod.
type Outcome struct {
	Attachment attach.ID
	probe.Outcome
}

// ErrNotAsked is of a Dial that failed before anything was sent, which says nothing of the pod.
var ErrNotAsked = errors.New("the pod was not asked")

// Dial connects, as net.Dialer does.
type Dial func(ctx context.Context, network, address string) (net.Conn, error)

// Refresher asks targets until it is closed: each by itself, at random moments, and only so many at a time. Its methods
// are not safe for concurrent use.
type Refresher struct {
	// C has the outcomes. Until one is taken its target is not asked again.
	C <-chan Outcome

	outcomes chan Outcome
	now      func() uint64
	dial     Dial
	slots    chan struct{}

	end     context.CancelFunc
	ctx     context.Context
	all     sync.WaitGroup
	running map[attach.ID]map[probe.Endpoint]running
}

type running struct {
	target Target
	stop   context.CancelFunc
}

// New returns a refresher that asks at most that many targets at a time. now is the clock of outcomes, in ns.
func New(dial Dial, now func() uint64, most int) *Refresher {
	r := &Refresher{
		outcomes: make(chan Outcome), now: now, dial: dial,
		slots:   make(chan struct{}, most),
		running: map[attach.ID]map[probe.Endpoint]running{},
	}
	r.C = r.outcomes
	r.ctx, r.end = context.WithCancel(context.Background())
	return r
}

// Close stops everything, and waits for it.
func (r *Refresher) Close() {
	r.end()
	r.all.Wait()
}

// Set replaces an attachment's targets. Those that stay as they are go on.
func (r *Refresher) Set(id attach.ID, targets []Target) {
	old, current := r.running[id], map[probe.Endpoint]running{}
	for _, t := range targets {
		if same, ok := old[t.Endpoint]; ok && reflect.DeepEqual(same.target, t) {
			current[t.Endpoint] = same
			delete(old, t.Endpoint)
			continue
		}
		ctx, stop := context.WithCancel(r.ctx)
		current[t.Endpoint] = running{t, stop}
		r.all.Go(func() { r.run(ctx, id, t) })
	}
	for _, gone := range old {
		gone.stop()
	}
	if len(current) == 0 {
		delete(r.running, id)
		return
	}
	r.running[id] = current
}

func (r *Refresher) run(ctx context.Context, id attach.ID, t Target) {
	// Those that begin together, as at the daemon's start, are not to stay together.
	next := time.NewTimer(rand.N(t.Interval))
	defer next.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-next.C:
		}
		next.Reset(t.Interval - rand.N(t.Interval/5))
		select {
		case <-ctx.Done():
			return
		case r.slots <- struct{}{}:
		}
		outcome, known := r.ask(ctx, t)
		<-r.slots
		if !known {
			continue
		}
		select {
		case <-ctx.Done():
			return
		case r.outcomes <- Outcome{id, outcome}:
		}
	}
}

// ask asks as a probe does, and judges as the kubelet does. It returns false if nothing follows from it.
func (r *Refresher) ask(ctx context.Context, t Target) (o probe.Outcome, known bool) {
	o = probe.Outcome{Port: t.Endpoint.Port, Kind: t.Endpoint.Kind, Refresh: true}
	if o.Kind == probe.HTTP {
		var err error
		if o.Request, err = probe.ParseRequest(t.Request); err != nil {
			return o, false
		}
		o.Text, o.Question = t.Request, t.Question
	}
	start := r.now()
	limited, cancel := context.WithTimeout(ctx, t.Timeout)
	defer cancel()
	o.Event, o.Status, known = r.exchange(limited, t)
	o.ObservedAt = r.now()
	o.Duration = time.Duration(o.ObservedAt - start)
	if o.Event == probe.NoAnswer {
		o.Duration = max(o.Duration, t.Timeout)
	}
	return o, known && ctx.Err() == nil
}

// exchange opens a connection and asks. It is reset at its end, as load balancers do: none leaves a TIME_WAIT.
func (r *Refresher) exchange(ctx context.Context, t Target) (event probe.Event, status int, known bool) {
	conn, err := r.dial(ctx, "tcp", netip.AddrPortFrom(t.Address, t.Endpoint.Port).String())
	if err != nil {
		return eventOf(err), 0, !errors.Is(err, ErrNotAsked)
	}
	defer conn.Close() //nolint:errcheck // nothing of it is wanted any more
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	if t.Endpoint.Kind == probe.TCP {
		return probe.Connected, 0, true
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := conn.Write(t.Request); err != nil {
		return eventOf(err), 0, true
	}
	return read(conn)
}

// read reads until the verdict is certain.
func read(conn net.Conn) (event probe.Event, status int, known bool) {
	response := evidence.Response{Bytes: make([]byte, 0, 1<<10)}
	for {
		text := slices.Grow(response.Bytes, 512)
		n, err := conn.Read(text[len(text):min(cap(text), maxResponse)])
		response.Bytes = text[:len(text)+n]
		switch {
		case err == io.EOF:
			response.End = evidence.Closed
		case err != nil:
			return eventOf(err), 0, true
		case len(response.Bytes) == maxResponse:
			response.End = evidence.Unseen
		}
		event, status, doubt := response.Judge()
		if event != probe.NoAnswer || response.End != evidence.Open {
			return event, status, doubt == ""
		}
	}
}

// eventOf says what the prober would make of an error.
func eventOf(err error) probe.Event {
	var timeout net.Error
	switch {
	case errors.As(err, &timeout) && timeout.Timeout():
		return probe.NoAnswer
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return probe.Reset
	}
	return probe.Failed
}
