package datapath

import (
	"errors"
	"fmt"
	"os"

	"github.com/cilium/ebpf"
)

// Pod provides access to what is known about the pod behind a device. Only one process may change it.
type Pod struct {
	d      *Datapath
	device DeviceKey
}

// Pod returns the pod behind a device. The error is os.ErrNotExist as for Device.
func (d *Datapath) Pod(key DeviceKey) (*Pod, error) {
	if _, err := d.Device(key); err != nil {
		return nil, err
	}
	return &Pod{d, key}, nil
}

// Device returns the key of the pod's device.
func (p *Pod) Device() DeviceKey { return p.device }

// Put sets the evidence of an endpoint, and creates its tally if there is none. The error is os.ErrNotExist if the device has been
// removed meanwhile, in which case Put leaves nothing behind.
func (p *Pod) Put(key EndpointKey, e Evidence) error {
	if err := p.Renew(key, e); !errors.Is(err, ebpf.ErrKeyNotExist) {
		return err
	}
	unlock, err := p.d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if _, err := p.d.Device(p.device); err != nil {
		return err
	}
	if err := p.list(key); err != nil {
		return err
	}
	k := key.of(p.device)
	if err := p.d.objects.EndpointTallies.Update(k, Tally{}, ebpf.UpdateNoExist); err != nil && !errors.Is(err, ebpf.ErrKeyExist) {
		return fmt.Errorf("tally of port %d: %w", key.Port, err)
	}
	e.Seal = sealOf(k, e)
	if err := p.d.objects.EndpointEvidence.Put(k, e); err != nil {
		return fmt.Errorf("evidence of port %d: %w", key.Port, err)
	}
	return nil
}

// Renew replaces the evidence of an endpoint without taking the lock. The error is os.ErrNotExist as for Put, or ebpf.ErrKeyNotExist
// if the endpoint has no evidence.
func (p *Pod) Renew(key EndpointKey, e Evidence) error {
	k := key.of(p.device)
	e.Seal = sealOf(k, e)
	err := p.d.objects.EndpointEvidence.Update(&k, &e, ebpf.UpdateExist) // pointers avoid encoding by reflection
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		if _, gone := p.d.Device(p.device); gone != nil {
			return gone
		}
	}
	if err != nil {
		return fmt.Errorf("evidence of port %d: %w", key.Port, err)
	}
	return nil
}

// Get returns the evidence of an endpoint, with Seal 0, and its tally. The error is ebpf.ErrKeyNotExist if there is none.
func (p *Pod) Get(key EndpointKey) (Evidence, Tally, error) {
	var e Evidence
	var t Tally
	k := key.of(p.device)
	if err := p.d.objects.EndpointEvidence.Lookup(&k, &e); err != nil {
		return e, t, err
	}
	if e.Seal != sealOf(k, e) {
		return e, t, fmt.Errorf("evidence of port %d: wrong seal", key.Port)
	}
	e.Seal = 0
	if err := p.d.objects.EndpointTallies.Lookup(&k, &t); err != nil {
		return e, t, err
	}
	return e, t, p.addWithdrawal(&t)
}

// Tally returns the tally of an endpoint, or an empty one if there is none. WithdrawnAt and WithdrawnCause include withdrawals of all
// of the pod's evidence.
func (p *Pod) Tally(key EndpointKey) (t Tally, err error) {
	k := key.of(p.device)
	if err := ignoreAbsent(p.d.objects.EndpointTallies.Lookup(&k, &t)); err != nil {
		return t, err
	}
	return t, p.addWithdrawal(&t)
}

// addWithdrawal merges the withdrawal of all of the pod's evidence into a tally, if it is later. A removed device has none.
func (p *Pod) addWithdrawal(t *Tally) error {
	device, err := p.d.Device(p.device)
	if err == nil && device.WithdrawnAt > t.WithdrawnAt {
		t.WithdrawnAt, t.WithdrawnCause = device.WithdrawnAt, uint8(probeletWithdrawalCauseWITHDRAWN_LISTENER_CLOSED)
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// Delete removes an endpoint. It is no error if the endpoint does not exist.
func (p *Pod) Delete(key EndpointKey) error {
	unlock, err := p.d.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if err := p.delete(key); err != nil {
		return err
	}
	list, err := p.readList()
	if err != nil {
		return err
	}
	i := list.index(key)
	if i < 0 {
		return nil
	}
	list.Count--
	list.Hashes[i], list.Ports[i] = list.Hashes[list.Count], list.Ports[list.Count]
	list.Hashes[list.Count], list.Ports[list.Count] = 0, 0
	return p.writeList(list)
}

// delete removes evidence before the tally, so that there is never evidence without a tally.
func (p *Pod) delete(key EndpointKey) error {
	for _, m := range []*ebpf.Map{p.d.objects.EndpointEvidence, p.d.objects.EndpointTallies} {
		if err := ignoreAbsent(m.Delete(key.of(p.device))); err != nil {
			return fmt.Errorf("port %d: %w", key.Port, err)
		}
	}
	return nil
}

// Keys returns the keys of the pod's endpoints and ports.
func (p *Pod) Keys() ([]EndpointKey, error) {
	list, err := p.readList()
	if err != nil {
		return nil, err
	}
	return list.keys(), nil
}

// clear removes all endpoints.
func (p *Pod) clear() error {
	keys, err := p.Keys()
	errs := []error{err}
	for _, key := range keys {
		errs = append(errs, p.delete(key))
	}
	errs = append(errs, ignoreAbsent(p.d.objects.EndpointLists.Delete(p.device)))
	return errors.Join(errs...)
}

// list adds the key to the device's list, unless it is already there.
func (p *Pod) list(key EndpointKey) error {
	list, err := p.readList()
	if err != nil || list.index(key) >= 0 {
		return err
	}
	if int(list.Count) == len(list.Ports) {
		return fmt.Errorf("port %d: the pod already has %d endpoints and ports: %w", key.Port, list.Count, errTooMany)
	}
	list.Hashes[list.Count], list.Ports[list.Count] = key.Hash, key.packed()
	list.Count++
	return p.writeList(list)
}

var errTooMany = errors.New("no room for more")

func (p *Pod) readList() (list probeletEndpointList, err error) {
	if err := ignoreAbsent(p.d.objects.EndpointLists.Lookup(p.device, &list)); err != nil {
		return list, fmt.Errorf("endpoints of device %d: %w", p.device.Ifindex, err)
	}
	return list, nil
}

func (p *Pod) writeList(list probeletEndpointList) error {
	if err := p.d.objects.EndpointLists.Put(p.device, &list); err != nil {
		return fmt.Errorf("endpoints of device %d: %w", p.device.Ifindex, err)
	}
	return nil
}

func (l *probeletEndpointList) keys() []EndpointKey {
	keys := make([]EndpointKey, min(int(l.Count), len(l.Ports)))
	for i := range keys {
		keys[i] = EndpointKey{Hash: l.Hashes[i], Port: uint16(l.Ports[i] >> 16), Kind: uint8(l.Ports[i])}
	}
	return keys
}

func (l *probeletEndpointList) index(key EndpointKey) int {
	for i, k := range l.keys() {
		if k == key {
			return i
		}
	}
	return -1
}
