// Package role runs the current binary again as another program, in a network namespace and cgroup of the caller's choice,
// and calls its methods. It includes a server for pods and a client with the kubelet's prober; benchmarks register more.
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

var services = map[string]any{serverRole: &server{}, clientRole: &client{}}

// Register adds a role whose service has methods as net/rpc requires. Call it before Main.
func Register(name string, service any) { services[name] = service }

// Main runs the role that this process was started for, and then does not return. In a process without a role, it returns at
// once. Call it first in main.
func Main() {
	name := os.Getenv(roleEnv)
	if name == "" {
		return
	}
	service, ok := services[name]
	if !ok {
		fmt.Fprintf(os.Stderr, "no role %q\n", name)
		os.Exit(2)
	}
	if err := rpc.RegisterName("role", service); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	rpc.ServeConn(stdio{os.Stdin, os.Stdout}) // until the parent exits or closes it
	os.Exit(0)
}

type stdio struct {
	io.ReadCloser
	io.WriteCloser
}

func (s stdio) Close() error { return errors.Join(s.ReadCloser.Close(), s.WriteCloser.Close()) }

// Process is a running role.
type Process struct {
	cmd *exec.Cmd
	rpc *rpc.Client
}

// Start starts a role in a network namespace and a cgroup, both given by path; an empty path keeps the caller's. If extra is
// not nil, it becomes file descriptor 3.
func Start(name, netns, cgroup string, extra *os.File) (*Process, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+name)
	cmd.Stderr = os.Stderr
	if extra != nil {
		cmd.ExtraFiles = []*os.File{extra}
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := StartCommand(cmd, netns, cgroup); err != nil {
		return nil, fmt.Errorf("starting the %s: %w", name, err)
	}
	return &Process{cmd, rpc.NewClient(stdio{out, in})}, nil
}

// StartCommand starts a command in a network namespace and a cgroup, as Start does.
func StartCommand(cmd *exec.Cmd, netns, cgroup string) error {
	if cgroup != "" {
		fd, err := unix.Open(cgroup, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("cgroup %s: %w", cgroup, err)
		}
		defer unix.Close(fd) //nolint:errcheck // read only
		if cmd.SysProcAttr == nil {
			cmd.SysProcAttr = &syscall.SysProcAttr{}
		}
		cmd.SysProcAttr.UseCgroupFD, cmd.SysProcAttr.CgroupFD = true, fd
	}
	if netns == "" {
		return cmd.Start()
	}
	return ns.WithNetNSPath(netns, func(ns.NetNS) error { return cmd.Start() })
}

// Call calls a method of the role's service and waits for the result.
func (p *Process) Call(method string, args, reply any) error {
	return p.rpc.Call("role."+method, args, reply)
}

// Pid returns the process ID.
func (p *Process) Pid() int { return p.cmd.Process.Pid }

// Stop kills the process.
func (p *Process) Stop() {
	_ = p.cmd.Process.Kill()
	_ = p.rpc.Close()
	_ = p.cmd.Wait()
}
