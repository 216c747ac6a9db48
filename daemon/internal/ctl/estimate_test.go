//go:build linux

package ctl

import (
	"strings"
	"testing"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/estimate"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/store"
)

// A workstation knows what the kernel side can do.
func TestLimitsOfEstimates(t *testing.T) {
	want := probe.Limits{Request: store.Limits.Request, Records: store.Limits.Records, Live: datapath.MaxAnswers, Traffic: store.Limits.Traffic}
	if estimate.Limits != want {
		t.Errorf("%+v, want %+v", estimate.Limits, want)
	}
}

// estimate reads what kubectl prints, and nothing of this node.
func TestEstimateOfStandardInput(t *testing.T) {
	for text, want := range map[string]struct {
		code   int
		output string
	}{
		`{"kind": "List", "items": [{"kind": "Pod", "metadata": {"name": "a", "namespace": "shop"},
			"spec": {"containers": [{"name": "a", "livenessProbe": {"tcpSocket": {"port": 80}}}]}}]}`: {status.OK, "default            90 %"},
		`{"kind": "List", "items": []}`: {status.NotFound, "standard input: no pods"},
		`{"kind": "List"`:               {status.Failed, "standard input: document 1: unexpected EOF"},
	} {
		var stdout strings.Builder
		env := environment{stdin: strings.NewReader(text), stdout: &stdout, stderr: &stdout}
		err := execute(t.Context(), env, []string{"estimate", "--file", "-"})
		if code := status.Exit(&stdout, "probeletctl", err); code != want.code || !strings.Contains(stdout.String(), want.output) {
			t.Errorf("%d, want %d, and %q:\n%s", code, want.code, want.output, stdout.String())
		}
	}
}
