package datapath

import (
	"errors"

	"github.com/cilium/ebpf"
)

// ExemptSocket makes the connection of the socket with the given cookie (SO_COOKIE) reach the pod, even if the socket belongs to a
// prober. It is no probe; only whether the pod accepts it is noted. Call it before the socket connects.
func (d *Datapath) ExemptSocket(cookie uint64) error {
	if err := d.lookForOwnSockets(); err != nil {
		return err
	}
	return d.objects.OwnSockets.Put(cookie, uint8(0))
}

// lookForOwnSockets makes the programs look into own_sockets, which they skip until it is used.
func (d *Datapath) lookForOwnSockets() error {
	d.prober.Lock()
	defer d.prober.Unlock()
	var config probeletProberConfig
	if d.own {
		return nil
	}
	if err := d.objects.Prober.Lookup(uint32(0), &config); err != nil {
		return err
	}
	config.OwnSockets = 1
	err := d.objects.Prober.Put(uint32(0), &config)
	d.own = err == nil
	return err
}

// ForgetSocket undoes ExemptSocket for future connections.
func (d *Datapath) ForgetSocket(cookie uint64) error {
	err := d.objects.OwnSockets.Delete(cookie)
	if errors.Is(err, ebpf.ErrKeyNotExist) {
		return nil
	}
	return err
}
