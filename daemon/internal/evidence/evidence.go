// Package evidence turns records of a prober's connections into outcomes: it puts each exchange together and judges it as
// the kubelet does. What was not seen whole and in order is no outcome.
package evidence

import (
	"time"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
)

const (
	// maxExchanges is above what the kernel side observes at a time, since finished ones stay for a moment.
	maxExchanges = 16384
	// maxBytes limits what is kept of all exchanges together.
	maxBytes = 16 << 20
	// abandonedAfter is when an exchange whose end was not seen is forgotten: the kernel side's own limit (OBSERVING_NS).
	abandonedAfter = 600 * time.Second
	// lingering is for how long a finished exchange is known, so that what its pod still sends begins no other.
	lingering = time.Second
	// tidyEvery is how often exchanges are looked through for those past their deadlines.
	tidyEvery = time.Second
)

// Observation is the outcome of an exchange, and the device by which it went.
type Observation struct {
	Device datapath.DeviceKey
	probe.Outcome
}

// Assembler makes observations of records. Its methods are not safe for concurrent use.
type Assembler struct {
	exchanges map[connection]*exchange
	bytes     int
	tidyAt    uint64
	doubtful  map[Doubtful]uint64 // nil: none
}

// connection identifies one, as records do.
type connection struct {
	device           datapath.DeviceKey
	owner, startedAt uint64
}

// NewAssembler returns an assembler that knows no exchange.
func NewAssembler() *Assembler { return &Assembler{exchanges: map[connection]*exchange{}} }

// Add takes the next record, and returns the outcome of its exchange if that is complete. Records may come in another order
// than that of their times, as those of different CPUs do; what comes after the end of its exchange is ignored. Nothing of
// the record is kept.
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

// exchangeOf returns the exchange that a record belongs to; nil if its beginning was not seen, or there are too many.
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

// begins reports whether the record can be the first of an exchange: the pod accepts, or either side gives the connection
// up before that. A connection that is handed over begins with its request.
func begins(r datapath.Record) bool {
	return r.TCPFlags&datapath.FlagRST != 0 || r.FromPod && r.TCPFlags&datapath.FlagSYN != 0 ||
		!r.FromPod && r.Len > 0 && r.Offset == 0
}

// ends reports whether nothing that matters follows the record: the prober has its verdict, or is not one, having asked
// what is no question.
func ends(r datapath.Record) bool {
	return r.TCPFlags&datapath.FlagRST != 0 ||
		!r.FromPod && (r.TCPFlags&datapath.FlagFIN != 0 || r.Len > 0 && r.Question == datapath.Question{})
}

// keep adds a record to its exchange, within the bounds of memory.
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

// drop forgets what the pod sent.
func (a *Assembler) drop(x *exchange) {
	a.bytes -= x.size
	x.segments, x.size = nil, 0
}

// tidy forgets exchanges past their deadlines.
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
