package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/refresh"
)

// dialFunc is net.Dialer.DialContext, of that dialer.
type dialFunc func(dialer *net.Dialer, ctx context.Context, network, address string) (net.Conn, error)

// asOwn makes connections that are never taken for a probe's, whoever the prober is: the kernel side is told of each
// socket before it connects. Later packets of a connection that was passed on are passed on too. The error is
// refresh.ErrNotAsked if no socket came as far as to connect. connects is called for each that does.
func asOwn(d *datapath.Datapath, dial dialFunc, connects func()) refresh.Dial {
	return func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		var cookies []uint64 // of sockets that connect
		dialer := &net.Dialer{Control: func(_, _ string, socket syscall.RawConn) error {
			cookie, err := cookieOf(socket)
			if err != nil {
				return fmt.Errorf("socket cookie: %w", err)
			}
			if err := d.ExemptSocket(cookie); err != nil {
				return fmt.Errorf("exempting the socket: %w", err)
			}
			cookies = append(cookies, cookie)
			connects()
			return nil
		}}
		conn, err = dial(dialer, ctx, network, address)
		for _, cookie := range cookies {
			_ = d.ForgetSocket(cookie) // no other socket ever has it, and the least used go first
		}
		if err != nil && cookies == nil {
			err = errors.Join(refresh.ErrNotAsked, err)
		}
		return conn, err
	}
}

func cookieOf(socket syscall.RawConn) (cookie uint64, err error) {
	control := socket.Control(func(fd uintptr) {
		cookie, err = unix.GetsockoptUint64(int(fd), unix.SOL_SOCKET, unix.SO_COOKIE)
	})
	return cookie, errors.Join(control, err)
}
