package install

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/statedir"
	"github.com/probelet/probelet/daemon/internal/store"
)

// lock keeps a daemon from attaching what is being detached.
func (u uninstaller) lock(ctx context.Context) (unlock func(), err error) {
	deadline := time.Now().Add(u.ForDaemon)
	unlock, err = u.tryLock()
	for errors.Is(err, statedir.ErrRunning) && time.Now().Before(deadline) && wait(ctx, lookForDaemon) {
		unlock, err = u.tryLock()
	}
	if errors.Is(err, statedir.ErrRunning) {
		err = fmt.Errorf("%w; end it first", err)
	}
	return unlock, err
}

// tryLock returns statedir.ErrRunning if there is a daemon of the same state directory or of the same pins.
func (u uninstaller) tryLock() (unlock func(), err error) {
	release, err := statedir.ClaimPins(u.BPFDir)
	if err != nil {
		return nil, err
	}
	held, err := statedir.Lock(u.StateDir)
	if errors.Is(err, fs.ErrNotExist) {
		return release, nil
	}
	if err != nil {
		release()
		return nil, err
	}
	return func() { _ = held.Release(); release() }, nil
}

// lookForDaemon is how often it is looked whether the daemon has ended.
const lookForDaemon = 200 * time.Millisecond

// drainInterval separates looks at the connections that are left. It is longer than a taken one may still be answered.
const drainInterval = datapath.TakenGrace + 500*time.Millisecond

func (u uninstaller) detach(ctx context.Context) error {
	d, err := datapath.Open(u.BPFDir)
	switch {
	case errors.Is(err, datapath.ErrNotLoaded) || errors.Is(err, fs.ErrNotExist):
		d = nil // or what is left of it when uninstall was killed
	case err != nil:
		return err
	default:
		defer d.Close() //nolint:errcheck // nothing is lost
	}
	ids, err := attach.List(u.BPFDir)
	if err != nil {
		return err
	}
	if d != nil {
		if err := u.quiesce(ctx, d, ids); err != nil {
			return err
		}
	}
	records, err := attach.ReadRecords(u.StateDir)
	if err != nil {
		u.Log.Warn("records of attachments that cannot be read", "error", err)
	}
	for _, id := range ids {
		if err := attach.Detach(d, u.BPFDir, id); err != nil {
			return fmt.Errorf("detaching %s: %w", id, err)
		}
	}
	if err := removeFilters(records); err != nil {
		return err
	}
	u.Log.Info("detached", "pods", len(ids))
	if d == nil {
		return nil
	}
	return attach.Prune(ctx, d, u.BPFDir)
}

// removeFilters removes filters whose pins are lost from the devices on record. The records themselves go later: should this
// be killed, they are needed again.
func removeFilters(records []attach.Record) error {
	links, err := attach.Links()
	if err != nil {
		return err
	}
	for _, r := range records {
		if link, present := links[r.IfIndex]; !present || link.Name != r.HostIfName {
			continue
		}
		if err := attach.RemoveFilters(r.IfIndex); err != nil {
			return err
		}
	}
	return nil
}

// removePins removes the directory of pins, but never a whole file system of others' pins.
func (u uninstaller) removePins() error {
	var fs unix.Statfs_t
	if parent := filepath.Dir(u.BPFDir); unix.Statfs(parent, &fs) != nil || fs.Type != unix.BPF_FS_MAGIC {
		u.Log.Info("no pins", "reason", parent+" is not a BPF file system")
		return nil
	}
	return os.RemoveAll(u.BPFDir)
}

// quiesce makes the programs take no connection any more, by leaving them nothing to answer from, and waits for those that
// they have.
func (u uninstaller) quiesce(ctx context.Context, d *datapath.Datapath, ids []attach.ID) error {
	for _, id := range ids {
		known, err := attach.OpenPod(d, u.BPFDir, id)
		if errors.Is(err, os.ErrNotExist) {
			continue // deleted meanwhile, or never whole
		}
		if err != nil {
			return err
		}
		pod, err := store.Open(known)
		if err != nil {
			return err
		}
		if err := pod.Sync(store.Records{}); err != nil {
			return fmt.Errorf("%s: %w", id, err)
		}
	}
	for deadline := time.Now().Add(u.Drain); ; {
		if !wait(ctx, drainInterval) {
			return ctx.Err()
		}
		flows, err := d.Flows()
		if err != nil || flows == 0 {
			return err
		}
		if time.Now().After(deadline) {
			u.Log.Warn("connections that were handed over, or observed, have not ended", "connections", flows)
			return nil
		}
	}
}

// removeState removes the daemon's files and the records, but nothing of others.
func (u uninstaller) removeState() error {
	records := attach.RecordsDir(u.StateDir)
	if err := os.RemoveAll(records); err != nil {
		return err
	}
	if err := statedir.Remove(u.StateDir); err != nil {
		return err
	}
	// In a pod the directory is a mount: only where the host has it can it be removed.
	err := os.Remove(filepath.Join(u.procDir(), "1/root", u.StateDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		u.Log.Info("the empty directory of the state is left", "reason", err)
	}
	return nil
}
