package main

import (
	"context"
	"errors"
	"io/fs"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
)

// cmdDel accepts any configuration, because a pod must be removable whatever has become of its configuration.
func (p *plugin) cmdDel(args *skel.CmdArgs) error {
	conf := parseConfForDel(args.StdinData)
	start := time.Now()
	return p.report("DEL", conf, args, start, remove(conf, attach.ID{ContainerID: args.ContainerID, IfName: args.IfName}))
}

// remove undoes ADD. It removes the record last so that a retry finds what could not be removed.
func remove(conf *netConf, id attach.ID) error {
	if id.Check() != nil {
		return nil // ADD made nothing
	}
	defer keepDaemonOut(conf)()
	if err := detach(conf, id); err != nil {
		return err
	}
	if err := attach.RemoveRecord(conf.stateDir, id); err != nil {
		return fault(codeDetach, "removing the record: %v", err)
	}
	return nil
}

// keepDaemonOut keeps the daemon from repairing an attachment while it is being removed. A daemon that hangs while it holds the
// lock only delays the removal.
func keepDaemonOut(conf *netConf) (done func()) {
	ctx, cancel := context.WithTimeout(context.Background(), daemonDeadline)
	defer cancel()
	unlock, err := attach.LockRecords(ctx, conf.stateDir, unix.LOCK_SH)
	if err != nil {
		return func() {}
	}
	return unlock
}

// detach stops answering and removes the pins. The kernel detaches the programs a moment later (see attach.Release).
func detach(conf *netConf, id attach.ID) error {
	d, err := openForRemoval(conf.bpfDir)
	if err != nil {
		return err
	}
	if d != nil {
		defer d.Close() //nolint:errcheck // pinned
	}
	if err := removeUnpinned(d, conf, id); err != nil {
		return fault(codeDetach, "%v", err)
	}
	if err := attach.Release(d, conf.bpfDir, id); err != nil {
		return fault(codeDetach, "%v", err)
	}
	return nil
}

// removeUnpinned removes what Release cannot find: an attachment that has a record, but no pin that names its device.
func removeUnpinned(d *datapath.Datapath, conf *netConf, id attach.ID) error {
	if _, err := attach.Device(conf.bpfDir, id); !errors.Is(err, fs.ErrNotExist) || d == nil {
		return nil
	}
	record, err := attach.ReadRecord(conf.stateDir, id)
	if err != nil || record.IfIndex == 0 {
		return nil
	}
	if err := attach.Prune(context.Background(), d, conf.bpfDir); err != nil {
		return err
	}
	devices, err := d.Devices()
	if _, reused := devices[uint32(record.IfIndex)]; err != nil || reused {
		return err
	}
	return attach.ClearClsact(record.IfIndex)
}

// openForRemoval opens the pinned objects. It returns nil if any are no longer pinned; the rest can still be removed.
func openForRemoval(bpfDir string) (*datapath.Datapath, error) {
	d, err := datapath.Open(bpfDir)
	if errors.Is(err, datapath.ErrNotLoaded) || errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault(codeLoad, "%v", err)
	}
	return d, nil
}
