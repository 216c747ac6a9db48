package main

import (
	"errors"
	"os"

	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/probelet/probelet/bpf/veth"
)

// findTarget finds the device to attach to. prevResult may be nil.
func findTarget(netnsPath, ifName string, prevResult *current.Result) (veth.HostEnd, error) {
	netns, err := os.Open(netnsPath)
	if err != nil {
		return veth.HostEnd{}, fault(types.ErrInvalidNetNS, "the pod's network namespace: %v", err)
	}
	defer netns.Close() //nolint:errcheck // read only
	end, err := veth.Find(netns, netnsPath, ifName, hintsOf(prevResult))
	switch {
	case err == nil:
		return end, nil
	case errors.Is(err, veth.ErrNoNetns):
		return end, fault(types.ErrInvalidNetNS, "the pod's network namespace: %v", err)
	case errors.Is(err, veth.ErrContradicted):
		return end, fault(codePrevResult, "prevResult: %v", err)
	default:
		return end, fault(codeNoVeth, "%v", err)
	}
}

func hintsOf(prevResult *current.Result) (hints []veth.Hint) {
	if prevResult == nil {
		return nil
	}
	for _, i := range prevResult.Interfaces {
		if i != nil { // a null in the list
			hints = append(hints, veth.Hint{Name: i.Name, Sandbox: i.Sandbox})
		}
	}
	return hints
}
