// Package evidence turns records of a prober's connections into outcomes: it assembles each exchange, and judges it as
// the kubelet does. An exchange that was not seen completely and in order has no outcome.
package evidence

import (
	"time"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
)

const (
	// maxExchanges exceeds what the kernel side observes at a time, because finished exchanges are kept for a moment.
	maxExchanges = 16384
	// maxBytes limits the memory for all exchanges together.
	maxBytes = 16 << 20
	// abandonedAfter is when an exchange is dropped whose end was not seen; the kernel side has the same limit
	// (OBSERVING_NS).
	abandonedAfter = 600 * time.Second
	// lingering is how long a finished exchange is remembered, so that late packets of its pod do not begin another one.
	lingering = time.Second
	// tidyEvery is how often expired exchanges are dropped.
	tidyEvery = time.Second
)

// Observation is the outcome of an exchange, and the device that it passed.
type Observation struct {
	Device datapath.DeviceKey
	probe.Outcome
}

// Assembler turns records into observations. Its methods are not safe for concurrent use.
type Assembler struct {
	exchanges map[connection]*exchange
	bytes     int
	tidyAt    uint64
	doubtful  map[Doubtful]uint64 // nil if there are none
}

// connection identifies a connection as records do.
type connection struct {
	device           datapath.DeviceKey
	owner, startedAt uint64
}

// NewAssembler returns an assembler without exchanges.
func NewAssembler() *Assembler { return &Assembler{exchanges: map[connection]*exchange{}} }

// Add adds a record, and returns the outcome of its exchange if that is complete. Records may arrive out of order, as
// those of different CPUs do; records after the end of their exchange are ignored. Add does not retain the record.
func (a *Assembler) Add(r datapath.Record) (o Observation, ok bool) {
	a.tidy(r.ObservedAt)
	x := a.exchangeOf(r)
	if x == nil || x.finished {
		return o, false
	}
	a.keep(x, r)
	if !ends(r) {
		return o, false
	}
	outcome, doubt := x.outcome(r)
	if doubt != "" {
		a.doubt(r.Device, doubt)
	}
	a.drop(x)
	x.finished, x.deadline = true, r.ObservedAt+uint64(lingering)
	return Observation{r.Device, outcome}, doubt == ""
}

// exchangeOf returns the exchange of a record, or nil if its beginning was not seen or there are too many.
func (a *Assembler) exchangeOf(r datapath.Record) *exchange {
	key := connection{r.Device, r.Owner, r.StartedAt}
	if x := a.exchanges[key]; x != nil {
		return x
	}
	full := len(a.exchanges) >= maxExchanges
	if !begins(r) || full {
		switch {
		case !ends(r):
		case full:
			a.doubt(r.Device, DoubtTooLarge)
		default:
			a.doubt(r.Device, DoubtUnseen)
		}
		return nil
	}
	x := &exchange{deadline: r.ObservedAt + uint64(abandonedAfter)}
	a.exchanges[key] = x
	return x
}

// begins reports whether the record can be the first of an exchange: the pod accepts, or either side gives up the
// connection before that. A connection that is handed over begins with its request.
func begins(r datapath.Record) bool {
	return r.TCPFlags&datapath.FlagRST != 0 || r.FromPod && r.TCPFlags&datapath.FlagSYN != 0 ||
		!r.FromPod && r.Len > 0 && r.Offset == 0
}

// ends reports whether nothing relevant can follow the record: the prober has its verdict, or it is none, because what it
// sent is no question.
func ends(r datapath.Record) bool {
	return r.TCPFlags&datapath.FlagRST != 0 ||
		!r.FromPod && (r.TCPFlags&datapath.FlagFIN != 0 || r.Len > 0 && r.Question == datapath.Question{})
}

// keep adds a record to its exchange, within the memory limits.
func (a *Assembler) keep(x *exchange, r datapath.Record) {
	before := x.size
	x.add(r)
	a.bytes += x.size - before
	if x.doubt == "" && a.bytes > maxBytes {
		x.doubt = DoubtTooLarge
	}
	if x.doubt != "" {
		a.drop(x)
	}
}

// drop releases what the pod sent.
func (a *Assembler) drop(x *exchange) {
	a.bytes -= x.size
	x.segments, x.size = nil, 0
}

// tidy drops expired exchanges.
func (a *Assembler) tidy(now uint64) {
	if now < a.tidyAt {
		return
	}
	a.tidyAt = now + uint64(tidyEvery)
	for key, x := range a.exchanges {
		if x.deadline > now {
			continue
		}
		if !x.finished {
			a.doubt(key.device, DoubtUnseen)
		}
		a.drop(x)
		delete(a.exchanges, key)
	}
}
