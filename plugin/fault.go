package main

import (
	"errors"
	"fmt"

	"github.com/containernetworking/cni/pkg/types"
)

// Error codes in addition to those of the CNI specification, which reserves 100 and above for plugins.
const (
	codeNoVeth       = 100 // the pod's interface is not a veth whose peer is in the host's namespace
	codePrevResult   = 101 // prevResult names another device for this pod
	codeKernelTooOld = 102
	codeNoBPFFS      = 103 // bpfDir is not on a BPF file system
	codeLoad         = 104 // the BPF objects cannot be loaded or opened
	codeAttach       = 105 // the programs cannot be attached to the device
	codeDetach       = 106 // something cannot be removed: retry later or remove it manually
	codeCheck        = 107 // the attachment differs from what ADD made
)

// fault returns an error of the type that skel prints for the runtime.
func fault(code uint, format string, args ...any) error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

// ignoredError marks an error that the configuration tells us to ignore.
type ignoredError struct{ error }

// tolerate marks err as ignored if the configuration says so.
func (c *netConf) tolerate(err error) error {
	if c.onError == onErrorIgnore {
		return ignoredError{err}
	}
	return err
}

// withDetails adds follow-up errors to the details of err.
func withDetails(err error, more ...error) error {
	joined := errors.Join(more...)
	var e *types.Error
	if joined == nil || !errors.As(err, &e) {
		return err
	}
	return types.NewError(e.Code, e.Msg, joined.Error())
}
