package attach

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/datapath"
)

// attachTCX attaches in front of all other programs, because one that runs before ours and returns TC_ACT_OK keeps ours from running.
func attachTCX(d *datapath.Datapath, dir string, ifindex int) error {
	for _, side := range sides {
		l, err := link.AttachTCX(link.TCXOptions{
			Program: side.program(d), Interface: ifindex, Attach: side.tcx, Anchor: link.Head(),
		})
		if err != nil {
			return fmt.Errorf("attaching tcx to %s of device %d: %w", side.name, ifindex, err)
		}
		err = errors.Join(l.Pin(filepath.Join(dir, side.pin)), l.Close())
		if err != nil {
			return err
		}
	}
	return nil
}

// tcxPrograms returns the tcx programs at a hook in the order in which they run. On a kernel without tcx there are none.
func tcxPrograms(ifindex int, hook ebpf.AttachType) ([]link.AttachedProgram, error) {
	result, err := link.QueryPrograms(link.QueryOptions{Target: ifindex, Attach: hook})
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EINVAL) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("%s programs of device %d: %w", hook, ifindex, err)
	}
	return result.Programs, nil
}
