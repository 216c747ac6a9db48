package probe

import (
	"math"
	"time"
)

// The API server admits periods and timeouts of up to 68 years, and as many failures. Products and sums of them are limited to longest,
// rather than becoming negative.
const longest = time.Duration(math.MaxInt64)

func times(n int, d time.Duration) time.Duration {
	if n > 0 && d > longest/time.Duration(n) {
		return longest
	}
	return time.Duration(n) * d
}

func sum(durations ...time.Duration) (total time.Duration) {
	for _, d := range durations {
		total += min(d, longest-total)
	}
	return total
}
