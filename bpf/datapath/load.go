package datapath

import (
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/features"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"
)

// MinKernel is the oldest supported kernel, as LINUX_VERSION_CODE. On older ones the programs may load but lose packets.
const MinKernel = 5<<16 | 15<<8

// KernelName returns the name of a LINUX_VERSION_CODE, such as "5.15".
func KernelName(code uint32) string { return fmt.Sprintf("%d.%d", code>>16, code>>8&0xff) }

// Load loads the objects without pinning them. They live until Close, or until the last attachment is gone.
func Load() (*Datapath, error) {
	spec, err := loadProbelet()
	if err != nil {
		return nil, err
	}
	if err := drawSecrets(spec); err != nil {
		return nil, err
	}
	if err := spec.Variables[probeletVarReplies].Set(replies()); err != nil {
		return nil, err
	}
	// Kernels before 5.18 do not know the flag. Their generic XDP linearizes every packet.
	if features.HaveProgramHelper(ebpf.XDP, asm.FnXdpLoadBytes) != nil {
		spec.Programs[probeletProgRespond].Flags &^= unix.BPF_F_XDP_HAS_FRAGS
	}
	d := &Datapath{}
	if err := d.load(spec); err != nil {
		return nil, fmt.Errorf("loading BPF objects: %w", err)
	}
	if err := d.startWatch(spec); err != nil {
		return nil, errors.Join(fmt.Errorf("watching listening sockets: %w", err), d.Close())
	}
	return d, nil
}

// drawSecrets sets the constants that must be secret from pods.
func drawSecrets(spec *ebpf.CollectionSpec) error {
	for _, name := range []string{probeletVarOrderToken, probeletVarQuestionKeys} {
		random := make([]byte, spec.Variables[name].Size())
		if _, err := rand.Read(random); err != nil {
			return err
		}
		if err := spec.Variables[name].Set(random); err != nil {
			return err
		}
	}
	return nil
}

// load loads steer with its look at listening sockets, or without it where the kernel refuses that: it requires BTF, CAP_PERFMON,
// a helper, and a verifier that accepts them.
func (d *Datapath) load(spec *ebpf.CollectionSpec) error {
	seeing := d.loadSteer(spec, true)
	if seeing == nil {
		return nil
	}
	if err := d.loadSteer(spec, false); err != nil {
		return errors.Join(err, fmt.Errorf("with a look at listening sockets: %w", seeing))
	}
	return nil
}

// loadSteer loads all objects except watch. sees determines whether steer looks at listening sockets.
func (d *Datapath) loadSteer(spec *ebpf.CollectionSpec, sees bool) error {
	var options ebpf.CollectionOptions
	if !sees {
		// The code that reads kernel types is dead then, but CO-RE still relocates it, so use the object's own types.
		options.Programs.KernelTypes = spec.Types
	}
	d.blind = !sees
	if err := spec.Variables[probeletVarSeesListeners].Set(sees); err != nil {
		return err
	}
	return spec.LoadAndAssign(&d.objects, &options)
}

// startWatch attaches the program that sees listening sockets close. It is a no-op on a kernel without BTF, where evidence ends with
// the next probe that is passed on, as after any other failure.
func (d *Datapath) startWatch(spec *ebpf.CollectionSpec) error {
	if _, err := btf.LoadKernelSpec(); errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	var programs struct {
		Watch *ebpf.Program `ebpf:"watch"`
	}
	err := spec.LoadAndAssign(&programs, &ebpf.CollectionOptions{MapReplacements: map[string]*ebpf.Map{
		probeletMapPodNetns: d.objects.PodNetns,
		probeletMapDevices:  d.objects.Devices,
		probeletMapCounters: d.objects.Counters,
	}})
	if err != nil {
		return err
	}
	defer programs.Watch.Close() //nolint:errcheck // the link holds it
	d.watch, err = link.AttachTracing(link.TracingOptions{Program: programs.Watch})
	return err
}

// Watched reports whether pods' listening sockets are watched, so that a pod's evidence ends as soon as one of its servers does.
func (d *Datapath) Watched() bool {
	if d.dir == "" {
		return d.watch != nil
	}
	_, err := os.Stat(filepath.Join(d.dir, pinWatch))
	return err == nil
}

// SeesListeners reports whether steer looks at pods' listening sockets. If it does not, TCP probes are answered like HTTP probes,
// only on the evidence of earlier ones.
func (d *Datapath) SeesListeners() bool {
	if d.dir == "" {
		return !d.blind
	}
	_, err := os.Stat(filepath.Join(d.dir, pinBlind))
	return Absent(err)
}
