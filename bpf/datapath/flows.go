package datapath

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
)

// Sweep removes flows that are past their deadline because their end was not seen, and flows of detached devices.
func (d *Datapath) Sweep() error {
	if _, err := d.objects.Sweep.Run(&ebpf.RunOptions{}); err != nil {
		return fmt.Errorf("sweeping flows: %w", err)
	}
	return nil
}

// Flows counts the connections in the flow table.
func (d *Datapath) Flows() (n int, err error) {
	err = d.eachFlow(func(probeletFlowKey, *probeletFlow) { n++ })
	return n, err
}

// PodPort identifies a port of the pod behind a device.
type PodPort struct {
	Device DeviceKey
	Port   uint16
}

// Unanswered returns the start times (see Now) of a prober's connections that their port has not answered, for as long as they are
// in the flow table. There is no other trace of them, because a client that gives up connecting sends nothing.
func (d *Datapath) Unanswered() (map[PodPort][]uint64, error) {
	began := map[PodPort][]uint64{}
	err := d.eachFlow(func(key probeletFlowKey, flow *probeletFlow) {
		if flow.State == uint8(probeletFlowStateFLOW_OBSERVING) && flow.Flags&uint32(probeletFlowFlagFLOW_CONNECTED) == 0 {
			to := PodPort{DeviceKey{Ifindex: key.Ifindex, Generation: flow.Generation}, key.PodPort}
			began[to] = append(began[to], flow.StartedAt)
		}
	})
	return began, err
}

// eachFlow calls f for each connection in the flow table.
func (d *Datapath) eachFlow(f func(probeletFlowKey, *probeletFlow)) error {
	const batch = 512
	keys, flows := make([]probeletFlowKey, batch), make([]probeletFlow, batch)
	for cursor := new(ebpf.MapBatchCursor); ; {
		count, err := d.objects.Flows.BatchLookup(cursor, keys, flows, nil)
		for i := range count {
			f(keys[i], &flows[i])
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) { // end of the map
			return nil
		}
		if err != nil {
			return err
		}
	}
}
