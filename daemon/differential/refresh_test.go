package differential

import (
	"math/rand/v2"
	"net/netip"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	kubeprobe "k8s.io/kubernetes/pkg/probe"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/refresh"
	"github.com/probelet/probelet/e2e/harness/replies"
)

// sockets opens ordinary sockets, and counts them.
type sockets struct{ opened atomic.Int32 }

func (s *sockets) Open(family int) (fd int, cookie uint64, err error) {
	s.opened.Add(1)
	fd, err = unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	return fd, 1, err
}

func (s *sockets) Done(uint64) {}

// refreshed reports whether the daemon's own request would be a success of a probe with this timeout. A request without
// an outcome is repeated, which ends the wait.
func refreshed(t testing.TB, at netip.AddrPort, timeout time.Duration) bool {
	s := &sockets{}
	r, err := refresh.New(s, datapath.Now)
	must(t, err)
	defer r.Close()
	r.Set(attach.ID{}, []refresh.Target{{
		Endpoint: probe.Endpoint{Port: at.Port(), Kind: probe.HTTP, Path: "/ok"}, Address: at.Addr(),
		Request: []byte("GET /ok HTTP/1.1\r\nHost: h\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n"),
		Timeout: timeout, Interval: time.Millisecond,
	}})
	for s.opened.Load() < 2 {
		select {
		case <-r.C:
			o := r.Take()[0]
			return o.Event == probe.Answered && o.Status >= 200 && o.Status < 300 && o.Duration < timeout-timeout/10
		case <-time.After(time.Millisecond):
		}
	}
	return false
}

// at serves a reply, and returns its address; forget stops that.
func (s *stage) at(reply replies.Reply) (at netip.AddrPort, forget func()) {
	n := s.next.Add(1)
	at = netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 1, byte(n >> 8), byte(n)}), s.port)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.replies[at] = reply
	return at, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.replies, at)
	}
}

// Whatever a server replies: the daemon's own request never succeeds where the kubelet's prober fails.
func TestRefreshIsNoMoreLenient(t *testing.T) {
	const timeout = time.Second
	s := newStage(t)
	var successes, missed atomic.Int64
	var all sync.WaitGroup
	seeds := make(chan uint64)
	for range atATime {
		all.Go(func() {
			for seed := range seeds {
				reply := replies.Generate(seed)
				if reply.Racy() { // the verdict is a matter of chance
					continue
				}
				at, forget := s.at(reply)
				for attempt := 0; ; attempt++ { // on a busy machine either of them may be late
					result, said, err := ask(t, at, timeout)
					success, seen := result == kubeprobe.Success && err == nil, refreshed(t, at, timeout)
					if success {
						successes.Add(1)
					}
					if success && !seen && !leftOut(reply) {
						missed.Add(1)
					}
					if success || !seen {
						break
					}
					if attempt == 2 {
						t.Errorf("taken for a success, although the prober says %s: %s (%v)\n%s", result, said, err, reply)
						break
					}
				}
				forget()
			}
		})
	}
	n := *count * 2 / 5
	for seed := range n {
		seeds <- *first + seed
	}
	for range 20 {
		seeds <- replies.Healthy + rand.Uint64N(1000)
	}
	close(seeds)
	all.Wait()
	t.Logf("%d replies, %d of them successes, %d of which were not recognised", n, successes.Load(), missed.Load())
	if got := uint64(successes.Load()); got < n/4 || uint64(missed.Load()) > n/25 {
		t.Error("too few successes")
	}
}
