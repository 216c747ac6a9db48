package bench

import (
	"math"
	"math/rand/v2"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, test := range []struct {
		values []float64
		want   float64
	}{
		{[]float64{3}, 3},
		{[]float64{3, 1}, 2},
		{[]float64{9, 1, 2}, 2},
		{[]float64{4, 1, 3, 2}, 2.5},
		{[]float64{math.Inf(1), 1, 2}, 2},
	} {
		if got := median(test.values); got != test.want {
			t.Errorf("median of %v: %v, want %v", test.values, got, test.want)
		}
	}
}

func TestMedianLeavesItsArgumentInOrder(t *testing.T) {
	values := []float64{3, 1, 2}
	if median(values); values[0] != 3 || values[1] != 1 || values[2] != 2 {
		t.Errorf("values were changed to %v", values)
	}
}

func TestPairwise(t *testing.T) {
	a, b := []float64{6, 10}, []float64{2, 5}
	if q := quotients(a, b); q[0] != 3 || q[1] != 2 {
		t.Errorf("quotients %v, want [3 2]", q)
	}
	if d := differences(a, b); d[0] != 4 || d[1] != 5 {
		t.Errorf("differences %v, want [4 5]", d)
	}
}

// A 95 % interval contains the true median in 95 of 100 trials, whatever the distribution and its outliers. With few rounds,
// this kind of interval is known to be slightly too narrow.
func TestIntervalCoversTheMedian(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	for name, source := range map[string]struct {
		draw   func() float64
		median float64
	}{
		"normal":      {func() float64 { return 1 + 0.1*random.NormFloat64() }, 1},
		"exponential": {random.ExpFloat64, math.Ln2},
		"outliers": {func() float64 {
			if random.IntN(5) == 0 {
				return 1 + 10*(random.Float64()-0.5)
			}
			return 1 + 0.1*(random.Float64()-0.5)
		}, 1},
	} {
		for _, rounds := range []int{15, 60} {
			const trials = 200
			covered := 0
			for range trials {
				values := make([]float64, rounds)
				for i := range values {
					values[i] = source.draw()
				}
				e := medianOf(values)
				if e.low > e.value || e.high < e.value || e.rounds != rounds {
					t.Fatalf("%s: %+v", name, e)
				}
				if e.low <= source.median && source.median <= e.high {
					covered++
				}
			}
			if share := float64(covered) / trials; share < 0.87 || share > 0.99 {
				t.Errorf("%s, %d rounds: the interval contains the median in %.1f %% of trials, want about 95", name, rounds, 100*share)
			}
		}
	}
}

func TestBootstrapKeepsRoundsTogether(t *testing.T) {
	// The rounds differ widely, but the pairs do not.
	var a, b []float64
	for i := range 30 {
		a, b = append(a, float64(100*i+10)), append(b, float64(100*i+5))
	}
	e := bootstrap(len(a), func(picked []int) float64 { return median(differences(pick(a, picked), pick(b, picked))) })
	if e.value != 5 || e.low != 5 || e.high != 5 {
		t.Errorf("%+v, want 5 with an empty interval", e)
	}
}
