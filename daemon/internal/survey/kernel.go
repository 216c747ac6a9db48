//go:build linux

package survey

import (
	"errors"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
)

// Kernel gives access to the BPF objects. Errors are those of package datapath.
type Kernel interface {
	Prober() (datapath.Prober, error)
	Counters() (map[string]uint64, error)
	// Watched reports whether the kernel side notices when listening sockets close.
	Watched() bool
	// SeesListeners reports whether the kernel side can look up listening sockets.
	SeesListeners() bool
	// Pod opens the maps of an attachment's pod.
	Pod(attach.ID) (PodMaps, error)
	// AttachedDevice returns the device of an attachment.
	AttachedDevice(attach.ID) (datapath.Device, error)
	// Neighbours returns other agents' programs at a device's hooks.
	Neighbours(ifindex int) ([]attach.Neighbour, error)
	// TrustAgain makes the programs try again whether answers through a device arrive.
	TrustAgain(datapath.DeviceKey) error
	Close() error
}

// PodMaps reads the maps of a pod.
type PodMaps interface {
	Get(datapath.EndpointKey) (datapath.Evidence, datapath.Tally, error)
}

type openedKernel struct {
	*datapath.Datapath
	bpfDir  string
	checker *attach.Checker // created on first use
}

func (k *openedKernel) Pod(id attach.ID) (PodMaps, error) {
	return attach.OpenPod(k.Datapath, k.bpfDir, id)
}

func (k *openedKernel) AttachedDevice(id attach.ID) (datapath.Device, error) {
	key, err := attach.Device(k.bpfDir, id)
	if err != nil {
		return datapath.Device{}, err
	}
	return k.Device(key)
}

func (k *openedKernel) Neighbours(ifindex int) (_ []attach.Neighbour, err error) {
	if k.checker == nil {
		if k.checker, err = attach.NewChecker(k.Datapath, k.bpfDir); err != nil {
			return nil, err
		}
	}
	return k.checker.Neighbours(ifindex)
}

// OpenKernel opens the pinned BPF objects; it returns nil if nothing is loaded.
func OpenKernel(bpfDir string) (Kernel, error) {
	d, err := datapath.Open(bpfDir)
	if errors.Is(err, datapath.ErrNotLoaded) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &openedKernel{Datapath: d, bpfDir: bpfDir}, nil
}
