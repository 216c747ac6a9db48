package api

import (
	"context"
	"crypto/tls"
	"net"
	"net/http"
	"slices"
	"sync"
)

// maxConnections is the maximum number of connections of a server. Its clients are Prometheus, the kubelet and a few people.
const maxConnections = 64

// connections limits a server to maxConnections. A new connection evicts the oldest one whose request is not being answered, or else the
// oldest of all. If new connections had to wait instead, any process on the node could keep the kubelet from checking the daemon.
type connections struct {
	mutex sync.Mutex
	all   []*connection // oldest first
}

type connection struct {
	net.Conn
	answered bool // a request on it is being answered
}

type connectionKey struct{}

// limit limits the connections of a server.
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

// begun is the server's ConnContext hook.
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

// closeNow closes a connection without waiting for the client, as closing a TLS connection may.
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

// oneAtATime serializes requests. A request waits for as long as the daemon may take to reply. Replies are buffered, so that no request
// waits for a client that does not read.
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
