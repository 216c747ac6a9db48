package datapath

import "fmt"

const (
	// MaxTrafficAnswers is the maximum number of consecutive probes that are answered of an endpoint that traffic may vouch for.
	// TRAFFIC_ANSWERS_MAX in bpf/traffic.h.
	MaxTrafficAnswers = 9
	// trafficSlots is TRAFFIC_SLOTS in bpf/maps.h.
	trafficSlots = 4096
)

// IsServing reports whether the traffic of a port, as noted in its tally, shows at the given time that the pod would serve the
// evidence's endpoint. Like PortFresh it is a model of the program.
func IsServing(e Evidence, port Tally, kind uint8, at uint64) bool {
	last := port.LastServed(kind)
	return at < e.TrafficUntil && last != 0 && int64(at-last) < int64(e.TrafficWindowMs)*1_000_000
}

// LastServed returns when the pod was last seen serving an endpoint of a kind on the tally's port; 0: never. For TCP it suffices
// that it closed a connection.
func (t *probeletTally) LastServed(kind uint8) uint64 {
	if kind == KindTCP {
		return max(t.ServedAt, t.ClosedAt)
	}
	return t.ServedAt
}

// IsRealDue reports whether an endpoint that traffic may vouch for has had so many answers that its next probe must reach the pod.
// Like PortFresh it is a model of the program.
func IsRealDue(e Evidence, endpoint Tally) bool {
	return e.TrafficUntil != 0 && endpoint.Answered >= MaxTrafficAnswers
}

// trafficSlot returns the slot of a device and a port of its pod, as may_show_traffic in bpf/parse.h computes it.
func trafficSlot(ifindex uint32, port uint16) uint32 {
	return (ifindex*31 + uint32(port)) & (trafficSlots - 1)
}

// WantTraffic makes observe note what the pod's traffic on a port shows, for evidence with a TrafficUntil.
func (p *Pod) WantTraffic(port uint16) error {
	slot := trafficSlot(p.device.Ifindex, port)
	p.d.traffic.Lock()
	defer p.d.traffic.Unlock()
	if p.d.traffic.wanted[slot] {
		return nil
	}
	return p.d.setTraffic(slot, true)
}

// WantTrafficOnly reverts the calls of WantTraffic by this process, except those for the ports.
func (d *Datapath) WantTrafficOnly(ports []PodPort) error {
	still := map[uint32]bool{}
	for _, p := range ports {
		still[trafficSlot(p.Device.Ifindex, p.Port)] = true
	}
	d.traffic.Lock()
	defer d.traffic.Unlock()
	for slot := range d.traffic.wanted {
		if still[slot] {
			continue
		}
		if err := d.setTraffic(slot, false); err != nil {
			return err
		}
	}
	return nil
}

// IgnoreTraffic reverts all calls of WantTraffic. The daemon calls it when it starts, because nothing else reverts those of
// earlier daemons.
func (d *Datapath) IgnoreTraffic() error {
	d.traffic.Lock()
	defer d.traffic.Unlock()
	slots := make([]uint32, trafficSlots)
	for i := range slots {
		slots[i] = uint32(i)
	}
	if _, err := d.objects.TrafficSlots.BatchUpdate(slots, make([]uint32, trafficSlots), nil); err != nil {
		return fmt.Errorf("clearing the map of traffic: %w", err)
	}
	clear(d.traffic.wanted)
	return nil
}

// setTraffic sets a slot. The caller must hold the lock on d.traffic.
func (d *Datapath) setTraffic(slot uint32, wanted bool) error {
	value := uint32(0)
	if wanted {
		value = 1
	}
	if err := d.objects.TrafficSlots.Put(slot, value); err != nil {
		return fmt.Errorf("selecting the traffic to look at: %w", err)
	}
	if d.traffic.wanted == nil {
		d.traffic.wanted = map[uint32]bool{}
	}
	if wanted {
		d.traffic.wanted[slot] = true
	} else {
		delete(d.traffic.wanted, slot)
	}
	return nil
}
