package differential

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
)

// capture does on the loopback device what the kernel side does on a pod's device: it records the first connection to
// each address.
type capture struct {
	fd   int
	last uint64 // time of the latest packet

	mu    sync.Mutex
	flows map[netip.AddrPort]*flow
}

// flow is one connection.
type flow struct {
	client              uint16 // port of the client
	clientISN, podISN   uint32
	startedAt, question uint64
	records             []datapath.Record
	ended               chan struct{}
}

func newCapture(t testing.TB) *capture {
	// Since Linux 6.15 a socket bound to ETH_P_IP sees a packet only after the IPv4 stack has processed it, and so possibly
	// after its consequences.
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, int(htons(unix.ETH_P_ALL)))
	must(t, err)
	must(t, unix.SetsockoptInt(fd, unix.SOL_PACKET, unix.PACKET_IGNORE_OUTGOING, 1))
	must(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 64<<20))
	must(t, unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1))
	must(t, unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}))
	c := &capture{fd: fd, flows: map[netip.AddrPort]*flow{}}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		c.run(t, stop)
	}()
	t.Cleanup(func() {
		close(stop)
		<-stopped
		_ = unix.Close(fd)
	})
	return c
}

func htons(v uint16) uint16 { return v<<8 | v>>8 }

func (c *capture) run(t testing.TB, stop chan struct{}) {
	packet, oob := make([]byte, 1<<17), make([]byte, 256)
	for {
		select {
		case <-stop:
			return
		default:
		}
		n, oobn, _, _, err := unix.Recvmsg(c.fd, packet, oob, 0)
		switch {
		case errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EINTR):
		case err != nil:
			t.Errorf("capturing: %v", err)
			return
		default:
			// The first packets may carry the time at which they were read: the kernel starts to take timestamps a moment
			// later.
			c.last = max(c.last, timeOf(oob[:oobn]))
			c.record(packet[:n], c.last)
		}
	}
}

func timeOf(oob []byte) uint64 {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil || len(messages) == 0 || messages[0].Header.Type != unix.SCM_TIMESTAMPNS {
		return uint64(time.Now().UnixNano())
	}
	seconds, ns := binary.NativeEndian.Uint64(messages[0].Data), binary.NativeEndian.Uint64(messages[0].Data[8:])
	return seconds*uint64(time.Second) + ns
}

// expect starts recording what goes to an address.
func (c *capture) expect(address netip.AddrPort) *flow {
	f := &flow{ended: make(chan struct{})}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.flows[address] = f
	return f
}

// forget stops recording, and returns what was recorded.
func (c *capture) forget(address netip.AddrPort) []datapath.Record {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.flows[address]
	delete(c.flows, address)
	return f.records
}

// record records an IPv4 packet (RFC 791) with TCP (RFC 9293).
func (c *capture) record(packet []byte, at uint64) {
	if packet[9] != unix.IPPROTO_TCP {
		return
	}
	source, _ := netip.AddrFromSlice(packet[12:16])
	destination, _ := netip.AddrFromSlice(packet[16:20])
	tcp := packet[packet[0]&15*4 : binary.BigEndian.Uint16(packet[2:])]
	payload := tcp[tcp[12]>>4*4:]
	flags := tcp[13]
	seq := binary.BigEndian.Uint32(tcp[4:])

	c.mu.Lock()
	defer c.mu.Unlock()
	client, server := binary.BigEndian.Uint16(tcp), binary.BigEndian.Uint16(tcp[2:])
	fromPod, f := false, c.flows[netip.AddrPortFrom(destination, server)]
	if f == nil {
		client, server = server, client
		fromPod, f = true, c.flows[netip.AddrPortFrom(source, server)]
	}
	switch {
	case f == nil || f.client != 0 && f.client != client:
		return
	case !fromPod && flags&datapath.FlagSYN != 0:
		f.client, f.clientISN, f.startedAt = client, seq, at
		return
	case fromPod && flags&datapath.FlagSYN != 0:
		f.podISN = seq
	}
	f.add(fromPod, flags, seq, payload, at)
}

func (f *flow) add(fromPod bool, flags uint8, seq uint32, payload []byte, at uint64) {
	if len(payload) == 0 && flags&(datapath.FlagSYN|datapath.FlagFIN|datapath.FlagRST) == 0 {
		return
	}
	r := datapath.Record{
		Owner: uint64(f.client), StartedAt: f.startedAt, ObservedAt: at, FromPod: fromPod, TCPFlags: flags,
		Offset: seq - f.clientISN - 1, Len: uint32(len(payload)),
	}
	if fromPod {
		r.Offset = seq - f.podISN - 1
	}
	if flags&datapath.FlagSYN != 0 {
		r.Offset = 0
	}
	if !fromPod && len(payload) > 0 {
		f.question = 1
	}
	r.Question = datapath.Question{Hash: f.question, Check: f.question}
	if r.Offset < datapath.MaxRecorded {
		r.Payload = append(r.Payload, payload[:min(len(payload), datapath.MaxRecorded-int(r.Offset))]...)
	}
	f.records = append(f.records, r)
	if flags&datapath.FlagRST != 0 || !fromPod && flags&datapath.FlagFIN != 0 {
		select {
		case <-f.ended:
		default:
			close(f.ended)
		}
	}
}
