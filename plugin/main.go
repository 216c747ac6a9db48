// probelet is a chained CNI plugin. It attaches the programs of package datapath to the host side of the pod's veth and
// leaves a record of the pod for the daemon. It changes nothing that earlier plugins created, and it works while the daemon
// is down.
package main

import (
	"fmt"
	"io"
	"os"

	"github.com/cilium/ebpf/features"
	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	cniversion "github.com/containernetworking/cni/pkg/version"

	"github.com/probelet/probelet/internal/version"
)

func main() {
	if asksVersion(os.Args) {
		fmt.Println("probelet version", version.String())
		return
	}
	p := &plugin{stdout: os.Stdout, stderr: os.Stderr, kernelVersion: features.LinuxVersionCode}
	funcs := p.funcs()
	if os.Getenv("CNI_COMMAND") == "DEL" {
		if err := takeAnyConf(&funcs); err != nil {
			_ = types.NewError(types.ErrIOFailure, err.Error(), "").Print()
			os.Exit(1)
		}
	}
	skel.PluginMainFuncs(funcs, cniversion.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"),
		"CNI plugin probelet "+version.String()+": answers kubelet probes in the kernel; must be chained after a plugin that creates a veth")
}

// asksVersion reports whether the command line asks for the version. Runtimes pass no arguments.
func asksVersion(args []string) bool {
	return os.Getenv("CNI_COMMAND") == "" && len(args) == 2 && (args[1] == "--version" || args[1] == "version")
}

// takeAnyConf makes DEL accept anything on stdin. skel rejects a configuration that is not JSON, lacks a name, or has an unsupported
// version, so it is given one that it accepts, while funcs.Del receives the real one.
func takeAnyConf(funcs *skel.CNIFuncs) error {
	conf, _ := io.ReadAll(os.Stdin) // treat unreadable as empty
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
