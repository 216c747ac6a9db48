package attach_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
)

// attachEnv makes the test binary attach and detach until it is killed. Its value holds the network namespace, BPF directory, ifindex,
// hook and way.
const attachEnv = "PROBELET_TEST_ATTACH"

func init() {
	text, ok := os.LookupEnv(attachEnv)
	if !ok {
		return
	}
	var netns, bpfDir, hook, via string
	var ifindex int
	_, err := fmt.Sscanf(text, "%q %q %d %q %q", &netns, &bpfDir, &ifindex, &hook, &via)
	if err == nil {
		err = ns.WithNetNSPath(netns, func(ns.NetNS) error {
			return attachForever(bpfDir, attach.Target{IfIndex: ifindex, PodNetns: 4711, Hook: attach.Hook(hook)}, attach.Via(via))
		})
	}
	panic(err)
}

func attachForever(bpfDir string, target attach.Target, via attach.Via) error {
	d, err := datapath.Ensure(context.Background(), bpfDir)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		if err := attach.Attach(d, bpfDir, oddID, target, via); err != nil {
			return err
		}
		pod, err := attach.OpenPod(d, bpfDir, oddID)
		if err != nil {
			return err
		}
		if err := pod.Put(datapath.PortKey(80), datapath.Evidence{}); err != nil {
			return err
		}
		if err := attach.Detach(d, bpfDir, oddID); err != nil {
			return err
		}
	}
}

// Whenever a process is killed while it attaches or detaches, the next Detach and Prune clean up.
func TestKilledAtAnyMoment(t *testing.T) {
	kills := map[attach.Via]int{attach.ViaClsact: 60, attach.ViaAuto: 15} // most of the latter would be killed while waiting for RCU
	eachWay(t, func(_ *testing.T, w *world, way way) {
		before := w.state()
		for range kills[way.via] {
			w.kill(way)
			w.detach()
			w.must(attach.Prune(w.t.Context(), w.d, w.bpfDir))
			w.wantState(before)
			if w.t.Failed() {
				return
			}
		}
		w.attach(way)
		w.wantWhole()
	})
}

// kill starts a process that attaches and detaches, and kills it after a moment.
func (w *world) kill(way way) {
	w.t.Helper()
	child := exec.Command("/proc/self/exe")
	child.Env = append(os.Environ(), attachEnv+"="+fmt.Sprintf("%q %q %d %q %q",
		w.pod.Node.NS.Path(), w.bpfDir, w.pod.IfIndex, way.hook, way.via))
	ready, err := child.StdoutPipe()
	w.must(err)
	child.Stderr = os.Stderr
	w.must(child.Start())
	_, err = ready.Read(make([]byte, 1))
	time.Sleep(time.Duration(rand.IntN(20_000)) * time.Microsecond)
	w.must(errors.Join(err, child.Process.Kill()))
	_ = child.Wait() // killed
}
