package bench

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/e2e/harness/node"
	"github.com/probelet/probelet/e2e/harness/role"
)

var (
	measure   = flag.Bool("measure", false, "measure, as root; otherwise only the suite itself is tested")
	writeRoot = flag.String("write", "", "root of the repository to write the results to; empty: only print them")
)

// machine is shared by all measurements.
var machine *node.Machine

// skipMarks is the reason why nothing is measured.
var skipMarks = "make bench measures"

func TestMain(m *testing.M) {
	role.Register(workerRole, &working{})
	role.Register(kubeletRole, &probing{})
	role.Main()
	flag.Parse()
	if err := node.Suited(); *measure && errors.Is(err, node.ErrUnsuited) && os.Getenv("CI") == "" {
		skipMarks, *measure = err.Error(), false
	}
	if !*measure {
		os.Exit(m.Run())
	}
	os.Exit(node.Run(func(inner *node.Machine) int {
		machine = inner
		if err := keepInside(); err != nil {
			fmt.Fprintln(os.Stderr, "setting up:", err)
			return 1
		}
		return m.Run()
	}))
}

// keepInside ties temporary files and named network namespaces to the machine's lifetime, even if it is interrupted. Both are
// in memory, like a node's /run.
func keepInside() error {
	temporary := filepath.Join(machine.Dir, "temporary")
	return errors.Join(
		bpftest.HideNames(), os.Mkdir(temporary, 0o755), unix.Mount("tmpfs", temporary, "tmpfs", 0, ""), os.Setenv("TMPDIR", temporary),
	)
}

// suite is a run with its results so far.
type suite struct {
	results
	began      time.Time
	section    string
	incomplete bool // a part was skipped, so the page must not be written
}

// TestMarks measures everything and compares it with the marks. A missed mark shows in the results but does not fail the
// test.
func TestMarks(t *testing.T) {
	if !*measure {
		t.Skip("all measurements: ", skipMarks)
	}
	requireTCX(t)
	s := &suite{began: time.Now()}
	s.machine = describeMachine()
	for _, m := range []struct {
		name, section string
		measure       func(*testing.T, *suite)
	}{
		{"bulk", "Bulk throughput of a pod", measureBulk},
		{"http", "HTTP of a pod", measureHTTP},
		{"latency", "Latency of answered probes", measureLatency},
		{"handover", "Latency of handed-over requests", measureHandover},
		{"cost", "Time in the BPF programs", measureCost},
		{"cni", "CNI ADD and DEL", measureCNI},
		{"throttled", "A busy pod that is throttled", measureThrottled},
		{"scale", "Memory and many pods", measureScale},
		{"ports", "The node's ports", measurePorts},
		{"policies", "A node's probes: what they cost, and how soon they detect failures", measurePolicies},
	} {
		t.Run(m.name, func(t *testing.T) {
			t.Cleanup(func() { s.incomplete = s.incomplete || t.Skipped() })
			s.section = m.section
			s.progress("%s", m.section)
			m.measure(t, s)
		})
	}
	if s.section == "" {
		t.Fatal("no such part: ", flag.Lookup("test.run").Value)
	}
	if err := s.print(os.Stdout); err != nil {
		t.Error(err)
	}
	if t.Failed() || *writeRoot == "" {
		return
	}
	if s.incomplete {
		t.Fatal("nothing is written, because a part was skipped")
	}
	if err := s.write(*writeRoot); err != nil {
		t.Error(err)
	}
}

// progress prints a message with the elapsed time.
func (s *suite) progress(format string, args ...any) {
	seconds := int(time.Since(s.began).Seconds())
	fmt.Fprintf(os.Stderr, "[%2d:%02d] %s\n", seconds/60, seconds%60, fmt.Sprintf(format, args...))
}

// add adds a row to the results and prints it.
func (s *suite) add(measure string, v, against variant, e estimate, unit string, m *mark) {
	r := newRow(measure, v, against, e, unit, m)
	r.section = s.section
	s.rows = append(s.rows, r)
	s.progress("  %s", strings.Join(r.cells(), "  "))
}

// cell adds a value to the section's matrix.
func (s *suite) cell(measure string, v variant, e estimate, unit string) {
	r := newRow(measure, v, "", e, unit, nil)
	r.section, r.cell = s.section, true
	s.rows = append(s.rows, r)
}

// rounds and window shorten measurements under -short, which shows that the suite works but measures nothing meaningful.
func rounds(n int) int {
	if testing.Short() {
		return min(n, 2)
	}
	return n
}

// window returns how long a variant is measured before the next one's turn. A machine's speed varies from second to second,
// so the windows of a pair have to be short and adjacent.
func window() time.Duration {
	if testing.Short() {
		return 30 * time.Millisecond
	}
	return 150 * time.Millisecond
}

func describeMachine() string {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return "an unknown machine"
	}
	text, _ := os.ReadFile("/proc/cpuinfo")
	cpus, model := 0, "unknown"
	for line := range strings.Lines(string(text)) {
		name, value, _ := strings.Cut(line, ":")
		switch strings.TrimSpace(name) {
		case "processor":
			cpus++
		case "model name":
			model = strings.TrimSpace(value)
		}
	}
	return fmt.Sprintf("Linux %s, %d CPUs (%s), %s", unix.ByteSliceToString(uts.Release[:]), cpus, model, time.Now().Format(time.DateOnly))
}
