package role

import (
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/kubernetes/pkg/probe"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"
	tcpprobe "k8s.io/kubernetes/pkg/probe/tcp"
)

const clientRole = "client"

// Client is a program on the node that connects to pods, from a cgroup of its own.
type Client struct {
	*Process

	mu      sync.Mutex // keeps sockets in the order of calls
	sockets *net.UnixConn
}

// StartClient starts a client in a cgroup, in the caller's network namespace.
func StartClient(cgroup string) (*Client, error) {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "sockets"), os.NewFile(uintptr(pair[1]), "sockets")
	defer ours.Close()   //nolint:errcheck // copied by FileConn
	defer theirs.Close() //nolint:errcheck // the child's
	sockets, err := net.FileConn(ours)
	if err != nil {
		return nil, err
	}
	p, err := Start(clientRole, "", cgroup, theirs)
	if err != nil {
		return nil, errors.Join(err, sockets.Close())
	}
	return &Client{Process: p, sockets: sockets.(*net.UnixConn)}, nil
}

// Stop kills the client. Connections that it dialled stay open.
func (c *Client) Stop() {
	c.Process.Stop()
	_ = c.sockets.Close()
}

// Dial connects to a pod. The caller owns the connection, but its socket stays in the client's cgroup.
func (c *Client) Dial(address string) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if err := c.Call("Dial", address, &struct{}{}); err != nil {
		return nil, err
	}
	rights := make([]byte, unix.CmsgSpace(4))
	_, n, _, _, err := c.sockets.ReadMsgUnix(make([]byte, 1), rights)
	if err != nil {
		return nil, err
	}
	messages, err := unix.ParseSocketControlMessage(rights[:n])
	if err != nil {
		return nil, err
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fds[0]), address)
	defer f.Close() //nolint:errcheck // copied by FileConn
	return net.FileConn(f)
}

// Probes describes a series of probes.
type Probes struct {
	Path    string // empty for a TCP probe
	Headers []v1.HTTPHeader
	Address string // or a host name
	Port    int
	Count   int
	Timeout time.Duration
	// Every is the time from the start of one probe to the start of the next; 0 means no pause.
	Every time.Duration
}

// Result counts the outcomes.
type Result struct {
	Failures  int
	Messages  []string // of the first failures
	Latencies []time.Duration
}

const messagesMax = 3

// Probe runs the probes with the kubelet's own prober (k8s.io/kubernetes/pkg/probe).
func (c *Client) Probe(p Probes) (result Result, err error) {
	return result, c.Call("Probe", p, &result)
}

// client is the service that runs in the cgroup.
type client struct{}

func (*client) Dial(address string, _ *struct{}) error {
	conn, err := net.DialTimeout("tcp", address, 5*time.Second)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // it lives on where it is sent
	f, err := conn.(*net.TCPConn).File()
	if err != nil {
		return err
	}
	defer f.Close() //nolint:errcheck // likewise
	return unix.Sendmsg(3, []byte{0}, unix.UnixRights(int(f.Fd())), nil, 0)
}

func (*client) Probe(p Probes, result *Result) error {
	do := prober(p)
	result.Latencies = make([]time.Duration, 0, p.Count)
	for range p.Count {
		start := time.Now()
		outcome, message, err := do()
		took := time.Since(start)
		result.Latencies = append(result.Latencies, took)
		if err != nil || outcome != probe.Success {
			result.Failures++
			if len(result.Messages) < messagesMax {
				result.Messages = append(result.Messages, fmt.Sprintf("%s: %s (%v)", outcome, message, err))
			}
		}
		time.Sleep(p.Every - took)
	}
	return nil
}

// prober runs one probe the way the kubelet does (pkg/kubelet/prober, runProbe).
func prober(p Probes) func() (probe.Result, string, error) {
	if p.Path == "" {
		tcp := tcpprobe.New()
		return func() (probe.Result, string, error) { return tcp.Probe(p.Address, p.Port, p.Timeout) }
	}
	http := httpprobe.New(false)
	action := &v1.HTTPGetAction{Path: p.Path, HTTPHeaders: p.Headers, Port: intstr.FromInt32(int32(p.Port))}
	return func() (probe.Result, string, error) {
		request, err := httpprobe.NewRequestForHTTPGetAction(action, nil, p.Address, "probe")
		if err != nil {
			return probe.Unknown, "", err
		}
		return http.Probe(request, p.Timeout)
	}
}
