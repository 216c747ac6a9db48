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

// lock keeps a daemon from attaching pods again while they are being detached.
func (u uninstaller) lock(ctx context.Context) (unlock func(), err error) {
	deadline := time.Now().Add(u.ForDaemon)
	unlock, err = u.tryLock()
	for errors.Is(err, statedir.ErrRunning) && time.Now().Before(deadline) && wait(ctx, lookForDaemon) {
		unlock, err = u.tryLock()
	}
	if errors.Is(err, statedir.ErrRunning) {
		err = fmt.Errorf("%w; stop it first", err)
	}
	return unlock, err
}

// tryLock returns statedir.ErrRunning if a daemon uses the same state directory or the same pins.
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

// lookForDaemon is the interval at which lock checks whether the daemon has exited.
const lookForDaemon = 200 * time.Millisecond

// drainInterval is the interval at which quiesce counts the remaining connections. It exceeds the time for which a taken connection
// may still be answered.
const drainInterval = datapath.TakenGrace + 500*time.Millisecond

func (u uninstaller) detach(ctx context.Context) error {
	d, err := datapath.Open(u.BPFDir)
	switch {
	case errors.Is(err, datapath.ErrNotLoaded) || errors.Is(err, fs.ErrNotExist):
		d = nil // or only parts of it are left, because uninstall was killed
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
		u.Log.Warn("failed to read attachment records", "error", err)
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

// removeFilters removes filters whose pins are lost from the devices on record. The records themselves are removed later, because
// they are needed again if this is killed.
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

// removePins removes the directory of pins if its parent is in a BPF file system. Otherwise the directory may itself be the mount point of
// one, which may have the pins of other programs in it.
func (u uninstaller) removePins() error {
	var fs unix.Statfs_t
	if parent := filepath.Dir(u.BPFDir); unix.Statfs(parent, &fs) != nil || fs.Type != unix.BPF_FS_MAGIC {
		u.Log.Info("no pins to remove", "reason", parent+" is not a BPF file system")
		return nil
	}
	return os.RemoveAll(u.BPFDir)
}

// quiesce stops the programs from taking connections, by removing all evidence, and waits for the connections that they have.
func (u uninstaller) quiesce(ctx context.Context, d *datapath.Datapath, ids []attach.ID) error {
	for _, id := range ids {
		known, err := attach.OpenPod(d, u.BPFDir, id)
		if errors.Is(err, os.ErrNotExist) {
			continue // deleted meanwhile, or incomplete
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
		if err := d.Sweep(); err != nil {
			return err
		}
		flows, err := d.Flows()
		if err != nil || flows == 0 {
			return err
		}
		if time.Now().After(deadline) {
			u.Log.Warn("handed-over or observed connections are still open", "connections", flows)
			return nil
		}
	}
}

// removeState removes the daemon's files and the attachment records. Other files in the state directory stay.
func (u uninstaller) removeState() error {
	records := attach.RecordsDir(u.StateDir)
	if err := os.RemoveAll(records); err != nil {
		return err
	}
	if err := statedir.Remove(u.StateDir); err != nil {
		return err
	}
	// In a pod the directory is a mount point, so remove it through the host's root.
	err := os.Remove(filepath.Join(u.procDir(), "1/root", u.StateDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		u.Log.Info("keeping the state directory", "reason", err)
	}
	return nil
}
