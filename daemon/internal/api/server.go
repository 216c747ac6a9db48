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
	// maxBody is more than any request needs.
	maxBody = 64 << 10
	// maxHeader is more than a request's line and headers need; net/http adds 4 KiB to it.
	maxHeader = 8 << 10
	// patience is how long the daemon may take to answer: it decides one thing after the other.
	patience = 5 * time.Second
)

// Listen listens on the socket of a state directory, in place of one that a daemon before left: the caller has the state
// directory to itself. Only the owner may connect, from the first moment on.
func Listen(stateDir string) (net.Listener, error) {
	return listen(stateDir, statedir.SocketPath(stateDir), 0o600)
}

// ListenMetrics listens, likewise, on a socket for what monitoring asks. Whoever sees it may connect: it is in a directory of its own,
// for pods that see nothing else.
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
	defer os.RemoveAll(private) //nolint:errcheck // of no harm
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

// TLSConfig demands client certificates of an authority. Files are read for each connection, as all are renewed.
func TLSConfig(certFile, keyFile, clientCAFile string) (*tls.Config, error) {
	load := func() (*tls.Config, error) {
		certificate, err := tls.LoadX509KeyPair(certFile, keyFile)
		if err != nil {
			return nil, fmt.Errorf("certificate %s, key %s: %w", certFile, keyFile, err)
		}
		authority, err := os.ReadFile(clientCAFile)
		if err != nil {
			return nil, fmt.Errorf("client authority: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(authority) {
			return nil, fmt.Errorf("client authority %s: no certificate in it", clientCAFile)
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

// Serve answers on a listener until ctx ends. The error is one of the listener's. What clients can make it hold is bounded, by the
// number of connections and by what is read of each; see connections.
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

// Controls is what programs may ask of the daemon: POST /v1/invalidate.
func Controls(n Node) http.Handler {
	mux := http.NewServeMux()
	addControls(mux, n)
	return mux
}

// Health is what monitoring asks: GET /metrics, /healthz and /readyz.
func Health(n Node, metrics http.Handler) http.Handler {
	mux := http.NewServeMux()
	addHealth(mux, n, metrics)
	return mux
}

// Local is all of it, and what probeletctl asks besides.
// level, if not nil, is that of the daemon's log.
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

// addDebugging adds profiles (as net/http/pprof has them; none may take longer than the server's WriteTimeout) and the log's level.
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
		tell(w, nil, n.Alive(ctx))
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), patience)
		defer cancel()
		missing, err := n.Unready(ctx)
		tell(w, missing, err)
	})
}

// tell answers in plain text, a line for each thing that is not well.
func tell(w http.ResponseWriter, missing []string, err error) {
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

// errMalformed: the request is not understood.
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

// failure is the body of an answer that is none.
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
