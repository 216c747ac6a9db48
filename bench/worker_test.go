package bench

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containernetworking/plugins/pkg/ns"
	"golang.org/x/sys/unix"
	v1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/kubernetes/pkg/probe"
	httpprobe "k8s.io/kubernetes/pkg/probe/http"
	tcpprobe "k8s.io/kubernetes/pkg/probe/tcp"

	"github.com/probelet/probelet/e2e/harness/role"
)

// worker is a separate process in a network namespace and a cgroup: a pod's server, a prober, or a client that loads a pod.
type worker struct{ *role.Process }

const workerRole = "worker"

// startWorker starts a worker in a network namespace and one of the machine's cgroups.
func startWorker(t testing.TB, n ns.NetNS, cgroup string) *worker {
	t.Helper()
	p, err := role.Start(workerRole, n.Path(), machine.CgroupPath(cgroup), nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return &worker{p}
}

// Server is a server to start. It and the types below are exported for net/rpc.
type Server struct {
	Protocol string // http, canned or bulk
	Address  string
	Netns    string // path; the worker's if empty
}

func (w *worker) serve(t testing.TB, s Server) {
	t.Helper()
	if err := w.Call("Serve", s, &struct{}{}); err != nil {
		t.Fatal(err)
	}
}

// Load is continuous traffic.
type Load struct {
	Address string
	// Bulk streams as fast as possible. With Download, the pod's server sends; otherwise it receives.
	Bulk, Download bool
	// Path is requested over a number of concurrent connections, which are either kept alive or opened for each request.
	Path        string
	Connections int
	KeepAlive   bool
}

// start begins a load, which stop ends.
func (w *worker) start(t testing.TB, l Load) {
	t.Helper()
	if err := w.Call("Start", l, &struct{}{}); err != nil {
		t.Fatal(err)
	}
}

func (w *worker) stop(t testing.TB) {
	t.Helper()
	if err := w.Call("Stop", struct{}{}, &struct{}{}); err != nil {
		t.Fatal(err)
	}
}

// pin keeps the worker on one CPU, the machine's last. With both ends of a transfer on the same CPU, throughput is the
// inverse of the total cost, and no idle CPU hides any of it. Spread over CPUs, it depends more on which end runs where than
// on anything measured here: between windows of equal variants, it differed by a third.
func (w *worker) pin(t testing.TB) *worker {
	t.Helper()
	if err := w.Call("Pin", runtime.NumCPU()-1, &struct{}{}); err != nil {
		t.Fatal(err)
	}
	return w
}

// rate counts for a while and returns bytes received, or responses read, per second.
func (w *worker) rate(t testing.TB, window time.Duration) float64 {
	t.Helper()
	var rate float64
	if err := w.Call("Rate", window, &rate); err != nil {
		t.Fatal(err)
	}
	if rate == 0 {
		t.Fatal("nothing was received")
	}
	return rate
}

// Plan is a number of requests to time: in each round, Burst requests to each target, with the targets in random order.
type Plan struct {
	Targets       []Target
	Rounds, Burst int
	Limit         time.Duration // for starting rounds; 0 means none
	// Timeout is that of each request. With 0 none may take longer than requestTimeout.
	Timeout time.Duration
}

// Target is the destination and kind of a request.
type Target struct {
	Kind string // http and tcp: Kubernetes' prober; socket: a request on a bare socket; post: one with a body of 300 kB
	Host string
	Port int
	Path string
}

// latencies returns the median time of each round's requests to each target, in µs: a list of rounds per target.
func (w *worker) latencies(t testing.TB, p Plan) [][]float64 {
	t.Helper()
	var took [][]float64
	if err := w.Call("Time", p, &took); err != nil {
		t.Fatal(err)
	}
	return took
}

// working is the service in the worker's process.
type working struct {
	count atomic.Uint64 // bytes received, or responses read

	mu    sync.Mutex
	conns map[net.Conn]bool // of the load; nil without one
	group sync.WaitGroup
	err   error // the first error that ended a part of the load
}

func (w *working) Serve(s Server, _ *struct{}) (err error) {
	var l net.Listener
	listen := func(ns.NetNS) (err error) {
		l, err = net.Listen("tcp", s.Address)
		return err
	}
	if s.Netns == "" {
		err = listen(nil)
	} else {
		err = ns.WithNetNSPath(s.Netns, listen) // a socket stays in the namespace in which it was created
	}
	if err != nil {
		return err
	}
	switch s.Protocol {
	case "http":
		go http.Serve(l, handler()) //nolint:errcheck // until the process ends
	case "canned":
		go accept(l, cannedReply)
	case "bulk":
		go accept(l, func(c net.Conn) { go w.bulk(c) })
	}
	return nil
}

func accept(l net.Listener, serve func(net.Conn)) {
	for {
		conn, err := l.Accept()
		if err != nil {
			panic(err)
		}
		serve(conn)
	}
}

const (
	healthPath, otherPath = "/healthz", "/other"
	bareHost              = "pod" // in requests on a bare socket
	smallPath, largePath  = "/small", "/large"
	largeBytes, postBytes = 100_000, 300_000
)

func handler() http.Handler {
	mux := http.NewServeMux()
	large := make([]byte, largeBytes)
	mux.HandleFunc(healthPath, func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc(smallPath, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "Hello, world!\n") })
	mux.HandleFunc(largePath, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(large) })
	mux.HandleFunc(otherPath, func(w http.ResponseWriter, r *http.Request) {
		n, _ := io.Copy(io.Discard, r.Body)
		_, _ = fmt.Fprintf(w, "%s %d", r.Method, n)
	})
	return mux
}

// cannedReply does the minimum: no goroutine, no parsing.
func cannedReply(conn net.Conn) {
	_, _ = conn.Read(make([]byte, 4096))
	_, _ = io.WriteString(conn, "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
	_ = conn.Close()
}

const (
	pleaseSend    = 's'
	pleaseReceive = 'r'
	bulkBuffer    = 256 << 10
)

// bulk is the server's side of a stream, whose first byte selects the direction.
func (w *working) bulk(conn net.Conn) {
	defer conn.Close() //nolint:errcheck // either side may end it
	wish := make([]byte, 1)
	if _, err := io.ReadFull(conn, wish); err != nil {
		return
	}
	if wish[0] == pleaseSend {
		_ = send(conn)
	} else {
		_ = w.receive(conn)
	}
}

func send(conn net.Conn) error {
	buf := make([]byte, bulkBuffer)
	for {
		if _, err := conn.Write(buf); err != nil {
			return err
		}
	}
}

func (w *working) receive(conn net.Conn) error {
	buf := make([]byte, bulkBuffer)
	for {
		n, err := conn.Read(buf)
		w.count.Add(uint64(n))
		if err != nil {
			return err
		}
	}
}

func (w *working) Start(l Load, _ *struct{}) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conns != nil {
		return errors.New("a load is already running")
	}
	w.conns = map[net.Conn]bool{}
	if l.Bulk {
		w.spawn(func() error { return w.stream(l) })
	}
	for range l.Connections {
		w.spawn(func() error { return w.request(l) })
	}
	return nil
}

func (w *working) spawn(f func() error) {
	w.group.Go(func() {
		err := f()
		w.mu.Lock()
		defer w.mu.Unlock()
		if w.conns != nil && w.err == nil { // unless stopped
			w.err = err
		}
	})
}

func (w *working) Stop(struct{}, *struct{}) error {
	w.mu.Lock()
	for conn := range w.conns {
		_ = conn.Close()
	}
	w.conns = nil
	err := w.err
	w.err = nil
	w.mu.Unlock()
	w.group.Wait()
	return err
}

func (w *working) Pin(cpu int, _ *struct{}) error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return err
	}
	var set unix.CPUSet
	set.Set(cpu)
	for _, thread := range threads { // later threads inherit it
		id, err := strconv.Atoi(thread.Name())
		if err != nil {
			return err
		}
		if err := unix.SchedSetaffinity(id, &set); err != nil {
			return err
		}
	}
	return nil
}

func (w *working) Rate(window time.Duration, rate *float64) error {
	begin, before := time.Now(), w.count.Load()
	time.Sleep(window)
	count, took := w.count.Load()-before, time.Since(begin)
	*rate = float64(count) / took.Seconds()
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

var errStopped = errors.New("stopped")

// dial opens a connection for the load, which stop closes.
func (w *working) dial(address string) (net.Conn, error) {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.conns == nil {
		return nil, errors.Join(errStopped, conn.Close())
	}
	w.conns[conn] = true
	return conn, nil
}

func (w *working) hangUp(conn net.Conn) {
	w.mu.Lock()
	delete(w.conns, conn)
	w.mu.Unlock()
	_ = conn.Close()
}

func (w *working) stream(l Load) error {
	conn, err := w.dial(l.Address)
	if err != nil {
		return err
	}
	defer w.hangUp(conn)
	wish := byte(pleaseReceive)
	if l.Download {
		wish = pleaseSend
	}
	if _, err := conn.Write([]byte{wish}); err != nil {
		return err
	}
	if l.Download {
		return w.receive(conn)
	}
	return send(conn)
}

// request sends requests in a loop, with as little client code as possible.
func (w *working) request(l Load) error {
	connection := "close"
	if l.KeepAlive {
		connection = "keep-alive"
	}
	text := fmt.Sprintf("GET %s HTTP/1.1\r\nHost: pod\r\nConnection: %s\r\n\r\n", l.Path, connection)
	for {
		if err := w.onOneConnection(l, text); err != nil {
			return err
		}
	}
}

func (w *working) onOneConnection(l Load, text string) error {
	conn, err := w.dial(l.Address)
	if err != nil {
		return err
	}
	defer w.hangUp(conn)
	reader := bufio.NewReader(conn)
	for {
		if _, err := io.WriteString(conn, text); err != nil {
			return err
		}
		response, err := http.ReadResponse(reader, nil)
		if err != nil {
			return err
		}
		if _, err := io.Copy(io.Discard, response.Body); err != nil {
			return err
		}
		w.count.Add(1)
		if !l.KeepAlive {
			return nil
		}
	}
}

func (w *working) Time(p Plan, took *[][]float64) error {
	var ask []func() error
	for _, t := range p.Targets {
		ask = append(ask, t.asker(cmp.Or(p.Timeout, requestTimeout)))
	}
	*took = make([][]float64, len(ask))
	begin := time.Now()
	for range p.Rounds {
		if p.Limit > 0 && time.Since(begin) > p.Limit {
			break
		}
		for _, i := range rand.Perm(len(ask)) {
			round := make([]float64, p.Burst)
			for j := range round {
				start := time.Now()
				err, passed := ask[i](), time.Since(start)
				if err != nil && (p.Timeout == 0 || passed < p.Timeout) {
					return fmt.Errorf("%+v: %w", p.Targets[i], err)
				}
				round[j] = float64(passed.Nanoseconds()) / 1000
			}
			(*took)[i] = append((*took)[i], median(round))
		}
	}
	return nil
}

const requestTimeout = 10 * time.Second

// asker prepares a repeated request. Kubernetes' prober is called the way the kubelet does (pkg/kubelet/prober, runProbe).
func (t Target) asker(timeout time.Duration) func() error {
	switch t.Kind {
	case "tcp":
		p := tcpprobe.New()
		return func() error { return success(p.Probe(t.Host, t.Port, timeout)) }
	case "http":
		p := httpprobe.New(false)
		action := &v1.HTTPGetAction{Path: t.Path, Port: intstr.FromInt32(int32(t.Port))}
		return func() error {
			request, err := httpprobe.NewRequestForHTTPGetAction(action, nil, t.Host, "probe")
			if err != nil {
				return err
			}
			return success(p.Probe(request, timeout))
		}
	case "post":
		body := strings.Repeat("x", postBytes)
		return t.exchange(timeout, fmt.Sprintf("POST %s HTTP/1.1\r\nHost: pod\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", t.Path, len(body), body))
	}
	return t.exchange(timeout, proberRequest(bareHost, t.Path))
}

// proberRequest returns the request that Kubernetes' prober sends (pkg/probe/http).
func proberRequest(host, path string) string {
	return fmt.Sprintf("GET %s HTTP/1.1\r\nHost: %s\r\nUser-Agent: kube-probe/1.37\r\nAccept: */*\r\nConnection: close\r\n\r\n", path, host)
}

func success(result probe.Result, message string, err error) error {
	if err == nil && result != probe.Success {
		err = fmt.Errorf("%s: %s", result, message)
	}
	return err
}

// exchange sends a request on a socket and reads the response to the end.
func (t Target) exchange(timeout time.Duration, text string) func() error {
	address := net.JoinHostPort(t.Host, strconv.Itoa(t.Port))
	return func() error {
		conn, err := net.Dial("tcp", address)
		if err != nil {
			return err
		}
		defer conn.Close() //nolint:errcheck // read to its end
		if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
			return err
		}
		if _, err := io.WriteString(conn, text); err != nil {
			return err
		}
		reply, err := io.ReadAll(conn)
		if err == nil && !strings.HasPrefix(string(reply), "HTTP/1.1 200 ") {
			err = fmt.Errorf("reply %q", reply)
		}
		return err
	}
}

// Visits are requests to each address at an interval, for which connections are kept alive.
type Visits struct {
	Addresses []string
	Path      string
	Every     time.Duration
}

// Visit starts visits that continue until the process ends. Errors are ignored.
func (w *working) Visit(v Visits, _ *struct{}) error {
	client := &http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{MaxIdleConnsPerHost: 1}}
	for _, address := range v.Addresses {
		go func() {
			time.Sleep(time.Duration(rand.Int64N(int64(v.Every))))
			for {
				response, err := client.Get("http://" + address + v.Path)
				if err == nil {
					_, _ = io.Copy(io.Discard, response.Body)
					_ = response.Body.Close()
				}
				time.Sleep(v.Every)
			}
		}()
	}
	return nil
}
