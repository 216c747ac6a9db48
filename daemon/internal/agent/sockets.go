package agent

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
)

// openFunc opens a non-blocking TCP socket of an address family, in the node's network namespace.
type openFunc func(family int) (fd int, err error)

func openSocket(family int) (fd int, err error) {
	return unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
}

// ownSockets opens sockets whose connections are never taken for a probe's, whoever the prober is: the kernel side is told of each
// before it connects. Later packets of a connection that was passed on are passed on too. It implements refresh.Sockets.
type ownSockets struct {
	datapath *datapath.Datapath
	open     openFunc
	opened   func() // is called for each
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

// Done implements refresh.Sockets. A socket that cannot be forgotten does no harm: no other one ever has its cookie, and the
// least used go first.
func (o ownSockets) Done(cookie uint64) { _ = o.datapath.ForgetSocket(cookie) }
