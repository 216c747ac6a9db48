package main

import (
	"fmt"
	"io"
	"text/tabwriter"
)

func printResults(w io.Writer, results []result) {
	_, _ = fmt.Fprintln(w)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	_, _ = fmt.Fprintln(t, "PROBE\tFAMILY\tENTRY\tN\tFAILURES\tP50 µs\tP99 µs\tTIME_WAIT HOST\tTIME_WAIT POD\tSERVER SAW\tANSWERED\t")
	for _, r := range results {
		_, _ = fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%d\t%.1f\t%.1f\t%d\t%d\t%d\t%d\t\n", r.Probe, r.Family, r.Entry, r.N,
			r.Failures, r.P50, r.P99, r.TimeWaitHost, r.TimeWaitPod, r.ServerRequests, r.Answered)
	}
	_ = t.Flush()
	_, _ = fmt.Fprintln(w)
	for i := 0; i+1 < len(results); i += 2 {
		unanswered, answered := results[i], results[i+1]
		_, _ = fmt.Fprintf(w, "%s over %s: the kernel's median answer takes 1/%.1f of the pod's\n", answered.Probe,
			answered.Family, unanswered.P50/answered.P50)
	}
}
