package agent

import (
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/bpftest"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/repair/repairtest"
)

// The program that makes the answers is gone, which nothing notifies the daemon of. One probe is held up until its client repeats
// the SYN; then the kernel takes none any more, until a person says so.
func TestAnswersThatDoNotArrive(t *testing.T) {
	n := newNode(t)
	n.config.Hook = attach.HookXDP
	n.specs("httpGet: {path: /healthz, port: 8080}, " + long)
	n.attach()
	logged := n.keepLog()
	n.start()
	n.makeFresh()
	n.want("/healthz", 200, true)
	if trust := n.device().Trust; trust != datapath.TrustProven {
		t.Fatalf("trust %d after an answer", trust)
	}

	n.detach("respond")
	n.want("/healthz", 200, false)
	if d := n.device(); d.Trust != datapath.TrustLost || d.Loss != "syn_repeated" {
		t.Fatalf("%+v", d)
	}
	n.want("/healthz", 200, false)
	n.wantMetrics(map[string]string{
		`probelet_untrusted_devices{noticed="syn_repeated"}`:         "1",
		`probelet_untrusted_devices{noticed="unacknowledged"}`:       "0",
		`probelet_untrusted_devices{noticed="unobserved"}`:           "0",
		`probelet_probes_total{reason="untrusted",verdict="passed"}`: "1",
	})
	n.eventually("said", func() bool { return logged("answers do not arrive") > 0 })

	n.attachRespond()
	if err := n.d.TrustAgain(n.device().Key); err != nil {
		t.Fatal(err)
	}
	n.want("/healthz", 200, true)
	n.eventually("said", func() bool { return logged("trying answers by the device again") > 0 })
	if n := logged("answers do not arrive"); n != 1 {
		t.Errorf("said %d times, through several looks", n)
	}
	n.wantMetrics(map[string]string{`probelet_untrusted_devices{noticed="syn_repeated"}`: "0"})
}

func (n *node) attachRespond() {
	n.t.Helper()
	bpftest.Do(n.t, n.pod.Node.NS, func() error {
		l, err := link.AttachXDP(link.XDPOptions{Program: n.d.Respond(), Interface: n.pod.IfIndex, Flags: link.XDPGenericMode})
		if err != nil {
			return err
		}
		return errors.Join(os.Remove(n.pin("respond")), l.Pin(n.pin("respond")), l.Close())
	})
}

// A device that lost trust, and is then gone, is not said to be trusted again.
func TestALostDeviceGoes(t *testing.T) {
	k := newKept(t)
	p := k.adopted()
	a := k.attachments[repairtest.ID(p)]
	device := datapath.Device{Key: k.Device(p), Trust: datapath.TrustLost, Loss: "unacknowledged"}
	k.noteTrust(a, device)
	k.noteTrust(a, device)
	if err := k.datapath.RemoveDevice(device.Key); err != nil {
		t.Fatal(err)
	}
	k.checkDevices()
	if k.log.Count("answers do not arrive") != 1 || k.log.Count("trying answers by the device again") != 0 {
		t.Error(k.log)
	}
}

// An outcome is of one life of a device: what came of a probe of an earlier pod, or before the device was attached again,
// says nothing of what is attached now.
func TestOutcomesOfAnEarlierLife(t *testing.T) {
	k := newKept(t)
	p, other := k.adopted(), k.adopted()
	earlier := k.Device(p)
	k.attachClsact(p)
	if k.Device(p) == earlier {
		t.Fatal("it is the same life")
	}
	for _, key := range []datapath.DeviceKey{earlier, k.Device(other)} {
		if k.observeAs(key); k.fresh(p) {
			t.Errorf("learned from %+v, and is %+v", key, k.Device(p))
		}
	}
	if k.observeAs(k.Device(p)); !k.fresh(p) {
		t.Errorf("not fresh\n%s", k.log)
	}

	// Before the daemon has noticed, too.
	k.In(func() error {
		return attach.Attach(k.datapath, k.bpfDir, repairtest.ID(p), k.Record(p).Target(), attach.ViaAuto)
	})
	if k.arm(p); k.fresh(p) {
		t.Error("learned before it was known that the device was attached again")
	}
}

// A pod whose device has just been removed is no error, whatever was about to be written.
func TestADeviceGoesWhileItIsWritten(t *testing.T) {
	k := newKept(t)
	p := k.adopted()
	k.arm(p)
	key := k.Device(p)
	if err := k.datapath.RemoveDevice(key); err != nil {
		t.Fatal(err)
	}
	k.observeAs(key)
	if n := k.log.Count("level=ERROR"); n != 0 {
		t.Error(k.log)
	}
}

// A connection whose end nobody saw is forgotten in the end, and counted.
func TestExpiredFlows(t *testing.T) {
	n := started(t)
	idle := n.connect()
	n.want("/healthz", 200, false)
	if flows, err := n.d.Flows(); err != nil || flows != 1 {
		t.Fatalf("%d flows, %v", flows, err)
	}
	n.expireFlows()
	n.eventually("forgotten, and counted", func() bool {
		got, _ := n.metricsOf()
		return got["probelet_expired_flows_total"] == "1" && got[`probelet_map_entries{map="flows"}`] == "0"
	})
	wantAnswer(t, idle, n.probeRequest("/healthz", ""), "0", false)
}

// expireFlows makes the deadline of all flows pass.
func (n *node) expireFlows() {
	n.t.Helper()
	flows, err := ebpf.LoadPinnedMap(filepath.Join(n.d.Dir(), "flows"), nil)
	if err != nil {
		n.t.Fatal(err)
	}
	defer flows.Close() //nolint:errcheck // a test's
	const deadline = 16 // offset in struct flow, bpf/abi.h
	var key, value []byte
	entries := flows.Iterate()
	for entries.Next(&key, &value) {
		binary.NativeEndian.PutUint64(value[deadline:], 1)
		if err := flows.Put(key, value); err != nil {
			n.t.Fatal(err)
		}
	}
	if err := entries.Err(); err != nil {
		n.t.Fatal(err)
	}
}
