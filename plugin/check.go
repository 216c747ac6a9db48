package main

import (
	"errors"
	"io/fs"
	"os"

	"github.com/containernetworking/cni/pkg/skel"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
)

// check compares the record, the device and the attachment with what ADD made.
func check(conf *netConf, args *skel.CmdArgs) error {
	id := attach.ID{ContainerID: args.ContainerID, IfName: args.IfName}
	if err := id.Check(); err != nil {
		return conf.tolerate(fault(codeCheck, "not attached: %v", err))
	}
	record, err := attach.ReadRecord(conf.stateDir, id)
	if errors.Is(err, fs.ErrNotExist) {
		noRecord := fault(codeCheck, "%s has no record in %s", id, conf.stateDir)
		if uninstalled(conf) {
			return conf.tolerate(noRecord)
		}
		return noRecord
	}
	if err != nil {
		return fault(codeCheck, "the record of %s: %v", id, err)
	}
	if record.ID() != id || record.Network != conf.name {
		return fault(codeCheck, "the record of %s on network %s describes %s on network %s",
			id, conf.name, record.ID(), record.Network)
	}
	if record.Error != "" {
		return conf.tolerate(fault(codeCheck, "%s is not attached: %s", id, record.Error))
	}
	device, err := findTarget(args.Netns, args.IfName, conf.prevResult)
	if err != nil {
		return err
	}
	if device.Index != record.IfIndex || device.Name != record.HostIfName {
		return fault(codeCheck, "the host side of %s is device %d, %s; the record says %d, %s",
			id, device.Index, device.Name, record.IfIndex, record.HostIfName)
	}
	if record.NetnsCookie != 0 && device.NetnsCookie != record.NetnsCookie {
		return fault(codeCheck, "%s is the network namespace with cookie %d; the record of %s says %d",
			args.Netns, device.NetnsCookie, id, record.NetnsCookie)
	}
	return checkAttached(conf, id, device.Index)
}

// uninstalled reports whether probelet was uninstalled. A runtime may keep checking pods with the configuration of their ADD.
func uninstalled(conf *netConf) bool {
	_, err := os.Stat(conf.bpfDir)
	return datapath.Absent(err)
}

func checkAttached(conf *netConf, id attach.ID, ifIndex int) error {
	d, err := datapath.Open(conf.bpfDir)
	if err != nil {
		return fault(codeCheck, "%v", err)
	}
	defer d.Close() //nolint:errcheck // read only
	if err := attach.Check(d, conf.bpfDir, id, ifIndex); err != nil {
		return fault(codeCheck, "%v", err)
	}
	return nil
}
