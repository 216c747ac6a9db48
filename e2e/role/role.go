// Package role has the programs that the demo and the tests start: the pod's server, the kubelet's prober, and a dialer.
// They are run by the binary that starts them, in another network namespace or cgroup.
package role

import (
	"errors"
	"fmt"
	"io"
	"net/rpc"
	"os"
	"os/exec"
	"syscall"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"
)

const roleEnv = "PROBELET_ROLE"

// Main runs the role that this process was started for, if it was, and then does not return. To be called first in main.
func Main() {
	var service any
	switch name := os.Getenv(roleEnv); name {
	case "":
		return
	case serverRole:
		service = &server{}
	case clientRole:
		service = &client{}
	default:
		fmt.Fprintf(os.Stderr, "no role %q\n", name)
		os.Exit(2)
	}
	if err := rpc.RegisterName("role", service); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	rpc.ServeConn(stdio{os.Stdin, os.Stdout}) // until the starter is gone or closes it
	os.Exit(0)
}

type stdio struct {
	io.ReadCloser
	io.WriteCloser
}

func (s stdio) Close() error { return errors.Join(s.ReadCloser.Close(), s.WriteCloser.Close()) }

// process is a started role.
type process struct {
	cmd *exec.Cmd
	rpc *rpc.Client
}

// start starts a role in a network namespace (a path; empty for the caller's) and a cgroup (likewise). extra becomes its
// file descriptor 3, unless nil.
func start(name, netns, cgroup string, extra *os.File) (*process, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+name)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	if extra != nil {
		cmd.ExtraFiles = []*os.File{extra}
	}
	if cgroup != "" {
		fd, err := unix.Open(cgroup, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("cgroup %s: %w", cgroup, err)
		}
		defer unix.Close(fd) //nolint:errcheck // read only
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, fd
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := inNetns(netns, cmd.Start); err != nil {
		return nil, fmt.Errorf("starting the %s: %w", name, err)
	}
	return &process{cmd, rpc.NewClient(stdio{out, in})}, nil
}

func inNetns(path string, do func() error) error {
	if path == "" {
		return do()
	}
	return ns.WithNetNSPath(path, func(ns.NetNS) error { return do() })
}

// call calls a method of the role's service.
func (p *process) call(method string, args, reply any) error {
	return p.rpc.Call("role."+method, args, reply)
}

// Pid is the process's id.
func (p *process) Pid() int { return p.cmd.Process.Pid }

// Stop kills the process, and with it everything it has open.
func (p *process) Stop() {
	_ = p.cmd.Process.Kill()
	_ = p.rpc.Close()
	_ = p.cmd.Wait()
}
