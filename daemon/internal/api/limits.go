package api

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"slices"
	"sync"
)

// maxConnections is how many connections a server has. Its clients are Prometheus, the kubelet and a few people.
const maxConnections = 64

// connections keeps a server to maxConnections. A new one takes the place of the oldest that has not sent its request, or of the
// oldest of all: to let new ones wait would let any process of the node keep the kubelet from asking whether the daemon is well.
type connections struct {
	mutex sync.Mutex
	all   []*connection // oldest first
}

type connection struct {
	net.Conn
	answered bool // at this moment
}

type connectionKey struct{}

// limit keeps a server to its connections.
func limit(server *http.Server) {
	c := &connections{}
	server.ConnContext = c.begun
	server.ConnState = func(conn net.Conn, state http.ConnState) {
		if state == http.StateClosed || state == http.StateHijacked {
			c.ended(conn)
		}
	}
	handler := server.Handler
	server.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		conn := r.Context().Value(connectionKey{}).(*connection)
		c.answer(conn, true)
		defer c.answer(conn, false)
		handler.ServeHTTP(w, r)
	})
}

// begun is http.Server.ConnContext.
func (c *connections) begun(ctx context.Context, conn net.Conn) context.Context {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if len(c.all) == maxConnections {
		i := max(0, slices.IndexFunc(c.all, func(one *connection) bool { return !one.answered }))
		closeNow(c.all[i].Conn)
		c.all = slices.Delete(c.all, i, i+1)
	}
	one := &connection{Conn: conn}
	c.all = append(c.all, one)
	return context.WithValue(ctx, connectionKey{}, one)
}

// closeNow does not wait for the client, as the end of TLS may.
func closeNow(conn net.Conn) {
	if encrypted, ok := conn.(*tls.Conn); ok {
		conn = encrypted.NetConn()
	}
	_ = conn.Close()
}

func (c *connections) ended(conn net.Conn) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.all = slices.DeleteFunc(c.all, func(one *connection) bool { return one.Conn == conn })
}

func (c *connections) answer(conn *connection, now bool) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	conn.answered = now
}

// oneAtATime has requests wait for each other, for as long as the daemon may take to answer. What is written meanwhile is kept until
// it is whole, so that nobody waits for a client that does not read.
func oneAtATime(handler http.Handler) http.Handler {
	free := make(chan struct{}, 1)
	return http.TimeoutHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
			return
		case free <- struct{}{}:
		}
		defer func() { <-free }()
		handler.ServeHTTP(w, r)
	}), patience, "the daemon is busy\n")
}
