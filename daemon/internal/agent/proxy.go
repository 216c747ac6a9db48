package agent

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

const metricsHelp = `Passes the metrics of this node's daemon on: GET /metrics, and nothing else. In a pod with a network of its own, so that the node
needs no open port. It needs no right, and to see nothing but <state-dir>/metrics, with a socket on which the daemon answers /metrics, /healthz
and /readyz.`

// MetricsCommand returns the command that passes the metrics of a daemon on.
func MetricsCommand(stderr io.Writer) *cobra.Command {
	var listen, stateDir string
	cmd := &cobra.Command{
		Use:   "metrics",
		Short: "Pass the daemon's metrics on",
		Long:  metricsHelp,
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			listener, err := net.Listen("tcp", listen)
			if err != nil {
				return fmt.Errorf("--listen %s: %w", listen, err)
			}
			return api.Serve(cmd.Context(), listener, metricsProxy(stateDir), slog.New(slog.NewTextHandler(stderr, nil)))
		},
	}
	cmd.Flags().StringVar(&listen, "listen", ":9553", "`ADDRESS` of /metrics, and of /healthz, which says that this command runs")
	cmd.Flags().StringVar(&stateDir, "state-dir", attach.DefaultStateDir, "`directory` of the daemon's state")
	return cmd
}

// metricsProxy answers with status 502 while the daemon does not run.
func metricsProxy(stateDir string) http.Handler {
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host, r.Out.URL.RawQuery = "http", "probeletd", ""
		},
		Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", statedir.MetricsSocketPath(stateDir))
		}},
	}
	proxy.ErrorHandler = func(w http.ResponseWriter, _ *http.Request, err error) {
		http.Error(w, "probeletd: "+err.Error(), http.StatusBadGateway) // Prometheus notes it for each scrape; a log would only repeat it
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", proxy)
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") })
	return mux
}
