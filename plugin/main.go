// probelet is a chained CNI plugin. It attaches the programs of package datapath to the host side of the pod's veth, and
// leaves a record of the pod for the daemon. It changes nothing of what the plugins before it made, and it works whether
// or not the daemon runs.
package main

import (
	"os"

	"github.com/cilium/ebpf/features"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/version"
)

func main() {
	p := &plugin{stdout: os.Stdout, stderr: os.Stderr, kernelVersion: features.LinuxVersionCode}
	skel.PluginMainFuncs(p.funcs(), supportedVersions(os.Getenv("CNI_COMMAND")),
		"CNI plugin probelet: answers kubelet probes in the kernel; chained behind a plugin that makes a veth")
}

// supportedVersions are the versions of the specification that are accepted for a command.
func supportedVersions(command string) version.PluginInfo {
	if command == "DEL" {
		// It has no result whose form could be wrong, and a configuration without cniVersion means 0.1.0.
		return version.All
	}
	return version.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
}
