package crosscheck

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"strings"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// Worker is one probe of one container, which the kubelet counts separately.
type Worker struct {
	Namespace, Pod, UID, Container string
	Type                           probe.Type
}

// Verdicts counts the probes of a worker that succeeded and failed, according to the kubelet, since it probes the pod. A probe that ends in
// an error, such as a truncated body, counts as neither: the kubelet retries up to three times, and then discards it
// (pkg/kubelet/prober: runProbeWithRetries in prober.go, doProbe in worker.go).
type Verdicts struct{ Succeeded, Failed uint64 }

func (v Verdicts) plus(w Verdicts) Verdicts {
	return Verdicts{v.Succeeded + w.Succeeded, v.Failed + w.Failed}
}

func (v Verdicts) below(w Verdicts) bool { return v.Succeeded < w.Succeeded || v.Failed < w.Failed }

// metric is the kubelet's counter, with labels probe_type (Liveness, …), result (successful, failed, unknown), container,
// pod, namespace and pod_uid (ProberResults in pkg/kubelet/prober/prober_manager.go). It disappears with the worker.
const metric = "prober_probe_total"

// maxLine is the longest line of a response, in bytes.
const maxLine = 64 << 10

// parse reads the kubelet's response at /metrics/probes. A worker appears once a probe of it was counted.
func parse(answer io.Reader) (map[Worker]Verdicts, error) {
	// Most of the response is histograms, which are not worth parsing.
	var lines bytes.Buffer
	scanner := bufio.NewScanner(answer)
	scanner.Buffer(nil, maxLine)
	for scanner.Scan() {
		if bytes.HasPrefix(scanner.Bytes(), []byte(metric+"{")) {
			lines.Write(scanner.Bytes())
			lines.WriteByte('\n')
		}
	}
	if err := scanner.Err(); err != nil {
		return nil, err
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(&lines)
	if err != nil {
		return nil, err
	}
	all := map[Worker]Verdicts{}
	for _, m := range families[metric].GetMetric() {
		labels := map[string]string{}
		for _, l := range m.GetLabel() {
			labels[l.GetName()] = l.GetValue()
		}
		worker := Worker{
			labels["namespace"], labels["pod"], labels["pod_uid"], labels["container"],
			probe.Type(strings.ToLower(labels["probe_type"])),
		}
		one := Verdicts{Failed: uint64(m.GetUntyped().GetValue())}
		switch labels["result"] {
		case "successful":
			one = Verdicts{Succeeded: one.Failed}
		case "failed", "unknown":
		default:
			return nil, fmt.Errorf("%s: unknown result %q", metric, labels["result"])
		}
		all[worker] = all[worker].plus(one)
	}
	return all, nil
}
