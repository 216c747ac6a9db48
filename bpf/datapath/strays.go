package datapath

import (
	"errors"
	"os"
)

// strayLists returns devices that have endpoints although the programs do not know them. A process that dies in the middle of
// RemoveDevice leaves them behind.
func (d *Datapath) strayLists() ([]DeviceKey, error) {
	var strays []DeviceKey
	var key DeviceKey
	var list probeletEndpointList
	entries := d.objects.EndpointLists.Iterate()
	for entries.Next(&key, &list) {
		if _, err := d.Device(key); errors.Is(err, os.ErrNotExist) {
			strays = append(strays, key)
		}
	}
	return strays, entries.Err()
}

// RemoveStrays cleans up after interrupted calls of RemoveDevice and AddDevice: it removes the remains of devices that the programs
// do not know.
func (d *Datapath) RemoveStrays() error {
	strays, err := d.strayLists()
	errs := []error{err}
	for _, key := range strays {
		errs = append(errs, d.RemoveDevice(key))
	}
	return errors.Join(append(errs, d.removeStraysFromNetns())...)
}

// removeStraysFromNetns removes devices from the lists of network namespaces that they do not lead to.
func (d *Datapath) removeStraysFromNetns() error {
	known, err := d.Devices()
	if err != nil {
		return err
	}
	errs := []error{}
	var netns uint32
	var devices probeletNetnsDevices
	entries := d.objects.PodNetns.Iterate()
	for entries.Next(&netns, &devices) {
		for _, ifindex := range devices.Ifindex {
			if device, ok := known[ifindex]; ifindex != 0 && (!ok || device.Netns != netns) {
				errs = append(errs, d.removeStrayFromNetns(ifindex, netns))
			}
		}
	}
	return errors.Join(append(errs, entries.Err())...)
}

// removeStrayFromNetns is a no-op if the device has been added meanwhile.
func (d *Datapath) removeStrayFromNetns(ifindex, netns uint32) error {
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	device, err := d.device(ifindex)
	if err == nil && device.Netns == netns || err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return d.removeFromNetns(ifindex, netns)
}
