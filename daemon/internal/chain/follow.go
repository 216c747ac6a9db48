package chain

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/fsnotify/fsnotify"
)

// settle is how long after a change the configuration is read: whoever changes it may truncate and write.
const settle = 100 * time.Millisecond

// Follow joins the chain, and keeps to the primary network when its configuration changes, is renamed, goes or comes. It
// returns when ctx ends, or, if once, as soon as it has joined.
func (n Node) Follow(ctx context.Context, way Way, once bool) error {
	watcher, err := fsnotify.NewWatcher()
	if err != nil {
		return err
	}
	defer watcher.Close() //nolint:errcheck // nothing is lost
	if err := watcher.Add(n.NetDir); err != nil {
		return fmt.Errorf("watching %s: %w", n.NetDir, err)
	}
	said := ""
	due := time.After(0)
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-watcher.Events:
			if !ok {
				return fmt.Errorf("watching %s: %w", n.NetDir, fsnotify.ErrClosed)
			}
			due = time.After(settle)
		case err := <-watcher.Errors:
			n.Log.Warn("watching network configurations", "error", err)
			due = time.After(settle) // events may be lost
		case <-due:
			due = nil
			joined, err := n.Join(way)
			word := joined.String()
			if err != nil {
				word = err.Error()
			}
			later := errors.Is(err, ErrNoNetwork) || errors.Is(err, ErrUnusable)
			switch {
			case err == nil && (joined.Changed || word != said):
				n.Log.Info("in the chain", "network", joined.Network, "primary", joined.Primary, "by", joined.Way, "file", joined.File)
			case later && word != said:
				n.Log.Info("waiting for a network to join", "reason", err)
			case err != nil && word != said:
				n.Log.Error("joining the chain", "error", err)
			}
			said = word
			if once && err == nil {
				return nil
			}
			if once && !later {
				return err
			}
		}
	}
}
