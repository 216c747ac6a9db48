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
	// settle is how long after a change the configuration is read: whoever changes it may truncate and write.
	settle = 100 * time.Millisecond
	// lookAgain is how often it is read although nobody tells of a change: a link may lead to another directory, and that one
	// itself may have been replaced.
	lookAgain = 10 * time.Second
	// Somebody else may undo what we do, whenever we do it. Then changes follow each other within contested, and we wait
	// longer and longer, up to longestPause.
	contested    = 5 * time.Second
	longestPause = time.Minute
)

// Follow joins the chain, and keeps to the primary network when its configuration changes, is renamed, goes or comes. It
// returns when ctx ends, or, if once, as soon as it has joined; not to have joined by then is an error.
func (n Node) Follow(ctx context.Context, way Way, once bool) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer watcher.Close() //nolint:errcheck // nothing is lost
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
				return fmt.Errorf("not in the chain yet (%s): %w", f.said, ctx.Err())
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
			n.Log.Warn("watching network configurations", "error", err)
			due = time.After(f.pause) // events may be lost
		case <-again.C:
			if err := f.watch(); err != nil {
				n.Log.Warn("watching network configurations", "error", err)
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

// passes is of errors that the network's owner ends, by writing its configuration.
func passes(err error) bool {
	return errors.Is(err, ErrNoNetwork) || errors.Is(err, ErrUnusable) || errors.Is(err, ErrUnsupported)
}

// quiet is of errors that do not mean that somebody undoes what we do.
func quiet(err error) bool { return err == nil || passes(err) || errors.Is(err, ErrMisplaced) }

// follower is what Follow remembers.
type follower struct {
	Node
	way     Way
	watcher *fsnotify.Watcher
	watched os.FileInfo
	joined  bool      // once at least
	said    string    // last
	changed time.Time // when we last changed something
	pause   time.Duration
}

// watch watches the directory that there is now.
func (f *follower) watch() error {
	now, err := os.Stat(f.NetDir)
	if err == nil && (f.watched == nil || !os.SameFile(f.watched, now)) {
		_ = f.watcher.Remove(f.NetDir) // the one before, if that is still watched
		err = f.watcher.Add(f.NetDir)
	}
	if err != nil {
		return fmt.Errorf("watching %s: %w", f.NetDir, err)
	}
	f.watched = now
	_ = f.watcher.Add(f.BinDir) // of programs that go, Follow hears at its next look otherwise
	return nil
}

// join joins, says what is new, and decides how soon the next change is followed.
func (f *follower) join(ctx context.Context) error {
	joined, err := f.Join(ctx, f.way)
	if err == nil && !f.joined {
		// Whoever joined before us may have been killed before the runtime was told.
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
	case err == nil && (joined.Changed || word != f.said):
		f.Log.Info("in the chain", "network", joined.Network, "primary", joined.Primary, "by", joined.Way, "file", joined.File)
	case err != nil && word != f.said && (errors.Is(err, ErrNoNetwork) || errors.Is(err, ErrUnusable)):
		f.Log.Info("waiting for a network to join", "reason", err)
	case err != nil && word != f.said:
		f.Log.Error("not in the chain", "error", err)
	}
	f.said = word
	if !joined.Changed && quiet(err) {
		return err
	}
	if time.Since(f.changed) > f.pause+contested {
		f.pause = settle
	} else if f.pause = min(2*f.pause, longestPause); f.pause > contested {
		f.Log.Warn("somebody else keeps changing the network configuration; the chain follows less often", "pause", f.pause)
	}
	f.changed = time.Now()
	return err
}
