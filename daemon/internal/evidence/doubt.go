package evidence

import "github.com/probelet/probelet/bpf/datapath"

// Doubt explains why an exchange has no outcome; empty if it has one.
type Doubt string

// Doubts.
const (
	DoubtUnseen   Doubt = "unseen"    // part of it was not recorded
	DoubtNoProbe  Doubt = "no_probe"  // not exactly one GET request without a body
	DoubtTooLarge Doubt = "too_large" // the verdict depends on more than is recorded or kept
	DoubtDisorder Doubt = "disorder"  // the packets contradict each other, or the answer came before the request
	DoubtTiming   Doubt = "timing"    // the verdict depends on how the bytes arrived (urgent data, for example), or on the version of net/http
	DoubtOurs     Doubt = "ours"      // the response was itself an answer of probelet's
)

// Doubts returns all doubts.
func Doubts() []Doubt {
	return []Doubt{DoubtUnseen, DoubtNoProbe, DoubtTooLarge, DoubtDisorder, DoubtTiming, DoubtOurs}
}

// Doubtful identifies exchanges without an outcome, by device and doubt.
type Doubtful struct {
	Device datapath.DeviceKey
	Doubt  Doubt
}

// TakeDoubtful returns how many exchanges had no outcome since the last call.
func (a *Assembler) TakeDoubtful() map[Doubtful]uint64 {
	taken := a.doubtful
	a.doubtful = nil
	return taken
}

func (a *Assembler) doubt(device datapath.DeviceKey, why Doubt) {
	if a.doubtful == nil {
		a.doubtful = map[Doubtful]uint64{}
	}
	a.doubtful[Doubtful{device, why}]++
}
