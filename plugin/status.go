package main

import (
	"fmt"
	"os"

	"github.com/containernetworking/cni/pkg/types"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
)

// status does everything that ADD does before it looks at the pod; anything less could miss a reason for ADD to fail.
func (p *plugin) status(conf *netConf) error {
	err := p.ready(conf)
	if err == nil {
		return nil
	}
	return conf.tolerate(fault(types.ErrPluginNotAvailable, "%v", err))
}

func (p *plugin) ready(conf *netConf) error {
	records := attach.RecordsDir(conf.stateDir)
	if err := os.MkdirAll(records, 0o700); err != nil {
		return err
	}
	if err := unix.Access(records, unix.W_OK); err != nil {
		return fmt.Errorf("%s is not writable: %w", records, err)
	}
	d, err := p.ensureLoaded(conf)
	if err != nil {
		return err
	}
	return d.Close()
}
