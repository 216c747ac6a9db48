package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/netlinksafe"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
)

// The parts of a node come and go, and no probe fails for it.
func TestPartsComeAndGo(t *testing.T) {
	deploy(t, nil)
	pod := run(t, web("steady"))
	awaitHits(t, pod.Name, 3)
	client := startClient(t, pod)

	t.Run("daemon rolled", func(t *testing.T) {
		watch := watchSteady(t, pod)
		deploy(t, map[string]any{"podAnnotations": map[string]any{"release": "2"}})
		awaitHits(t, pod.Name, 3)
		watch.end(true)
	})
	t.Run("daemon killed", func(t *testing.T) {
		watch := watchSteady(t, pod)
		must(t, killByName("probeletd", "run"))
		awaitHits(t, pod.Name, 20)
		watch.end(true)
	})
	t.Run("daemon absent when a pod is created", func(t *testing.T) {
		watch := watchSteady(t, pod)
		must(t, cluster.Undeploy(t.Context()))
		later := run(t, web("later"))
		deploy(t, nil)
		awaitHits(t, later.Name, 3)
		for _, a := range readStatus(t).Attachments {
			if a.Pod == Namespace+"/later" && a.Adopted {
				t.Error("it was not attached at ADD, but adopted")
			}
		}
		watch.end(true)
	})
	t.Run("API server down", func(t *testing.T) {
		failed := failures(t, pod)
		hits := readStatus(t).hits(pod.Name)
		must(t, cluster.Stop("kube-apiserver", syscall.SIGKILL))
		time.Sleep(5 * time.Second)
		if now := readStatus(t).hits(pod.Name); now <= hits {
			t.Errorf("answered: %d, then %d", hits, now)
		}
		must(t, cluster.StartAPIServer())
		eventually(t, "the API server is back", time.Minute, func() bool {
			_, err := cluster.Get(t.Context(), pod)
			return err == nil
		})
		if now := failures(t, pod); now != failed {
			t.Errorf("%d probes failed meanwhile", now-failed)
		}
		watch := watchSteady(t, pod)
		awaitHits(t, pod.Name, 3)
		watch.end(true)
	})
	t.Run("kubelet restarted", func(t *testing.T) {
		watch := watchSteady(t, pod)
		for _, signal := range []os.Signal{syscall.SIGTERM, syscall.SIGKILL} {
			must(t, cluster.Stop("kubelet", signal))
			must(t, cluster.StartKubelet())
			eventually(t, "the kubelet probes", time.Minute, func() bool {
				counts, err := cluster.ProbeCounts(t.Context(), pod.Name, "app")
				return err == nil && counts["Liveness"].Successful > 3
			})
			awaitHits(t, pod.Name, 3)
		}
		counts, err := cluster.ProbeCounts(t.Context(), pod.Name, "app")
		must(t, err)
		for kind, count := range counts {
			if count.Failed > 0 {
				t.Errorf("%d probes failed: %s", count.Failed, kind)
			}
		}
		watch.end(false)
	})
	client.end()
}

// killByName kills the process whose command line has these words.
func killByName(words ...string) error {
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		return err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		line := strings.ReplaceAll(string(text), "\x00", " ")
		if strings.HasPrefix(line, "/usr/local/bin/"+strings.Join(words, " ")) {
			var pid int
			if _, err := fmt.Sscanf(file, "/proc/%d/cmdline", &pid); err != nil {
				return err
			}
			return syscall.Kill(pid, syscall.SIGKILL)
		}
	}
	return fmt.Errorf("no process %v", words)
}

// snapshot is what can be seen of probelet on a node: files with mode and contents, devices with what is attached to them.
func snapshot(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, dir := range []string{NetDir, BinDir, BPFFS} {
		must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				all[path] = "directory"
				return err
			}
			info, err := d.Info()
			if err != nil {
				return err
			}
			text := []byte(nil)
			if dir != BPFFS {
				if text, err = os.ReadFile(path); err != nil {
					return err
				}
			}
			all[path] = info.Mode().String() + " " + string(text)
			return nil
		}))
	}
	devices, err := netlinksafe.LinkList()
	must(t, err)
	for _, device := range devices {
		qdiscs, err := netlinksafe.QdiscList(device)
		must(t, err)
		kinds := ""
		for _, q := range qdiscs {
			kinds += " " + q.Type()
		}
		xdp := device.Attrs().Xdp
		all["device "+device.Attrs().Name] = fmt.Sprintf("%s, XDP %v,%s", device.Type(), xdp != nil && xdp.Attached, kinds)
	}
	for _, table := range []string{"ip_tables_names", "ip6_tables_names"} {
		text, err := os.ReadFile("/proc/net/" + table)
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Fatal(err)
		}
		all[table] = string(text)
	}
	return all
}

// churn creates and deletes pods until it is told to stop.
type churn struct {
	t     *testing.T
	stop  chan struct{}
	done  sync.WaitGroup
	count int
}

func startChurn(t *testing.T) *churn {
	t.Helper()
	c := &churn{t: t, stop: make(chan struct{})}
	c.done.Go(func() {
		for {
			select {
			case <-c.stop:
				return
			default:
			}
			c.count++
			if err := c.one(fmt.Sprintf("churn-%d", c.count)); err != nil {
				t.Errorf("pod %d that came and went: %v", c.count, err)
				return
			}
		}
	})
	return c
}

func (c *churn) one(name string) error {
	ctx := context.Background()
	pod, err := cluster.Create(ctx, web(name))
	if err != nil {
		return err
	}
	_, err = cluster.Await(ctx, pod, time.Minute, "ready", Ready)
	return errors.Join(err, cluster.Delete(ctx, pod))
}

func (c *churn) end() {
	c.t.Helper()
	close(c.stop)
	c.done.Wait()
	if text := events(c.t, nil); strings.Contains(text, "FailedCreatePodSandBox") || strings.Contains(text, "FailedKillPod") {
		c.t.Error(text)
	}
	say("%d pods came and went", c.count)
}

// Onto a node with pods, through an upgrade, and off it again: nobody notices, and nothing is left.
func TestInstallUpgradeUninstall(t *testing.T) {
	must(t, uninstall(t))
	for _, way := range []string{"copy", "dropin"} {
		t.Run(way, func(t *testing.T) {
			pod := run(t, web("before"))
			before := snapshot(t)
			watch := watchSteady(t, pod)
			client := startClient(t, pod)
			churn := startChurn(t)
			chain := map[string]any{"chain": way}

			deploy(t, map[string]any{"cni": chain})
			awaitHits(t, pod.Name, 5)
			adopted := false
			for _, a := range readStatus(t).Attachments {
				adopted = adopted || a.Pod == Namespace+"/before" && a.Adopted
			}
			if !adopted {
				t.Errorf("not adopted:\n%s", ctl(t, "status", "-o", "wide"))
			}
			deploy(t, map[string]any{"cni": chain, "podAnnotations": map[string]any{"release": "2"}})
			awaitHits(t, pod.Name, 5)
			must(t, uninstall(t))

			churn.end()
			client.end()
			watch.end(true)
			after := snapshot(t)
			for range 300 { // sandboxes of pods that have ended are removed later
				if reflect.DeepEqual(after, before) {
					break
				}
				time.Sleep(100 * time.Millisecond)
				after = snapshot(t)
			}
			if !reflect.DeepEqual(after, before) {
				for name, text := range before {
					if after[name] != text {
						t.Errorf("was %s: %s\nis %s", name, text, after[name])
					}
				}
				for name, text := range after {
					if _, ok := before[name]; !ok {
						t.Errorf("left %s: %s", name, text)
					}
				}
			}
		})
	}
}

// uninstall does what the chart says.
func uninstall(t *testing.T) error {
	t.Helper()
	if _, err := cluster.Deploy(t.Context(), map[string]any{"uninstall": true}); err != nil {
		return fmt.Errorf("%w\n%s", err, daemonLog())
	}
	err := cluster.Undeploy(t.Context())
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}

// A node that is well is called so, by a process of the host and by one of the daemon's pod; and one that is not, not.
func TestDoctor(t *testing.T) {
	daemon, err := cluster.Deploy(t.Context(), map[string]any{"mode": "answer"})
	must(t, err)
	pod := run(t, web("well"))
	awaitHits(t, pod.Name, 3)
	text := ctl(t, "doctor")
	if !strings.Contains(text, "the kubelet, cgroup") || !strings.Contains(text, "containerd, process") {
		t.Error(text)
	}
	_, id, _ := strings.Cut(daemon.Status.ContainerStatuses[0].ContainerID, "://")
	must(t, cluster.ctr("tasks", "exec", "--exec-id", "doctor", id, "/usr/local/bin/probeletctl", "doctor"))

	must(t, uninstall(t))
	out, err := exec.Command(filepath.Join(cluster.Bin, "probeletctl"), "doctor").CombinedOutput()
	for _, about := range []string{"chain", "plugin", "daemon", "prober"} {
		if err == nil || !strings.Contains(string(out), fmt.Sprintf("%-8s %s", "PROBLEM", about)) {
			t.Errorf("%s: %v\n%s", about, err, out)
		}
	}
}

// Where an attachment leaves something.
const (
	pinsDir    = BPFFS + "/probelet/v2/attachments"
	recordsDir = "/run/probelet/attachments"
)

// A pod of before, deleted while probelet is there, leaves nothing.
func TestAdoptedIsDeleted(t *testing.T) {
	must(t, uninstall(t))
	old, err := cluster.Create(t.Context(), web("adopted"))
	must(t, err)
	old = awaitReady(t, old)
	deploy(t, nil)
	awaitHits(t, old.Name, 3)
	name := attachmentOf(t, old)
	left := func(dir string) bool {
		files, err := filepath.Glob(filepath.Join(dir, name+"*"))
		must(t, err)
		return len(files) > 0
	}
	if !left(pinsDir) || !left(recordsDir) {
		t.Fatalf("%s is not pinned, or not on record", name)
	}
	must(t, cluster.Delete(t.Context(), old))
	eventually(t, "nothing of it is left", 10*time.Second, func() bool { return !left(pinsDir) && !left(recordsDir) })
}
