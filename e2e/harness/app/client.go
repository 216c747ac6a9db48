package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Asked counts what a client sent, and the outcomes.
type Asked struct {
	Requests, Connections int64 // connections are those without a request
	Failed, ByKernel      int64
	Failure               string // the most recent one
}

// client sends the same requests as the kubelet, byte for byte except for the User-Agent, and opens connections like a TCP
// probe. It is not the prober.
type client struct {
	target     string
	stop, done chan struct{}
	once       sync.Once
	asked      Asked // the client's own while it runs
}

// Pause between two requests, and the timeout of one.
const (
	pace     = 20 * time.Millisecond
	patience = 5 * time.Second
)

func startClient(target string) *client {
	c := &client{target: target, stop: make(chan struct{}), done: make(chan struct{})}
	go c.run()
	return c
}

// end stops the client.
func (c *client) end() Asked {
	c.once.Do(func() { close(c.stop) })
	<-c.done
	return c.asked
}

func (c *client) run() {
	defer close(c.done)
	for {
		select {
		case <-c.stop:
			return
		case <-time.After(pace):
		}
		c.asked.Requests++
		c.note(c.request())
		c.asked.Connections++
		c.note(c.connect())
	}
}

func (c *client) note(err error) {
	if err != nil {
		c.asked.Failed++
		c.asked.Failure = err.Error()
	}
}

func (c *client) request() error {
	conn, err := net.DialTimeout("tcp", c.target, patience)
	if err != nil {
		return err
	}
	defer conn.Close() //nolint:errcheck // nothing is lost
	if err := conn.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	_, err = io.WriteString(conn, "GET /healthz HTTP/1.1\r\nHost: "+c.target+"\r\nUser-Agent: client/1.0\r\nAccept: */*\r\nConnection: close\r\n\r\n")
	if err != nil {
		return err
	}
	reply, err := io.ReadAll(conn)
	if err != nil {
		return err
	}
	if bytes.Contains(reply, []byte("\r\nCache-Status: probelet")) {
		c.asked.ByKernel++
	}
	if !bytes.HasPrefix(reply, []byte("HTTP/1.1 200 ")) {
		return fmt.Errorf("reply %q", reply)
	}
	return nil
}

func (c *client) connect() error {
	conn, err := net.DialTimeout("tcp", c.target, patience)
	if err != nil {
		return err
	}
	return conn.Close()
}
