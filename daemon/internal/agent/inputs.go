package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/source"
)

// recordsSettle is how long after a change of records they are read, because one change makes several events.
const recordsSettle = 10 * time.Millisecond

// inputs are the goroutines beside the loop, and what they send it.
type inputs struct {
	snapshots chan []probe.Pod
	records   chan struct{} // records of attachments have changed
	exchanges chan batch
	failed    chan error // the first error that the daemon cannot go on after
	// recordsReplaced reports whether the directory of records is no longer the one that is watched.
	recordsReplaced func() bool
	all             sync.WaitGroup // of the goroutines, which end after ctx
}

// watch starts the inputs.
func watch(ctx context.Context, stateDir string, d *datapath.Datapath, specs source.Source, log *slog.Logger) (*inputs, error) {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return nil, err
	}
	if err := watcher.Add(attach.RecordsDir(stateDir)); err != nil {
		return nil, errors.Join(fmt.Errorf("watching %s: %w", attach.RecordsDir(stateDir), err), watcher.Close())
	}
	watched, err := os.Stat(attach.RecordsDir(stateDir))
	if err != nil {
		return nil, errors.Join(err, watcher.Close())
	}
	reader, err := d.Records()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("records of connections: %w", err), watcher.Close())
	}
	in := &inputs{
		recordsReplaced: func() bool {
			current, err := os.Stat(attach.RecordsDir(stateDir))
			return err != nil || !os.SameFile(watched, current)
		},
		snapshots: make(chan []probe.Pod),
		records:   make(chan struct{}, 1),
		exchanges: make(chan batch),
		failed:    make(chan error, 1),
	}
	in.all.Go(func() { in.fail(specs.Run(ctx, in.snapshots)) })
	in.all.Go(func() { in.fail(in.watchRecords(ctx, watcher, log)) })
	in.all.Go(func() { in.fail(readExchanges(ctx, reader, in.exchanges)) })
	// Closing the reader wakes it up.
	context.AfterFunc(ctx, func() { _ = reader.Close() })
	return in, nil
}

func (in *inputs) fail(err error) {
	if err == nil {
		return
	}
	select {
	case in.failed <- err:
	default:
	}
}

func (in *inputs) watchRecords(ctx context.Context, watcher *fsnotify.Watcher, log *slog.Logger) error {
	defer watcher.Close() //nolint:errcheck // nothing is lost
	var due <-chan time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-watcher.Events:
			if !ok {
				return fmt.Errorf("watching records: %w", os.ErrClosed)
			}
			if due == nil {
				due = time.After(recordsSettle)
			}
		case err := <-watcher.Errors:
			log.Warn("failed to watch records of attachments; reading them now", "error", err)
			due = time.After(recordsSettle)
		case <-due:
			due = nil
			select {
			case in.records <- struct{}{}:
			default: // a notification is pending already
			}
		}
	}
}
