// Package refresh sends the daemon's own requests to endpoints, so that their evidence stays fresh.
package refresh

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/probe"
)

const (
	// gather is how long replies and due requests are left to accumulate, because waking up for each one would cost more
	// than everything else. It is short compared with a probe's timeout, which is at least a second.
	gather = 10 * time.Millisecond
	// mostUntaken is how many outcomes may wait to be taken before no more requests are sent.
	mostUntaken = 4096
)

// Outcome is the outcome of a request to a pod.
type Outcome struct {
	Attachment attach.ID
	probe.Outcome
}

// Sockets opens the sockets for requests.
type Sockets interface {
	// Open returns a new non-blocking TCP socket (SOCK_CLOEXEC) of an address family, and the cookie to pass to Done. An
	// error says nothing about a pod.
	Open(family int) (fd int, cookie uint64, err error)
	// Done is called once for each socket, when it will send no more SYNs.
	Done(cookie uint64)
}

// Refresher sends requests to its targets until it is closed. It needs one goroutine: a request that waits for its reply
// costs a file descriptor and an entry in a heap. Each pod has limits of its own (podConnections, podApart), so that no
// pod can delay the refresh of another.
type Refresher struct {
	// C receives a value when there are outcomes to take.
	C <-chan struct{}

	ready   chan struct{}
	sockets Sockets
	now     func() uint64
	epoll   int
	wake    int // an eventfd, watched by epoll
	done    chan struct{}
	scratch []byte // used by the goroutine only

	mu       sync.Mutex // protects the fields below
	closed   bool
	schedule *schedule
	open     map[int32]*job // by file descriptor
	outcomes []Outcome
}

// New returns a refresher that uses these sockets. now is the clock for outcomes, in ns.
func New(sockets Sockets, now func() uint64) (*Refresher, error) {
	r := &Refresher{
		ready: make(chan struct{}, 1), done: make(chan struct{}), sockets: sockets, now: now,
		scratch: make([]byte, maxResponse), schedule: newSchedule(), open: map[int32]*job{},
	}
	r.C = r.ready
	var err error
	if r.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("refresh: epoll: %w", err)
	}
	if r.wake, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, errors.Join(fmt.Errorf("refresh: eventfd: %w", err), unix.Close(r.epoll))
	}
	if err := r.watch(unix.EPOLL_CTL_ADD, r.wake, unix.EPOLLIN); err != nil {
		return nil, errors.Join(fmt.Errorf("refresh: %w", err), unix.Close(r.wake), unix.Close(r.epoll))
	}
	go r.run()
	return r, nil
}

// Close ends all requests, and waits for the goroutine to end.
func (r *Refresher) Close() {
	r.mu.Lock()
	again := r.closed
	r.closed = true
	if !again {
		r.rouse()
	}
	r.mu.Unlock()
	<-r.done
	if again {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, j := range r.open {
		r.hangUp(j)
	}
	_ = unix.Close(r.wake)
	_ = unix.Close(r.epoll)
}

// Set replaces an attachment's targets. Unchanged targets carry on; if another one has a request under way, its outcome
// is lost.
func (r *Refresher) Set(id attach.ID, targets []Target) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.schedule.unchanged(id, targets) {
		return
	}
	for _, j := range r.schedule.set(id, targets, r.now()) {
		r.hangUp(j)
	}
	r.rouse()
}

// Take returns the outcomes since the last call.
func (r *Refresher) Take() []Outcome {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := r.outcomes
	r.outcomes = nil
	if len(all) >= mostUntaken && !r.closed {
		r.rouse()
	}
	return all
}

// rouse wakes up the goroutine. The caller holds r.mu, and r must not be closed.
func (r *Refresher) rouse() {
	var one [8]byte
	one[0] = 1
	_, _ = unix.Write(r.wake, one[:]) // EAGAIN: already roused
}

func (r *Refresher) run() {
	defer close(r.done)
	events := make([]unix.EpollEvent, 256)
	for n := 0; ; {
		busy, ok := r.step()
		if !ok {
			return
		}
		if busy || n > 0 && r.underWay() {
			time.Sleep(gather)
		}
		var err error
		n, err = unix.EpollWait(r.epoll, events, r.wait())
		if err != nil && err != unix.EINTR {
			panic(fmt.Sprintf("refresh: epoll_wait: %v", err)) // only possible for a bad descriptor or bad memory of our own
		}
		r.handle(events[:max(n, 0)])
	}
}

// step deals with all jobs that are due, and reports whether there were any. ok is false if the refresher is closed.
func (r *Refresher) step() (busy, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return false, false
	}
	now := r.now()
	for len(r.outcomes) < mostUntaken {
		j := r.schedule.next(now)
		if j == nil {
			break
		}
		busy = true
		r.deal(j, now)
	}
	if len(r.outcomes) > 0 {
		select {
		case r.ready <- struct{}{}:
		default:
		}
	}
	return busy, true
}

// underWay reports whether replies are outstanding.
func (r *Refresher) underWay() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.open) > 0
}

// wait returns how long until the next job is due, in ms (-1: for ever).
func (r *Refresher) wait() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.outcomes) >= mostUntaken || len(r.schedule.due) == 0 {
		return -1
	}
	left := time.Duration(r.schedule.due[0].at) - time.Duration(r.now())
	return int(max(0, left+time.Millisecond-1) / time.Millisecond)
}

// deal begins a request, checks on it again, or gives it up.
func (r *Refresher) deal(j *job, now uint64) {
	switch {
	case j.conn == nil:
		r.begin(j)
	case now >= j.deadline() && j.conn.enough:
		r.abandon(j)
	case now >= j.deadline():
		r.finish(j, probe.NoAnswer, 0)
	default:
		r.look(j)
	}
}

// handle advances the requests whose sockets have events.
func (r *Refresher) handle(events []unix.EpollEvent) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, e := range events {
		if int(e.Fd) == r.wake {
			var count [8]byte
			_, _ = unix.Read(r.wake, count[:])
			continue
		}
		if j := r.open[e.Fd]; j != nil {
			r.advance(j)
		}
	}
}

// finish ends a request with an outcome.
func (r *Refresher) finish(j *job, event probe.Event, status int) {
	now := r.now()
	o := probe.Outcome{
		Port: j.Endpoint.Port, Kind: j.Endpoint.Kind, Request: j.request, Question: j.Question, Text: j.Request,
		Event: event, Status: status, ObservedAt: now, Duration: time.Duration(now - j.began), Refresh: true,
	}
	if event == probe.NoAnswer {
		o.Duration = max(o.Duration, j.Timeout)
	}
	r.outcomes = append(r.outcomes, Outcome{j.pod.id, o})
	r.abandon(j)
}

// abandon ends a request without an outcome.
func (r *Refresher) abandon(j *job) {
	r.hangUp(j)
	r.schedule.end(j, r.now())
}

// hangUp closes the job's connection, if it has one.
func (r *Refresher) hangUp(j *job) {
	if j.conn == nil {
		return
	}
	r.settle(j)
	delete(r.open, int32(j.conn.fd))
	_ = unix.Close(j.conn.fd)
	j.conn = nil
}
