package datapath

import (
	"fmt"
	"strings"
	"time"

	"github.com/cilium/ebpf"
)

// CounterNames lists the names of the counters in the order of enum counter in bpf/abi.h.
var CounterNames = [probeletCounterCOUNT_MAX]string{
	"answered_http", "answered_tcp", "observed", "handed_over", "passed_not_fresh", "passed_not_probed",
	"passed_not_parsable", "passed_not_prober", "passed_own", "passed_untrusted", "passed_full", "dropped",
	"records_lost", "flows_expired", "devices_lost",
	"withdrawn_listener_closed", "withdrawn_reset", "withdrawn_status",
	"passed_no_listener", "passed_queue_long", "passed_head_old", "passed_special", "passed_real_due",
	"passed_unanswered",
}

// ProbeVerdict classifies the counters of a prober's connections, which together count each connection once. verdict is "answered" or
// "passed" (to the pod), reason is the kind of answer or the reason for passing. ok is false for all other counters.
func ProbeVerdict(counter string) (verdict, reason string, ok bool) {
	switch counter {
	case "handed_over":
		return "passed", counter, true
	case "passed_not_prober", "passed_own":
		return "", "", false
	}
	verdict, reason, _ = strings.Cut(counter, "_")
	if verdict != "answered" && verdict != "passed" {
		return "", "", false
	}
	return verdict, reason, true
}

// Counters returns the counters by name, summed over all CPUs.
func (d *Datapath) Counters() (map[string]uint64, error) {
	all, err := sums(d.objects.Counters, len(CounterNames))
	if err != nil {
		return nil, fmt.Errorf("counters: %w", err)
	}
	counters := make(map[string]uint64, len(CounterNames))
	for i, name := range CounterNames {
		counters[name] = all[i]
	}
	return counters, nil
}

func (d *Datapath) counter(index probeletCounter) (uint64, error) {
	value, err := sum(d.objects.Counters, uint32(index))
	if err != nil {
		return 0, fmt.Errorf("counters: %w", err)
	}
	return value, nil
}

// Unrecorded returns how many connections of probers were not, or not completely, recorded for lack of space.
func (d *Datapath) Unrecorded() (uint64, error) {
	full, err := d.counter(probeletCounterCOUNT_PASSED_FULL)
	if err != nil {
		return 0, err
	}
	lost, err := d.counter(probeletCounterCOUNT_RECORDS_LOST)
	return full + lost, err
}

// AnswerAgeBounds lists the upper bounds, in seconds, of all buckets of AnswerAges but the last (AGE_BOUNDS in bpf/abi.h).
var AnswerAgeBounds = [probeletAgeAGE_BOUNDED]float64{0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300}

// AnswerAges is a histogram of the age of the evidence that answers were based on.
type AnswerAges struct {
	// Buckets counts answers by age. The last bucket is unbounded. Buckets are not cumulative.
	Buckets [len(AnswerAgeBounds) + 1]uint64
	Sum     time.Duration // sum of all ages
}

// AnswerAges returns the ages of all answers since the programs were loaded.
func (d *Datapath) AnswerAges() (AnswerAges, error) {
	all, err := sums(d.objects.AnswerAges, int(probeletAgeAGE_MAX))
	if err != nil {
		return AnswerAges{}, fmt.Errorf("ages of answers: %w", err)
	}
	return AnswerAges{[len(AnswerAgeBounds) + 1]uint64(all), time.Duration(all[probeletAgeAGE_SUM])}, nil
}

// Fill describes how full a map is.
type Fill struct{ Entries, Max int }

// Fills returns the fill of the maps that can run full: "flows" (connections) and "pods" (devices).
func (d *Datapath) Fills() (map[string]Fill, error) {
	flows, err := d.Flows()
	if err != nil {
		return nil, fmt.Errorf("flows: %w", err)
	}
	devices, err := d.Devices()
	if err != nil {
		return nil, err
	}
	return map[string]Fill{
		"flows": {flows, int(d.objects.Flows.MaxEntries())},
		"pods":  {len(devices), int(d.objects.Devices.MaxEntries())},
	}, nil
}

// sums returns the first n elements of a per-CPU array, each summed over all CPUs.
func sums(array *ebpf.Map, n int) (sums []uint64, err error) {
	sums = make([]uint64, n)
	for i := range sums {
		if sums[i], err = sum(array, uint32(i)); err != nil {
			return nil, err
		}
	}
	return sums, nil
}

func sum(array *ebpf.Map, index uint32) (sum uint64, err error) {
	var perCPU []uint64
	if err := array.Lookup(index, &perCPU); err != nil {
		return 0, err
	}
	for _, value := range perCPU {
		sum += value
	}
	return sum, nil
}
