package main

import (
	"context"
	"errors"
	"slices"

	"github.com/containernetworking/cni/pkg/types"

	"github.com/probelet/probelet/bpf/attach"
)

// gc removes stale attachments: those of this network that the runtime does not list, and those without a record whose device is
// gone. Without a list it cannot tell which are stale and removes nothing.
func gc(conf *netConf) error {
	if conf.validAttachments == nil {
		return fault(types.ErrInvalidNetworkConfig, "%s is missing: cannot tell which attachments are stale", fieldValidAttachments)
	}
	valid := map[attach.ID]bool{}
	for _, a := range conf.validAttachments {
		valid[attach.ID{ContainerID: a.ContainerID, IfName: a.IfName}] = true
	}
	// List pins before reading records, because ADD writes its record first.
	pinned, err := attach.List(conf.bpfDir)
	errs := []error{err}
	records, err := attach.ReadRecords(conf.stateDir)
	errs = append(errs, err)

	recorded := map[attach.ID]bool{}
	for _, r := range records {
		recorded[r.ID()] = true
		if r.Network == conf.name && !valid[r.ID()] {
			errs = append(errs, remove(conf, r.ID()))
		}
	}
	unrecorded := slices.DeleteFunc(pinned, func(id attach.ID) bool { return recorded[id] || valid[id] })
	errs = append(errs, removeOrphans(conf, unrecorded))
	if err := errors.Join(errs...); err != nil {
		return fault(codeDetach, "%v", err)
	}
	return nil
}

// removeOrphans removes the given attachments whose device is gone, and devices that belong to no attachment.
func removeOrphans(conf *netConf, ids []attach.ID) error {
	d, err := openForRemoval(conf.bpfDir)
	if err != nil {
		return err
	}
	if d != nil {
		defer d.Close() //nolint:errcheck // pinned
	}
	var errs []error
	for _, id := range ids {
		orphaned, err := attach.Orphaned(conf.bpfDir, id)
		if err == nil && orphaned {
			err = attach.Detach(d, conf.bpfDir, id)
		}
		errs = append(errs, err)
	}
	if d != nil {
		errs = append(errs, attach.Prune(context.Background(), d, conf.bpfDir))
	}
	return errors.Join(errs...)
}
