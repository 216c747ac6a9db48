// Package differential compares what probelet considers a success with the kubelet's own prober, over real sockets.
package differential

import (
	"bytes"
	"flag"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	kubeprobe "k8s.io/kubernetes/pkg/probe"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/e2e/harness/replies"
)

var (
	count = flag.Uint64("replies", 5000, "number of replies to compare")
	first = flag.Uint64("first", 0, "seed of the first reply")
)

const atATime = 48

// stage runs a server whose reply depends on the address that is asked.
type stage struct {
	capture *capture
	port    uint16
	next    atomic.Uint32
	mu      sync.Mutex
	replies map[netip.AddrPort]replies.Reply
}

func newStage(t testing.TB) *stage {
	loopbackUp(t)
	listener, err := net.Listen("tcp4", "0.0.0.0:0")
	must(t, err)
	t.Cleanup(func() { _ = listener.Close() })
	s := &stage{
		capture: newCapture(t), port: listener.Addr().(*net.TCPAddr).AddrPort().Port(),
		replies: map[netip.AddrPort]replies.Reply{},
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go s.serve(conn.(*net.TCPConn))
		}
	}()
	return s
}

func (s *stage) serve(conn *net.TCPConn) {
	s.mu.Lock()
	at := conn.LocalAddr().(*net.TCPAddr).AddrPort()
	reply := s.replies[netip.AddrPortFrom(at.Addr().Unmap(), at.Port())]
	s.mu.Unlock()
	if !reply.Early {
		if _, err := replies.ReadRequest(conn); err != nil {
			_ = conn.Close()
			return
		}
	}
	reply.Serve(conn)
}

// play makes the kubelet's prober request the reply, and returns its verdict and what was recorded.
func (s *stage) play(t testing.TB, reply replies.Reply, timeout time.Duration) (success bool, said string, records []datapath.Record) {
	address, forget := s.at(reply)
	defer forget()
	flow := s.capture.expect(address)
	result, message, err := ask(t, address, timeout)
	select {
	case <-flow.ended:
	case <-time.After(10 * time.Second):
	}
	return result == kubeprobe.Success && err == nil, fmt.Sprintf("%s: %s (%v)", result, message, err), s.capture.forget(address)
}

// ask does what the kubelet does for one probe (pkg/kubelet/prober, runProbe).
func ask(t testing.TB, address netip.AddrPort, timeout time.Duration) (kubeprobe.Result, string, error) {
	action := &v1.HTTPGetAction{Path: "/ok", Port: intstr.FromInt32(int32(address.Port()))}
	request, err := httpprobe.NewRequestForHTTPGetAction(action, nil, address.Addr().String(), "probe")
	must(t, err)
	return httpprobe.New(false).Probe(request, timeout)
}

// taken reports whether the records are a success of a probe with this timeout.
func taken(records []datapath.Record, timeout time.Duration) bool {
	assembler := evidence.NewAssembler()
	return slices.ContainsFunc(records, func(r datapath.Record) bool {
		o, ok := assembler.Add(r)
		return ok && o.Event == probe.Answered && o.Status >= 200 && o.Status < 300 && !late([]datapath.Record{r}, timeout)
	})
}

// late reports whether the records end so late that the prober may have given up, by the daemon's own rule.
func late(records []datapath.Record, timeout time.Duration) bool {
	return slices.ContainsFunc(records, func(r datapath.Record) bool {
		return time.Duration(r.ObservedAt-r.StartedAt) >= timeout-timeout/10
	})
}

// Whatever a server replies, and whichever of its packets are lost, duplicated or reordered: if the kubelet's prober does
// not call it a success, neither do we. And if the prober does, so do we, except for replies that are left out on
// purpose.
func TestNothingElseIsASuccess(t *testing.T) {
	s := newStage(t)
	var successes atomic.Int64
	var all sync.WaitGroup
	seeds := make(chan uint64)
	for range atATime {
		all.Go(func() {
			for seed := range seeds {
				if s.compare(t, replies.Generate(seed), time.Second, rand.New(rand.NewPCG(seed, 1))) {
					successes.Add(1)
				}
			}
		})
	}
	for seed := *first; seed < *first+*count; seed++ {
		seeds <- seed
	}
	close(seeds)
	all.Wait()
	t.Logf("%d replies, %d of them successes", *count, successes.Load())
	if n := uint64(successes.Load()); n < *count/4 || n > *count*3/4 {
		t.Error("too little variety among the replies")
	}
}

// A truncated response counts as a success only if the whole response does.
func TestUnseenRestDoesNotMatter(t *testing.T) {
	successes := 0
	for seed := range uint64(20_000) {
		text := replies.Generate(seed).Text()
		event, status, doubt := evidence.Response{Bytes: text, End: evidence.Closed}.Judge()
		success := event == probe.Answered && status/100 == 2 && doubt == ""
		random := rand.New(rand.NewPCG(seed, 0))
		for range 20 {
			seen := len(text) - random.IntN(1+min(len(text), 1<<random.IntN(16)))
			for _, end := range []evidence.End{evidence.Open, evidence.Unseen} {
				event, status, doubt := evidence.Response{Bytes: text[:seen], End: end}.Judge()
				if event != probe.Answered || status/100 != 2 || doubt != "" {
					continue
				}
				successes++
				if !success {
					t.Fatalf("the first %d of %d bytes are a success, the whole is not (seed %d)", seen, len(text), seed)
				}
			}
		}
	}
	if successes < 1000 {
		t.Errorf("only %d successes", successes)
	}
}

// FuzzReply compares the prober's verdict on a reply of these bytes with ours. cuts holds the lengths of four parts; end
// is an index into ends.
func FuzzReply(f *testing.F) {
	ends := []replies.End{replies.Close, replies.HalfClose, replies.Hold, replies.Reset}
	for seed := range uint64(200) {
		reply := replies.Generate(seed)
		f.Add(reply.Text(), seed, uint8(slices.Index(ends, reply.End)))
	}
	s := newStage(f)
	f.Fuzz(func(t *testing.T, text []byte, cuts uint64, end uint8) {
		reply := replies.Reply{End: ends[int(end)%len(ends)]}
		for n := int(cuts & 0xffff); n > 0 && n < len(text) && len(reply.Parts) < 4; n = int(cuts & 0xffff) {
			reply.Parts = append(reply.Parts, replies.Part{Pause: time.Millisecond, Text: text[:n]})
			text, cuts = text[n:], cuts>>16
		}
		reply.Parts = append(reply.Parts, replies.Part{Text: text})
		s.compare(t, reply, 200*time.Millisecond, rand.New(rand.NewPCG(cuts, 1)))
	})
}

// compare plays the reply, and reports whether the prober calls it a success.
func (s *stage) compare(t *testing.T, reply replies.Reply, timeout time.Duration, random *rand.Rand) bool {
	success, said, records := s.play(t, reply, timeout)
	switch seen := taken(records, timeout); {
	case success && !seen && !late(records, timeout) && !leftOut(reply) && !cutShort(reply, records):
		t.Errorf("not recognised as a success:\n%s\n%s", reply, describe(records))
	case seen && !success:
		t.Errorf("taken for a success, although the prober says %s\n%s", said, reply)
	}
	for range 20 {
		if garbled := garble(records, random); !success && taken(garbled, timeout) {
			t.Errorf("taken for a success, although it was not seen completely and the prober says %s\n%s\n%s", said, reply, describe(garbled))
		}
	}
	return success
}

// leftOut reports whether a success may go unrecognised: it came before the request, is an answer of probelet's, is too
// long to be recorded, is an error to older versions of net/http, or depends on how its bytes arrive.
func leftOut(r replies.Reply) bool {
	text := r.Text()
	_, _, doubt := evidence.Response{Bytes: text, End: evidence.Closed}.Judge()
	return r.Early || len(text) > datapath.MaxRecorded || doubt == evidence.DoubtTiming && isLong(text) ||
		bytes.Contains(text, []byte("Cache-Status: probelet")) || bytes.Count(text, []byte("HTTP/")) > 5
}

// cutShort reports whether the prober may have closed the connection before the end of a chunked body longer than it reads.
// Whether what follows would have made it fail is then unknown.
func cutShort(r replies.Reply, records []datapath.Record) bool {
	return isLong(r.Text()) &&
		!slices.ContainsFunc(records, func(r datapath.Record) bool { return r.FromPod && r.TCPFlags&datapath.FlagFIN != 0 })
}

func isLong(text []byte) bool {
	return len(text) > 10<<10 && bytes.Contains(bytes.ToLower(text), []byte("chunked"))
}

// garble drops and repeats some records, and moves others in time past those that follow them.
func garble(records []datapath.Record, random *rand.Rand) []datapath.Record {
	var garbled []datapath.Record
	for _, r := range records {
		switch random.IntN(8) {
		case 0: // lost
		case 1:
			garbled = append(garbled, r, r)
		case 2: // recorded by another CPU
			r.ObservedAt += uint64(random.IntN(int(time.Millisecond)))
			garbled = append(garbled, r)
		default:
			garbled = append(garbled, r)
		}
	}
	return garbled
}

// describe returns a line about each record.
func describe(records []datapath.Record) string {
	var b strings.Builder
	for _, r := range records {
		fmt.Fprintf(&b, "%8d µs  from pod: %-5t  flags %2d  %d+%d, %d recorded\n", (r.ObservedAt-r.StartedAt)/1000, r.FromPod, r.TCPFlags, r.Offset, r.Len, len(r.Payload))
	}
	return b.String()
}
