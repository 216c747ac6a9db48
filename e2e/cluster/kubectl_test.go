package cluster

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/probelet/probelet/e2e/harness/kube"
)

// kubectl runs a kubectl command with the plugin in the PATH, and returns its output and exit code. kubectl itself is built
// together with the conformance tests; without it, the plugin is executed directly, which is all that kubectl would do.
func kubectl(t *testing.T, kubeconfig string, args ...string) (text string, code int) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"kubectl-probelet", "kubectl_complete-probelet"} {
		must(t, os.Symlink(filepath.Join(cluster.Bin, "probeletctl"), filepath.Join(dir, name)))
	}
	cmd := exec.Command(cluster.Tool("kubectl"), args...)
	if _, err := os.Stat(cmd.Path); err != nil {
		cmd = exec.Command(filepath.Join(dir, "kubectl-probelet"), args[1:]...)
		if args[0] == "__complete" {
			cmd = exec.Command(filepath.Join(dir, "kubectl_complete-probelet"), args[2:]...)
		}
	}
	cmd.Env = append(os.Environ(), "PATH="+dir+":"+os.Getenv("PATH"), "KUBECONFIG="+kubeconfig)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

// From a workstation, through the real API server and kubelet, to the daemon's pod.
func TestKubectl(t *testing.T) {
	if cluster.Kind {
		t.Skip("the kubeconfigs are those of the harness's own API server")
	}
	deploy(t, nil)
	pod := run(t, web("asked"))
	awaitHits(t, pod.Name, 3)
	admin := cluster.AdminKubeconfig()
	// The scheduler may list pods but not access them; a node may not even list all of them.
	scheduler, node := cluster.Kubeconfig(kube.SchedulerToken), cluster.Kubeconfig(kube.NodeToken)
	for _, test := range []struct {
		kubeconfig string
		args       string
		code       int
		says       []string
	}{
		{admin, "probelet status", 0, []string{`(?m)^` + cluster.NodeName + ` +yes +\d+ +0 +\d+ % +\d+ +\S+ +-$`, `1 of 1 node ready; \d+ pods? attached, 0 not attached; \d+ % of \d+ probes answered`}},
		{admin, "probelet status -o json", 0, []string{`"nodesWithout": \[\]`, `"ready": true`}},
		{admin, "probelet status -o wide -n " + kube.Namespace + " --node " + cluster.NodeName, 0, []string{kube.Namespace + `/asked .* HTTP :8080/healthz .* app/readiness`}},
		{admin, "probelet explain asked -n " + kube.Namespace, 0, []string{`probeletd: running`, kube.Namespace + `/asked  device`, `next probe +answered in the kernel|next probe +reaches the pod`, `observed by probe: success 200`}},
		{admin, "probelet explain nobody -n " + kube.Namespace, 4, []string{`pods "nobody" not found`}},
		{admin, "probelet doctor", 0, []string{`(?m)^` + cluster.NodeName + `$`}},
		{admin, "probelet doctor --node " + cluster.NodeName, 0, []string{`ok +kernel +Linux`, `ok +prober +the kubelet, cgroup`, `ok +daemon +process \d+, ready`}},
		{admin, "probelet stauts", 2, []string{`unknown command "stauts"`}},
		{admin, "__complete probelet explain -n " + kube.Namespace + " ask", 0, []string{`(?m)^asked$`}},
		{scheduler, "probelet status", 1, []string{cluster.NodeName + ` +no .*cannot be asked: .*forbidden`}},
		{scheduler, "probelet explain asked -n " + kube.Namespace, 5, []string{`forbidden`}},
		{node, "probelet status", 5, []string{`forbidden.*--daemon-namespace`}},
	} {
		text, code := kubectl(t, test.kubeconfig, strings.Fields(test.args)...)
		if code != test.code {
			t.Errorf("%s: exit code %d, want %d:\n%s", test.args, code, test.code, text)
		}
		for _, pattern := range test.says {
			if !regexp.MustCompile(pattern).MatchString(text) {
				t.Errorf("%s: no %s:\n%s", test.args, pattern, text)
			}
		}
	}
	undeploy(t)
	if text, code := kubectl(t, admin, "probelet", "status"); code != 3 || !strings.Contains(text, "is probelet installed?") {
		t.Errorf("without a daemon: %d\n%s", code, text)
	}
	if text := ctl(t, "explain", kube.Namespace+"/asked"); !strings.Contains(text, "NOT RUNNING") {
		t.Errorf("on the node, without a daemon:\n%s", text)
	}
}
