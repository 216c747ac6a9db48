package agent

import (
	"context"
	"errors"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
)

// promotePause separates two promotions. A DEL or the loop that wants the records' lock gets it meanwhile.
const promotePause = 20 * time.Millisecond

// promoter turns what ADD attached by clsact into tcx links: ADD must not wait for RCU grace periods, and only tcx links keep
// their place. It runs beside the loop, which must not wait for them either.
type promoter struct {
	offered chan []attach.ID
	promote func(*daemon, attach.ID) error
}

func newPromoter() *promoter {
	return &promoter{
		offered: make(chan []attach.ID),
		promote: func(d *daemon, id attach.ID) error { return attach.Promote(d.datapath, d.bpfDir, id) },
	}
}

// offer hands run the attachments that need promoting, unless it is busy. A later look offers them again.
func (p *promoter) offer(ids []attach.ID) {
	if len(ids) == 0 {
		return
	}
	select {
	case p.offered <- ids:
	default:
	}
}

// run promotes what is offered, until ctx ends or the kernel turns out not to have tcx. It uses only those fields of the daemon
// that never change.
func (p *promoter) run(ctx context.Context, d *daemon) {
	logged := map[attach.ID]string{}
	for {
		var ids []attach.ID
		select {
		case <-ctx.Done():
			return
		case ids = <-p.offered:
		}
		maps.DeleteFunc(logged, func(id attach.ID, _ string) bool { return !slices.Contains(ids, id) })
		for _, id := range ids {
			err := p.promoteOne(ctx, d, id)
			switch {
			case errors.Is(err, ebpf.ErrNotSupported):
				d.log.Info("this kernel has no tcx, so attachments stay on clsact")
				return
			case ctx.Err() != nil:
				return
			case err != nil && err.Error() != logged[id]:
				logged[id] = err.Error()
				d.log.Warn("attachment stays on clsact for now", "id", id, "error", err)
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(promotePause):
			}
		}
	}
}

func (p *promoter) promoteOne(ctx context.Context, d *daemon, id attach.ID) error {
	unlock, err := attach.LockRecords(ctx, d.stateDir, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer unlock()
	err = p.promote(d, id)
	if errors.Is(err, os.ErrNotExist) {
		return nil // deleted meanwhile
	}
	if err == nil {
		d.log.Debug("attachment promoted to tcx", "id", id)
	}
	return err
}
