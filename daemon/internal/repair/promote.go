package repair

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"os"
	"slices"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
)

// promotePause separates promotions, so that a DEL or a repair can take the lock on records in between.
const promotePause = 20 * time.Millisecond

// Promoter replaces what ADD attached by clsact with tcx links. ADD must not wait for RCU grace periods, but only tcx links keep
// their place in line. It runs beside the caller's loop, which must not wait for them either.
type Promoter struct {
	stateDir string
	log      *slog.Logger
	offered  chan []attach.ID
	promote  func(attach.ID) error
}

// NewPromoter returns a promoter, whose Run must be called.
func NewPromoter(c Config) *Promoter {
	return &Promoter{
		stateDir: c.StateDir, log: c.Log, offered: make(chan []attach.ID),
		promote: func(id attach.ID) error { return attach.Promote(c.Datapath, c.BPFDir, id) },
	}
}

// Offer hands over attachments to promote, unless the promoter is busy. The next look offers them again.
func (p *Promoter) Offer(ids []attach.ID) {
	if len(ids) == 0 {
		return
	}
	select {
	case p.offered <- ids:
	default:
	}
}

// Run promotes what is offered until ctx ends, or until the kernel turns out not to have tcx.
func (p *Promoter) Run(ctx context.Context) {
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
			err := p.promoteOne(ctx, id)
			switch {
			case errors.Is(err, ebpf.ErrNotSupported):
				p.log.Info("this kernel has no tcx, so attachments stay on clsact")
				return
			case ctx.Err() != nil:
				return
			case err != nil && err.Error() != logged[id]:
				logged[id] = err.Error()
				p.log.Warn("attachment stays on clsact for now", "id", id, "error", err)
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(promotePause):
			}
		}
	}
}

func (p *Promoter) promoteOne(ctx context.Context, id attach.ID) error {
	unlock, err := attach.LockRecords(ctx, p.stateDir, unix.LOCK_EX)
	if err != nil {
		return err
	}
	defer unlock()
	err = p.promote(id)
	if errors.Is(err, os.ErrNotExist) {
		return nil // deleted meanwhile
	}
	if err == nil {
		p.log.Debug("attachment promoted to tcx", "id", id)
	}
	return err
}
