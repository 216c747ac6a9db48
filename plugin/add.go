package main

import (
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"

	"github.com/probelet/probelet/bpf/attach"
)

func (p *plugin) cmdAdd(args *skel.CmdArgs) error {
	return p.strictly("ADD", func(conf *netConf, args *skel.CmdArgs) error {
		if conf.prevResult == nil {
			return fault(types.ErrInvalidNetworkConfig,
				"prevResult is missing: probelet must be chained after the plugin that creates the interface")
		}
		err := p.add(conf, args)
		var ignored ignoredError
		if err != nil && !errors.As(err, &ignored) {
			return err
		}
		if _, printErr := fmt.Fprintf(p.stdout, "%s\n", conf.rawPrevResult); printErr != nil {
			return fault(types.ErrIOFailure, "printing the result: %v", printErr)
		}
		return err
	})(args)
}

// add attaches. If it fails, nothing stays attached. If the pod must start regardless, the error is an ignoredError, and the
// record, where it can be written, holds the reason.
func (p *plugin) add(conf *netConf, args *skel.CmdArgs) error {
	record := attach.Record{
		ContainerID: args.ContainerID,
		IfName:      args.IfName,
		Network:     conf.name,
		CreatedAt:   time.Now().UTC(),
	}
	if err := record.ID().Check(); err != nil {
		return conf.tolerate(fault(types.ErrInvalidEnvironmentVariables, "CNI_CONTAINERID: %v", err))
	}
	err := p.attachPod(conf, args, &record)
	if err == nil {
		return nil
	}
	if conf.onError == onErrorFail {
		return withDetails(err, remove(conf, record.ID()))
	}
	record.Error, record.Passing = err.Error(), mayPass(err)
	return ignoredError{withDetails(err, detach(conf, record.ID()), attach.WriteRecord(conf.stateDir, record))}
}

// mayPass reports whether the error is transient, so that a later attempt may succeed.
func mayPass(err error) bool {
	var e *types.Error
	return errors.As(err, &e) && slices.Contains([]uint{types.ErrTryAgainLater, codeNoBPFFS, codeLoad, codeAttach}, e.Code)
}

// attachPod attaches the pod and fills in the record as far as it gets.
func (p *plugin) attachPod(conf *netConf, args *skel.CmdArgs, record *attach.Record) error {
	if err := describePod(record, args.Args, conf.prevResult); err != nil {
		return err
	}
	device, err := findTarget(args.Netns, args.IfName, conf.prevResult)
	if err != nil {
		return err
	}
	record.IfIndex, record.HostIfName, record.PodNetns = device.Index, device.Name, device.PodNetns
	record.NetnsCookie = device.NetnsCookie
	record.Hook = conf.hook

	record.Error = attach.Unfinished
	if err := attach.WriteRecord(conf.stateDir, *record); err != nil {
		return fault(types.ErrIOFailure, "writing the record: %v", err)
	}
	d, err := p.ensureLoaded(conf)
	if err != nil {
		return err
	}
	defer d.Close() //nolint:errcheck // pinned
	if err := attach.Attach(d, conf.bpfDir, record.ID(), record.Target(), attachVia(conf.name)); err != nil {
		return fault(codeAttach, "%v", err)
	}
	record.Error = ""
	if err := attach.WriteRecord(conf.stateDir, *record); err != nil {
		return fault(types.ErrIOFailure, "writing the record: %v", err)
	}
	return nil
}

// podArgs holds the arguments that Kubernetes runtimes pass in CNI_ARGS.
type podArgs struct {
	types.CommonArgs
	K8S_POD_NAME      types.UnmarshallableString //nolint:revive // the name of the argument
	K8S_POD_NAMESPACE types.UnmarshallableString //nolint:revive // the name of the argument
	K8S_POD_UID       types.UnmarshallableString //nolint:revive // the name of the argument
}

func describePod(record *attach.Record, cniArgs string, prevResult *current.Result) error {
	pod := podArgs{CommonArgs: types.CommonArgs{IgnoreUnknown: true}}
	if err := types.LoadArgs(cniArgs, &pod); err != nil {
		return fault(types.ErrInvalidEnvironmentVariables, "CNI_ARGS is %q: %v", cniArgs, err)
	}
	record.PodName = string(pod.K8S_POD_NAME)
	record.PodNamespace = string(pod.K8S_POD_NAMESPACE)
	record.PodUID = string(pod.K8S_POD_UID)
	for _, ip := range prevResult.IPs {
		if ip != nil { // a null in the list
			record.PodIPs = append(record.PodIPs, ip.Address.IP.String())
		}
	}
	return nil
}
