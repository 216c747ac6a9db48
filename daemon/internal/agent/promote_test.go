package agent

import (
	"context"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/containernetworking/plugins/pkg/ns"

	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/repair"
)

// promoting runs the promoter until the test ends.
func (k *kept) promoting() {
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = k.NS.Do(func(ns.NetNS) error { k.repairs.promoter.Run(ctx); return nil })
	}()
	k.t.Cleanup(func() { cancel(); <-done })
}

// What was known stays known.
func TestPromotion(t *testing.T) {
	k := newKept(t)
	k.RequireTCX()
	p, adopted := k.adopted(), k.adopted()
	k.attachClsact(p)
	before := k.Device(p)
	if k.arm(p); k.IsTCX(p) || !k.fresh(p) {
		t.Fatal("not as the plugin makes it")
	}
	k.promoting()
	k.eventually("promoted", func() bool { return k.IsTCX(p) })
	k.WantWhole(p)
	k.WantWhole(adopted)
	if k.Device(p) != before || !k.fresh(p) {
		t.Error("what was known is forgotten")
	}
	k.wantRepairs(repair.Reattached, 0)
}

// A device that lost trust is tried again once ours are first in line.
func TestPromotionOfALostDevice(t *testing.T) {
	k := newKept(t)
	k.RequireTCX()
	p := k.adopted()
	k.attachClsact(p)
	devices, err := ebpf.LoadPinnedMap(k.datapath.Dir()+"/devices", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer devices.Close() //nolint:errcheck // a test's
	const trust = 22      // offset in struct device, bpf/abi.h
	var device []byte
	if device, err = devices.LookupBytes(uint32(p.IfIndex)); err == nil {
		device[trust] = byte(datapath.TrustLost)
		err = devices.Put(uint32(p.IfIndex), device)
	}
	if err != nil {
		t.Fatal(err)
	}
	k.checkDevices()
	k.promoting()
	k.eventually("it is tried again", func() bool {
		device, err := k.datapath.Device(k.Device(p))
		return err == nil && device.Trust == datapath.TrustUnproven && k.IsTCX(p)
	})
	k.look(1)
	if k.log.Count("answers do not arrive") != 1 || k.log.Count("trying answers by the device again") != 1 {
		t.Error(k.log)
	}
}
