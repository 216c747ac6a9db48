package agent

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
)

// openFunc opens a non-blocking TCP socket in the node's network namespace.
type openFunc func(family int) (fd int, err error)

func openSocket(family int) (fd int, err error) {
	return unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
}

// ownSockets opens sockets whose connections are always passed to the pod, whoever the prober is: the kernel learns of each before it
// connects. It implements refresh.Sockets.
type ownSockets struct {
	datapath *datapath.Datapath
	open     openFunc
	opened   func() // called for each socket
}

// Open implements refresh.Sockets.
func (o ownSockets) Open(family int) (fd int, cookie uint64, err error) {
	fd, err = o.open(family)
	if err != nil {
		return 0, 0, fmt.Errorf("socket: %w", err)
	}
	cookie, err = unix.GetsockoptUint64(fd, unix.SOL_SOCKET, unix.SO_COOKIE)
	if err == nil {
		err = o.datapath.ExemptSocket(cookie)
	}
	if err != nil {
		return 0, 0, errors.Join(fmt.Errorf("exempting a socket: %w", err), unix.Close(fd))
	}
	o.opened()
	return fd, cookie, nil
}

// Done implements refresh.Sockets. Failing to forget a socket does no harm: cookies are never reused, and the map evicts the least
// recently used.
func (o ownSockets) Done(cookie uint64) { _ = o.datapath.ForgetSocket(cookie) }
