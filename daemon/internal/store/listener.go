package store

import "github.com/probelet/probelet/bpf/datapath"

// Live returns how many TCP probes in a row may be answered by inspecting the listening sockets of the pod behind a device; 0 if that is
// not possible. The error is os.ErrNotExist if the programs do not know the device.
func Live(d *datapath.Datapath, key datapath.DeviceKey) (int, error) {
	device, err := d.Device(key)
	if err != nil || device.NSID < 0 || !d.SeesListeners() {
		return 0, err
	}
	return datapath.MaxAnswers, nil
}

// Listener is what inspecting a port's listening socket has shown.
type Listener struct {
	// Answered is how many probes were answered since one was last known to be accepted, and Most the limit.
	Answered int `json:"answered"`
	Most     int `json:"most"`
	// Pending is set if a connection has reached the socket since. The next inspection shows whether it was accepted.
	Pending bool `json:"pending,omitempty"`
	// Obstacle is what last kept a probe from being answered: no_listener, queue_long, head_old, special, real_due or unanswered; empty if
	// nothing did.
	Obstacle string `json:"obstacle,omitempty"`
}

// ListenerOf returns what a port's tally says about its listening socket.
func ListenerOf(port datapath.Tally) Listener {
	return Listener{int(port.Answered), int(port.AnsweredMax), port.ConnectedAt != 0, datapath.Obstacles[port.Obstacle]}
}

// ClosedAt returns when a listening socket of the pod last closed, in terms of datapath.Now; 0 if never, or if a probe of the port was
// refused or reset since.
func (p *Pod) ClosedAt(port uint16) (uint64, error) {
	tally, err := p.Tally(datapath.PortKey(port))
	if err != nil || datapath.WithdrawalCauses[tally.WithdrawnCause] != "listener_closed" {
		return 0, err
	}
	return tally.WithdrawnAt, nil
}
