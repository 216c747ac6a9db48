// Package replies makes up what servers may reply to a probe: valid responses, and responses that are wrong in their status
// line, headers, lengths, chunks, end or timing.
package replies

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// End is what the server does after its last byte.
type End string

// Ends.
const (
	Close     End = "close"
	HalfClose End = "half-close" // and leave the rest to the client
	Hold      End = "hold"       // leave all to the client
	Reset     End = "reset"
)

// Reply is what a server does on one connection.
type Reply struct {
	Parts []Part
	End   End
	// Early: without waiting for the request.
	Early bool
}

// Part is written at once, after a pause.
type Part struct {
	Pause time.Duration
	Text  []byte
}

// Racy reports whether a client's verdict is a matter of luck: whether it has read what came before a reset, or sent its
// request before it was answered.
func (r Reply) Racy() bool { return r.Early || r.End == Reset }

// Text is all that is sent.
func (r Reply) Text() []byte {
	var text []byte
	for _, p := range r.Parts {
		text = append(text, p.Text...)
	}
	return text
}

func (r Reply) String() string {
	var all []string
	for _, p := range r.Parts {
		all = append(all, fmt.Sprintf("(%s)%s", p.Pause, shorten(p.Text)))
	}
	return fmt.Sprintf("early: %t, %s, %s", r.Early, strings.Join(all, " "), r.End)
}

func shorten(text []byte) string {
	const most = 300
	if len(text) <= most {
		return fmt.Sprintf("%q", text)
	}
	return fmt.Sprintf("%q…(%d bytes)…%q", text[:most/2], len(text)-most, text[len(text)-most/2:])
}

// ReadRequest reads a request without a body, up to its end.
func ReadRequest(conn net.Conn) ([]byte, error) {
	var text []byte
	buffer := make([]byte, 4096)
	for !bytes.Contains(text, []byte("\r\n\r\n")) {
		n, err := conn.Read(buffer)
		if err != nil {
			return nil, err
		}
		text = append(text, buffer[:n]...)
	}
	return text, nil
}

// Serve replies on a connection whose request was read, unless the reply is early. It returns when the connection is closed.
func (r Reply) Serve(conn *net.TCPConn) {
	defer conn.Close() //nolint:errcheck // of no interest
	for _, p := range r.Parts {
		time.Sleep(p.Pause)
		if _, err := conn.Write(p.Text); err != nil {
			return
		}
	}
	switch r.End {
	case Reset:
		_ = conn.SetLinger(0)
	case HalfClose:
		_ = conn.CloseWrite()
		_, _ = io.Copy(io.Discard, conn)
	case Hold:
		_, _ = io.Copy(io.Discard, conn)
	}
}
