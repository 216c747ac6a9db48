package api

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/probelet/probelet/internal/polltest"
)

// well is a healthy Node.
type well struct{ Node }

func (well) Alive(context.Context) error               { return nil }
func (well) Unready(context.Context) ([]string, error) { return nil, nil }

// serve serves Health on loopback.
func serve(t *testing.T, metrics http.HandlerFunc) (address string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, Health(well{}, metrics), slog.New(slog.DiscardHandler)) }()
	t.Cleanup(func() {
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

func dial(t *testing.T, address, text string) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_, _ = io.WriteString(conn, text) // fails if it was evicted already
	return conn
}

func get(t *testing.T, url string) (status int, text string) {
	t.Helper()
	client := &http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Get(url)
	if err != nil {
		t.Error(err)
		return 0, ""
	}
	defer response.Body.Close() //nolint:errcheck // read only
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Error(err)
	}
	return response.StatusCode, string(body)
}

// However many requests clients leave unfinished, the server keeps to its limit and answers complete ones.
func TestUnfinishedRequests(t *testing.T) {
	address := serve(t, func(http.ResponseWriter, *http.Request) {})
	for name, text := range map[string]string{
		"nothing":        "",
		"a line":         "GET /healthz HTTP/1.1\r\n",
		"half a header":  "GET /healthz HTTP/1.1\r\nHost: x\r\nX: " + strings.Repeat("a", maxHeader/2),
		"a body":         "GET /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n",
		"idle":           "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n",
		"no end of it":   "GET /metrics HTTP/1.1\r\nHost: x\r\n" + strings.Repeat("X: y\r\n", 100),
		"several, piped": strings.Repeat("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 10),
	} {
		t.Run(name, func(t *testing.T) {
			var open atomic.Int32
			var all sync.WaitGroup
			for range 4 * maxConnections {
				conn := dial(t, address, text)
				open.Add(1)
				all.Go(func() {
					_, _ = io.Copy(io.Discard, conn)
					open.Add(-1)
				})
			}
			if !polltest.Within(patience/2, func() bool { return open.Load() <= maxConnections }) {
				t.Fatalf("%d connections are open", open.Load())
			}
			if status, text := get(t, "http://"+address+"/healthz"); status != http.StatusOK || text != "ok\n" {
				t.Errorf("%d %s", status, text)
			}
		})
	}
}

func TestLongHeaders(t *testing.T) {
	address := serve(t, func(http.ResponseWriter, *http.Request) {})
	conn := dial(t, address, "GET /healthz HTTP/1.1\r\nHost: x\r\nX: "+strings.Repeat("a", maxHeader+8<<10)+"\r\n\r\n")
	text, _ := io.ReadAll(conn)
	if !bytes.HasPrefix(text, []byte("HTTP/1.1 431 ")) {
		t.Errorf("%.100q", text)
	}
}

// A scrape in progress keeps its connection while others come and go.
func TestConnectionBeingAnsweredIsNotEvicted(t *testing.T) {
	begun, end := make(chan struct{}), make(chan struct{})
	address := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		close(begun)
		<-end
		_, _ = io.WriteString(w, "all of it")
	})
	scraped := make(chan string)
	go func() {
		_, text := get(t, "http://"+address+"/metrics")
		scraped <- text
	}()
	<-begun
	for range 2 * maxConnections {
		dial(t, address, "GET ")
	}
	if status, _ := get(t, "http://"+address+"/healthz"); status != http.StatusOK { // so all those were accepted
		t.Errorf("%d", status)
	}
	close(end)
	if text := <-scraped; text != "all of it" {
		t.Errorf("%q", text)
	}
}

// Metrics are gathered for one scrape at a time, and no scrape waits for a client that does not read.
func TestScrapesAreSerialized(t *testing.T) {
	var gathering atomic.Int32
	large := bytes.Repeat([]byte("metric 1\n"), 1<<20)
	address := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if gathering.Add(1) != 1 {
			t.Error("two at once")
		}
		if r.URL.RawQuery != "" {
			_, _ = w.Write(large)
		}
		gathering.Add(-1)
	})
	for range 4 {
		dial(t, address, "GET /metrics?large HTTP/1.1\r\nHost: x\r\n\r\n") // and reads nothing
	}
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			if status, _ := get(t, "http://"+address+"/metrics"); status != http.StatusOK {
				t.Errorf("%d", status)
			}
		})
	}
	all.Wait()
}
