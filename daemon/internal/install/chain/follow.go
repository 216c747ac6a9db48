package chain

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// settle is the delay between a change and reading the configuration: its owner may truncate the file and then write it.
	settle = 100 * time.Millisecond
	// lookAgain is the interval of checks without a notification: NetDir may be a symlink whose target changes, or may be replaced.
	lookAgain = 10 * time.Second
	// Another process may undo each of our changes. If we have to make the next one within contested, we back off, up to longestPause.
	contested    = 5 * time.Second
	longestPause = time.Minute
)

// Follow joins the chain and joins again whenever the primary network's configuration is changed, renamed, removed or created. It
// returns when ctx ends. With once it returns as soon as it has joined, and returns an error if ctx ends first.
func (n Node) Follow(ctx context.Context, way Way, once bool) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer watcher.Close() //nolint:errcheck // read only
	f := follower{Node: n, way: way, watcher: watcher, pause: settle}
	if err := f.watch(); err != nil {
		return err
	}
	again := time.NewTicker(lookAgain)
	defer again.Stop()
	due := time.After(0)
	for {
		select {
		case <-ctx.Done():
			if once {
				return fmt.Errorf("not in the chain yet (%s): %w", f.last, ctx.Err())
			}
			return nil
		case _, ok := <-watcher.Events:
			if !ok {
				return fmt.Errorf("watching %s: %w", n.NetDir, fsnotify.ErrClosed)
			}
			if due == nil || f.pause == settle {
				due = time.After(f.pause)
			}
		case err := <-watcher.Errors:
			n.Log.Warn("failed to watch network configurations", "error", err)
			due = time.After(f.pause) // events may have been lost
		case <-again.C:
			if err := f.watch(); err != nil {
				n.Log.Warn("failed to watch network configurations", "error", err)
			}
			if due == nil {
				due = time.After(0)
			}
		case <-due:
			due = nil
			if err := f.join(ctx); once && !passes(err) {
				return err
			}
		}
	}
}

// passes reports whether an error goes away once the network's owner has written its configuration.
func passes(err error) bool {
	return errors.Is(err, ErrNoNetwork) || errors.Is(err, ErrUnusable) || errors.Is(err, ErrUnsupported)
}

// quiet reports whether an outcome gives no reason to suspect that another process undoes our changes.
func quiet(err error) bool { return err == nil || passes(err) || errors.Is(err, ErrMisplaced) }

// follower is the state of Follow.
type follower struct {
	Node
	way     Way
	watcher *fsnotify.Watcher
	watched os.FileInfo
	joined  bool      // at least once
	last    string    // outcome that was logged
	changed time.Time // when we last changed a file
	pause   time.Duration
}

// watch watches NetDir, and starts over if that is now another directory.
func (f *follower) watch() error {
	now, err := os.Stat(f.NetDir)
	if err == nil && (f.watched == nil || !os.SameFile(f.watched, now)) {
		_ = f.watcher.Remove(f.NetDir) // the previous directory, if still watched
		err = f.watcher.Add(f.NetDir)
	}
	if err != nil {
		return fmt.Errorf("--cni-net-dir: watching %s: %w", f.NetDir, err)
	}
	f.watched = now
	_ = f.watcher.Add(f.BinDir) // best effort: without it Follow notices removed programs at its next check
	return nil
}

// join joins, logs changes, and sets the pause until the next change is handled.
func (f *follower) join(ctx context.Context) error {
	joined, err := f.Join(ctx, f.way)
	if err == nil && !f.joined {
		// A previous process may have joined and been killed before its own Wake.
		f.joined, err = true, f.Wake()
	}
	if f.Looked != nil {
		f.Looked(joined, err)
	}
	word := joined.String()
	if err != nil {
		word = err.Error()
	}
	switch {
	case err == nil && (joined.Changed || word != f.last):
		f.Log.Info("in the chain", "network", joined.Network, "primary", joined.Primary, "by", joined.Way, "file", joined.File)
	case err != nil && word != f.last && (errors.Is(err, ErrNoNetwork) || errors.Is(err, ErrUnusable)):
		f.Log.Info("waiting for a network to join", "reason", err)
	case err != nil && word != f.last:
		f.Log.Error("not in the chain", "error", err)
	}
	f.last = word
	if !joined.Changed && quiet(err) {
		return err
	}
	if time.Since(f.changed) > f.pause+contested {
		f.pause = settle
	} else if f.pause = min(2*f.pause, longestPause); f.pause > contested {
		f.Log.Warn("another process keeps changing the network configuration; backing off", "pause", f.pause)
	}
	f.changed = time.Now()
	return err
}
