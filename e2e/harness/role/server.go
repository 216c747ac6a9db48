package role

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/probelet/probelet/e2e/harness/replies"
)

const serverRole = "server"

// Server is a program in a pod: an HTTP server on any number of ports.
type Server struct{ *Process }

// StartServer starts a server in a network namespace. It does not listen on any port yet.
func StartServer(netns string) (*Server, error) {
	p, err := Start(serverRole, netns, "", nil)
	if err != nil {
		return nil, err
	}
	return &Server{p}, nil
}

// Seen counts what reached a port of the server.
type Seen struct {
	Connections int // accepted
	Requests    int // HTTP requests
}

// Listen makes the server listen on all addresses of its pod.
func (s *Server) Listen(ports ...int) error { return s.Call("Listen", ports, &struct{}{}) }

// ListenTLS makes the server speak HTTP over TLS on a port, with a self-signed certificate.
func (s *Server) ListenTLS(port int) error { return s.Call("ListenTLS", port, &struct{}{}) }

// ListenReplies makes the server on a port reply to GET /SEED with replies.Generate(SEED).
func (s *Server) ListenReplies(port int) error { return s.Call("ListenReplies", port, &struct{}{}) }

// Close makes the server stop listening on a port. Existing connections stay open.
func (s *Server) Close(port int) error { return s.Call("Close", port, &struct{}{}) }

// Seen returns what has reached a port so far.
func (s *Server) Seen(port int) (seen Seen, err error) {
	return seen, s.Call("Seen", port, &seen)
}

// SetStatus makes the server answer /healthz with this status on all ports.
func (s *Server) SetStatus(status int) error {
	return s.Call("SetStatus", status, &struct{}{})
}

// OnlyHeader is a header that OnlyPath requires.
const OnlyHeader = "X-Auth"

// OnlyPath answers only requests with these values of Host and OnlyHeader that were sent to one of the pod's addresses; other
// requests get 403.
func OnlyPath(host, header, address string) string {
	return "/only?" + url.Values{"host": {host}, "header": {header}, "address": {address}}.Encode()
}

// server is the service that runs in the pod.
type server struct {
	mu     sync.Mutex
	ports  map[int]*port
	status atomic.Int32
}

type port struct {
	listener              net.Listener
	connections, requests atomic.Int64
}

// Accept counts connections. It makes *port a net.Listener.
func (p *port) Accept() (net.Conn, error) {
	conn, err := p.listener.Accept()
	if err == nil {
		p.connections.Add(1)
	}
	return conn, err
}

func (p *port) Close() error   { return p.listener.Close() }
func (p *port) Addr() net.Addr { return p.listener.Addr() }

func (s *server) Listen(ports []int, _ *struct{}) error {
	for _, number := range ports {
		if err := s.listen(number, nil); err != nil {
			return err
		}
	}
	return nil
}

func (s *server) ListenTLS(number int, _ *struct{}) error {
	certificate, err := selfSigned()
	if err != nil {
		return err
	}
	return s.listen(number, &tls.Config{Certificates: []tls.Certificate{certificate}})
}

func (s *server) listen(number int, config *tls.Config) error {
	listener, err := net.Listen("tcp", ":"+strconv.Itoa(number))
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ports == nil {
		s.ports = map[int]*port{}
	}
	p := s.ports[number]
	if p == nil {
		p = &port{}
		s.ports[number] = p
	}
	p.listener = listener
	web := &http.Server{Handler: s.handler(p), ReadHeaderTimeout: time.Minute, TLSConfig: config}
	go func() {
		if config != nil {
			_ = web.ServeTLS(p, "", "")
		} else {
			_ = web.Serve(p)
		}
	}()
	return nil
}

// handler handles the requests of the pod's server. Its responses have no Date header, so that equal requests get equal
// responses.
func (s *server) handler(p *port) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/healthz", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(max(int(s.status.Load()), http.StatusOK))
		_, _ = io.WriteString(w, "healthy\n")
	})
	mux.HandleFunc("/only", func(w http.ResponseWriter, r *http.Request) {
		local, _, _ := net.SplitHostPort(r.Context().Value(http.LocalAddrContextKey).(net.Addr).String())
		if r.URL.RequestURI() != OnlyPath(r.Host, r.Header.Get(OnlyHeader), local) {
			w.WriteHeader(http.StatusForbidden)
		}
	})
	mux.HandleFunc("/echo", func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler)
		}
		_, _ = w.Write(body)
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p.requests.Add(1)
		w.Header()["Date"] = nil
		mux.ServeHTTP(w, r)
	})
}

func (s *server) port(number int) (*port, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p := s.ports[number]; p != nil {
		return p, nil
	}
	return nil, fmt.Errorf("not listening on port %d", number)
}

func (*server) ListenReplies(port int, _ *struct{}) error {
	listener, err := net.Listen("tcp", ":"+strconv.Itoa(port))
	if err != nil {
		return err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			go reply(conn.(*net.TCPConn))
		}
	}()
	return nil
}

func reply(conn *net.TCPConn) {
	request, err := replies.ReadRequest(conn)
	var seed uint64
	if err == nil {
		_, err = fmt.Sscanf(string(request), "GET /%d ", &seed)
	}
	if err != nil {
		_ = conn.Close()
		return
	}
	replies.Generate(seed).Serve(conn)
}

func (s *server) Close(number int, _ *struct{}) error {
	p, err := s.port(number)
	if err != nil {
		return err
	}
	return p.Close()
}

func (s *server) Seen(number int, seen *Seen) error {
	p, err := s.port(number)
	if err != nil {
		return err
	}
	*seen = Seen{int(p.connections.Load()), int(p.requests.Load())}
	return nil
}

func (s *server) SetStatus(status int, _ *struct{}) error {
	if status < 200 || status > 599 {
		return errors.New("not a final status")
	}
	s.status.Store(int32(status))
	return nil
}

func selfSigned() (tls.Certificate, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return tls.Certificate{}, err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, err
}
