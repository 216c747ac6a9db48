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
	codePrevResult   = 101 // prevResult names another device for this pod
	codeKernelTooOld = 102
	codeNoBPFFS      = 103 // bpfDir is not on a BPF file system
	codeLoad         = 104 // the BPF objects cannot be loaded or opened
	codeAttach       = 105 // the programs cannot be attached to the device
	codeDetach       = 106 // something cannot be removed: try again later, or remove it by hand
	codeCheck        = 107 // the attachment is not as ADD made it
)

const (
	minKernelMajor, minKernelMinor = 5, 15

	// loadDeadline bounds the wait for another process that loads the objects.
	loadDeadline = 5 * time.Second

	// daemonDeadline bounds the wait for the daemon's lock. It is far longer than the daemon takes to attach a pod.
	daemonDeadline = 2 * time.Second
)

// fault returns an error in the form that runtimes print.
func fault(code uint, format string, args ...any) error {
	return types.NewError(code, fmt.Sprintf(format, args...), "")
}

// ignoredError marks an error that the configuration says to ignore.
type ignoredError struct{ error }

// tolerate returns err, marked as ignored if the configuration says so.
func (c *netConf) tolerate(err error) error {
	if c.onError == onErrorIgnore {
		return ignoredError{err}
	}
	return err
}

// plugin holds what the plugin needs of its environment.
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

// strictly makes a command of a function that needs a valid configuration.
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

// cmdDel accepts any configuration: a pod must be removable whatever its configuration has become.
func (p *plugin) cmdDel(args *skel.CmdArgs) error {
	conf := parseConfForDel(args.StdinData)
	start := time.Now()
	return p.report("DEL", conf, args, start, remove(conf, attach.ID{ContainerID: args.ContainerID, IfName: args.IfName}))
}

// report logs what a command did, and writes an ignored error to stderr. It returns any other error.
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

// add attaches. If it fails, nothing stays attached. If the pod is to start regardless, the error is an ignoredError, and the
// record, where one can be written, says what failed.
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

// mayPass reports whether a later attempt may succeed.
func mayPass(err error) bool {
	var e *types.Error
	return errors.As(err, &e) && slices.Contains([]uint{types.ErrTryAgainLater, codeNoBPFFS, codeLoad, codeAttach}, e.Code)
}

// attachPod attaches, and fills in the record as far as it gets.
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

// podArgs are the arguments that Kubernetes runtimes pass in CNI_ARGS.
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

// checkKernel checks the version, because on older kernels the programs may load, but lose packets.
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

// remove undoes ADD. It removes the record last, so that a later call finds what could not be removed.
func remove(conf *netConf, id attach.ID) error {
	if id.Check() != nil {
		return nil // ADD made nothing
	}
	defer keepDaemonOut(conf)()
	if err := detach(conf, id); err != nil {
		return err
	}
	if err := attach.RemoveRecord(conf.stateDir, id); err != nil {
		return fault(codeDetach, "removing the record: %v", err)
	}
	return nil
}

// keepDaemonOut keeps the daemon from repairing what is being removed. A daemon that hangs with the lock only delays the
// removal.
func keepDaemonOut(conf *netConf) (done func()) {
	ctx, cancel := context.WithTimeout(context.Background(), daemonDeadline)
	defer cancel()
	unlock, err := attach.LockRecords(ctx, conf.stateDir, unix.LOCK_SH)
	if err != nil {
		return func() {}
	}
	return unlock
}

// detach stops the answering and removes the pins. The kernel takes the programs off a moment later (attach.Release).
func detach(conf *netConf, id attach.ID) error {
	d, err := openForRemoval(conf.bpfDir)
	if err != nil {
		return err
	}
	if d != nil {
		defer d.Close() //nolint:errcheck // pinned
	}
	if err := removeUnpinned(d, conf, id); err != nil {
		return fault(codeDetach, "%v", err)
	}
	if err := attach.Release(d, conf.bpfDir, id); err != nil {
		return fault(codeDetach, "%v", err)
	}
	return nil
}

// removeUnpinned removes what Release cannot find: the record tells of an attachment, but no pin says to which device.
func removeUnpinned(d *datapath.Datapath, conf *netConf, id attach.ID) error {
	if _, err := attach.Device(conf.bpfDir, id); !errors.Is(err, fs.ErrNotExist) || d == nil {
		return nil
	}
	record, err := attach.ReadRecord(conf.stateDir, id)
	if err != nil || record.IfIndex == 0 {
		return nil
	}
	if err := attach.Prune(context.Background(), d, conf.bpfDir); err != nil {
		return err
	}
	devices, err := d.Devices()
	if _, reused := devices[uint32(record.IfIndex)]; err != nil || reused {
		return err
	}
	return attach.ClearClsact(record.IfIndex)
}

// openForRemoval returns nil if the objects, or some of them, are not pinned any more: the rest can still be removed.
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
		return fault(codeCheck, "the record of %s on network %s is that of %s on network %s",
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
		return fault(codeCheck, "%s is the network namespace with cookie %d; that of %s had %d",
			args.Netns, device.NetnsCookie, id, record.NetnsCookie)
	}
	return checkAttached(conf, id, device.Index)
}

// uninstalled reports whether probelet was uninstalled. A runtime may go on checking pods with the configuration of their
// ADD.
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

// gc removes what the runtime does not list: this network's attachments, and those without a record whose device is gone.
// Without a list it cannot tell what is stale, and removes nothing.
func gc(conf *netConf) error {
	if conf.validAttachments == nil {
		return fault(types.ErrInvalidNetworkConfig, "%s is missing: without it no attachment can be told to be stale", fieldValidAttachments)
	}
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

// removeOrphans removes those of these attachments whose device is gone, and what belongs to no attachment.
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

// status does what ADD does before it looks at the pod. Anything less could miss what makes ADD fail.
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

// withDetails adds to err the errors that followed from it.
func withDetails(err error, more ...error) error {
	joined := errors.Join(more...)
	var e *types.Error
	if joined == nil || !errors.As(err, &e) {
		return err
	}
	return types.NewError(e.Code, e.Msg, joined.Error())
}
