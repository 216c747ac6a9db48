package datapath

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
	"unsafe"

	"github.com/cilium/ebpf/ringbuf"
)

// MaxRecorded is how many bytes are recorded of what each side of a connection sends. RECORDED_MAX in bpf/abi.h.
const MaxRecorded = 16384

// Bits of Record.TCPFlags (RFC 9293, section 3.1).
const (
	FlagFIN = uint8(1)
	FlagSYN = uint8(2)
	FlagRST = uint8(4)
	FlagACK = uint8(16)
	FlagURG = uint8(32)
)

// Record is a packet of a prober's connection that was passed on to the pod, or handed over: the pod's SYN-ACK, and data, FINs
// and RSTs of both sides, repeated ones included. A connection's last record is its client's FIN or RST, or the pod's RST. It
// has none if an earlier record was lost, or if it turned out not to be a probe's: then the last is of the client's data,
// without a Question.
type Record struct {
	// Owner and StartedAt identify the connection. StartedAt is when its first SYN was seen. Times are nanoseconds of
	// CLOCK_BOOTTIME (see Now).
	Owner, StartedAt uint64
	ObservedAt       uint64
	// Question is the one that the client has asked; zero if it has asked none yet.
	Question Question
	Device   DeviceKey
	Port     uint16 // the pod's
	FromPod  bool   // otherwise the client sent it
	// Offset is the payload's in what its sender sends, and Len its length, in bytes. Both are 0 of a SYN or RST.
	Offset, Len uint32
	TCPFlags    uint8
	// Payload is what is recorded of it: the bytes at offsets below MaxRecorded. It is shorter, too, if they could not be read.
	Payload []byte
}

// Records opens the ring of records. Each record goes to one reader only, so there should be one at a time.
func (d *Datapath) Records() (*RecordReader, error) {
	ring, err := ringbuf.NewReader(d.objects.Records)
	if err != nil {
		return nil, err
	}
	return &RecordReader{ring: ring}, nil
}

// RecordReader reads records of connections.
type RecordReader struct {
	ring     *ringbuf.Reader
	raw      ringbuf.Record
	deadline time.Time
	hurried  bool // the ring's reader may have a deadline to report that was not the caller's

	mapped sync.Mutex // held while the ring is looked at without its reader's own lock, so that it is not unmapped meanwhile
	closed bool
}

// Next waits for the next record and reads it into a Record, whose Payload is valid until the next call. The error is os.ErrClosed
// after Close, and os.ErrDeadlineExceeded after the deadline.
//
// A reader that waits is woken once for each connection, at its last record.
func (r *RecordReader) Next(into *Record) error {
	if err := r.read(); err != nil {
		return err
	}
	var head probeletRecord
	const size = int(unsafe.Sizeof(head))
	sample := r.raw.RawSample
	if len(sample) < size {
		return fmt.Errorf("a record of %d bytes, at least %d are expected", len(sample), size)
	}
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&head)), size), sample)
	// The ring rounds lengths up.
	payload := sample[size:][:min(int(head.Recorded), len(sample)-size)]
	*into = Record{
		Owner: head.Owner, StartedAt: head.StartedAt, ObservedAt: head.ObservedAt,
		Question: Question{head.Question.Hash, head.Question.Check},
		Device:   head.Device, Port: head.Port, FromPod: head.FromPod != 0, Offset: head.Offset, Len: head.Len,
		TCPFlags: head.TcpFlags, Payload: payload,
	}
	return nil
}

// read waits only if there is no record. The ring's reader alone would wait to be woken even if there is one.
func (r *RecordReader) read() error {
	for {
		r.ring.SetDeadline(r.deadline)
		if r.Pending() {
			r.hurried = true
			r.ring.SetDeadline(time.Unix(1, 0))
		}
		err := r.ring.ReadInto(&r.raw)
		if !r.hurried || !errors.Is(err, os.ErrDeadlineExceeded) {
			return err
		}
		r.hurried = false
	}
}

// Pending reports whether there are records, so that Next need not wait.
func (r *RecordReader) Pending() bool {
	r.mapped.Lock()
	defer r.mapped.Unlock()
	return !r.closed && r.ring.AvailableBytes() > 0
}

// SetDeadline bounds the waiting of Next.
func (r *RecordReader) SetDeadline(t time.Time) { r.deadline = t }

// Close ends a Next that is waiting, and closes the ring. Unlike the other methods it may be called by another goroutine.
func (r *RecordReader) Close() error {
	r.mapped.Lock()
	r.closed = true
	r.mapped.Unlock()
	return r.ring.Close()
}
