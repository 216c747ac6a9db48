//go:build linux

package ctl

import (
	"fmt"
	"strings"

	"github.com/probelet/probelet/daemon/internal/evidence"
)

// doubtInWords describes connections whose outcome is not certain.
var doubtInWords = map[evidence.Doubt]string{
	evidence.DoubtUnseen:   "not seen whole",
	evidence.DoubtNoProbe:  "not asked as a probe asks",
	evidence.DoubtTooLarge: "longer than what is recorded",
	evidence.DoubtDisorder: "contradictory",
	evidence.DoubtTiming:   "dependent on how the answer arrived",
	evidence.DoubtOurs:     "answered by probelet elsewhere",
}

// inconclusive says how many connections had no certain outcome, and why; empty if there are none.
func inconclusive(reasons map[string]uint64) string {
	var total uint64
	var why []string
	for _, doubt := range evidence.Doubts() {
		if n := reasons[string(doubt)]; n > 0 {
			total += n
			why = append(why, fmt.Sprintf("%d %s", n, doubtInWords[doubt]))
		}
	}
	if total == 0 {
		return ""
	}
	return fmt.Sprintf("inconclusive: %d (%s)", total, strings.Join(why, ", "))
}
