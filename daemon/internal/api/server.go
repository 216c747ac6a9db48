package api

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/probelet/probelet/daemon/internal/statedir"
)

const (
	// maxBody limits the body of a request; none needs as much.
	maxBody = 64 << 10
	// maxHeader limits the request line and headers; none needs as much. net/http adds 4 KiB to it.
	maxHeader = 8 << 10
	// patience is how long the daemon may take to reply, because its loop handles one thing at a time.
	patience = 5 * time.Second
)

// Listen listens on the socket of a state directory and replaces one that a previous daemon left; the caller must hold the state
// directory. At no time can anyone but the owner connect.
func Listen(stateDir string) (net.Listener, error) {
	return listen(stateDir, statedir.SocketPath(stateDir), 0o600)
}

// ListenMetrics listens on the socket for monitoring in the same way. Every process that can see it may connect: it has a directory of
// its own, which can be mounted into a pod that sees nothing else.
func ListenMetrics(stateDir string) (net.Listener, error) {
	path := statedir.MetricsSocketPath(stateDir)
	if err := os.Mkdir(filepath.Dir(path), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, err
	}
	return listen(stateDir, path, 0o666)
}

func listen(stateDir, path string, mode os.FileMode) (net.Listener, error) {
	private, err := statedir.ListeningDir(stateDir)
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(private) //nolint:errcheck // harmless if it stays
	temporary := filepath.Join(private, "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: temporary, Net: "unix"})
	if err != nil {
		return nil, err
	}
	l.SetUnlinkOnClose(false) // the next daemon may have replaced it
	if err = os.Chmod(temporary, mode); err == nil {
		err = os.Rename(temporary, path)
	}
	if err != nil {
		return nil, errors.Join(err, l.Close())
	}
	return l, nil
}

// TLSConfig returns a configuration that requires client certificates issued by the given authority. The files are read again for each
// connection, so that renewed certificates take effect.
func TLSConfig(certFile, keyFile, clientCAFile string) (*tls.Config, error) {
	load := func() (*tls.Config, error) {
		certificate, err := tls.LoadX509KeyPair(certFile, keyFile)
		if err != nil {
			return nil, fmt.Errorf("--api-cert-file %s, --api-key-file %s: %w", certFile, keyFile, err)
		}
		authority, err := os.ReadFile(clientCAFile)
		if err != nil {
			return nil, fmt.Errorf("--api-client-ca-file: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(authority) {
			return nil, fmt.Errorf("--api-client-ca-file %s: has no certificate", clientCAFile)
		}
		return &tls.Config{
			Certificates: []tls.Certificate{certificate}, ClientCAs: pool,
			ClientAuth: tls.RequireAndVerifyClientCert, MinVersion: tls.VersionTLS12,
		}, nil
	}
	config, err := load()
	if err != nil {
		return nil, err
	}
	config.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return load() }
	return config, nil
}

// Serve serves requests on a listener until ctx ends, and returns an error if the listener fails. It limits the memory that clients can
// occupy by the number of connections (see connections) and by what it reads from each.
func Serve(ctx context.Context, l net.Listener, handler http.Handler, log *slog.Logger) error {
	server := &http.Server{
		Handler: handler, ErrorLog: slog.NewLogLogger(log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout: patience, ReadTimeout: patience, WriteTimeout: 4 * patience, IdleTimeout: time.Minute,
		MaxHeaderBytes: maxHeader,
	}
	limit(server)
	stop := context.AfterFunc(ctx, func() { _ = server.Close() })
	defer stop()
	if err := server.Serve(l); ctx.Err() == nil {
		return err
	}
	return nil
}

// Controls returns the handler for programs: POST /v1/invalidate.
func Controls(n Node) http.Handler {
	mux := http.NewServeMux()
	addControls(mux, n)
	return mux
}

// Health returns the handler for monitoring: GET /metrics, /healthz and /readyz.
func Health(n Node, metrics http.Handler) http.Handler {
	mux := http.NewServeMux()
	addHealth(mux, n, metrics)
	return mux
}

// Local returns the handler for the local socket: Controls, Health, profiles and the requests of probeletctl. If level is not nil,
// PUT /v1/log-level changes it.
func Local(n Node, metrics http.Handler, level *slog.LevelVar) http.Handler {
	mux := http.NewServeMux()
	addDebugging(mux, level)
	addControls(mux, n)
	addHealth(mux, n, metrics)
	mux.HandleFunc("GET /v1/pods/{namespace}/{pod}/events", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), patience)
		defer cancel()
		reply, err := n.Events(ctx, r.PathValue("namespace"), r.PathValue("pod"))
		answer(w, reply, err)
	})
	mux.HandleFunc("GET /v1/endpoints", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), patience)
		defer cancel()
		reply, err := n.Endpoints(ctx)
		answer(w, reply, err)
	})
	mux.HandleFunc("GET /v1/source", func(w http.ResponseWriter, _ *http.Request) { answer(w, n.Source(), nil) })
	return mux
}

// addDebugging adds the profiles of net/http/pprof, which must not take longer than the server's WriteTimeout, and the log level.
func addDebugging(mux *http.ServeMux, level *slog.LevelVar) {
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	if level == nil {
		return
	}
	mux.HandleFunc("PUT /v1/log-level", func(w http.ResponseWriter, r *http.Request) {
		var wanted LogLevel
		if err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody)).Decode(&wanted); err != nil {
			answer(w, nil, fmt.Errorf("%w: level: %w", errMalformed, err))
			return
		}
		level.Set(wanted.Level)
		answer(w, wanted, nil)
	})
}

func addControls(mux *http.ServeMux, n Node) {
	mux.HandleFunc("POST /v1/invalidate", func(w http.ResponseWriter, r *http.Request) {
		request, err := decode(http.MaxBytesReader(w, r.Body, maxBody))
		if err != nil {
			answer(w, nil, err)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), patience)
		defer cancel()
		reply, err := n.Invalidate(ctx, request)
		answer(w, reply, err)
	})
}

func addHealth(mux *http.ServeMux, n Node, metrics http.Handler) {
	mux.Handle("GET /metrics", oneAtATime(metrics))
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), patience)
		defer cancel()
		report(w, nil, n.Alive(ctx))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), patience)
		defer cancel()
		missing, err := n.Unready(ctx)
		report(w, missing, err)
	})
}

// report replies in plain text, with a line per problem.
func report(w http.ResponseWriter, missing []string, err error) {
	if err != nil {
		missing = append(missing, err.Error())
	}
	if len(missing) == 0 {
		missing = []string{"ok"}
	} else {
		w.WriteHeader(http.StatusServiceUnavailable)
	}
	_, _ = io.WriteString(w, strings.Join(missing, "\n")+"\n")
}

// errMalformed is wrapped by errors about the request itself.
var errMalformed = errors.New("malformed request")

func decode(body io.Reader) (InvalidateRequest, error) {
	var in struct {
		Namespace *string `json:"namespace"`
		Pod       *string `json:"pod"`
		Port      *int64  `json:"port"`
		Path      *string `json:"path"`
	}
	d := json.NewDecoder(body)
	d.DisallowUnknownFields()
	err := d.Decode(&in)
	var mismatch *json.UnmarshalTypeError
	var tooLarge *http.MaxBytesError
	switch {
	case errors.As(err, &mismatch) && mismatch.Field != "":
		return InvalidateRequest{}, malformed("%s: %s: must be of type %s", mismatch.Field, mismatch.Value, jsonType(mismatch))
	case errors.As(err, &tooLarge):
		return InvalidateRequest{}, malformed("a body of more than %d bytes", tooLarge.Limit)
	case err != nil:
		return InvalidateRequest{}, malformed("%s", strings.TrimPrefix(err.Error(), "json: "))
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return InvalidateRequest{}, malformed("more than one JSON value")
	}
	r := InvalidateRequest{}
	switch {
	case in.Namespace == nil || *in.Namespace == "":
		return r, malformed("namespace: must be set")
	case in.Pod == nil || *in.Pod == "":
		return r, malformed("pod: must be set")
	case in.Port != nil && (*in.Port < 1 || *in.Port > 65535):
		return r, malformed("port: %d: must be between 1 and 65535", *in.Port)
	case in.Path != nil && !strings.HasPrefix(*in.Path, "/"):
		return r, malformed("path: %q: must begin with /", *in.Path)
	}
	r.Namespace, r.Pod = *in.Namespace, *in.Pod
	if in.Port != nil {
		r.Port = uint16(*in.Port)
	}
	if in.Path != nil {
		r.Path = *in.Path
	}
	return r, nil
}

func jsonType(mismatch *json.UnmarshalTypeError) string {
	if strings.HasSuffix(mismatch.Type.String(), "int64") {
		return "integer"
	}
	return "string"
}

func malformed(format string, a ...any) error {
	return fmt.Errorf("%w: %s", errMalformed, fmt.Sprintf(format, a...))
}

// failure is the body of an error reply.
type failure struct {
	Error string `json:"error"`
}

func answer(w http.ResponseWriter, reply any, err error) {
	status := http.StatusOK
	switch {
	case err == nil:
	case errors.Is(err, errMalformed):
		status = http.StatusBadRequest
	case errors.Is(err, ErrNotFound):
		status = http.StatusNotFound
	case errors.Is(err, context.DeadlineExceeded):
		status = http.StatusServiceUnavailable
	default:
		status = http.StatusInternalServerError
	}
	if err != nil {
		reply = failure{err.Error()}
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(reply)
}
