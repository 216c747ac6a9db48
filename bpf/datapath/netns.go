package datapath

import (
	"fmt"
	"slices"
)

func (d *Datapath) addToNetns(ifindex, netns uint32) error {
	return d.changeNetns(netns, func(devices []uint32) error {
		if slices.Contains(devices, ifindex) {
			return nil
		}
		slot := slices.Index(devices, 0)
		if slot < 0 {
			return fmt.Errorf("network namespace %d already has %d attached devices, the maximum", netns, len(devices))
		}
		devices[slot] = ifindex
		return nil
	})
}

func (d *Datapath) removeFromNetns(ifindex, netns uint32) error {
	return d.changeNetns(netns, func(devices []uint32) error {
		if slot := slices.Index(devices, ifindex); slot >= 0 {
			devices[slot] = 0
		}
		return nil
	})
}

func (d *Datapath) changeNetns(netns uint32, change func(devices []uint32) error) error {
	var devices probeletNetnsDevices
	err := ignoreAbsent(d.objects.PodNetns.Lookup(netns, &devices))
	if err == nil {
		err = change(devices.Ifindex[:])
	}
	switch {
	case err != nil:
	case devices == (probeletNetnsDevices{}):
		err = ignoreAbsent(d.objects.PodNetns.Delete(netns))
	default:
		err = d.objects.PodNetns.Put(netns, &devices)
	}
	if err != nil {
		return fmt.Errorf("devices of network namespace %d: %w", netns, err)
	}
	return nil
}
