package cluster

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/util/intstr"
)

func TestFirst(t *testing.T) {
	ctx := t.Context()
	out, err := exec.Command(filepath.Join(cluster.Bin, "probeletd"), "install").CombinedOutput()
	t.Logf("%s %v", out, err)
	log, _ := os.Create(filepath.Join(cluster.Dir, "pd.log"))
	tok := filepath.Join(cluster.Dir, "tok")
	os.WriteFile(tok, []byte(adminToken), 0o600)
	cmd := exec.Command(filepath.Join(cluster.Bin, "probeletd"), "run", "--kubelet-token-file", tok, "--kubelet-ca-file", "/var/lib/kubelet/pki/kubelet.crt", "--kubelet-server-name", "node1", "--cni-net-dir", NetDir)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	time.Sleep(time.Second)
	a := App("app", 8080)
	a.ReadinessProbe = HTTP("/healthz", intstr.FromInt(8080))
	a.LivenessProbe = HTTP("/healthz", intstr.FromInt(8080))
	p, err := cluster.Create(ctx, Pod("web", a))
	if err != nil {
		t.Fatal(err)
	}
	p, err = cluster.Await(ctx, p, 30*time.Second, "ready", Ready)
	if err != nil {
		t.Error(err)
	}
	time.Sleep(20 * time.Second)
	seen, err := SeenBy(ctx, p, 8080)
	t.Log(seen, err)
	counts, err := cluster.ProbeCounts(ctx, "web", "app")
	t.Log(counts, err)
	out, err = exec.Command(filepath.Join(cluster.Bin, "probeletctl"), "status", "-o", "wide").CombinedOutput()
	t.Logf("%s %v", out, err)
	text, _ := os.ReadFile(log.Name())
	t.Logf("%s", text)
	t.Log(cluster.Log("kubelet"))
}
