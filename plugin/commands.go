package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	current "github.com/containernetworking/cni/pkg/types/100"
	"golang.org/x/sys/unix"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
)

// Codes of errors beyond those of the CNI specification, which leaves 100 and above to the plugin.
const (
	codeNoVeth       = 100 // the pod's interface is not a veth whose peer is in the host's namespace
	codePrevResult   = 101 // prevResult does not fit the devices
	codeKernelTooOld = 102
	codeNoBPFFS      = 103 // bpfDir is not on a BPF file system
	codeLoad         = 104 // the BPF objects cannot be loaded or opened
	codeAttach       = 105 // the programs cannot be attached to the device
	codeDetach       = 106 // something cannot be removed; again later, or by hand
	codeCheck        = 107 // the attachment is not as ADD made it
)

const (
	minKernelMajor, minKernelMinor = 5, 15

	// loadDeadline bounds the wait for another process that loads the objects.
	loadDeadline = 5 * time.Second

	// daemonDeadline is far longer than the daemon needs to attach one pod.
	daemonDeadline = 2 * time.Second

	// addUnfinished is in the record from before anything is attached until all is, so that whoever reads the record
	// waits, and knows what happened should ADD die.
	addUnfinished = "ADD has not finished"
)

// fault makes an error of the form that a runtime gets to see.
func fault(code uint, format string, args ...any) error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

// ignoredError is one that the configuration says to live with.
type ignoredError struct{ error }

// plugin is the plugin and its environment.
type plugin struct {
	stdout, stderr io.Writer
	kernelVersion  func() (uint32, error) // as LINUX_VERSION_CODE
}

func (p *plugin) funcs() skel.CNIFuncs {
	return skel.CNIFuncs{
		Add:    p.cmdAdd,
		Check:  p.strictly("CHECK", check),
		Del:    p.cmdDel,
		GC:     p.strictly("GC", func(conf *netConf, _ *skel.CmdArgs) error { return gc(conf) }),
		Status: p.strictly("STATUS", func(conf *netConf, _ *skel.CmdArgs) error { return p.status(conf) }),
	}
}

// strictly makes a command of one that needs a valid configuration.
func (p *plugin) strictly(verb string, run func(*netConf, *skel.CmdArgs) error) func(*skel.CmdArgs) error {
	return func(args *skel.CmdArgs) error {
		conf, err := parseConf(args.StdinData)
		if err != nil {
			return err
		}
		start := time.Now()
		return p.report(verb, conf, args, start, run(conf, args))
	}
}

func (p *plugin) cmdAdd(args *skel.CmdArgs) error {
	return p.strictly("ADD", func(conf *netConf, args *skel.CmdArgs) error {
		if conf.prevResult == nil {
			return fault(types.ErrInvalidNetworkConfig,
				"prevResult is missing: probelet must be chained behind the plugin that makes the interface")
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

// cmdDel takes any configuration: a pod must be removable whatever has become of it.
func (p *plugin) cmdDel(args *skel.CmdArgs) error {
	conf := parseConfForDel(args.StdinData)
	start := time.Now()
	return p.report("DEL", conf, args, start, remove(conf, attach.ID{ContainerID: args.ContainerID, IfName: args.IfName}))
}

// report tells of what a command did: a line in the log file, and on stderr what is ignored. It returns what is not.
func (p *plugin) report(verb string, conf *netConf, args *skel.CmdArgs, start time.Time, err error) error {
	attrs := []slog.Attr{
		slog.String("network", conf.name),
		slog.String("container", args.ContainerID),
		slog.String("interface", args.IfName),
		slog.Duration("took", time.Since(start)),
	}
	level := slog.LevelInfo
	var ignored ignoredError
	switch {
	case errors.As(err, &ignored):
		level = slog.LevelWarn
		attrs = append(attrs, slog.String("ignored", err.Error()))
		_, _ = fmt.Fprintf(p.stderr, "probelet: %s: ignored: %v\n", verb, err)
		err = nil
	case err != nil:
		level = slog.LevelError
		attrs = append(attrs, slog.String("error", err.Error()))
	}
	if logErr := appendLog(conf.logFile, level, verb, attrs); logErr != nil {
		_, _ = fmt.Fprintf(p.stderr, "probelet: logFile: %v\n", logErr)
	}
	return err
}

func appendLog(path string, level slog.Level, verb string, attrs []slog.Attr) error {
	if path == "" {
		return nil
	}
	f, err := os.OpenFile(path, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	slog.New(slog.NewTextHandler(f, nil)).LogAttrs(context.Background(), level, verb, attrs...)
	return f.Close()
}

// add attaches. If it can't, nothing stays attached; the error is an ignoredError if the pod is to start regardless, and
// then the record says why.
func (p *plugin) add(conf *netConf, args *skel.CmdArgs) error {
	record := attach.Record{
		ContainerID: args.ContainerID,
		IfName:      args.IfName,
		Network:     conf.name,
		CreatedAt:   time.Now().UTC(),
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

// mayPass is whether the same may succeed later.
func mayPass(err error) bool {
	var e *types.Error
	return errors.As(err, &e) && slices.Contains([]uint{types.ErrTryAgainLater, codeNoBPFFS, codeLoad, codeAttach}, e.Code)
}

// attachPod completes the record as far as it gets.
func (p *plugin) attachPod(conf *netConf, args *skel.CmdArgs, record *attach.Record) error {
	if err := describePod(record, args.Args, conf.prevResult); err != nil {
		return err
	}
	device, err := findTarget(args.Netns, args.IfName, conf.prevResult)
	if err != nil {
		return err
	}
	record.IfIndex, record.HostIfName, record.PodNetns = device.ifIndex, device.ifName, device.podNetns

	record.Error = addUnfinished
	if err := attach.WriteRecord(conf.stateDir, *record); err != nil {
		return fault(types.ErrIOFailure, "writing the record: %v", err)
	}
	d, err := p.ensureLoaded(conf)
	if err != nil {
		return err
	}
	defer d.Close() //nolint:errcheck // pinned
	if err := attach.Attach(d, conf.bpfDir, record.ID(), record.Target(), attach.HookAuto); err != nil {
		return fault(codeAttach, "%v", err)
	}
	record.Error = ""
	if err := attach.WriteRecord(conf.stateDir, *record); err != nil {
		return fault(types.ErrIOFailure, "writing the record: %v", err)
	}
	return nil
}

// podArgs is what Kubernetes runtimes pass in CNI_ARGS.
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
		record.PodIPs = append(record.PodIPs, ip.Address.IP.String())
	}
	return nil
}

func (p *plugin) ensureLoaded(conf *netConf) (*datapath.Datapath, error) {
	if err := p.checkKernel(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(context.Background(), loadDeadline)
	defer cancel()
	d, err := datapath.Ensure(ctx, conf.bpfDir)
	switch {
	case err == nil:
		return d, nil
	case errors.Is(err, datapath.ErrNoBPFFS):
		return nil, fault(codeNoBPFFS, "%v", err)
	case errors.Is(err, datapath.ErrLocked):
		return nil, fault(types.ErrTryAgainLater, "%v", err)
	default:
		return nil, fault(codeLoad, "%v", err)
	}
}

// checkKernel looks at the version, not at what loads: on an older kernel the programs may load and lose packets.
func (p *plugin) checkKernel() error {
	v, err := p.kernelVersion()
	if err != nil {
		return fault(codeLoad, "the kernel's version: %v", err)
	}
	if v < minKernelMajor<<16|minKernelMinor<<8 {
		return fault(codeKernelTooOld, "kernel %d.%d is too old: probelet needs %d.%d or newer",
			v>>16, v>>8&0xff, minKernelMajor, minKernelMinor)
	}
	return nil
}

// remove undoes ADD. The record goes last, so that what could not be removed is found again.
func remove(conf *netConf, id attach.ID) error {
	defer keepDaemonOut(conf)()
	if err := detach(conf, id); err != nil {
		return err
	}
	if err := attach.RemoveRecord(conf.stateDir, id); err != nil {
		return fault(codeDetach, "removing the record: %v", err)
	}
	return nil
}

// keepDaemonOut keeps the daemon from repairing what is being removed. A daemon that does not let go of the lock does not keep the
// pod from being removed.
func keepDaemonOut(conf *netConf) (done func()) {
	ctx, cancel := context.WithTimeout(context.Background(), daemonDeadline)
	defer cancel()
	unlock, err := attach.LockRecords(ctx, conf.stateDir, unix.LOCK_SH)
	if err != nil {
		return func() {}
	}
	return unlock
}

func detach(conf *netConf, id attach.ID) error {
	d, err := openForRemoval(conf.bpfDir)
	if err != nil {
		return err
	}
	if d != nil {
		defer d.Close() //nolint:errcheck // pinned
	}
	if lostPins(conf, id) && d != nil {
		if err := attach.Prune(d, conf.bpfDir); err != nil {
			return fault(codeDetach, "%v", err)
		}
	}
	if err := attach.Detach(d, conf.bpfDir, id); err != nil {
		return fault(codeDetach, "%v", err)
	}
	return nil
}

// lostPins says whether the record tells of an attachment that is not pinned: without its pins Detach cannot know it.
func lostPins(conf *netConf, id attach.ID) bool {
	record, err := attach.ReadRecord(conf.stateDir, id)
	if err != nil || record.IfIndex == 0 {
		return false
	}
	ids, err := attach.List(conf.bpfDir)
	return err == nil && !slices.Contains(ids, id)
}

// openForRemoval returns nil if the objects are not loaded, or not all of them any more: what else there is must still
// be removable.
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

// check compares everything with what ADD made.
func check(conf *netConf, args *skel.CmdArgs) error {
	id := attach.ID{ContainerID: args.ContainerID, IfName: args.IfName}
	record, err := attach.ReadRecord(conf.stateDir, id)
	if errors.Is(err, fs.ErrNotExist) {
		noRecord := fault(codeCheck, "%s has no record in %s", id, conf.stateDir)
		if conf.onError == onErrorIgnore && uninstalled(conf) {
			return ignoredError{noRecord}
		}
		return noRecord
	}
	if err != nil {
		return fault(codeCheck, "the record of %s: %v", id, err)
	}
	if record.ID() != id || record.Network != conf.name {
		return fault(codeCheck, "the record of %s on network %s is that of %s on network %s",
			id, conf.name, record.ID(), record.Network)
	}
	if record.Error != "" {
		notAttached := fault(codeCheck, "%s is not attached: %s", id, record.Error)
		if conf.onError == onErrorIgnore {
			return ignoredError{notAttached}
		}
		return notAttached
	}
	device, err := findTarget(args.Netns, args.IfName, conf.prevResult)
	if err != nil {
		return err
	}
	if device.ifIndex != record.IfIndex || device.ifName != record.HostIfName {
		return fault(codeCheck, "the host side of %s is device %d, %s; the record says %d, %s",
			id, device.ifIndex, device.ifName, record.IfIndex, record.HostIfName)
	}
	return checkAttached(conf, id, device.ifIndex)
}

// uninstalled says whether nothing is left of probelet but this plugin: a runtime may go on checking pods with the configuration
// of their ADD.
func uninstalled(conf *netConf) bool {
	_, err := os.Stat(conf.bpfDir)
	return datapath.Absent(err)
}

func checkAttached(conf *netConf, id attach.ID, ifIndex int) error {
	d, err := datapath.Open(conf.bpfDir)
	if err != nil {
		return fault(codeCheck, "%v", err)
	}
	defer d.Close() //nolint:errcheck // only read
	if err := attach.Check(d, conf.bpfDir, id, ifIndex); err != nil {
		return fault(codeCheck, "%v", err)
	}
	return nil
}

// gc removes what the runtime does not list: attachments of this network by their records, and what has no record once
// its device is gone. Another network's are its own.
func gc(conf *netConf) error {
	valid := map[attach.ID]bool{}
	for _, a := range conf.validAttachments {
		valid[attach.ID{ContainerID: a.ContainerID, IfName: a.IfName}] = true
	}
	// Pins before records: an ADD writes its record first.
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

// removeOrphans removes of these attachments, which have no record, those whose device is gone, and what no attachment
// accounts for.
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
		orphaned, err := attach.Orphaned(d, conf.bpfDir, id)
		if err == nil && orphaned {
			err = attach.Detach(d, conf.bpfDir, id)
		}
		errs = append(errs, err)
	}
	if d != nil {
		errs = append(errs, attach.Prune(d, conf.bpfDir))
	}
	return errors.Join(errs...)
}

// status does what an ADD would need, up to the pod: only that tells for sure.
func (p *plugin) status(conf *netConf) error {
	err := p.ready(conf)
	if err == nil {
		return nil
	}
	err = fault(types.ErrPluginNotAvailable, "%v", err)
	if conf.onError == onErrorIgnore {
		return ignoredError{err}
	}
	return err
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

// withDetails adds to err what failed on top of it.
func withDetails(err error, more ...error) error {
	joined := errors.Join(more...)
	var e *types.Error
	if joined == nil || !errors.As(err, &e) {
		return err
	}
	return types.NewError(e.Code, e.Msg, joined.Error())
}
