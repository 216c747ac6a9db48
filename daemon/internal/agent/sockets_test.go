package agent

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
)

// A socket that the kernel side could not be told of is none: it would be taken for the prober's.
func TestOwnSockets(t *testing.T) {
	bpftest.RequireRoot(t)
	maps, err := datapath.Ensure(t.Context(), bpftest.BPFDir(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = maps.Close() })
	opened, last := 0, 0
	own := ownSockets{maps, func(family int) (int, error) {
		fd, err := openSocket(family)
		last = fd
		return fd, err
	}, func() { opened++ }}
	isOpen := func(fd int) bool {
		_, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0)
		return err == nil
	}
	for _, family := range []int{unix.AF_INET, unix.AF_INET6} {
		fd, cookie, err := own.Open(family)
		if err != nil || cookie == 0 {
			t.Fatalf("cookie %d, %v", cookie, err)
		}
		own.Done(cookie)
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
			t.Errorf("flags %#x, %v", flags, err)
		}
		_ = unix.Close(fd)
	}
	if err := maps.Close(); err != nil {
		t.Fatal(err)
	}
	if fd, _, err := own.Open(unix.AF_INET); err == nil || opened != 2 || isOpen(last) {
		t.Errorf("socket %d, %v; %d were opened; left open: %t", fd, err, opened, isOpen(last))
	}
	own.open = func(int) (int, error) { return -1, unix.EMFILE }
	if _, _, err := own.Open(unix.AF_INET); !errors.Is(err, unix.EMFILE) {
		t.Errorf("got %v", err)
	}
	own.Done(1) // of maps that are closed
}
