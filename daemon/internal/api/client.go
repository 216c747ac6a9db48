package api

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"syscall"

	"github.com/probelet/probelet/daemon/internal/statedir"
)

// Client sends requests to the daemon of a state directory.
type Client struct{ http http.Client }

// NewClient returns a client. It does not connect until the first request.
func NewClient(stateDir string) *Client {
	c := &Client{}
	c.http.Timeout = 2 * patience
	c.http.Transport = &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", statedir.SocketPath(stateDir))
		},
		DisableKeepAlives: true,
	}
	return c
}

// ErrDown is returned if no daemon is listening.
var ErrDown = errors.New("probeletd is not running")

// Invalidate sends POST /v1/invalidate.
func (c *Client) Invalidate(ctx context.Context, r InvalidateRequest) (reply InvalidateReply, err error) {
	return reply, c.do(ctx, http.MethodPost, "/v1/invalidate", r, &reply)
}

// Events sends GET /v1/pods/{namespace}/{pod}/events.
func (c *Client) Events(ctx context.Context, namespace, pod string) (reply EventsReply, err error) {
	path := "/v1/pods/" + url.PathEscape(namespace) + "/" + url.PathEscape(pod) + "/events"
	return reply, c.do(ctx, http.MethodGet, path, nil, &reply)
}

// Endpoints sends GET /v1/endpoints.
func (c *Client) Endpoints(ctx context.Context) (reply EndpointsReply, err error) {
	return reply, c.do(ctx, http.MethodGet, "/v1/endpoints", nil, &reply)
}

// Source sends GET /v1/source.
func (c *Client) Source(ctx context.Context) (reply SourceReply, err error) {
	return reply, c.do(ctx, http.MethodGet, "/v1/source", nil, &reply)
}

// SetLogLevel sends PUT /v1/log-level.
func (c *Client) SetLogLevel(ctx context.Context, level slog.Level) error {
	var reply LogLevel
	return c.do(ctx, http.MethodPut, "/v1/log-level", LogLevel{level}, &reply)
}

// Ready sends GET /readyz. It returns what the daemon lacks, and nothing if it is ready.
func (c *Client) Ready(ctx context.Context) (missing []string, err error) {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://probeletd/readyz", nil)
	if err != nil {
		return nil, err
	}
	status, text, err := c.send(request)
	if err != nil || status == http.StatusOK {
		return nil, err
	}
	return strings.Split(strings.TrimSpace(string(text)), "\n"), nil
}

// send returns ErrDown if nothing is listening.
func (c *Client) send(request *http.Request) (status int, text []byte, err error) {
	response, err := c.http.Do(request)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return 0, nil, ErrDown
	}
	if err != nil {
		return 0, nil, err
	}
	defer response.Body.Close() //nolint:errcheck // read only
	text, err = io.ReadAll(response.Body)
	return response.StatusCode, text, err
}

func (c *Client) do(ctx context.Context, method, path string, body, reply any) error {
	text, err := json.Marshal(body)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://probeletd"+path, bytes.NewReader(text))
	if err != nil {
		return err
	}
	status, text, err := c.send(request)
	if err != nil {
		return err
	}
	if status == http.StatusOK {
		return json.Unmarshal(text, reply)
	}
	var f failure
	if json.Unmarshal(text, &f) != nil || f.Error == "" {
		return fmt.Errorf("probeletd: status %d: %s", status, text)
	}
	if status == http.StatusNotFound {
		return NotFound("%s", f.Error)
	}
	return errors.New(f.Error)
}
