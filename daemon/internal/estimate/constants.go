package estimate

import (
	"time"

	"github.com/probelet/probelet/daemon/internal/probe"
)

// Constant is a number that estimates are based on.
type Constant struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	// Source says where the number comes from.
	Source string `json:"source"`
}

// Sources of the measured constants.
const (
	fromDensity = "docs/density.md, Go server"
	fromDaemon  = "docs/density.md, what the daemon takes"
	fromDemo    = "README.md, make demo, mean of IPv4 and IPv6"
)

// constants holds every number that is not computed. CPU was measured on one machine with two shared cores: ratios carry over to
// other machines, microseconds do not.
//
// The density table gives the CPU of the kubelet, the daemon and the servers for a hundred Go pods: in one row 205 probes a second, half
// HTTP and half TCP, all reached the pods; in the other 51 % of the HTTP and 1 % of the TCP probes did, of 202 a second. These are two
// equations for the cost of HTTP and TCP probes to the servers, and two for the cost of real and answered probes to the kubelet.
// TestConstantsAreMeasured solves them.
var constants = struct {
	// timeWait is how long a socket stays in TIME_WAIT.
	timeWait Constant
	// trackedClosed and trackedReset are how long connection tracking keeps a connection that was closed, and one that was reset.
	trackedClosed, trackedReset Constant
	// httpNode and httpPod are the shares of HTTP probes that leave a socket in TIME_WAIT on the node and in the pod. The side that
	// closes first keeps it. Some probes leave none.
	httpNode, httpPod Constant
	// tcpNode is the share of TCP probes that leave one on the node. They leave none in the pod, since the kubelet closes first.
	tcpNode Constant
	// kubelet and kubeletAnswered are the kubelet's CPU per real and per answered probe, including its other work for the pods.
	kubelet, kubeletAnswered Constant
	// httpServer and tcpServer are the servers' CPU per probe.
	httpServer, tcpServer Constant
	// daemonPod, daemonProbe and daemonRefresh are the daemon's CPU per pod and second, per probe, and per request of its own.
	daemonPod, daemonProbe, daemonRefresh Constant
}{
	timeWait: Constant{"time in TIME_WAIT", 60, "s", "TCP_TIMEWAIT_LEN in Linux' include/net/tcp.h"},
	trackedClosed: Constant{"conntrack entry of a closed connection", 120, "s",
		"default of nf_conntrack_tcp_timeout_time_wait"},
	trackedReset: Constant{"conntrack entry of an answered probe or a refresh, which end in a reset", 10, "s",
		"default of nf_conntrack_tcp_timeout_close"},
	httpNode:        Constant{"HTTP probes that leave a TIME_WAIT on the node", 0.263, "of all", fromDemo},
	httpPod:         Constant{"HTTP probes that leave a TIME_WAIT in the pod", 0.570, "of all", fromDemo},
	tcpNode:         Constant{"TCP probes that leave a TIME_WAIT on the node", 1, "of all", fromDemo},
	kubelet:         Constant{"kubelet, per probe that reaches a pod, its other work included", 800, "µs", fromDensity},
	kubeletAnswered: Constant{"kubelet, per answered probe, its other work included", 709, "µs", fromDensity},
	httpServer:      Constant{"server, per HTTP probe", 538, "µs", fromDensity},
	tcpServer:       Constant{"server, per TCP probe", 311, "µs", fromDensity},
	daemonPod:       Constant{"daemon, per pod and second", 50, "µs", fromDensity},
	daemonProbe:     Constant{"daemon, per probe", 45, "µs", fromDensity},
	daemonRefresh:   Constant{"daemon, per refresh", 117, "µs", fromDaemon},
}

// Constants returns all constants, in the order in which they are printed.
func Constants() []Constant {
	c := &constants
	return []Constant{
		c.timeWait, c.trackedClosed, c.trackedReset, c.httpNode, c.httpPod, c.tcpNode,
		c.kubelet, c.kubeletAnswered, c.httpServer, c.tcpServer, c.daemonPod, c.daemonProbe, c.daemonRefresh,
	}
}

// cost is the cost of a probe that reaches its pod.
type cost struct {
	connects bool
	// node and pod are the shares of probes that leave a socket in TIME_WAIT on the node and in the pod.
	node, pod float64
	// kubelet and server are CPU, in seconds.
	kubelet, server float64
}

const microsecond = 1e-6

// costs returns the cost of a probe of a kind. Only HTTP and TCP were measured. HTTPS counts as HTTP, which leaves out its handshake;
// HTTP/2 and gRPC count as HTTP with the client closing first. Exec costs nothing here: it opens no connection, and the CPU of its
// command is unknown.
func costs(k probe.Kind) cost {
	c := &constants
	http := cost{true, c.httpNode.Value, c.httpPod.Value, c.kubelet.Value * microsecond, c.httpServer.Value * microsecond}
	switch k {
	case probe.TCP:
		return cost{true, c.tcpNode.Value, 0, c.kubelet.Value * microsecond, c.tcpServer.Value * microsecond}
	case probe.HTTP2, probe.GRPC:
		http.node, http.pod = 1, 0
	case probe.Exec:
		return cost{}
	}
	return http
}

// learning is the mean time from the start of a successful probe until others can be answered: the server responds, and the daemon reads
// outcomes every 50 ms.
const learning = 36 * time.Millisecond
