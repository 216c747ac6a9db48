package refresh

import (
	"bytes"
	"errors"
	"net/netip"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
)

const (
	// maxResponse limits how much of a reply is read, in bytes. It equals what the kernel side records of a reply, so
	// that both know the same. The kubelet reads 10 KiB of a body, and up to 10 MiB of headers (maxRespBodyLength in its
	// pkg/probe/http/http.go, maxHeaderResponseSize in net/http). A reply that exceeds this limit is ignored, so it is
	// never answered.
	maxResponse = datapath.MaxRecorded
	// eagerLooks is how often an incomplete reply is judged as soon as more of it arrives. After that it is judged at
	// intervals of lazily: a pod that sends one byte at a time is not worth a judgement of each.
	eagerLooks = 8
	lazily     = 100 * time.Millisecond
)

// conn is the connection of a request.
type conn struct {
	fd        int
	cookie    uint64 // 0 once the socket is settled
	connected bool   // and the request, if any, was sent
	watched   bool   // registered with epoll
	reply     evidence.Response
	looks     int
	paused    bool // not checked for a while
	enough    bool // what was read may satisfy the prober, depending on what follows
}

// watch registers a file descriptor with epoll, or changes its events.
func (r *Refresher) watch(operation, fd int, events uint32) error {
	return unix.EpollCtl(r.epoll, operation, fd, &unix.EpollEvent{Events: events, Fd: int32(fd)})
}

// begin opens the job's connection, and sends the request if that is possible at once.
func (r *Refresher) begin(j *job) {
	family := unix.AF_INET
	if j.Address.Is6() {
		family = unix.AF_INET6
	}
	fd, cookie, err := r.sockets.Open(family)
	if err != nil {
		r.abandon(j)
		return
	}
	j.conn = &conn{fd: fd, cookie: cookie}
	r.open[int32(fd)] = j
	// Reset the connection when closing it, as load balancers do, so that none is left in TIME_WAIT. The kernel needs to
	// buffer no more than is read.
	err = errors.Join(
		unix.SetsockoptLinger(fd, unix.SOL_SOCKET, unix.SO_LINGER, &unix.Linger{Onoff: 1}),
		unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, maxResponse),
	)
	if err != nil {
		r.abandon(j)
		return
	}
	err = unix.Connect(fd, sockaddr(netip.AddrPortFrom(j.Address, j.Endpoint.Port)))
	switch {
	case err == nil || errors.Is(err, unix.EINPROGRESS):
	case ours(err):
		r.abandon(j)
		return
	default:
		r.finish(j, eventOf(err), 0)
		return
	}
	r.schedule.plan(j, j.deadline())
	r.advance(j)
}

func sockaddr(to netip.AddrPort) unix.Sockaddr {
	if to.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(to.Port()), Addr: to.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(to.Port()), Addr: to.Addr().As16()}
}

// ours reports whether an error of connect(2) is due to a shortage on this node rather than to the pod.
func ours(err error) bool {
	return errors.Is(err, unix.EADDRNOTAVAIL) || errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOBUFS) || errors.Is(err, unix.ENOMEM)
}

// advance takes a request as far as its socket allows.
func (r *Refresher) advance(j *job) {
	if !j.conn.connected {
		r.connect(j)
		return
	}
	r.look(j)
}

// connect sends the request once the connection is established.
func (r *Refresher) connect(j *job) {
	n, err := 0, error(nil)
	asks := j.Endpoint.Kind.Keying() == probe.KeyedByRequest
	if asks {
		n, err = unix.Write(j.conn.fd, j.Request)
	} else {
		err = connected(j.conn.fd)
	}
	switch {
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENOTCONN):
		r.follow(j, unix.EPOLLOUT)
	case err != nil:
		r.finish(j, eventOf(err), 0)
	case !asks:
		r.finish(j, probe.Connected, 0)
	case n < len(j.Request):
		r.abandon(j) // the request is shorter than any empty send buffer
	default:
		j.conn.connected = true
		r.settle(j)
		r.follow(j, unix.EPOLLIN)
	}
}

// connected returns nil if a connecting socket is connected, ENOTCONN if it is still connecting, and otherwise the error
// that it met.
func connected(fd int) error {
	code, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_ERROR)
	if err == nil && code != 0 {
		err = unix.Errno(code)
	}
	if err != nil {
		return err
	}
	_, err = unix.Getpeername(fd)
	return err
}

// settle reports that the job's socket will send no more SYNs.
func (r *Refresher) settle(j *job) {
	if j.conn.cookie != 0 {
		r.sockets.Done(j.conn.cookie)
		j.conn.cookie = 0
	}
}

// follow registers the job's socket with epoll.
func (r *Refresher) follow(j *job, events uint32) {
	operation := unix.EPOLL_CTL_MOD
	if !j.conn.watched {
		operation = unix.EPOLL_CTL_ADD
	}
	if err := r.watch(operation, j.conn.fd, events); err != nil {
		r.abandon(j)
		return
	}
	j.conn.watched = true
}

// look reads what has arrived, and ends the request if the verdict is certain.
func (r *Refresher) look(j *job) {
	if j.conn.paused {
		j.conn.paused = false
		r.schedule.plan(j, j.deadline())
		if r.follow(j, unix.EPOLLIN); j.conn == nil {
			return
		}
	}
	reply := &j.conn.reply
	text := append(r.scratch[:0], reply.Bytes...)
	for len(text) < maxResponse && reply.End == evidence.Open {
		n, err := unix.Read(j.conn.fd, text[len(text):maxResponse])
		switch {
		case errors.Is(err, unix.EAGAIN):
			r.judge(j, text)
			return
		case errors.Is(err, unix.EINTR):
		case err != nil:
			r.broken(j, text, eventOf(err))
			return
		case n == 0:
			reply.End = evidence.Closed
		default:
			text = text[:len(text)+n]
		}
	}
	if reply.End == evidence.Open {
		reply.End = evidence.Unseen
	}
	r.judge(j, text)
}

// broken ends a request whose connection ended with an error. A client that reads the reply as it arrives, as the kubelet
// does, may have read all of it before the error.
func (r *Refresher) broken(j *job, text []byte, failure probe.Event) {
	event, status, doubt := evidence.Response{Bytes: text}.Judge()
	switch {
	case event == probe.NoAnswer:
		r.finish(j, failure, 0)
	case doubt != "":
		r.abandon(j)
	default:
		r.finish(j, event, status)
	}
}

// judge judges the reply so far as the kubelet does. It ends the request if the verdict is certain, and otherwise keeps
// the text.
func (r *Refresher) judge(j *job, text []byte) {
	c := j.conn
	if len(text) == len(c.reply.Bytes) && c.reply.End == evidence.Open {
		return // nothing new
	}
	if c.looks++; c.looks <= eagerLooks || c.reply.End != evidence.Open || headed(text) {
		reply := evidence.Response{Bytes: text, End: c.reply.End}
		event, status, doubt := reply.Judge()
		c.enough = event != probe.NoAnswer
		certain := c.enough && doubt != evidence.DoubtUnseen || reply.End != evidence.Open
		switch {
		case certain && doubt != "":
			r.abandon(j)
			return
		case certain:
			r.finish(j, event, status)
			return
		}
	}
	c.reply.Bytes = append(c.reply.Bytes[:0], text...)
	if c.looks >= eagerLooks {
		c.paused = true
		r.schedule.plan(j, min(r.now()+uint64(lazily), j.deadline()))
		r.follow(j, 0)
	}
}

// headed reports whether the text has a line that may end the headers. Without one a reply has no final status yet.
func headed(text []byte) bool {
	return bytes.Contains(text, []byte("\n\n")) || bytes.Contains(text, []byte("\n\r\n"))
}

// eventOf returns the event that an error means to the prober.
func eventOf(err error) probe.Event {
	var code unix.Errno
	switch {
	case errors.Is(err, unix.ECONNREFUSED), errors.Is(err, unix.ECONNRESET), errors.Is(err, unix.EPIPE):
		return probe.Reset
	case errors.As(err, &code) && code.Timeout():
		return probe.NoAnswer
	}
	return probe.Failed
}
