// Command app runs in the pods of the cluster tests: HTTP servers with adjustable health that report who asked them, also in
// an access log; with -ask, a client; and, as "app pause", the sandbox of a pod.
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
	ports := flag.String("listen", "8080", "comma-separated `PORTS` to listen on")
	startup := flag.Duration("startup", 0, "how `long` these ports stay closed after the start")
	ask := flag.String("ask", "", "`ADDRESS` of a server to send requests to")
	flag.Parse()
	time.Sleep(*startup)
	a := &app{listeners: map[string]net.Listener{}}
	if *ask != "" {
		a.client = startClient(*ask)
	}
	a.status.Store(http.StatusOK)
	for port := range strings.SplitSeq(*ports, ",") {
		if err := a.listen(port); err != nil {
			log.Fatal(err)
		}
	}
	pause()
}

// pause waits until it is terminated and reaps orphans, as the sandbox process must.
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

// Seen counts what reached the program: requests of the prober, other requests, and connections that ended without a request.
type Seen struct {
	Probes, Others, Empty int64
}

type app struct {
	status                atomic.Int64
	hang                  atomic.Int64 // deadline in Unix nanoseconds
	probes, others, empty atomic.Int64
	silent                sync.Map // connections without a request so far
	client                *client  // nil without -ask

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
	server := &http.Server{Handler: a.handler(port), ReadHeaderTimeout: time.Minute, ConnState: func(c net.Conn, s http.ConnState) {
		a.watch(port, c, s)
	}}
	go func() { _ = server.Serve(listener) }()
	return nil
}

// watch counts and logs connections that end without a request.
func (a *app) watch(port string, c net.Conn, s http.ConnState) {
	switch s {
	case http.StateNew:
		a.silent.Store(c, true)
	case http.StateActive:
		a.silent.Delete(c)
	case http.StateClosed:
		if _, silent := a.silent.LoadAndDelete(c); silent {
			a.empty.Add(1)
			fmt.Println(port, "no request")
		}
	}
}

func (a *app) handler(port string) http.Handler {
	mux := http.NewServeMux()
	healthy := func(w http.ResponseWriter, r *http.Request) {
		fmt.Println(port, r.Method, r.RequestURI, r.UserAgent())
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
		_ = json.NewEncoder(w).Encode(Seen{a.probes.Load(), a.others.Load(), a.empty.Load()})
	})
	mux.HandleFunc("/set", a.set)
	mux.HandleFunc("/asked", func(w http.ResponseWriter, _ *http.Request) {
		_ = json.NewEncoder(w).Encode(a.client.end())
	})
	return mux
}

// set changes the program's behaviour: ?status=500, ?hang=10s, ?close=PORT, ?open=PORT, ?exit=1.
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
