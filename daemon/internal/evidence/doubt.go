package evidence

import "github.com/probelet/probelet/bpf/datapath"

// Doubt is why an exchange has no outcome; empty if it has one.
type Doubt string

// Doubts.
const (
	DoubtUnseen   Doubt = "unseen"    // part of it was not recorded
	DoubtNoProbe  Doubt = "no_probe"  // what was asked is not one whole GET request without a body
	DoubtTooLarge Doubt = "too_large" // the verdict would take more than is recorded or kept
	DoubtDisorder Doubt = "disorder"  // its packets contradict each other, or the answer came before the request
	DoubtTiming   Doubt = "timing"    // the verdict depends on how the bytes arrived, such as urgent data, or on the version of net/http
	DoubtOurs     Doubt = "ours"      // the response was itself made from evidence
)

// Doubts returns all of them.
func Doubts() []Doubt {
	return []Doubt{DoubtUnseen, DoubtNoProbe, DoubtTooLarge, DoubtDisorder, DoubtTiming, DoubtOurs}
}

// Doubtful is an exchange that has no outcome.
type Doubtful struct {
	Device datapath.DeviceKey
	Doubt  Doubt
}

// TakeDoubtful returns how many exchanges had no outcome since it was called last.
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
