package main

import (
	"context"
	"errors"
	"net"
	"testing"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/refresh"
)

// asOwnOn returns a dialer whose maps fail from when they are closed, and an address that accepts.
func asOwnOn(t *testing.T, dial func(maps *datapath.Datapath) dialFunc) (refresh.Dial, *datapath.Datapath, string) {
	t.Helper()
	bpftest.RequireRoot(t)
	maps, err := datapath.Ensure(t.Context(), bpftest.BPFDir(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = maps.Close() })
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = listener.Close() })
	return asOwn(maps, dial(maps), func() {}), maps, listener.Addr().String()
}

func plain(*datapath.Datapath) dialFunc { return (*net.Dialer).DialContext }

// A socket that cannot be forgotten is no harm, and no reason to lose the connection.
func TestOwnNotForgotten(t *testing.T) {
	dial, _, address := asOwnOn(t, func(maps *datapath.Datapath) dialFunc {
		return func(dialer *net.Dialer, ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := dialer.DialContext(ctx, network, address)
			return conn, errors.Join(err, maps.Close())
		}
	})
	conn, err := dial(t.Context(), "tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	_ = conn.Close()
}

// Failures of ours are told apart from those of the pod.
func TestOwnNotAsked(t *testing.T) {
	dial, maps, address := asOwnOn(t, plain)
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refusing := listener.Addr().String()
	_ = listener.Close()
	if conn, err := dial(t.Context(), "tcp", refusing); err == nil || errors.Is(err, refresh.ErrNotAsked) {
		t.Errorf("refused: %v, %v", conn, err)
	}
	if conn, err := dial(t.Context(), "tcp", address); err != nil {
		t.Errorf("accepted: %v", err)
	} else {
		_ = conn.Close()
	}
	if err := maps.Close(); err != nil {
		t.Fatal(err)
	}
	if conn, err := dial(t.Context(), "tcp", address); !errors.Is(err, refresh.ErrNotAsked) {
		t.Errorf("not exempted: %v, %v", conn, err)
	}
}
