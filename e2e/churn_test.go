package e2e

import (
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/e2e/harness/node"
)

// Pods that come and go on a healthy node cause no warnings, in whatever order plugin, specs and servers appear, and neither
// do the connections of probes and refresh that are cut in the process.
func TestChurnWarnsOfNothing(t *testing.T) {
	s := newScene(t, node.PTP, "--refresh", "100ms")
	probes := []node.Probe{
		{Port: httpPort, Path: healthz, PeriodSeconds: 1, TimeoutSeconds: 1}, {Port: tcpPort, PeriodSeconds: 1, TimeoutSeconds: 1},
	}
	const looked = 12 * time.Second // covers two checks of the attachments
	var last []node.Probed          // deleted, but still in the specs
	n := 0
	for begin := time.Now(); time.Since(begin) < looked; n++ {
		p := s.newPod()
		specs := []node.Probed{{Pod: p.Pod, Readiness: probes}}
		must(t, s.WriteSpecs(append(last, specs...)...))
		p.makeFresh(probes...)
		p.probe(probes[0], p.IPv4, 20)
		if n%2 == 0 {
			p.Stop() // as containers do before DEL
		}
		must(t, p.Del())
		if n%3 == 0 {
			must(t, s.WriteSpecs(last...))
		}
		must(t, p.Remove())
		p.Stop()
		last = specs
	}
	log, err := os.ReadFile(s.DaemonLog())
	must(t, err)
	_, running, _ := strings.Cut(string(log), "msg=running") // earlier warnings are about the test environment
	if warnings := regexp.MustCompile(`(?m)^.*level=(WARN|ERROR).*$`).FindAllString(running, -1); len(warnings) > 0 || running == "" || n < 5 {
		t.Errorf("%d pods, %d warnings: %q", n, len(warnings), warnings)
	}
}
