//go:build linux

package ctl

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/doctor"
	"github.com/probelet/probelet/daemon/internal/status"
	"github.com/probelet/probelet/daemon/internal/survey"
)

func TestMain(m *testing.M) { bpftest.RunInOwnCgroup(m.Run) }

// On a real device, another agent's program drops an answer: the commands show that, and trust resolves it.
func TestTrustOfARealDevice(t *testing.T) {
	pod := bpftest.NewNode(t).AddPod(t)
	bpfDir, stateDir := bpftest.BPFDir(t), t.TempDir()
	d, err := datapath.Ensure(t.Context(), bpfDir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	r := attach.Record{
		ContainerID: "c0ffee", IfName: "eth0", IfIndex: pod.IfIndex, HostIfName: pod.HostIfName, PodNetns: pod.Netns,
		PodNamespace: "shop", PodName: "web",
	}
	bpftest.Do(t, pod.Node.NS, func() error { return attach.Attach(d, bpfDir, r.ID(), r.Target(), attach.ViaAuto) })
	maps, err := attach.OpenPod(d, bpfDir, r.ID())
	if err != nil {
		t.Fatal(err)
	}
	now := datapath.Now()
	for _, err := range []error{
		attach.WriteRecord(stateDir, r), d.SetProber(datapath.Prober{AnyLocal: true}),
		maps.Put(datapath.PortKey(8080), datapath.Evidence{ObservedAt: now, FreshUntil: now + uint64(time.Hour)}),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	run := func(args ...string) string {
		t.Helper()
		var stdout, stderr strings.Builder
		env := environment{stdout: &stdout, stderr: &stderr, now: datapath.Now, open: survey.OpenKernel, host: doctor.ThisHost()}
		bpftest.Do(t, pod.Node.NS, func() error {
			err := execute(context.Background(), env, append(args, "--bpf-dir", bpfDir, "--state-dir", stateDir))
			if status.Code(err) == status.DaemonDown {
				return nil
			}
			return err
		})
		if stderr.Len() > 0 {
			t.Errorf("%s: %s", args[0], &stderr)
		}
		return stdout.String()
	}
	if said := run("trust", "shop/web"); said != "shop/web: nothing to do: no answer through "+pod.HostIfName+" has been tried yet\n" {
		t.Errorf("said %q", said)
	}

	bpftest.AcceptAll(pod.Listen(t, 8080))
	pod.NewDropper(t).At(t, bpftest.HostIn, 8080, bpftest.Drop{Mask: bpftest.SYN, Flags: bpftest.SYN, First: 1})
	_ = pod.Dial(t, fmt.Sprintf("%s:8080", pod.IPv4)).Close() // delayed until the SYN is repeated
	for _, args := range [][]string{{"status"}, {"explain", "shop/web"}} {
		said := run(args...)
		for _, want := range []string{"answers through " + pod.HostIfName + " stopped arriving ", "a prober repeated its SYN", "dropper at tc filter ingress, after ours"} {
			if !strings.Contains(said, want) {
				t.Errorf("%s does not say %q:\n%s", args[0], want, said)
			}
		}
	}

	if said := run("trust", "shop/web"); said != "shop/web: answers through "+pod.HostIfName+" will be tried again\n" {
		t.Errorf("said %q", said)
	}
	var said string
	for range 50 { // if the server is slow to accept, the next connection is not taken
		_ = pod.Dial(t, fmt.Sprintf("%s:8080", pod.IPv4)).Close()
		if said = run("explain", "shop/web"); strings.Contains(said, "answers through "+pod.HostIfName+" arrive") {
			return
		}
		time.Sleep(100 * time.Millisecond)
	}
	t.Errorf("%s", said)
}
