// Package refresh asks endpoints what their probes ask, so that evidence of them is always fresh.
package refresh

import (
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/netip"
	"net/url"
	"reflect"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/probe"
)

const (
	// userAgent begins as the kubelet's does (pkg/probe/http/request.go): applications know their probes by it.
	userAgent = "kube-probe/probelet"
	// maxBody is how much of a body the kubelet reads (pkg/probe/http/http.go). A connection with more to come is closed.
	maxBody = 10 << 10
)

// Target is an endpoint to be asked, and how.
type Target struct {
	Endpoint probe.Endpoint // of kind HTTP or TCP
	Address  netip.Addr
	Headers  []probe.Header
	Timeout  time.Duration
	// Interval is the longest time between two requests.
	Interval time.Duration
	// Keep is for how long a connection is used. What it answers is no newer than itself, because a probe asks for a
	// connection too: it serves to see failures early, and another one to keep a success fresh.
	Keep time.Duration
}

// TargetOf is the target that keeps the endpoint of a pod fresh.
func TargetOf(s probe.EndpointSpec, address netip.Addr) Target {
	return Target{
		Endpoint: s.Endpoint, Address: address, Headers: s.CustomHeaders(), Timeout: s.Timeout,
		Interval: s.Refresh,
		// The request after this one must have renewed the success in time.
		Keep: max(0, s.Staleness-s.Refresh-s.Timeout),
	}
}

// Outcome is that of a request to a pod.
type Outcome struct {
	Attachment attach.ID
	probe.Outcome
}

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
	a := asker{Target: t, now: r.now, dial: r.dial}
	defer a.close()
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
		outcome := a.ask(ctx)
		<-r.slots
		select {
		case <-ctx.Done():
			return
		case r.outcomes <- Outcome{id, outcome}:
		}
	}
}

// asker asks one target.
type asker struct {
	Target
	now    func() uint64
	dial   Dial
	client *http.Client // whose connection is kept; nil: none yet
	conn   *keptConn    // that was used last
}

// keptConn is a connection with the time at which it was asked for.
type keptConn struct {
	net.Conn
	at uint64
}

func (a *asker) close() {
	if a.client != nil {
		a.client.CloseIdleConnections()
	}
}

// ask reports as the kernel does of a probe.
func (a *asker) ask(ctx context.Context) probe.Outcome {
	ctx, cancel := context.WithTimeout(ctx, a.Timeout)
	defer cancel()
	o := probe.Outcome{Endpoint: a.Endpoint, Refresh: true}
	start := a.now()
	var err error
	if a.Endpoint.Kind == probe.TCP {
		o.Event, err = probe.Connected, a.connect(ctx)
	} else {
		o.Event = probe.Answered
		o.Status, err = a.get(ctx, start)
	}
	o.ObservedAt = a.now()
	o.Duration = time.Duration(o.ObservedAt - start)
	var timeout net.Error
	switch {
	case err == nil:
		if a.conn != nil {
			o.ConnectedAt = a.conn.at
		}
	case errors.As(err, &timeout) && timeout.Timeout():
		o.Event, o.Status = probe.NoAnswer, 0
		o.Duration = max(o.Duration, a.Timeout)
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		o.Event, o.Status = probe.Reset, 0
	default:
		o.Event, o.Status = probe.Failed, 0
	}
	return o
}

// connect tells whether connections are accepted.
func (a *asker) connect(ctx context.Context) error {
	conn, err := a.open(ctx, "tcp", a.address())
	if err != nil {
		return err
	}
	_ = conn.Close()
	return nil
}

// open opens a connection that will be reset at its end, as load balancers do: none leaves a TIME_WAIT.
func (a *asker) open(ctx context.Context, network, address string) (net.Conn, error) {
	at := a.now()
	conn, err := a.dial(ctx, network, address)
	if err != nil {
		return nil, err
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	return &keptConn{conn, at}, nil
}

func (a *asker) get(ctx context.Context, now uint64) (status int, err error) {
	switch {
	case a.client == nil:
		a.client = a.newClient()
	case a.conn != nil && time.Duration(now-a.conn.at) > a.Keep:
		a.client.CloseIdleConnections()
	}
	request, err := a.newRequest(ctx)
	if err != nil {
		return 0, err
	}
	response, err := a.client.Do(request)
	if err != nil {
		return 0, err
	}
	defer response.Body.Close() //nolint:errcheck // read only
	_, err = io.Copy(io.Discard, io.LimitReader(response.Body, maxBody))
	return response.StatusCode, err
}

// newClient is as the kubelet's (pkg/probe/http/http.go), but for the connection, which is kept, and for redirects, which
// are no answer that could be repeated.
func (a *asker) newClient() *http.Client {
	return &http.Client{
		Transport: &http.Transport{
			DialContext: a.open, DisableCompression: true,
			// One whose request was given up may come to be idle after close.
			IdleConnTimeout: a.Interval + a.Timeout,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
}

// newRequest is what the kubelet asks (newProbeRequest in its pkg/probe/http/request.go), but for Connection: close.
func (a *asker) newRequest(ctx context.Context) (*http.Request, error) {
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) { a.conn, _ = info.Conn.(*keptConn) },
	})
	at, err := url.ParseRequestURI(a.Endpoint.Path)
	if err != nil {
		return nil, err
	}
	at.Scheme, at.Host = "http", a.address()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, at.String(), nil)
	if err != nil {
		return nil, err
	}
	header := request.Header
	for _, h := range a.Headers {
		header.Add(h.Name, h.Value)
	}
	if _, set := header["User-Agent"]; !set {
		header.Set("User-Agent", userAgent)
	}
	if _, set := header["Accept"]; !set {
		header.Set("Accept", "*/*")
	} else if header.Get("Accept") == "" {
		header.Del("Accept")
	}
	request.Host = header.Get("Host") // empty: the address
	return request, nil
}

func (a *asker) address() string {
	return net.JoinHostPort(a.Address.String(), strconv.Itoa(int(a.Endpoint.Port)))
}
