//go:build linux

package ctl

import (
	"fmt"
	"strings"

	"github.com/probelet/probelet/daemon/internal/evidence"
	"github.com/probelet/probelet/daemon/internal/status"
)

// inconclusive says how many connections had no certain outcome, and why; empty if there are none.
func inconclusive(reasons map[string]uint64) string {
	var total uint64
	var why []string
	for _, doubt := range evidence.Doubts() {
		if n := reasons[string(doubt)]; n > 0 {
			total += n
			why = append(why, fmt.Sprintf("%d %s", n, status.DoubtText(string(doubt))))
		}
	}
	if total == 0 {
		return ""
	}
	return fmt.Sprintf("inconclusive: %d (%s)", total, strings.Join(why, ", "))
}
