// Package bench measures the costs and savings of probelet, and compares them with their marks.
package bench

import (
	"math/rand/v2"
	"slices"
)

// median returns the middle value, or the mean of the two middle values. It panics without values.
func median(values []float64) float64 {
	s := slices.Sorted(slices.Values(values))
	return (s[(len(s)-1)/2] + s[len(s)/2]) / 2
}

// quotients divides values of the same round.
func quotients(values, by []float64) []float64 {
	q := make([]float64, len(values))
	for i := range values {
		q[i] = values[i] / by[i]
	}
	return q
}

// differences subtracts values of the same round.
func differences(values, minus []float64) []float64 {
	d := make([]float64, len(values))
	for i := range values {
		d[i] = values[i] - minus[i]
	}
	return d
}

// estimate is a statistic over some rounds, with its 95 % confidence interval.
type estimate struct {
	value, low, high float64
	rounds           int
}

// exactly returns the estimate for a single count.
func exactly(value float64) estimate { return estimate{value, value, value, 1} }

const resamples = 1000

// bootstrap estimates a statistic. of computes it from rounds given by index; drawing whole rounds instead of values keeps
// values together that were measured together. The interval is that of the percentile bootstrap (Efron and Tibshirani, An
// Introduction to the Bootstrap, section 13.3).
func bootstrap(rounds int, of func(picked []int) float64) estimate {
	picked := each(rounds)
	e := estimate{value: of(picked), rounds: rounds}
	random := rand.New(rand.NewPCG(1, 2)) // equal data give equal intervals
	drawn := make([]float64, resamples)
	for i := range drawn {
		for j := range picked {
			picked[j] = random.IntN(rounds)
		}
		drawn[i] = of(picked)
	}
	slices.Sort(drawn)
	e.low, e.high = drawn[resamples*25/1000], drawn[resamples*975/1000]
	return e
}

// each picks every round once.
func each(rounds int) []int {
	picked := make([]int, rounds)
	for i := range picked {
		picked[i] = i
	}
	return picked
}

// pick returns the values of the picked rounds.
func pick(values []float64, picked []int) []float64 {
	s := make([]float64, len(picked))
	for i, at := range picked {
		s[i] = values[at]
	}
	return s
}

// medianOf estimates the median of one value per round.
func medianOf(values []float64) estimate {
	return bootstrap(len(values), func(picked []int) float64 { return median(pick(values, picked)) })
}
