package metrics

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httputil"

	"github.com/spf13/cobra"

	"github.com/probelet/probelet/bpf/attach"
	"github.com/probelet/probelet/daemon/internal/api"
	"github.com/probelet/probelet/daemon/internal/statedir"
)

const proxyHelp = `Serves the metrics of this node's daemon: GET /metrics, and nothing else. It is meant for a pod with a network of its own, so
that the node needs no open port. It needs no privileges and no access to the node except <state-dir>/metrics, the directory with
the socket on which the daemon answers /metrics, /healthz and /readyz.`

// ProxyCommand returns the command that serves a daemon's metrics on TCP.
func ProxyCommand(stderr io.Writer) *cobra.Command {
	var listen, stateDir string
	cmd := &cobra.Command{
		Use:   "metrics",
		Short: "Serve the daemon's metrics on TCP",
		Long:  proxyHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			listener, err := net.Listen("tcp", listen)
			if err != nil {
				return fmt.Errorf("--listen %s: %w", listen, err)
			}
			return api.Serve(cmd.Context(), listener, Proxy(stateDir), slog.New(slog.NewTextHandler(stderr, nil)))
		},
	}
	cmd.Flags().StringVar(&listen, "listen", ":9553", "`ADDRESS` to serve /metrics on, and /healthz, which reports that this command is running")
	cmd.Flags().StringVar(&stateDir, "state-dir", attach.DefaultStateDir, "`directory` of the daemon's state")
	return cmd
}

// Proxy forwards GET /metrics to the daemon of a state directory. It answers with status 502 while none runs.
func Proxy(stateDir string) http.Handler {
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host, r.Out.URL.RawQuery = "http", "probeletd", ""
		},
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", statedir.MetricsSocketPath(stateDir))
		}},
	}
	proxy.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, err error) {
		http.Error(w, "probeletd: "+err.Error(), http.StatusBadGateway) // Prometheus records it for each scrape; logging it would only repeat it
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", proxy)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	return mux
}
