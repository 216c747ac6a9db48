// Command demo lets the kubelet's own prober probe pods that answer themselves, and the same pods once the kernel answers for
// them. Everything that it creates disappears when it ends.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"

	"github.com/probelet/probelet/e2e/harness/node"
	"github.com/probelet/probelet/e2e/harness/role"
)

// probesByDefault is the number of probes of each kind in each run. DEMO_N overrides it.
const probesByDefault = 10_000

func main() {
	role.Main()
	os.Exit(node.Run(func(m *node.Machine) int {
		if err := demo(m); err != nil {
			fmt.Fprintln(os.Stderr, "\nFAILED:", err)
			return 1
		}
		return 0
	}))
}

func demo(m *node.Machine) (err error) {
	n := probesByDefault
	if text := os.Getenv("DEMO_N"); text != "" {
		if n, err = strconv.Atoi(text); err != nil || n < 1 {
			return fmt.Errorf("DEMO_N %q: must be a positive number", text)
		}
	}
	s, err := setUp(m)
	if err != nil {
		return err
	}
	results, err := s.runAll(n)
	if err != nil {
		return errors.Join(err, s.tearDown())
	}
	printResults(os.Stdout, results)
	if err := s.printStatus(os.Stdout); err != nil {
		return errors.Join(err, s.tearDown())
	}
	progress("removing everything")
	err = s.tearDown()
	if file := os.Getenv("DEMO_JSON"); file != "" {
		err = errors.Join(err, writeJSON(file, results))
	}
	return errors.Join(err, verdict(results))
}

func progress(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }

func writeJSON(file string, results []result) error {
	text, err := json.MarshalIndent(map[string]any{"kernel": node.Kernel(), "runs": results}, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(file, append(text, '\n'), 0o644)
}

// verdict returns an error if a result is not as promised.
func verdict(results []result) error {
	var errs []error
	for _, r := range results {
		wrong := func(format string, args ...any) {
			errs = append(errs, fmt.Errorf("%s over %s, entry %s: %s", r.Probe, r.Family, r.Entry, fmt.Sprintf(format, args...)))
		}
		if r.Failures > 0 {
			wrong("%d of %d probes failed, the first with %q", r.Failures, r.N, r.messages)
		}
		if r.Entry == absent {
			if r.Answered > 0 {
				wrong("the kernel answered %d probes without evidence", r.Answered)
			}
			continue
		}
		passed := r.N - r.Answered
		if most := mayPass(r); passed > most {
			wrong("the kernel answered %d of %d probes", r.Answered, r.N)
		}
		if r.segments > node.SegmentsOfTCPProbe*passed || r.ServerRequests > passed {
			wrong("%d TCP segments and %d requests reached the pod for %d forwarded probes", r.segments, r.ServerRequests, passed)
		}
		if r.TimeWaitHost > passed || r.TimeWaitPod > passed {
			wrong("%d sockets are left in TIME_WAIT on the host, %d in the pod", r.TimeWaitHost, r.TimeWaitPod)
		}
	}
	return errors.Join(errs...)
}

// mayPass returns how many probes of a fresh endpoint may reach the pod. At most nine TCP probes in a row are answered, and
// none while the pod still has to accept a connection, as is often the case when probes come back to back.
func mayPass(r result) int {
	if r.Probe == "tcp" {
		return r.N / 2
	}
	return 0
}
