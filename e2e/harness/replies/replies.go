// Package replies makes up replies of a server to a probe: valid responses, and responses with a wrong status line, header,
// length, chunk, ending or timing.
package replies

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"strings"
	"time"
)

// End says what the server does after its last byte.
type End string

// The ways in which a server can end a connection.
const (
	Close     End = "close"
	HalfClose End = "half-close" // wait for the client to close
	Hold      End = "hold"       // leave closing to the client
	Reset     End = "reset"
)

// Reply describes what a server does on one connection.
type Reply struct {
	Parts []Part
	End   End
	// Early replies do not wait for the request.
	Early bool
}

// Part is written in one go, after a pause.
type Part struct {
	Pause time.Duration
	Text  []byte
}

// Racy reports whether the client's verdict depends on timing: whether it read everything before a reset, or sent its request
// before the answer arrived.
func (r Reply) Racy() bool { return r.Early || r.End == Reset }

// Text returns everything that is sent.
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

// ReadRequest reads a request that has no body.
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

// Serve replies on a connection whose request has been read, unless the reply is early. It returns once the connection is
// closed.
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
