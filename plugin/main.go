// probelet is a chained CNI plugin. It attaches the programs of package datapath to the host side of the pod's veth, and
// leaves a record of the pod for the daemon. It changes nothing that the plugins before it made, and works with the daemon
// down.
package main

import (
	"io"
	"os"

	"github.com/cilium/ebpf/features"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
)

func main() {
	p := &plugin{stdout: os.Stdout, stderr: os.Stderr, kernelVersion: features.LinuxVersionCode}
	funcs := p.funcs()
	if os.Getenv("CNI_COMMAND") == "DEL" {
		if err := takeAnyConf(&funcs); err != nil {
			_ = types.NewError(types.ErrIOFailure, err.Error(), "").Print()
			os.Exit(1)
		}
	}
	skel.PluginMainFuncs(funcs, version.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"),
		"CNI plugin probelet: answers kubelet probes in the kernel; chained behind a plugin that makes a veth")
}

// takeAnyConf makes DEL accept anything on stdin. skel would refuse a configuration that is not JSON, has no name or an unsupported
// version. So skel gets one that it accepts, and funcs.Del gets the real one.
func takeAnyConf(funcs *skel.CNIFuncs) error {
	conf, _ := io.ReadAll(os.Stdin) // unreadable counts as empty
	stdin, acceptable, err := os.Pipe()
	if err != nil {
		return err
	}
	if _, err := acceptable.WriteString(`{"cniVersion": "1.1.0", "name": "any"}`); err != nil {
		return err
	}
	os.Stdin = stdin
	del := funcs.Del
	funcs.Del = func(args *skel.CmdArgs) error {
		args.StdinData = conf
		return del(args)
	}
	return acceptable.Close()
}
