package datapath

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/lock"
)

// DeviceKey identifies one attachment of a host-side veth. A device that later gets the same index has another generation, and so
// inherits nothing.
type DeviceKey = probeletDeviceKey

// Hook selects where answers are made for a device.
type Hook uint8

// Hooks.
const (
	HookTC  = Hook(probeletHookHOOK_TC)  // by steer, in place
	HookXDP = Hook(probeletHookHOOK_XDP) // by respond, from steer's orders
)

// Device describes a host-side veth as the programs know it.
type Device struct {
	Key   DeviceKey
	Netns uint32 // inode number of the pod's network namespace
	Hook  Hook
	Trust Trust
	// Loss tells how a lost answer was detected, and LostAt when (see Now). They are empty and 0 unless Trust is TrustLost.
	Loss   string
	LostAt uint64
	// NSID is the id by which the host's network namespace knows the pod's; -1 if unknown.
	NSID int
	// NetnsCookie is the cookie of the pod's network namespace (SO_NETNS_COOKIE); 0 if not known yet.
	NetnsCookie uint64
	// WithdrawnAt is when one of the pod's listening sockets last closed (see Now), which voids all earlier evidence; 0 if none did.
	WithdrawnAt uint64
}

// lockDeadline bounds the wait for the lock. Adding or removing a device takes far less time.
const lockDeadline = 5 * time.Second

// NewDeviceKey returns a key with a random generation for the device ifindex.
func NewDeviceKey(ifindex int) (DeviceKey, error) {
	var random [4]byte
	for {
		if _, err := rand.Read(random[:]); err != nil {
			return DeviceKey{}, err
		}
		if generation := binary.NativeEndian.Uint32(random[:]); generation != 0 {
			return DeviceKey{Ifindex: uint32(ifindex), Generation: generation}, nil
		}
	}
}

// AddDevice makes a device known to the programs, with no evidence and no trust. netns is the inode number of the pod's network
// namespace. steer does not look at the pod's sockets until LookInto is called. Whatever a previous attachment of the device left
// behind is removed.
func (d *Datapath) AddDevice(key DeviceKey, netns uint32, hook Hook) error {
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	old, err := d.device(key.Ifindex)
	if err == nil {
		err = d.removeDevice(old.Key)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	device := probeletDevice{Generation: key.Generation, Netns: netns, Hook: uint8(hook), Nsid: -1}
	if err := d.objects.Devices.Update(key.Ifindex, &device, ebpf.UpdateNoExist); err != nil {
		return fmt.Errorf("device %d: %w", key.Ifindex, err)
	}
	if err := d.addToNetns(key.Ifindex, netns); err != nil {
		return errors.Join(err, d.removeDevice(key))
	}
	return nil
}

// LookInto makes steer look at listening sockets in the device's pod. nsid is the id by which the host's network namespace knows the
// pod's. The cookie guards against reuse of the id by another pod's namespace. If it is 0, steer adopts the cookie of the first socket
// that it finds in the namespace with the inode number passed to AddDevice. Call LookInto before the programs are attached, because it
// overwrites what they note. The error is os.ErrNotExist as for Device.
func (d *Datapath) LookInto(key DeviceKey, nsid int, cookie uint64) error {
	return d.changeDevice(key, func(device *probeletDevice) { device.Nsid, device.NetnsCookie = int32(nsid), cookie })
}

// changeDevice replaces a device. Whatever the programs note about it meanwhile is lost.
func (d *Datapath) changeDevice(key DeviceKey, change func(*probeletDevice)) error {
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := d.Device(key); err != nil {
		return err
	}
	var device probeletDevice
	if err := d.objects.Devices.Lookup(key.Ifindex, &device); err != nil {
		return fmt.Errorf("device %d: %w", key.Ifindex, err)
	}
	change(&device)
	if err := d.objects.Devices.Update(key.Ifindex, &device, ebpf.UpdateExist); err != nil {
		return fmt.Errorf("device %d: %w", key.Ifindex, err)
	}
	return nil
}

// RemoveDevice removes a device and all evidence about its pod. It is no error if the programs do not know the device.
func (d *Datapath) RemoveDevice(key DeviceKey) error {
	unlock, err := d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	return d.removeDevice(key)
}

func (d *Datapath) removeDevice(key DeviceKey) error {
	device, err := d.Device(key)
	if err == nil {
		// From here on the programs can no longer reach anything of it.
		err = errors.Join(ignoreAbsent(d.objects.Devices.Delete(key.Ifindex)), d.removeFromNetns(key.Ifindex, device.Netns))
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("removing device %d: %w", key.Ifindex, err)
	}
	if err := (&Pod{d, key}).clear(); err != nil {
		return fmt.Errorf("removing the evidence of device %d: %w", key.Ifindex, err)
	}
	return nil
}

// Device returns a device. The error is os.ErrNotExist if the programs do not know it, or if they know another attachment of it.
func (d *Datapath) Device(key DeviceKey) (Device, error) {
	device, err := d.device(key.Ifindex)
	if err == nil && device.Key != key {
		err = fmt.Errorf("device %d: attached again meanwhile: %w", key.Ifindex, os.ErrNotExist)
	}
	return device, err
}

func (d *Datapath) device(ifindex uint32) (Device, error) {
	var device probeletDevice
	err := d.objects.Devices.Lookup(ifindex, &device)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		err = os.ErrNotExist
	}
	if err != nil {
		return Device{}, fmt.Errorf("device %d: %w", ifindex, err)
	}
	return deviceOf(ifindex, device), nil
}

func deviceOf(ifindex uint32, device probeletDevice) Device {
	return Device{
		Key:   DeviceKey{Ifindex: ifindex, Generation: device.Generation},
		Netns: device.Netns, Hook: Hook(device.Hook), Trust: Trust(device.Trust),
		Loss: losses[device.Loss], LostAt: device.LostAt,
		NSID: int(device.Nsid), NetnsCookie: device.NetnsCookie, WithdrawnAt: device.WithdrawnAt,
	}
}

// Devices returns all devices that the programs know by ifindex.
func (d *Datapath) Devices() (map[uint32]Device, error) {
	devices := map[uint32]Device{}
	const batch = 256
	indexes, values := make([]uint32, batch), make([]probeletDevice, batch)
	for cursor := new(ebpf.MapBatchCursor); ; {
		n, err := d.objects.Devices.BatchLookup(cursor, indexes, values, nil)
		for i := range n {
			devices[indexes[i]] = deviceOf(indexes[i], values[i])
		}
		if errors.Is(err, ebpf.ErrKeyNotExist) { // end of the map
			return devices, nil
		}
		if err != nil {
			return nil, fmt.Errorf("devices: %w", err)
		}
	}
}

func ignoreAbsent(err error) error {
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}

// lock keeps other processes, and other users of this Datapath, from adding or removing devices and endpoints. Objects that are not
// pinned need no lock, because no other process has access to them.
func (d *Datapath) lock() (unlock func(), err error) {
	if d.dir == "" {
		return func() {}, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), lockDeadline)
	defer cancel()
	locked, err := lock.Dir(ctx, d.dir, unix.LOCK_EX)
	if Absent(err) { // all pins were removed
		return func() {}, nil
	}
	if err != nil {
		return nil, err
	}
	return locked.Release, nil
}
