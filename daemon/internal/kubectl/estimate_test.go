package kubectl

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/probelet/probelet/daemon/internal/status"
)

// estimate asks the API server for pods and nothing else: there need not be a daemon.
func TestEstimate(t *testing.T) {
	file := filepath.Join(t.TempDir(), "pods.yaml")
	if err := os.WriteFile(file, []byte("kind: Pod\nmetadata: {name: a, namespace: mail}\nspec: {containers: [{name: a, livenessProbe: {exec: {command: [ls]}}}]}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		change func(s *apiServer)
		args   []string
		code   int
		want   string // of stdout or stderr, with single blanks
	}{
		"all namespaces":     {nil, nil, status.OK, "\nbank 1 1 0.10 0 0.10 100 % -\nshop 1 1 0.10 0.10 0 100 % -\nall 2 2 0.20 0.10 0.10 100 % -\n"},
		"one of them":        {nil, []string{"-n", "bank"}, status.OK, "\nbank 1 1 0.10 0.10 100 % -\n"},
		"none there":         {nil, []string{"-n", "mail"}, status.NotFound, ": no pods in namespace mail\n"},
		"none at all":        {func(s *apiServer) { s.pods = nil }, nil, status.NotFound, ": no pods\n"},
		"all and one":        {nil, []string{"-A", "-n", "bank"}, status.Usage, `--namespace "bank", --all-namespaces: must be one or the other`},
		"no rights":          {func(s *apiServer) { s.forbidden = []string{"/api/v1/pods"} }, nil, status.NotAllowed, "select a namespace whose pods you may list with --namespace, or"},
		"no rights there":    {func(s *apiServer) { s.forbidden = []string{"/api/v1/namespaces/bank/pods"} }, []string{"-n", "bank"}, status.NotAllowed, "with --file"},
		"rights there":       {func(s *apiServer) { s.forbidden = []string{"/api/v1/pods"} }, []string{"-n", "bank"}, status.OK, "\nbank 1 1"},
		"a file":             {func(s *apiServer) { s.Close() }, []string{"-f", file}, status.OK, "\nmail 1 1 0.10 0.10 0 % kind: 1 (0.10/s)\n"},
		"a file's namespace": {nil, []string{"-f", file, "-n", "bank"}, status.NotFound, `--file "` + file + "\": no pods in namespace bank\n"},
		"file and context":   {nil, []string{"-f", file, "--context", "x"}, status.Usage, `--file "` + file + `": cannot be combined with --context "x"`},
		"no such file":       {nil, []string{"-f", file + "x"}, status.Failed, `: --file "` + file + "x\": no such file or directory\n"},
		"a directory":        {nil, []string{"-f", "."}, status.Failed, ": --file \".\": is a directory\n"},
		"no such format":     {nil, []string{"-o", "xml"}, status.Usage, `--output "xml": must be one of table|wide|json`},
		"argument":           {nil, []string{"shop"}, status.Usage, `unknown command "shop"`},
		"unreachable":        {func(s *apiServer) { s.Close() }, nil, status.Failed, "refused"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newAPIServer(t)
			web, bank := s.pod("shop", "web", "node1"), s.pod("bank", "safe", "node2")
			web.Spec.Containers = []corev1.Container{{Name: "c", ReadinessProbe: &corev1.Probe{
				ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt32(80)}}, PeriodSeconds: 10,
			}}}
			bank.Spec.Containers = []corev1.Container{{Name: "c", LivenessProbe: &corev1.Probe{
				ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(80)}}, PeriodSeconds: 10,
			}}}
			if test.change != nil {
				test.change(s)
			}
			stdout, stderr, code := s.run(append([]string{"estimate"}, test.args...)...)
			var lines []string
			for line := range strings.Lines(stdout + stderr) {
				lines = append(lines, strings.Join(strings.Fields(line), " "))
			}
			if text := strings.Join(lines, "\n") + "\n"; code != test.code || !strings.Contains(text, test.want) {
				t.Errorf("%d, want %d, and %q:\n%s", code, test.code, test.want, text)
			}
		})
	}
}
