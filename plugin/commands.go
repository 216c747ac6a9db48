package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"

	"github.com/probelet/probelet/bpf/datapath"
)

const (
	// loadDeadline bounds the wait for another process that is loading the objects.
	loadDeadline = 5 * time.Second

	// daemonDeadline bounds the wait for the daemon's lock. The daemon attaches a pod in far less time.
	daemonDeadline = 2 * time.Second
)

// plugin holds the plugin's environment, for tests to replace.
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

// strictly wraps a function that needs a valid configuration as a command.
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

// report logs the outcome of a command. It writes an ignored error to stderr and returns any other.
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

func (p *plugin) checkKernel() error {
	v, err := p.kernelVersion()
	if err != nil {
		return fault(codeLoad, "reading the kernel version: %v", err)
	}
	if v < datapath.MinKernel {
		return fault(codeKernelTooOld, "kernel %s is too old: probelet needs %s or newer",
			datapath.KernelName(v), datapath.KernelName(datapath.MinKernel))
	}
	return nil
}
