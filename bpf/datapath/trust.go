package datapath

import (
	"maps"
	"slices"

	"golang.org/x/sys/unix"
)

// Trust tells whether a device's answers are known to reach their clients.
type Trust uint16

// Trusts.
const (
	TrustUnproven = Trust(probeletTrustTRUST_UNPROVEN) // not tried yet
	TrustProven   = Trust(probeletTrustTRUST_PROVEN)
	TrustLost     = Trust(probeletTrustTRUST_LOST) // an answer was lost: nothing is taken
)

// losses are the names of enum loss.
var losses = map[uint16]string{
	uint16(probeletLossLOSS_SYN_REPEATED):     "syn_repeated",
	uint16(probeletLossLOSS_UNACKNOWLEDGED):   "unacknowledged",
	uint16(probeletLossLOSS_REQUEST_REPEATED): "request_repeated",
	uint16(probeletLossLOSS_UNOBSERVED):       "unobserved",
}

// Losses returns the possible values of Device.Loss, sorted, without the empty one.
func Losses() []string { return slices.Sorted(maps.Values(losses)) }

// TrustAgain puts a device on trial again, as if it had just been attached. The error is os.ErrNotExist as for Device.
//
// A listening socket of the pod's that closes while the device is replaced may be noted in the old one. But watch counts each one, of
// whatever pod, after it has noted it: if the count has moved once all programs have ended that may know of the old one, the pod's
// evidence is voided, too.
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

// awaitPrograms waits until all programs have ended that run now: each runs in an RCU read-side critical section, and the command is
// synchronize_rcu (membarrier(2); kernel/sched/membarrier.c). Returns false on kernels that refuse it (nohz_full).
func awaitPrograms() bool {
	const global = 1 // MEMBARRIER_CMD_GLOBAL in linux/membarrier.h
	_, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0)
	return errno == 0
}
