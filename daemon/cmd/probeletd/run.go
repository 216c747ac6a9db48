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

Specs are read from a source (--source):

  kubelet    the pods API of this node's kubelet (--kubelet-pods-socket), which pushes every change of a container's state.
             Kubernetes 1.37 and later serve it by default. Without it, the daemon polls GET /pods, also shortly after a pod is
             attached, but at most once a second and for at most a tenth of the time. That needs "get" on nodes/pods (before
             Kubernetes 1.33: nodes/proxy). A certificate that the kubelet generated itself, kubeadm's default, is recognised
             without any setting; --kubelet-ca-file must verify any other (empty: the CAs of the system). No token is sent to
             an http: URL (the read-only port).
  apiserver  the daemon watches the pods with spec.nodeName=--node-name at the API server.
  file       a file (--specs).

With kubelet and apiserver, the daemon also compares the kubelet's own counts of its probes (/metrics/probes at the host of
--kubelet-url) with what it observed (--crosscheck). That needs "get" on nodes/metrics. An endpoint whose counts contradict the
observations is not answered until its specs change. Endpoints that something other than their own probes may ask are not
compared; probeletctl explain names what.

While a source cannot be read, the previous specs stay in force, and evidence expires as usual.

A specs file is YAML, with probes as in a pod spec:

  pods:
  - name: web
    namespace: shop          # default: default
    ips: [10.0.0.7]          # for refresh, and for runtimes that do not pass the name of the pod to the plugin
    annotations: {probelet.dev/staleness: "2", probelet.dev/mode: answer}   # as on a pod; see below
    containers:
    - name: server
      ports: [{name: http, containerPort: 8080}]
      readinessProbe: {httpGet: {path: /ready, port: http}, periodSeconds: 5}

The file is reloaded when it changes. An invalid file is logged, and the previous one stays in force.

The prober (--prober) determines whose connections are probes:

  kubelet      the process named kubelet, or that of k3s or MicroK8s, that runs as root in the daemon's network and PID
               namespaces and outside of all pods (the default, except for specs from a file). The daemon follows its
               restarts. If it is alone in its cgroup, its child processes are probers too; otherwise only the process itself
               is. Nothing is answered until it is found, or while it cannot be told apart from others. The daemon must see
               the node's processes and cgroups (hostPID).
  cgroup:PATH  the processes in the cgroup v2 directory PATH, not in those below it: the kubelet's, for example
               cgroup:/sys/fs/cgroup/system.slice/kubelet.service
  host         every process in the host's network namespace. This is for experiments, not for production: any local
               connection counts as a probe, even one of a hostNetwork ingress or of a client that came in by a NodePort. The
               kernel would answer its requests instead of the pod, and where the server speaks first both sides would wait:
               the client for the server, which never sees the connection.

The mode (--mode, or the annotation probelet.dev/mode of a pod) determines what is done about a pod's probes:

  answer   they are observed, and answered while what was observed is fresh
  observe  they are observed only
  off      nothing

The staleness (--staleness, or the annotation probelet.dev/staleness of a pod) is how long a success is answered after it was
observed, from 0.5 to 5 periods of the shortest probe of the same endpoint. (Startup probes, which end with their success, do not
count beside others.) The smallest timeout of these probes is added, but at most half a period, so that a probe that is due after
exactly that many periods is still answered. Where the kernel can inspect the pod's listening socket, a TCP probe is answered for
as long as the socket accepts connections, up to 9 times in a row (fewer if its backlog is short), and the staleness is 10 periods
unless a lower one is set. No pod exceeds --staleness-ceiling, if it is set, whatever its annotation requests. Raising the
staleness affects only successes observed from then on. Two numbers, as in 1-5, are for an endpoint that is new, or has failed
lately, and for a steady one, which has succeeded without a failure for ten minutes in the same container.

With liveness traffic (--liveness, or the annotation probelet.dev/liveness of a pod: probes or traffic) a busy pod is not restarted
for being busy. Probes of endpoints that only liveness and startup probes ask are also answered while the pod serves its clients:
within one period before, it began an HTTP response with a status below 500 on the probed port, or, for TCP, closed a connection
there. The endpoint must have succeeded for real in this container. A timeout of a probe then changes nothing, but an error does:
a refused or reset connection, another status than 2xx, an invalid response. At least every tenth probe reaches the pod, whatever
its traffic shows. Not noticed is a hang of the probed request alone while others on the port are served.

With refresh (--refresh, or the annotation probelet.dev/refresh of a pod, if --refresh-by-annotation allows it: true, or the longest
interval, from 100ms) the daemon sends the requests of the probes itself, byte for byte, at least once per staleness, so that all
probes of a healthy pod are answered. It sends only requests that are known to succeed. After a failure it withdraws the evidence
at once, and leaves it to the prober to find out that the pod has recovered. Each request has a connection of its own, which is
reset at its end and leaves no TIME_WAIT behind. Because this costs the node CPU time, pods may only request it if the node
allows that; they may always decline it ("false"). A pod has at most 4 such connections at a time and 20 per second, however many
endpoints it has. Refresh is off, and probeletctl explain says why, for endpoints that are not answered, for pods whose address
is unknown, and for TCP probes that are answered by inspecting the listening socket.

A pod with an invalid annotation is not answered at all, because its author did not want the defaults. The annotation is logged,
and shown by probeletctl status.

The daemon listens on <state-dir>/probeletd.sock, which only root can open. POST /v1/invalidate takes
{"namespace": "shop", "pod": "web", "port": 8080, "path": "/ready"} (without path and port: the whole pod) and returns once nothing
is answered from what was known of it (404: no such pod or endpoint; 400: malformed). Controllers on other machines can be given
access to the same request over TLS with client certificates (--api-listen).

Each flag can also be set by an environment variable, for example --staleness-ceiling by PROBELET_STALENESS_CEILING. The command
line takes precedence.

On SIGTERM and SIGINT the daemon exits and leaves everything in place: evidence expires on its own.`

// serviceAccount is where pods have their service account.
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
		PreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := flagenv.Apply(cmd.Flags()); err != nil {
				return err
			}
			if err := install.CheckDirs(cmd.Flags()); err != nil {
				return err
			}
			noteChosen(cmd.Flags(), &c.Defaults)
			return checkIntervals(c)
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			log, err := newLog(stderr, logFormat, c.LogLevel)
			if err != nil {
				return err
			}
			if unknown := flagenv.Unknown(cmd.Flags(), os.Environ()); len(unknown) > 0 {
				log.Warn("ignoring environment variables that match no flag", "names", unknown)
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
	sourceFlags(flags, &c)
	flags.StringVar(&c.Prober, "prober", "", "whose connections are probes: `kubelet|cgroup:PATH|host` (default: kubelet, except for specs from a file)")
	policyFlags(flags, &c.Defaults)
	attachmentFlags(flags, &c)
	chainFlags(flags, &network)
	serverFlags(flags, &c)
	flags.BoolVar(&c.Events, "events", true, "write Events about pods with invalid annotations")
	flags.TextVar(c.LogLevel, "log-level", &slog.LevelVar{}, "lowest `level` to log: debug, info, warn or error; probeletctl log-level changes it at run time")
	flags.StringVar(&logFormat, "log-format", "text", "log format: `text|json`")
	return cmd
}

// sourceFlags adds the flags of the source of specs, and of the kubelet's verdicts.
func sourceFlags(flags *pflag.FlagSet, c *agent.Config) {
	flags.StringVar(&c.Source, "source", "", "source of specs: `kubelet|apiserver|file` (default: file with --specs, otherwise kubelet)")
	flags.StringVar(&c.Specs, "specs", "", "YAML `FILE` with pods and their probes")
	kubelet := "https://" + net.JoinHostPort(cmp.Or(os.Getenv("NODE_IP"), "127.0.0.1"), "10250") + "/pods"
	flags.StringVar(&c.Kubelet.URL, "kubelet-url", kubelet, "`URL` of the kubelet's list of pods (default: at $NODE_IP, if set)")
	flags.StringVar(&c.Kubelet.TokenFile, "kubelet-token-file", serviceAccount+"token", "`FILE` with the token for the kubelet")
	flags.StringVar(&c.Kubelet.CAFile, "kubelet-ca-file", serviceAccount+"ca.crt", "`FILE` with the CA of the kubelet's certificate; a certificate that the kubelet generated itself is recognised without")
	flags.StringVar(&c.Kubelet.ServerName, "kubelet-server-name", "", "`NAME` in the kubelet's certificate (default: the host of --kubelet-url)")
	flags.StringVar(&c.Kubelet.Socket, "kubelet-pods-socket", source.PodsAPISocket, "`SOCKET` of the kubelet's pods API; empty: do not use it")
	flags.DurationVar(&c.Kubelet.Poll, "kubelet-poll", 10*time.Second, "longest `INTERVAL` between two lists of all pods from the kubelet, from 1s")
	flags.DurationVar(&c.Crosscheck, "crosscheck", 15*time.Second, "`INTERVAL` at which the kubelet's verdicts are compared with what was observed, up to 1m; 0: never")
	flags.StringVar(&c.Kubeconfig, "kubeconfig", "", "kubeconfig `FILE` for the API server (default: the service account of the pod)")
	flags.StringVar(&c.NodeName, "node-name", os.Getenv("NODE_NAME"), "`NAME` of this node at the API server (default: $NODE_NAME)")
}

func policyFlags(flags *pflag.FlagSet, d *probe.Defaults) {
	builtIn := probe.NewDefaults()
	flags.TextVar(&d.Mode, "mode", builtIn.Mode, "mode of pods without an annotation: `answer|observe|off`")
	flags.TextVar(&d.Staleness, "staleness", builtIn.Staleness, "how many `periods` a success is answered for; 1-5: 1, and 5 once an endpoint is steady")
	flags.TextVar(&d.Liveness, "liveness", builtIn.Liveness, "what is evidence for liveness probes: `probes|traffic`")
	flags.TextVar(&d.Ceiling, "staleness-ceiling", builtIn.Ceiling, "most `periods` that an annotation can request; if set, also of TCP endpoints by default")
	flags.TextVar(&d.Refresh, "refresh", builtIn.Refresh, "whether the daemon sends requests of its own: `true|false`, or the longest interval between them")
	flags.BoolVar(&d.RefreshByAnnotation, "refresh-by-annotation", false, "let pods request refresh by annotation, at the node's expense")
}

// attachmentFlags adds the flags of attachments: where they are, and whether they are repaired.
func attachmentFlags(flags *pflag.FlagSet, c *agent.Config) {
	install.HookFlag(flags, &c.Hook)
	flags.StringVar(&c.BPFDir, "bpf-dir", datapath.DefaultDir, "`directory` in bpffs where the BPF objects are pinned")
	flags.StringVar(&c.StateDir, "state-dir", attach.DefaultStateDir, "`directory` with attachment records and the daemon's state")
	flags.BoolVar(&c.Repair, "repair", true, "repair attachments, and adopt pods that were started before probelet")
	flags.StringVar(&c.CNICacheDir, "cni-cache-dir", adopt.DefaultCacheDir, "`directory` on the host where libcni caches results, which has the pods to adopt")
}

// chainFlags adds the flags of the chain in which the daemon keeps the plugin.
func chainFlags(flags *pflag.FlagSet, network *install.Options) {
	flags.StringVar(&network.NetDir, "cni-net-dir", "", "`directory` with network configurations, to keep the plugin in their chain (default: do not)")
	flags.StringVar(&network.BinDir, "cni-bin-dir", "/opt/cni/bin", "`directory` with CNI plugins; the plugin is kept out of the chain while the runtime would not find it there")
	flags.StringVar(&network.Chain, "chain", "auto", "how the plugin joins the chain: `auto|dropin|copy`, as for install")
}

// serverFlags adds the flags of the servers that can be reached over the network.
func serverFlags(flags *pflag.FlagSet, c *agent.Config) {
	flags.StringVar(&c.MetricsListen, "metrics-listen", "127.0.0.1:9553", "`ADDRESS` to serve /metrics, /healthz and /readyz on, in plain HTTP; empty: none")
	flags.BoolVar(&c.MetricsPerPod, "metrics-per-pod", false, "add a metric per pod: as many time series as there are pods")
	flags.StringVar(&c.API.Listen, "api-listen", "", "`ADDRESS` to serve the API for controllers on, over TLS with client certificates")
	flags.StringVar(&c.API.CertFile, "api-cert-file", "", "`FILE` with its certificate")
	flags.StringVar(&c.API.KeyFile, "api-key-file", "", "`FILE` with its key")
	flags.StringVar(&c.API.ClientCAFile, "api-client-ca-file", "", "`FILE` with the CA of its clients")
}

// checkIntervals returns an error that names the flag and value of the first interval that is out of range.
func checkIntervals(c agent.Config) error {
	if c.Kubelet.Poll < time.Second {
		return fmt.Errorf("--kubelet-poll %s: must be 1s or more", c.Kubelet.Poll)
	}
	if c.Crosscheck != 0 && (c.Crosscheck < time.Second || c.Crosscheck > crosscheck.LongestInterval) {
		return fmt.Errorf("--crosscheck %s: must be between 1s and %s, or 0", c.Crosscheck, crosscheck.LongestInterval)
	}
	return nil
}

// noteChosen records which values were given, as opposed to defaults that happen to be the same.
func noteChosen(flags *pflag.FlagSet, d *probe.Defaults) {
	d.StalenessSet, d.CeilingSet = flags.Changed("staleness"), flags.Changed("staleness-ceiling")
}

// newLog returns a logger that writes one line per record.
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
