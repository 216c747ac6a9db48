package datapath

import (
	"maps"
	"slices"

	"golang.org/x/sys/unix"
)

// Trust states whether a device's answers are known to reach their clients.
type Trust uint16

// Levels of trust.
const (
	TrustUnproven = Trust(probeletTrustTRUST_UNPROVEN) // on trial, or not tried yet
	TrustProven   = Trust(probeletTrustTRUST_PROVEN)
	TrustLost     = Trust(probeletTrustTRUST_LOST) // an answer was lost: no connection is taken
)

// losses maps enum loss to names.
var losses = map[uint16]string{
	uint16(probeletLossLOSS_SYN_REPEATED):     "syn_repeated",
	uint16(probeletLossLOSS_UNACKNOWLEDGED):   "unacknowledged",
	uint16(probeletLossLOSS_REQUEST_REPEATED): "request_repeated",
	uint16(probeletLossLOSS_UNOBSERVED):       "unobserved",
}

// Losses returns the possible values of Device.Loss in sorted order, without the empty one.
func Losses() []string { return slices.Sorted(maps.Values(losses)) }

// TrustAgain puts a device on trial again, as if it had just been attached. The error is os.ErrNotExist as for Device.
//
// If a listening socket of the pod closes while the map element is replaced, watch may note that in the old element. But watch then
// also counts it, as it does for every pod. So if the count has changed by the time that no running program can still refer to the
// old element, TrustAgain voids the pod's evidence as well.
func (d *Datapath) TrustAgain(key DeviceKey) error {
	for withdrawn := uint64(0); ; withdrawn = Now() {
		before, err := d.counter(probeletCounterCOUNT_WITHDRAWN_LISTENER_CLOSED)
		if err != nil {
			return err
		}
		err = d.changeDevice(key, func(device *probeletDevice) {
			*device = probeletDevice{
				Generation: key.Generation, Netns: device.Netns, Hook: device.Hook, Nsid: device.Nsid,
				NetnsCookie: device.NetnsCookie, WithdrawnAt: max(device.WithdrawnAt, withdrawn),
			}
		})
		if err != nil {
			return err
		}
		certain := awaitPrograms()
		after, err := d.counter(probeletCounterCOUNT_WITHDRAWN_LISTENER_CLOSED)
		if err != nil || after == before && (certain || withdrawn != 0) {
			return err
		}
	}
}

// awaitPrograms waits until all programs that are running now have ended: each runs in an RCU read-side critical section, and the
// command amounts to synchronize_rcu (membarrier(2); kernel/sched/membarrier.c). It returns false on kernels that refuse the command
// (nohz_full).
func awaitPrograms() bool {
	const global = 1 // MEMBARRIER_CMD_GLOBAL in linux/membarrier.h
	_, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0)
	return errno == 0
}
