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

// MaxRecorded is the maximum number of bytes recorded of what each side of a connection sends. RECORDED_MAX in bpf/abi.h.
const MaxRecorded = 16384

// Bits of Record.TCPFlags (RFC 9293, section 3.1).
const (
	FlagFIN = uint8(1)
	FlagSYN = uint8(2)
	FlagRST = uint8(4)
	FlagACK = uint8(16)
	FlagURG = uint8(32)
)

// Record describes a packet of a prober's connection that was passed on to the pod or handed over: the pod's SYN-ACK, and data,
// FINs and RSTs of both sides, including repeated ones. The last record of a connection is the client's FIN or RST, or the pod's
// RST. There is no such record if an earlier one was lost, or if the connection turned out not to be a probe. In the latter case
// the last record is of the client's data, without a Question.
type Record struct {
	// Owner and StartedAt identify the connection, which started with its first SYN. Times are nanoseconds of CLOCK_BOOTTIME
	// (see Now).
	Owner, StartedAt uint64
	ObservedAt       uint64
	// Question is what the client has asked; zero if nothing yet.
	Question Question
	Device   DeviceKey
	Port     uint16 // of the pod
	FromPod  bool   // false: from the client
	// Offset is the position of the payload in the sender's data, and Len its length, in bytes. Both are 0 for a SYN or RST.
	Offset, Len uint32
	TCPFlags    uint8
	// Payload is the recorded part of the payload: the bytes at offsets below MaxRecorded, or fewer if they were unreadable.
	Payload []byte
}

// Records opens the ring of records. Each record goes to only one reader, so there should be only one at a time.
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
	hurried  bool // the ring's reader may report a deadline that the caller did not set

	mapped sync.Mutex // keeps the ring mapped while it is accessed without the lock of its reader
	closed bool
}

// Next waits for the next record and reads it into a Record, whose Payload is valid until the next call. The error is os.ErrClosed
// after Close, and os.ErrDeadlineExceeded after the deadline.
//
// A waiting reader is woken once per connection, at its last record.
func (r *RecordReader) Next(into *Record) error {
	if err := r.read(); err != nil {
		return err
	}
	var head probeletRecord
	const size = int(unsafe.Sizeof(head))
	sample := r.raw.RawSample
	if len(sample) < size {
		return fmt.Errorf("record of %d bytes: must be at least %d", len(sample), size)
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

// read waits only if there is no record. The ring's reader on its own would wait for a wakeup even if there is one.
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

// Pending reports whether there are records, so that Next would not wait.
func (r *RecordReader) Pending() bool {
	r.mapped.Lock()
	defer r.mapped.Unlock()
	return !r.closed && r.ring.AvailableBytes() > 0
}

// SetDeadline limits how long Next waits.
func (r *RecordReader) SetDeadline(t time.Time) { r.deadline = t }

// Close interrupts a waiting Next and closes the ring. Unlike the other methods, it may be called from another goroutine.
func (r *RecordReader) Close() error {
	r.mapped.Lock()
	r.closed = true
	r.mapped.Unlock()
	return r.ring.Close()
}
