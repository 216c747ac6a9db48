// Command app is what runs in the pods of the cluster's tests: HTTP servers whose health can be set and that tell who
// asked them, and, as "app pause", the sandbox of a pod.
package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"os/signal"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "pause" {
		pause()
		return
	}
	ports := flag.String("listen", "8080", "`PORTS` to listen on, with commas between")
	startup := flag.Duration("startup", 0, "how `long` the first ports stay closed")
	flag.Parse()
	time.Sleep(*startup)
	a := &app{listeners: map[string]net.Listener{}}
	a.status.Store(http.StatusOK)
	for port := range strings.SplitSeq(*ports, ",") {
		if err := a.listen(port); err != nil {
			log.Fatal(err)
		}
	}
	pause()
}

// pause waits for the end, and takes over and forgets orphans, as a sandbox does.
func pause() {
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGCHLD)
	for s := range signals {
		if s != syscall.SIGCHLD {
			return
		}
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

// Seen is what has reached the program, of the prober and of others. Connections are those without a request, too.
type Seen struct {
	Connections, Probes, Others int64
}

type app struct {
	status                      atomic.Int64
	hang                        atomic.Int64 // until then, in Unix nanoseconds
	connections, probes, others atomic.Int64

	mu        sync.Mutex
	listeners map[string]net.Listener
}

func (a *app) listen(port string) error {
	listener, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	a.mu.Lock()
	a.listeners[port] = listener
	a.mu.Unlock()
	server := &http.Server{Handler: a.handler(), ReadHeaderTimeout: time.Minute, ConnState: func(_ net.Conn, s http.ConnState) {
		if s == http.StateNew {
			a.connections.Add(1)
		}
	}}
	go func() { _ = server.Serve(listener) }()
	return nil
}

func (a *app) handler() http.Handler {
	mux := http.NewServeMux()
	healthy := func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.UserAgent(), "kube-probe/") {
			a.probes.Add(1)
		} else {
			a.others.Add(1)
		}
		time.Sleep(time.Until(time.Unix(0, a.hang.Load())))
		w.WriteHeader(int(a.status.Load()))
		_, _ = io.WriteString(w, "healthy, says the program\n")
	}
	mux.HandleFunc("/", healthy)
	mux.HandleFunc("/seen", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(Seen{a.connections.Load(), a.probes.Load(), a.others.Load()})
	})
	mux.HandleFunc("/set", a.set)
	return mux
}

// set changes what the program does: ?status=500, ?hang=10s, ?close=PORT, ?open=PORT, ?exit=1.
func (a *app) set(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	var err error
	if v := query.Get("status"); v != "" {
		var status int64
		_, err = fmt.Sscan(v, &status)
		a.status.Store(status)
	}
	if v := query.Get("hang"); v != "" && err == nil {
		var d time.Duration
		d, err = time.ParseDuration(v)
		a.hang.Store(time.Now().Add(d).UnixNano())
	}
	if port := query.Get("close"); port != "" && err == nil {
		a.mu.Lock()
		if l := a.listeners[port]; l != nil {
			err = l.Close()
		}
		a.mu.Unlock()
	}
	if port := query.Get("open"); port != "" && err == nil {
		err = a.listen(port)
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if query.Get("exit") != "" {
		os.Exit(1)
	}
}
