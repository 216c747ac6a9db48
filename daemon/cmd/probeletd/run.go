package main

import (
	"cmp"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/bpf/datapath"
	"github.com/probelet/probelet/daemon/internal/adopt"
	"github.com/probelet/probelet/daemon/internal/agent"
	"github.com/probelet/probelet/daemon/internal/crosscheck"
	"github.com/probelet/probelet/daemon/internal/flagenv"
	"github.com/probelet/probelet/daemon/internal/install"
	"github.com/probelet/probelet/daemon/internal/probe"
	"github.com/probelet/probelet/daemon/internal/prober"
	"github.com/probelet/probelet/daemon/internal/source"
)

const runHelp = `Runs the daemon in the foreground.

Specs come from a source (--source):

  kubelet    the pods API of this node's kubelet (--kubelet-pods-socket), which pushes each change of a container's state.
             Kubernetes 1.37 serves it unless told otherwise. Where it is not there, GET /pods again and again, and soon
             after a pod is attached, but never more often than each second, nor for more than a tenth of the time. It
             needs "get" on nodes/pods (before Kubernetes 1.33: nodes/proxy). --kubelet-ca-file must vouch for the
             kubelet's certificate: one that the kubelet signed itself does so for itself
             (/var/lib/kubelet/pki/kubelet.crt), with the node's name as --kubelet-server-name. With http: (the
             read-only port) no token is sent.
  apiserver  the pods with spec.nodeName=--node-name are watched at the API server.
  file       a file (--specs).

Whatever the source of pods of the cluster, the kubelet's counts of its probes (/metrics/probes at the host of --kubelet-url) are
compared with what was observed (--crosscheck). It needs "get" on nodes/metrics. An endpoint of whose probes the kubelet says
otherwise is not answered until its specs change. One that others than its own probes may ask is not compared: probeletctl
explain names them.

While a source cannot be read, what it last said stays in force, and evidence expires as ever.

A specs file is YAML, with probes as in a pod spec:

  pods:
  - name: web
    namespace: shop          # default: default
    ips: [10.0.0.7]          # needed where the runtime did not tell the plugin the pod's name, and for refresh
    annotations: {probelet.dev/staleness: "2", probelet.dev/mode: answer}   # as on a pod; see below
    containers:
    - name: server
      ports: [{name: http, containerPort: 8080}]
      readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 5}

The file is read again when it changes. One that cannot be used is logged, and the last good one stays in force.

The prober (--prober) is whose connections are probes:

  kubelet      the process of that name, or of k3s or MicroK8s, that is root's, in the daemon's network and PID namespace
               and in no pod (default, but for specs from a file). It is followed when it restarts. If it has its cgroup to
               itself, what it runs is a prober too; otherwise its process alone is. Until it is found, and while it cannot
               be told from others, nothing is answered. The daemon must see the node's processes and cgroups (hostPID)
  cgroup:PATH  the processes of the cgroup v2 directory PATH itself (not of those below it): the kubelet's, for example
               cgroup:/sys/fs/cgroup/system.slice/kubelet.service
  host         every process of the host's network namespace. For trying things by hand, not for production: a
               connection of any local process would be taken for a probe, such as one of a hostNetwork ingress or of a
               client that came by a NodePort. Its requests would be answered by the kernel, not by the pod, and where
               the server speaks first both sides would wait: the client for the server, which has not been told.

The mode (--mode, or the pod's annotation probelet.dev/mode) says what is done for a pod:

  answer   probes are observed, and answered while what was observed is fresh
  observe  probes are observed, and none is answered
  off      neither

The staleness (--staleness, or the pod's annotation probelet.dev/staleness) says for how long after its observation a
success is answered, in periods of the shortest probe of the same endpoint (startup probes, which end with their success,
do not count beside others): a number from 0.5 to 5. The smallest timeout of these probes is added, but at most half a
period, so that a probe that is due after just so many periods is surely answered. Where the kernel can look at the pod's
listening socket, a TCP probe is answered for as long as that accepts connections, up to 9 in a row (fewer if its queue is
short), and the staleness is 10 periods unless somebody says less. No pod exceeds --staleness-ceiling where that is given,
whatever its annotation says. What was observed already is not answered for longer when the staleness grows; only the next
success is.

With refresh (--refresh, or, where --refresh-by-annotation allows it, the pod's annotation probelet.dev/refresh: true, or the
longest interval, from 100ms) the daemon itself asks what the probes ask, byte for byte, once in the staleness at least, so that the probes of a pod that is well are
all answered. It asks only what is known to succeed; a failure withdraws at once, and then the prober finds out that the pod
has recovered. Each request has a connection of its own, which is reset at its end and leaves no TIME_WAIT. It costs the
node's CPU, so pods may not ask for it unless the node allows that; they may always do without ("false"). A pod has at most 4
such connections at a time and 20 per second, however many endpoints it has. Refresh is off, and probeletctl explain says why, for what is not answered, for pods whose address is not known, and for TCP probes that are
answered by a look at the listening socket.

An annotation that cannot be used is logged and shown by probeletctl status, and of its pod nothing is answered: whoever
wrote it did not want the defaults.

The daemon listens on <state-dir>/probeletd.sock, for root only: POST /v1/invalidate takes
{"namespace": "shop", "pod": "web", "port": 8080, "path": "/ready"} (without path and port: all of the pod) and returns when
nothing is answered from what was known of it (404: there is no such pod, or endpoint; 400: malformed). Controllers on other
machines can be given the same on TLS with client certificates (--api-listen).

Every flag can be given by the environment too: --staleness-ceiling as PROBELET_STALENESS_CEILING. What is given on the command
line prevails.

On SIGTERM and SIGINT the daemon ends and leaves everything as it is: evidence expires by itself.`

// serviceAccount is where a pod finds its service account.
const serviceAccount = "/var/run/secrets/kubernetes.io/serviceaccount/"

func runCommand(stderr io.Writer) *cobra.Command {
	c := agent.Config{LogLevel: &slog.LevelVar{}}
	var network install.Options
	var logFormat string
	c.Kubelet.SelfSigned = func() ([]byte, error) { return prober.KubeletCertificate("/proc") }
	cmd := &cobra.Command{
		Use:   "run [--source kubelet|apiserver|file] [--prober kubelet|cgroup:PATH|host]",
		Short: "Run the daemon in the foreground",
		Long:  runHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := newLog(stderr, logFormat, c.LogLevel)
			if err != nil {
				return err
			}
			if unknown := flagenv.Unknown(cmd.Flags(), os.Environ()); len(unknown) > 0 {
				log.Warn("variables of the environment that are no flag's have no effect", "names", unknown)
			}
			if network.NetDir != "" {
				network.BPFDir, network.StateDir, network.Hook, network.Log = c.BPFDir, c.StateDir, c.Hook, log
				if c.FollowChain, err = install.Keeper(network); err != nil {
					return err
				}
			}
			return agent.Run(cmd.Context(), c, log)
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&c.Source, "source", "", "where specs come from: `kubelet|apiserver|file` (default: file with --specs, otherwise kubelet)")
	flags.StringVar(&c.Specs, "specs", "", "YAML `FILE` of pods and their probes")
	kubelet := "https://" + net.JoinHostPort(cmp.Or(os.Getenv("NODE_IP"), "127.0.0.1"), "10250") + "/pods"
	flags.StringVar(&c.Kubelet.URL, "kubelet-url", kubelet, "`URL` of the kubelet's pods (default: with $NODE_IP, if that is set)")
	flags.StringVar(&c.Kubelet.TokenFile, "kubelet-token-file", serviceAccount+"token", "`FILE` of the token for the kubelet")
	flags.StringVar(&c.Kubelet.CAFile, "kubelet-ca-file", serviceAccount+"ca.crt", "`FILE` of the authority of the kubelet's certificate; one that the kubelet made for itself is recognised")
	flags.StringVar(&c.Kubelet.ServerName, "kubelet-server-name", "", "`NAME` in the kubelet's certificate (default: the host of its URL)")
	flags.StringVar(&c.Kubelet.Socket, "kubelet-pods-socket", source.PodsAPISocket, "`SOCKET` of the kubelet's pods API; empty: it is not used")
	flags.DurationVar(&c.Kubelet.Poll, "kubelet-poll", 10*time.Second, "longest `INTERVAL` at which the kubelet is asked for all pods, from 1s")
	flags.DurationVar(&c.Crosscheck, "crosscheck", 15*time.Second, "`INTERVAL` at which the kubelet's verdicts on its probes are compared with what was observed, up to 1m; 0: never")
	flags.StringVar(&c.Kubeconfig, "kubeconfig", "", "`FILE` that says how to reach the API server (default: as in a pod)")
	flags.StringVar(&c.NodeName, "node-name", os.Getenv("NODE_NAME"), "`NAME` of this node at the API server (default: $NODE_NAME)")
	flags.StringVar(&c.Prober, "prober", "", "whose connections are probes: `kubelet|cgroup:PATH|host` (default: kubelet, but for specs from a file)")
	install.HookFlag(flags, &c.Hook)
	flags.StringVar(&c.BPFDir, "bpf-dir", datapath.DefaultDir, "`directory` in bpffs where the BPF objects are pinned")
	flags.StringVar(&c.StateDir, "state-dir", attach.DefaultStateDir, "`directory` of attachment records and the daemon's state")
	policyFlags(flags, &c.Defaults)
	flags.BoolVar(&c.Repair, "repair", true, "attach pods that had their network before probelet, and put right what was lost")
	flags.StringVar(&c.CNICacheDir, "cni-cache-dir", adopt.DefaultCacheDir, "`directory` of the host where the runtime's CNI library keeps results, for that")
	flags.StringVar(&network.NetDir, "cni-net-dir", "", "`directory` of network configurations, to keep the plugin in the chain of (default: somebody else does)")
	flags.StringVar(&network.BinDir, "cni-bin-dir", "/opt/cni/bin", "`directory` of CNI plugins; while the runtime would not find the plugin there, it is kept out of the chain")
	flags.StringVar(&network.Chain, "chain", "auto", "how the plugin is in the chain: `auto|dropin|copy`, as with install")
	flags.StringVar(&c.MetricsListen, "metrics-listen", "127.0.0.1:9553", "`ADDRESS` of /metrics, /healthz and /readyz, in plain HTTP; empty: none")
	flags.BoolVar(&c.MetricsPerPod, "metrics-per-pod", false, "one metric of each pod besides: as many time series as there are pods")
	flags.StringVar(&c.API.Listen, "api-listen", "", "`ADDRESS` of the API for controllers, in TLS with client certificates")
	flags.StringVar(&c.API.CertFile, "api-cert-file", "", "`FILE` of its certificate")
	flags.StringVar(&c.API.KeyFile, "api-key-file", "", "`FILE` of its key")
	flags.StringVar(&c.API.ClientCAFile, "api-client-ca-file", "", "`FILE` of the authority of its clients")
	cmd.PreRunE = func(cmd *cobra.Command, _ []string) error {
		if err := flagenv.Apply(cmd.Flags()); err != nil {
			return err
		}
		if err := install.CheckDirs(cmd.Flags()); err != nil {
			return err
		}
		noteChosen(cmd.Flags(), &c.Defaults)
		if c.Kubelet.Poll < time.Second {
			return fmt.Errorf("--kubelet-poll %s: must be 1s or more", c.Kubelet.Poll)
		}
		if c.Crosscheck != 0 && (c.Crosscheck < time.Second || c.Crosscheck > crosscheck.LongestInterval) {
			return fmt.Errorf("--crosscheck %s: must be between 1s and %s, or 0", c.Crosscheck, crosscheck.LongestInterval)
		}
		return nil
	}
	flags.BoolVar(&c.Events, "events", true, "write an Event about a pod whose annotation cannot be used")
	flags.TextVar(c.LogLevel, "log-level", &slog.LevelVar{}, "least `level` that is logged: debug, info, warn, error; probeletctl log-level changes it")
	flags.StringVar(&logFormat, "log-format", "text", "how is logged: `text|json`")
	return cmd
}

func policyFlags(flags *pflag.FlagSet, d *probe.Defaults) {
	builtIn := probe.NewDefaults()
	flags.TextVar(&d.Mode, "mode", builtIn.Mode, "what is done for pods without an annotation: `answer|observe|off`")
	flags.TextVar(&d.Staleness, "staleness", builtIn.Staleness, "for how many `periods` a success is answered")
	flags.TextVar(&d.Ceiling, "staleness-ceiling", builtIn.Ceiling, "most `periods` that an annotation can ask for")
	flags.TextVar(&d.Refresh, "refresh", builtIn.Refresh, "whether the daemon asks by itself: `true|false`, or the longest interval")
	flags.BoolVar(&d.RefreshByAnnotation, "refresh-by-annotation", false, "pods may ask for refresh by annotation, at the node's cost")
}

// noteChosen tells values that were given from built-in ones that are the same.
func noteChosen(flags *pflag.FlagSet, d *probe.Defaults) {
	d.StalenessSet, d.CeilingSet = flags.Changed("staleness"), flags.Changed("staleness-ceiling")
}

// newLog returns a logger that writes a line for each record.
func newLog(to io.Writer, format string, level *slog.LevelVar) (*slog.Logger, error) {
	options := &slog.HandlerOptions{Level: level}
	switch format {
	case "text":
		return slog.New(slog.NewTextHandler(to, options)), nil
	case "json":
		return slog.New(slog.NewJSONHandler(to, options)), nil
	}
	return nil, fmt.Errorf("--log-format %q: must be text or json", format)
}
